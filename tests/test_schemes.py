"""Schemes: the order of the paper, exact weights through extend and discard, and pruned networks that stay sparse."""

import gc
import json
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import kerascompress as kc

pytestmark = pytest.mark.once("jax")

FAMILIES = {
    "resnet": lambda **kwargs: kc.models.resnet(8, 5, width=4, input_shape=(8, 8, 3), seed=0, **kwargs),
    "mobilenet_v2": lambda: kc.models.mobilenet_v2(5, width=0.1, input_shape=(8, 8, 3), seed=0),
    "shufflenet_v2": lambda: kc.models.shufflenet_v2(5, width=0.1, input_shape=(8, 8, 3), seed=0),
}


def images(count=16):
    return np.random.default_rng(0).uniform(0, 255, (count, 8, 8, 3)).astype("float32")


def labels(count=16):
    return np.random.default_rng(1).integers(0, 5, count)


def tiny() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, strides=2, use_bias=False, name="conv")(inputs))
    x = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(name="relu")(x))
    return keras.Model(inputs, layers.Dense(5, name="logits")(x))


def lived_in(model: keras.Model) -> keras.Model:
    """The model with weights, BatchNorm statistics and all, that are not the initial ones."""
    rng = np.random.default_rng(2)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) * w + rng.uniform(0, 0.02, w.shape) for w in model.get_weights()])
    return model


def fit(model, magnitude=None, epochs=1, callbacks=()):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=keras.backend.backend() == "jax")  # XLA compiles longer than this trains
    model.fit(images(), labels(), batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks))


def outputs(model):
    return ops.convert_to_numpy(model(images(4), training=False))


def by_path(model):
    return {each.path: ops.convert_to_numpy(each.value) for each in model.weights}


def assert_weights(model, expected):
    for path, weights in by_path(model).items():
        np.testing.assert_array_equal(weights, expected[path], err_msg=path)


def config(model):
    return json.loads(model.to_json())["config"]


# --- schemes ---


@pytest.mark.quick
@pytest.mark.once
@pytest.mark.parametrize(
    ("scheme", "expected"),  # Section IV-C, the text under Figures 4 and 6
    [
        (kc.inherit, ["fit large 14", "shrink large", "fit small 4"]),
        (kc.baseline_a, ["shrink large", "fit small 14", "fit small 4"]),
        (kc.baseline_b, ["fit large 4", "shrink large", "fit small 4"]),
    ],
)
def test_schemes_train_in_the_order_and_with_the_magnitudes_of_the_paper(scheme, expected):
    done = []

    def shrink(model):
        done.append(f"shrink {model}")
        return "small"

    result = scheme("large", shrink=shrink, fit=lambda model, m: done.append(f"fit {model} {m}"), strong=14, weak=4)
    assert done == expected
    assert result == "small"


def test_a_fit_that_lets_a_pruned_network_grow_dense_gets_a_warning():
    def prune(dense):
        return kc.prune_now(dense, 0.5)

    schemes = {"shrink": prune, "fit": fit, "strong": 14, "weak": 4}
    with pytest.warns(UserWarning, match=r"50\.\d% were zero, and .*compile with `PruningOptimizer\(optimizer\)`"):
        kc.inherit(lived_in(tiny()), **schemes)


def test_baseline_a_starts_from_the_initial_weights_of_the_small_network():
    small = FAMILIES["resnet"]()
    started = []
    kc.baseline_a(
        kc.extend(small, extra_blocks=2),
        shrink=kc.discard,
        fit=lambda model, magnitude: started.append(by_path(model)),
        strong=14,
        weak=4,
    )
    for path, weights in by_path(small).items():
        np.testing.assert_array_equal(started[0][path], weights)


@pytest.mark.parametrize("end_step", [0, -1], ids=["one_shot", "masks_recomputed"])
def test_a_pruned_network_keeps_its_sparsity_through_retraining(end_step):
    sparsities = []

    def retrain(model, magnitude):
        fit(model, callbacks=[kc.UpdatePruningStep()] if sparsities else [])
        sparsities.append(kc.sparsity(model))

    def prune(dense):
        schedule = kc.ConstantSparsity(0.6, begin_step=0, end_step=end_step, frequency=1)
        return kc.prune_low_magnitude(dense, pruning_schedule=schedule, scope="global")

    pruned = kc.inherit(tiny(), shrink=prune, fit=retrain, strong=14, weak=4)
    retrain(pruned, 4)
    assert sparsities[0] == 0.0
    assert sparsities[1:] == pytest.approx([0.6, 0.6], abs=1 / 128)  # 3 * 3 * 3 * 4 + 4 * 5 weights in kernels
    assert kc.sparsity(kc.strip_pruning(pruned)) == sparsities[-1]


