"""keras-hub's image classifiers, tiny and untrained, through all that kerascompress does to a model."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import kerascompress as kc
from kerascompress import graph
from kerascompress.wrapper import wrappers_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from keras_hub import models as hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:The copy of .* is a plain Functional"),
    pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer"),  # loading such a layer unwrapped
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),  # keras-hub compiles with its own
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),  # by keras-hub's own `fit`
    pytest.mark.filterwarnings("ignore:Global pruning to a sparsity of .* leaves nothing of"),
]
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
SIZE = {"image_shape": (32, 32, 3)}


def mobilenet():
    blocks = {"num_filters": 8, "kernel_size": 3, "num_strides": 2, "se_ratio": 0.25, "padding": 1}
    blocks |= {"expansion": 8, "activation": "hard_swish"}
    return hub.MobileNetBackbone(
        **{f"stackwise_{name}": [[value]] for name, value in blocks.items()},
        stackwise_num_blocks=[1],
        output_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=8,
        input_num_filters=8,
        **SIZE,
    )


def efficientnet():
    blocks = {"kernel_sizes": 3, "num_repeats": 1, "input_filters": 8, "output_filters": 8, "expansion_ratios": 2}
    blocks |= {"squeeze_and_excite_ratios": 0.25, "strides": 2}
    return hub.EfficientNetBackbone(
        **{f"stackwise_{name}": [value] for name, value in blocks.items()},
        stackwise_block_types=["unfused"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        input_shape=SIZE["image_shape"],
    )


FAMILIES = {
    "MiT": lambda: hub.MiTBackbone([1], 1, [2], [2], 0.1, [7], [4], hidden_dims=[8], **SIZE),
    "ViT": lambda: hub.ViTBackbone((32, 32, 3), 8, 1, 2, 8, 16),
    "EfficientNet": efficientnet,
    "ResNetV2": lambda: hub.ResNetBackbone([64], [3], [64], [1], [1], "basic_block", use_pre_activation=True, **SIZE),
    "DenseNet": lambda: hub.DenseNetBackbone([1, 1], compression_ratio=0.5, growth_rate=4, **SIZE),
    "VGG": lambda: hub.VGGBackbone([1, 1], [4, 8], **SIZE),
    "Xception": lambda: hub.XceptionBackbone([[4, 8]], [True], **SIZE),
    "MobileNet": mobilenet,
    "DeiT": lambda: hub.DeiTBackbone((32, 32, 3), 8, 1, 2, 8, 16),
}
# On JAX, where compiling takes most of the time, the one that is hardest to copy.
FAMILIES_HERE = list(FAMILIES) if ON_TENSORFLOW else ["MiT"]


def classifier(family):
    kind = getattr(hub, f"{family.removesuffix('V2')}ImageClassifier")
    return kind(FAMILIES[family](), num_classes=3, **({"pooling_hidden_dim": 8} if family == "VGG" else {}))


@pytest.fixture(params=FAMILIES_HERE, scope="module")
def model(request):
    """One network a family; every test leaves it as it is."""
    model = classifier(request.param)
    weights = model.get_weights()
    yield model
    assert_weights(model, weights)


def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")


def outputs(model):
    return ops.convert_to_numpy(model(images(), training=False))


def assert_weights(model, weights):
    for ours, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(ours, expected)


def fit(model, optimizer="sgd", callbacks=()):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=[], run_eagerly=ON_TENSORFLOW)  # tracing takes longer than a step
    model.fit(images(), np.arange(2), verbose=0, callbacks=list(callbacks))
    return kc.sparsity(model)


def test_wrappers_prune_train_save_load_strip_and_export(model, tmp_path):
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0), scope="global")
    assert fit(pruned, callbacks=[kc.UpdatePruningStep()]) == pytest.approx(0.5, abs=0.001)
    pruned.save(tmp_path / "pruned.keras")
    small = kc.strip_pruning(keras.models.load_model(tmp_path / "pruned.keras"))
    assert not list(wrappers_in(small))
    np.testing.assert_allclose(outputs(small), outputs(pruned), rtol=1e-5, atol=1e-5)
    small.save(tmp_path / "small.keras")
    assert_weights(keras.models.load_model(tmp_path / "small.keras"), small.get_weights())
    if ON_TENSORFLOW:  # converted from what TensorFlow traces; LiteRT has the operations of all these networks
        report = kc.export_litert(pruned, tmp_path / "net.tflite")
    else:
        report = kc.export_saved_model(pruned, tmp_path / "net")
    assert report.sparsity == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("model", FAMILIES_HERE[:3], indirect=True)  # in that order, each network is built once
def test_the_optimizer_prunes_a_whole_copy_which_is_saved_loaded_and_exported(model, tmp_path):
    net = graph.copy(model)
    optimizer = kc.PruningOptimizer(keras.optimizers.AdamW(1e-3), kc.ConstantSparsity(0.5, 0), scope="global")
    assert fit(net, optimizer) == pytest.approx(0.5, abs=0.001)
    net.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(
        tmp_path / "net.keras", compile=False
    )  # keras-hub does not save how it was compiled
    assert type(loaded) is type(model)
    assert_weights(loaded, net.get_weights())
    assert kc.export_saved_model(net, tmp_path / "net").sparsity == pytest.approx(0.5, abs=0.001)


def test_a_network_teaches_its_copy(model):
    student = graph.copy(model)
    assert type(student) is type(model)
    np.testing.assert_array_equal(outputs(student), outputs(model))
    distiller = kc.Distiller(student, model, augment=keras.layers.RandomFlip(seed=0), num_candidates=2)
    distiller.compile("sgd", run_eagerly=ON_TENSORFLOW)
    history = distiller.fit(images(), np.arange(2), verbose=0).history
    assert np.isfinite(history["loss"] + history["distillation_loss"]).all()
    assert any(not np.array_equal(*pair) for pair in zip(student.get_weights(), model.get_weights(), strict=True))


@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_text_classifier_keeps_its_vocabulary(used):
    pytest.importorskip("tensorflow_text")
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "quick", "brown", "fox"]
    preprocessor = hub.BertTextClassifierPreprocessor(hub.BertTokenizer(vocabulary), sequence_length=8)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "max_sequence_length": 8}
    model = hub.BertTextClassifier(hub.BertBackbone(len(vocabulary), **sizes), 2, preprocessor=preprocessor)
    if used:
        model.predict(["the fox"], verbose=0)  # which makes parts of the preprocessor
    copy = kc.prune_now(model, 0.0)
    assert type(copy) is type(model)
    np.testing.assert_array_equal(copy.predict(["a quick fox"], verbose=0), model.predict(["a quick fox"], verbose=0))
