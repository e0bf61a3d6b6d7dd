import json
import math
import zlib
from functools import cache, partial
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import kerascompress as kc
from kerascompress import models
from kerascompress.models.mobilenet_v2 import _channels as channels_of_mobilenet
from kerascompress.models.mobilenet_v2 import inverted_residual
from kerascompress.models.resnet import basic_block
from kerascompress.models.shufflenet_v2 import shuffle_unit

NETWORKS = {
    "resnet8": partial(models.resnet, 8, width=3),
    "mobilenet_v2": partial(models.mobilenet_v2, width=0.25),
    "shufflenet_v2": partial(models.shufflenet_v2, width=0.25),
}
BLOCKS = {basic_block: "relu2", inverted_residual: "add", shuffle_unit: "shuffle"}  # and how their last layer is named


def trainable_parameters(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def small_resnet(**kwargs):
    return models.resnet(8, 5, **{"input_shape": (7, 6, 2), "width": 3, "mean": (100, 120), "std": (50, 60)} | kwargs)


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


@cache
def network_for_cifar(network):
    """Built once for the tests that leave its structure alone."""
    return NETWORKS[network](5, input_shape=(7, 10, 3), seed=0)


def block_model(block, filters=6, input_shape=(5, 4, 6), **kwargs):
    images = keras.Input(input_shape)
    return keras.Model(images, block(images, filters, **{"name": "block", "weight_decay": 0, "seed": None} | kwargs))


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("build", "published"),
    [
        (models.resnet20, {10: 272_474, 100: 278_324}),
        (models.resnet110, {100: 1_736_564}),
        (models.mobilenet_v2, {10: 2_236_682, 100: 2_351_972}),
        (models.shufflenet_v2, {10: 1_263_854, 100: 1_356_104}),
        (partial(models.mobilenet_v2, stem="imagenet"), {1000: 3_504_872}),
        (partial(models.shufflenet_v2, stem="imagenet"), {1000: 2_278_604}),
        (partial(models.shufflenet_v2, stem="imagenet", width=0.5), {1000: 1_366_792}),
    ],
)
def test_parameter_counts_are_the_published_ones(build, published):
    model = build(10)
    features, _ = model.get_layer("logits").kernel.shape
    for num_classes, parameters in published.items():
        assert trainable_parameters(model) + (num_classes - 10) * (features + 1) == parameters


def drawn(path, shape):
    """The formula of fixtures/make_networks.py."""
    random = np.random.RandomState(zlib.crc32(path.encode()))
    if path.endswith("kernel"):
        return random.normal(0, (2 / math.prod(shape[:2] if "depthwise" in path else shape[:-1])) ** 0.5, shape)
    if path.endswith(("gamma", "variance")):
        return random.uniform(0.5, 1.5, shape)
    return random.normal(0, 0.5, shape)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.once
def test_logits_are_pytorchs_for_the_same_weights(network, stem):
    if stem == "cifar":
        model, size = network_for_cifar(network), (7, 10)
    else:  # free sizes: in ShuffleNetV2 another graph
        model, size = NETWORKS[network](5, stem=stem, input_shape=(None, None, 3)), (33, 40)
    for weight in model.weights:
        weight.assign(drawn(weight.path, weight.shape))
    pixels = np.random.RandomState(0).randint(0, 256, (2, *size, 3)).astype("uint8")
    expected = json.loads((Path(__file__).parent / "fixtures" / "networks.json").read_text())[network][stem]
    np.testing.assert_allclose(
        model.predict(pixels, verbose=0), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_mobilenets_channels_are_multiples_of_8_that_lose_at_most_a_tenth():
    assert [channels_of_mobilenet(exact) for exact in (3.2, 11.9, 10.56, 8.8, 24.0)] == [8, 16, 16, 8, 24]


@pytest.mark.once("jax")
def test_shufflenets_channels_are_even_numbers_at_any_width():
    model = models.shufflenet_v2(5, width=0.01, input_shape=(8, 8, 3))
    assert [model.get_layer(f"stage{stage}_block0_shuffle").output.shape[-1] for stage in (1, 2, 3)] == [2, 2, 4]


@pytest.mark.parametrize("shape", [(5, 4, 6), (None, 4, 6), (5, None, 6), (None, None, 6)])
def test_channels_alternate_between_both_halves_for_every_kind_of_size(shape):
    model = block_model(shuffle_unit, input_shape=shape)
    concat = keras.Model(model.input, model.get_layer("block_concat").output)
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6)).astype("float32")
    before = ops.convert_to_numpy(concat(x))
    np.testing.assert_array_equal(before[..., :3], x[..., :3])
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before[..., [0, 3, 1, 4, 2, 5]])