# --- extend and discard ---


@pytest.fixture(params=FAMILIES, scope="module")
def small(request):
    """One network of each family for all tests, because `extend` leaves it alone."""
    return lived_in(FAMILIES[request.param]())


def test_discarding_at_once_gives_the_network_back_bit_for_bit(small):
    before, computed = config(small), outputs(small)
    large = kc.extend(small, extra_blocks=1)
    names = [layer.name for layer in large.layers]
    extra = [name for name in names if name.startswith("extra_")]
    assert [name for name in names if name not in extra] == [layer.name for layer in small.layers]
    assert names.index(extra[-1]) - names.index(extra[0]) == len(extra) - 1  # all in one place, and in use:
    assert not np.allclose(outputs(large), computed, rtol=1e-3)
    back = kc.discard(large)
    np.testing.assert_array_equal(outputs(back), computed)
    assert config(back) == before == config(small)  # layer for layer, name for name, argument for argument
    assert [each.path for each in back.weights] == [each.path for each in small.weights]
    assert_weights(back, by_path(small))
    assert all(one is not other for one, other in zip(back.layers, small.layers, strict=True))
    assert all(one is not other for one, other in zip(back.weights, small.weights, strict=True))


def test_the_further_blocks_are_of_the_networks_own_kind(small):
    parts = {
        "resnet8": ["conv1", "conv1_bn", "relu1", "conv2", "conv2_bn", "add", "relu2"],
        "mobilenet_v2": ["expand", "depthwise", "project", "add"],
        "shufflenet_v2": ["conv1", "depthwise", "conv2", "shuffle"],
    }[small.name]
    names = {layer.name for layer in kc.extend(small, extra_blocks=2).layers}
    assert {f"extra_block{index}_{part}" for index in (0, 1) for part in parts} <= names
    assert not [name for name in names if "shortcut" in name and name.startswith("extra_")]


def test_whatever_the_extended_network_learns_the_small_part_keeps_through_save_and_load(small, tmp_path):
    untouched = by_path(small)
    large = kc.extend(small, extra_blocks=1)
    learned = by_path(lived_in(large))
    large.save(tmp_path / "large.keras")
    back = kc.discard(keras.models.load_model(tmp_path / "large.keras"))
    assert config(back) == config(small)
    assert_weights(back, learned)
    assert_weights(small, untouched)


def test_training_reaches_every_weight_and_the_small_part_trains_on():
    small = lived_in(tiny())
    untouched = by_path(small)
    large = kc.extend(small, extra_blocks=1)
    initial = by_path(large)
    fit(large)
    trained = by_path(large)
    assert not [path for path in trained if np.array_equal(initial[path], trained[path])]
    back = kc.discard(large)
    assert_weights(back, trained)
    fit(back)
    assert_weights(small, untouched)
    assert not [path for path, weights in by_path(back).items() if np.array_equal(weights, trained[path])]


def test_resnet20_plus_20_has_the_weights_of_ten_further_blocks():
    small = kc.models.resnet20(100, seed=0)
    large = kc.extend(small, extra_blocks=10)
    # two 3x3 convolutions from 64 to 64 channels, two BatchNorms of four vectors
    assert large.count_params() - small.count_params() == 10 * (2 * 3 * 3 * 64 * 64 + 2 * 4 * 64)
    assert sum(isinstance(layer, layers.Conv2D) for layer in large.layers) == 19 + 2 + 20  # 2 shortcuts


