import keras
import numpy as np
import pytest
from keras import layers, ops

import kerascompress as kc
from kerascompress import models


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (layers.Dense(5), (4, 3), 4 * 15),
        (layers.EinsumDense("abc,cd->abd", (4, 5)), (4, 3), 4 * 15),
        (layers.Conv1D(5, 3), (10, 2), 8 * 3 * 2 * 5),
        (layers.Conv2D(6, 3, groups=2), (5, 5, 4), 9 * 9 * 2 * 6),
        (layers.Conv2DTranspose(6, 2, strides=2), (5, 5, 4), 25 * 4 * 4 * 6),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4), 9 * 9 * 4 * 2),
        (layers.SeparableConv2D(6, 3), (5, 5, 4), 9 * (9 * 4 + 4 * 6)),
        (layers.Embedding(10, 4), (3,), 0),
        (layers.LSTM(4), (3, 2), None),
    ],
    ids=lambda each: type(each).__name__,
)
def test_multiplications_are_counted_by_hand(layer, shape, macs):
    assert kc.summary(keras.Sequential([keras.Input(shape), layer])).macs == macs


def test_resnet20_has_the_published_multiplications_also_inside_of_a_model_and_pruned():
    net = models.resnet20(10)
    trainer = keras.Sequential([keras.Input((32, 32, 3)), kc.RandomCrop(4), net])
    assert kc.summary(trainer).macs == kc.summary(net).macs == 40_813_184  # 40.8 M
    pruned = kc.prune_low_magnitude(net, kc.ConstantSparsity(0.5, begin_step=0))
    summary = kc.summary(pruned)
    assert (summary.macs, summary.sparsity, summary.parameters) == (40_813_184, 0.0, 272_474 + 2 * 784)  # masks of ones
    summary = kc.summary(kc.prune_now(net, 0.5))
    assert summary.macs == 40_813_184
    assert summary.sparsity == pytest.approx(0.5, abs=1e-3)
    assert summary.parameters == 272_474 + 2 * 784
    assert "40,813,184" in str(summary)


class Block(layers.Layer):
    """A transformer's, on tokens of 8 numbers."""

    def __init__(self):
        super().__init__()
        self.attention, self.hidden, self.back = layers.MultiHeadAttention(2, 4), layers.Dense(16), layers.Dense(8)

    def build(self, shape):
        self.attention.build(shape, shape)
        self.hidden.build(shape)
        self.back.build((*shape[:-1], 16))

    def call(self, tokens):
        return self.back(self.hidden(self.attention(tokens, tokens)))