def test_uint8_and_float_pixels_give_the_same_logits():
    model, x = small_resnet(), images(3, 7, 6, 2)
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x.astype("float32"), verbose=0))


@pytest.mark.once
def test_default_normalisation_is_cifars_and_its_average_for_other_channels():
    def normalised(channels):
        model = models.resnet(8, 2, input_shape=(1, 1, channels), width=1)
        normalise = keras.Model(model.input, model.get_layer("normalize").output)
        return np.asarray(normalise(np.full((1, 1, 1, channels), 200.0)))[0, 0, 0]

    np.testing.assert_allclose(normalised(3), [70.70 / 68.17, 75.93 / 65.39, 87.57 / 70.42], rtol=1e-5)
    np.testing.assert_allclose(normalised(1), [(200 - 365.80 / 3) / (203.98 / 3)], rtol=1e-5)


@pytest.mark.once
def test_batch_norm_keeps_nine_tenths_of_its_statistics():
    model, x = small_resnet(), images(16, 7, 6, 2)
    stem = keras.Model(model.input, model.get_layer("stem").output)
    stem = ops.convert_to_numpy(stem(x)).astype("float64")
    model(x.astype("float32"), training=True)
    np.testing.assert_allclose(model.get_layer("stem_bn").moving_mean, 0.1 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)


@pytest.mark.once
def test_weight_decay_is_half_its_value_times_every_squared_trainable_value():
    model = small_resnet(weight_decay=0.02, seed=0)
    squares = sum((np.asarray(weight, "float64") ** 2).sum() for weight in model.trainable_weights)
    np.testing.assert_allclose(float(ops.convert_to_numpy(sum(model.losses))), 0.01 * squares, rtol=1e-5)
    assert not small_resnet(weight_decay=0).losses
    assert not small_resnet(weight_decay=None).losses
    default = small_resnet(seed=0)
    np.testing.assert_allclose(float(ops.convert_to_numpy(sum(default.losses))), 2.5e-4 * squares, rtol=1e-5)


@pytest.mark.once
def test_initial_weights_have_pytorchs_spread():
    model = models.resnet(8, 500, seed=3)
    kernel = np.asarray(model.get_layer("stage3_block0_conv2").kernel)  # 3x3, 64 filters: fan_out 576
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / 576), rel=0.02)
    assert np.abs(kernel).max() > 3 * math.sqrt(2 / 576)  # a normal distribution, not a truncated one
    logits = model.get_layer("logits")  # 64 inputs: uniform in [-1/8, 1/8]
    for weight in logits.weights:
        assert 0.12 < np.abs(np.asarray(weight)).max() <= 0.125
        assert np.std(np.asarray(weight)) == pytest.approx(0.125 / math.sqrt(3), rel=0.1)


def test_a_seed_reproduces_every_layer_by_its_name():
    weights = {w.path: np.asarray(w) for w in small_resnet(seed=1).weights}
    again = {w.path: np.asarray(w) for w in small_resnet(seed=1).weights}
    other = {w.path: np.asarray(w) for w in small_resnet(seed=2).weights}
    deeper = {w.path: np.asarray(w) for w in models.resnet(14, 5, input_shape=(7, 6, 2), width=3, seed=1).weights}
    drawn = [path for path in weights if path.endswith("kernel")] + ["logits/bias"]
    for path in drawn:
        np.testing.assert_array_equal(weights[path], again[path])
        np.testing.assert_array_equal(weights[path], deeper[path])
        assert not np.array_equal(weights[path], other[path])
    first, second = "stage1_block0_conv1/kernel", "stage1_block0_conv2/kernel"
    assert not np.array_equal(weights[first], weights[second])