def test_extra_blocks_take_the_networks_weight_decay_and_the_seed():
    large = kc.extend(FAMILIES["resnet"](weight_decay=0.3), extra_blocks=2, seed=7)
    assert float(large.get_layer("extra_block1_conv2").kernel_regularizer.l2) == pytest.approx(0.15)
    again = kc.extend(FAMILIES["resnet"](), extra_blocks=2, seed=7)
    other = kc.extend(FAMILIES["resnet"](weight_decay=None), extra_blocks=2, seed=8)
    kernels = [by_path(each)["extra_block1_conv2/kernel"] for each in (large, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert other.get_layer("extra_block1_conv2").kernel_regularizer is None


def test_a_copy_has_outputs_of_its_own_and_is_freed_while_the_first_model_lives():
    small = FAMILIES["resnet"]()
    large = kc.extend(small, extra_blocks=1)
    features = keras.Model(large.inputs, [large.get_layer(name).output for name in ("normalize", "pool")])
    assert [tuple(each.shape) for each in features.outputs] == [(None, 8, 8, 3), (None, 16)]
    back = kc.discard(large)
    freed = [weakref.ref(model.get_layer("stem").kernel) for model in (large, back)]
    del large, features, back
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    assert small.get_layer("stem").kernel is not None


def test_a_compiled_model_gives_uncompiled_ones_and_stays_compiled():
    small = tiny()
    small.compile("adam", "mse")
    large = kc.extend(small, extra_blocks=1)
    assert [small.compiled, large.compiled, kc.discard(large).compiled] == [True, False, False]


def test_discard_keeps_the_masks_of_a_network_that_was_pruned_while_extended():
    large = kc.extend(lived_in(tiny()), extra_blocks=1)
    pruned = kc.prune_low_magnitude(large, pruning_schedule=kc.ConstantSparsity(0.5, begin_step=0, end_step=0))
    fit(pruned, callbacks=[kc.UpdatePruningStep()])
    small = kc.discard(pruned)
    assert_weights(small, by_path(pruned))
    assert kc.sparsity(small) == pytest.approx(0.5, abs=0.01)
    fit(small, callbacks=[kc.UpdatePruningStep()])
    assert kc.sparsity(small) == pytest.approx(0.5, abs=0.01)


# --- a user's own networks ---


def branching() -> keras.Model:
    """Two inputs, two outputs, a layer that is called twice, a nested model, and operations that are no layers."""
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    shared = layers.Conv2D(6, 3, padding="same", name="shared")
    inner = keras.Sequential([keras.Input((8, 8, 6)), layers.BatchNormalization(), layers.ReLU()], name="inner")
    x = ops.maximum(shared(left), shared(right)) * 2.0
    x = layers.Conv2D(8, 3, name="features")(inner(x))
    pooled = layers.GlobalAveragePooling2D(name="gap")(x)
    side = layers.Lambda(lambda each: each + 1.0, name="side")(layers.Flatten(name="flat")(x))
    return keras.Model(
        {"left": left, "right": right}, {"logits": layers.Dense(5, name="logits")(pooled), "side": side}, name="mine"
    )


def split_block(x, filters, *, name, weight_decay, seed):
    """A block of operations with several outputs, and with names that it does not choose."""
    first, second = ops.split(x, 2, axis=-1)
    second = layers.Dense(filters // 2, activation="relu", name=f"{name}_dense")(second)
    return ops.concatenate([second, first], axis=-1) + x


@pytest.mark.parametrize("block", [None, split_block])
def test_a_network_with_branches_is_extended_at_a_named_layer(block, tmp_path):
    model = lived_in(branching())
    batch = {"left": images(4), "right": images(8)[4:]}
    before = model(batch, training=False)
    large = kc.extend(model, 2, features="features", block=block)
    after = large(batch, training=False)
    assert not np.allclose(*(ops.convert_to_numpy(each["logits"]) for each in (after, before)))
    back = kc.discard(large)
    now = back(batch, training=False)
    assert set(now) == set(before) == {"logits", "side"}
    for name, computed in before.items():
        np.testing.assert_array_equal(ops.convert_to_numpy(now[name]), ops.convert_to_numpy(computed))
    assert [layer.name for layer in back.layers] == [layer.name for layer in model.layers]
    for one, other in zip(back.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len([each for each in back.weights if "shared" in each.path]) == 2


def test_a_sequential_network_is_extended():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layers.Flatten(name="flatten"), layers.Dense(5)]
    )
    large = kc.extend(model, 1, features="conv")
    assert [layer.name for layer in large.layers if "conv" in layer.name][:2] == ["conv", "extra_block0_conv1"]
    np.testing.assert_array_equal(outputs(kc.discard(large)), outputs(model))


def test_further_blocks_compute_as_precisely_as_the_place_where_they_stand():
    inputs = keras.Input((8, 8, 3))
    features = layers.Conv2D(4, 3, name="conv", dtype="mixed_bfloat16")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool", dtype="float32")(features))
    large = kc.extend(model, 1, features="conv")
    assert large.get_layer("extra_block0_conv1").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"


def plain_block(x, filters, *, name, **settings):
    return layers.Conv2D(filters, 3, padding="same", name=name)(x)


def test_the_same_channels_go_before_and_behind_further_blocks():
    shuffled = kc.models.shufflenet_v2(4, width=0.5, input_shape=(32, 32, 3), seed=0)
    small = kc.discard(kc.prune_channels(kc.extend(shuffled, 1), 0.5))
    assert small.get_layer("logits").get_weights()[0].shape == (512, 4)  # of 1,024
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(8, 3, name="conv"), layers.Flatten()])
    model.add(layers.Dense(5, name="logits"))
    small = kc.discard(kc.prune_channels(kc.extend(model, 1, features="conv", block=plain_block), 0.5))
    (kernel, _), (kept, _) = (net.get_layer("conv").get_weights() for net in (model, small))
    (rows, _), (kept_rows, _) = (net.get_layer("logits").get_weights() for net in (model, small))
    left = [int(np.flatnonzero((kernel == kept[..., [i]]).all((0, 1, 2)))[0]) for i in range(4)]
    np.testing.assert_array_equal(kept_rows.reshape(36, 4, 5), rows.reshape(36, 8, 5)[:, left])