class Windows(layers.Layer):
    """Takes each row of an image for an image of its own."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def call(self, images):
        rows = ops.reshape(images, (-1, *images.shape[2:]))
        return ops.reshape(self.block(rows), (-1, *images.shape[1:]))


def test_attention_and_other_layers_made_of_layers_are_counted_by_what_they_call():
    query, value = keras.Input((5, 8)), keras.Input((7, 8))
    attention = layers.MultiHeadAttention(2, 4)
    macs = kc.summary(keras.Model([query, value], attention(query, value, use_causal_mask=False))).macs
    assert macs == 5 * (64 + 64) + 7 * (64 + 64)  # of the queries and the output, of the keys and the values
    block = Block()
    model = keras.Model(query, block(block(query)))
    assert kc.summary(model).macs == 2 * 5 * (4 * 64 + 2 * 8 * 16)
    assert kc.summary(kc.prune_low_magnitude(model)).macs == kc.summary(model).macs
    windows = keras.Model(image := keras.Input((4, 6, 8)), Windows(block)(image))
    assert kc.summary(windows).macs == 4 * 6 * (4 * 64 + 2 * 8 * 16)
    steps = keras.Model(query, layers.TimeDistributed(layers.Dense(3))(query))
    assert kc.summary(steps).macs is None


@pytest.mark.parametrize("batch", [None, 2])
def test_frames_and_windows_that_are_images_of_a_batch_are_all_counted(batch):
    video = keras.Input((10, 8, 8, 3), batch_size=batch)
    frames = layers.Conv2D(4, 3)(ops.reshape(video, (-1, 8, 8, 3)))
    frames = ops.reshape(layers.GlobalAveragePooling2D()(frames), (-1, 10, 4))
    model = keras.Model(video, layers.Dense(2)(ops.mean(frames, axis=1)))
    assert kc.summary(model).macs == 10 * 36 * 27 * 4 + 8
    image = keras.Input((4, 5, 8), batch_size=batch)
    rows = Block()(ops.reshape(image, (-1, 5, 8)))
    assert kc.summary(keras.Model(image, ops.reshape(rows, (-1, 4, 5, 8)))).macs == 4 * 5 * (4 * 64 + 2 * 8 * 16)


def test_a_shared_layer_multiplies_in_every_call_and_a_free_size_is_not_known():
    inputs, dense = keras.Input((4,)), layers.Dense(4)
    assert kc.summary(keras.Model(inputs, dense(dense(inputs)))).macs == 32
    assert kc.summary(models.resnet(8, 10, input_shape=(None, None, 3))).macs is None


def test_a_free_size_is_not_known_inside_of_attention_and_an_embedding_that_is_multiplied_with_is_not_free_of_charge():
    words = keras.Input((None, 8))
    model = keras.Model(words, layers.Dense(2)(layers.MultiHeadAttention(2, 4)(words, words)))
    assert kc.summary(model).macs is None
    tokens, embedding = keras.Input((5,), dtype="int32"), layers.ReversibleEmbedding(100, 4)
    assert kc.summary(keras.Model(tokens, embedding(tokens))).macs == 0
    assert kc.summary(keras.Model(tokens, embedding(embedding(tokens), reverse=True))).macs is None


def test_a_call_of_unknown_size_makes_the_multiplications_of_a_layer_unknown():
    free, fixed = keras.Input((None, None, 3)), keras.Input((8, 8, 3))
    convolution = layers.Conv2D(4, 3, padding="same")
    for inputs in ([free, fixed], [fixed, free]):
        assert kc.summary(keras.Model(inputs, [convolution(each) for each in inputs])).macs is None


def test_a_model_of_free_size_multiplies_as_often_as_the_size_that_it_is_given_says():
    inputs = keras.Input((32, 32, 3))
    net = models.resnet(20, 10, input_shape=(None, None, 3))
    assert kc.summary(keras.Model(inputs, net(layers.Identity()(inputs)))).macs == 40_813_184  # 40.8 M


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = kc.prune_low_magnitude(layers.Dense(4, name="hidden"))
        self.logits = layers.Dense(2, name="logits")

    def call(self, x):
        return self.logits(self.hidden(x))


def test_a_subclassed_model_of_wrappers_counts_what_its_forward_pass_multiplies_with():
    model = Subclassed()
    model(np.ones((1, 3)))
    ((_, mask, _),) = model.hidden.pruning_vars
    mask.assign([[True] * 4, [False] * 4, [False] * 4])
    summary = kc.summary(model)
    assert (summary.parameters, summary.nonzeros, summary.macs) == (12 + 4 + 8 + 2, 4 + 8, None)
    assert [kernel["nonzeros"] for kernel in summary.kernels] == [4, 8]
    assert summary.sparsity == pytest.approx(8 / 20)


def test_kernels_have_the_names_that_they_have_without_wrappers():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="inside")], name="inner")
    net = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="logits")])
    pruned = kc.prune_low_magnitude(net)
    summaries = [kc.summary(each) for each in (pruned, kc.strip_pruning(pruned))]
    assert summaries[0] == summaries[1]


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
def test_a_pruned_and_then_quantized_model_is_counted_as_it_was():
    model = kc.prune_now(keras.Sequential([keras.Input((8,)), layers.Dense(16)]), 0.5)
    before = kc.summary(model)
    model.quantize("int8")
    after = kc.summary(model)
    assert (after.macs, after.sparsity) == (before.macs, before.sparsity) == (128, 0.5)


def test_a_model_with_lora_is_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16)])
    model.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match=r"LoRA.*load its saved weights into the model without LoRA"):
        kc.summary(model)


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="Build or call the model first"):
        kc.summary(keras.Sequential([layers.Dense(2)]))