@pytest.mark.once
def test_a_saved_model_loads_without_the_package_and_predicts_the_same(tmp_path):
    model, x = small_resnet(), images(3, 7, 6, 2)
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.once
def test_free_height_and_width():
    model = small_resnet(input_shape=(None, None, 2))
    assert model(images(1, 9, 4, 2)).shape == model(images(1, 12, 16, 2)).shape == (1, 5)


@pytest.mark.once
def test_statistics_of_images_may_be_an_array():
    mean, std = np.array([100.0, 120.0]), np.array([50.0, 60.0], "float32")
    normalize = small_resnet(mean=mean, std=std).get_layer("normalize")
    expected = small_resnet(mean=(100, 120), std=(50, 60)).get_layer("normalize")
    assert (normalize.scale, normalize.offset) == (expected.scale, expected.offset)


@pytest.mark.once
def test_channels_first_are_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(ValueError, match=r"channels last. Received: .*'channels_first'. Call keras.config.set_"):
        small_resnet()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "6n \\+ 2 with n >= 1.*Received: depth=18"),
        ({"depth": 2}, "Received: depth=2"),
        ({"num_classes": 0}, "at least 1.*Received: num_classes=0, width=16"),
        ({"width": 0}, "Received: num_classes=10, width=0"),
        ({"input_shape": (8, 8)}, "channels last.*Received: input_shape=\\(8, 8\\)"),
        ({"input_shape": (8, 8, None)}, "Received: input_shape=\\(8, 8, None\\)"),
        ({"input_shape": (0, 8, 3)}, "Received: input_shape=\\(0, 8, 3\\)"),
        ({"weight_decay": -1e-4}, "Received: weight_decay=-0.0001"),
        ({"mean": (1, 2)}, "each of the 3 channels. Received: mean=\\(1, 2\\)"),
        ({"std": 0}, "positive. Received: std=0"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.resnet(**{"depth": 8, "num_classes": 10} | arguments)


@pytest.mark.once
@pytest.mark.parametrize("build", [models.mobilenet_v2, models.shufflenet_v2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "mnist"}, "one of \\('cifar', 'imagenet'\\). Received: stem='mnist'"),
        ({"width": 0.0}, "`width` positive. Received: num_classes=10, width=0.0"),
        ({"num_classes": 0}, "at least 1.*Received: num_classes=0"),
        ({"std": (1, 2)}, "each of the 3 channels. Received: std=\\(1, 2\\)"),
        ({"dropout": 1.0}, "in \\[0, 1\\). Received: dropout=1.0|unexpected keyword"),
    ],
)
def test_bad_arguments_of_the_mobile_networks_are_refused(build, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**{"num_classes": 10} | arguments)


@pytest.mark.once
def test_default_normalisation_of_an_imagenet_stem_is_imagenets():
    normalise = models.resnet(8, 2, width=1, stem="imagenet").get_layer("normalize")
    found = np.asarray(normalise(np.full((1, 1, 1, 3), 200.0)))[0, 0, 0]
    np.testing.assert_allclose(found, [76.325 / 58.395, 83.72 / 57.12, 96.47 / 57.375], rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("block", BLOCKS)
def test_one_further_block_ends_as_its_family_does_and_draws_by_seed_and_name(block):
    models_ = [block_model(block, seed=seed, name=name) for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))]
    assert [model.layers[-1].name for model in models_] == [f"{name}_{BLOCKS[block]}" for name in "aaab"]
    kernels = [[np.asarray(w) for w in model.trainable_weights if w.path.endswith("kernel")] for model in models_]
    for first, again, other_seed, other_name in zip(*kernels, strict=True):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other_seed)
        assert not np.array_equal(first, other_name)