def test_an_input_has_no_place_for_further_blocks():
    model = tiny()
    with pytest.raises(ValueError, match=r"an input\. Name a layer behind it"):
        kc.extend(model, 1, features=model.layers[0].name)


def test_channels_first_needs_a_block_of_ones_own():
    inputs = keras.Input((3, 8, 8))
    features = layers.Conv2D(8, 3, padding="same", data_format="channels_first", name="conv")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(data_format="channels_first", name="pool")(features))
    with pytest.raises(ValueError, match=r"with channels first. Pass a builder of your own: `block=`"):
        kc.extend(model, 1)
    kc.extend(model, 1, block=lambda x, filters, **settings: layers.Activation("relu")(x))


def test_state_that_is_no_weight_is_kept():
    adapted = layers.Normalization(name="normalization")
    adapted.adapt(images())
    inputs = keras.Input((8, 8, 3))
    x = layers.Dropout(0.5, seed=3)(layers.Conv2D(4, 3, name="conv")(adapted(inputs)))
    x = layers.Conv2D(4, 3, name="frozen", trainable=False)(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))
    back = kc.discard(kc.extend(model, 1))
    np.testing.assert_array_equal(outputs(back), outputs(model))
    assert not back.get_layer("frozen").trainable
    assert back.get_layer("frozen").trainable_weights == []


# --- bad input ---


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def nested():
    return keras.Sequential([keras.Input((8, 8, 3)), FAMILIES["resnet"]()])


def shrinking(x, filters, *, name, weight_decay, seed):
    return layers.Dense(filters - 1, name=name)(x)


def twice():
    inputs, dense = keras.Input((4,)), layers.Dense(4, name="dense")
    return keras.Model(inputs, dense(dense(inputs)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kc.extend(Subclassed(), 1), "Functional or Sequential.*Received: .*Subclassed"),
        (lambda: kc.discard(Subclassed()), "`discard` needs a Functional or Sequential"),
        (lambda: kc.extend("resnet20", 1), "Received: 'resnet20'"),
        (lambda: kc.extend(keras.Sequential([layers.Dense(3)]), 1), "keras.Input"),
        (lambda: kc.extend(FAMILIES["resnet"](), 0), "at least 1. Received: extra_blocks=0"),
        (lambda: kc.extend(FAMILIES["resnet"](), 1.5), "whole number"),
        (lambda: kc.extend(FAMILIES["resnet"](), 1, features="pol"), "Received: features='pol'"),
        (lambda: kc.extend(nested(), 1), "extend that one"),
        (lambda: kc.extend(kc.extend(FAMILIES["resnet"](), 1), 1), "extra blocks already.*`discard` first"),
        (lambda: kc.extend(kc.prune_low_magnitude(FAMILIES["resnet"]()), 1), "before pruning.*strip_pruning"),
        (lambda: kc.extend(FAMILIES["resnet"](), 1, block=shrinking), "the shape that it got"),
        (lambda: kc.extend(twice(), 1, features="dense", block=split_block), "one tensor passes once"),
        (lambda: kc.extend(twice(), 1, features="dense"), "`block=`"),
        (lambda: kc.discard(FAMILIES["resnet"]()), "no extra blocks to discard"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_class_of_ones_own_gets_a_warning():
    class Mine(keras.Model):
        def __init__(self, number, *args, **kwargs):
            super().__init__(*args, **kwargs)

    net = FAMILIES["resnet"]()
    with pytest.warns(UserWarning, match="no Mine.*train_step"):
        kc.extend(Mine(3, net.inputs, net.outputs), 1)