@pytest.mark.once
@pytest.mark.parametrize("block", BLOCKS)
def test_weight_decay_of_a_block_counts_every_trainable_value(block):
    model = block_model(block, weight_decay=0.02, stride=2, filters=8)
    squares = sum((np.asarray(weight, "float64") ** 2).sum() for weight in model.trainable_weights)
    np.testing.assert_allclose(float(ops.convert_to_numpy(sum(model.losses))), 0.01 * squares, rtol=1e-5)


@pytest.mark.once
def test_depthwise_kernels_have_pytorchs_initial_spread():
    model = block_model(inverted_residual, input_shape=(3, 3, 200), filters=200)
    kernel = np.asarray(model.get_layer("block_depthwise").kernel)  # 1200 channels: PyTorch's fan_out is 9 * 1200
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / 10_800), rel=0.03)


@pytest.mark.once
def test_dropout_stands_before_the_logits():
    model = models.mobilenet_v2(5, width=0.1, input_shape=(8, 8, 3), dropout=0.2)
    assert [layer.name for layer in model.layers[-3:]] == ["pool", "dropout", "logits"]
    assert model.get_layer("dropout").rate == 0.2


@pytest.mark.once("jax")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("input_shape", [(5, 4, 6), (None, None, 6)])
def test_a_block_is_keras_alone_and_one_more_fits_behind_a_loaded_one(block, input_shape, tmp_path):
    model = block_model(block, input_shape=input_shape)
    assert all(type(each).__module__.startswith("keras.") for each in model._flatten_layers())
    model.save(tmp_path / "net.keras")
    keras.utils.clear_session()
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6)).astype("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), ops.convert_to_numpy(model(x)))
    longer = keras.Model(loaded.input, block(loaded.output, 6, name="further", weight_decay=0, seed=0))
    assert longer.output_shape == model.output_shape


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Global pruning to a sparsity of .* leaves nothing of")  # nobody has trained them
@pytest.mark.parametrize("network", ["mobilenet_v2", "shufflenet_v2"])
def test_one_threshold_prunes_depthwise_and_pointwise_kernels(network):
    dense = network_for_cifar(network)
    pruned = kc.prune_low_magnitude(dense, pruning_schedule=kc.ConstantSparsity(0.6, begin_step=0), scope="global")
    update = kc.UpdatePruningStep()
    update.set_model(pruned)
    update.on_train_begin()
    small = kc.strip_pruning(pruned)
    kernels = [np.asarray(w) for w in small.trainable_weights if w.path.endswith("kernel")]
    assert [w.shape for w in kernels] == [w.shape for w in dense.trainable_weights if w.path.endswith("kernel")]
    assert [layer.name for layer in small.layers[-5:]] == ["head", "head_bn", "head_relu", "pool", "logits"]
    assert sum((kernel == 0).sum() for kernel in kernels) == pytest.approx(0.6 * sum(map(np.size, kernels)), abs=1)
    assert any(np.mean(kernel == 0) > 0 for kernel in kernels if kernel.shape[:2] == (3, 3) and kernel.shape[3] == 1)
    assert any(np.mean(kernel == 0) > 0 for kernel in kernels if kernel.shape[:2] == (1, 1))


@pytest.mark.parametrize(
    ("input_shape", "blocks"),
    [
        ((9, 8, 3), [(inverted_residual, 2), (inverted_residual, 1), (shuffle_unit, 2), (shuffle_unit, 1)]),
        ((None, None, 4), [(shuffle_unit, 1)]),
    ],
)
@pytest.mark.once
def test_the_blocks_run_in_litert(input_shape, blocks, tmp_path):
    x = pixels = keras.Input(input_shape, name="images")
    for block, stride in blocks:
        x = block(x, 4, stride=stride, name=f"{block.__name__}{stride}", weight_decay=0, seed=0)
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x))
    x = images(2, 9, 8, input_shape[-1])
    report = kc.export_litert(model, tmp_path / "net.tflite", images=x)  # refuses a file with other outputs
    assert report.parameters == model.count_params()
