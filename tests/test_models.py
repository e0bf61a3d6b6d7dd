import math

import keras
import numpy as np
import pytest

from kerascompress import models


def trainable_parameters(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def small_resnet(**kwargs):
    return models.resnet(8, 5, **{"input_shape": (7, 6, 2), "width": 3, "mean": (100, 120), "std": (50, 60)} | kwargs)


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


@pytest.mark.parametrize(
    ("build", "num_classes", "published"),
    [(models.resnet20, 10, 272_474), (models.resnet20, 100, 278_324), (models.resnet110, 100, 1_736_564)],
)
def test_parameter_counts_are_the_published_ones(build, num_classes, published):
    assert trainable_parameters(build(num_classes)) == published


def numpy_conv(x, kernel, stride, padding):
    """PyTorch's Conv2d: the same zero padding on all four sides, output floor((n + 2p - k) / stride) + 1."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    return np.stack(
        [
            np.stack(
                [
                    np.tensordot(x[:, stride * i :, stride * j :][:, :size, :size], kernel, axes=3)
                    for j in range(columns)
                ],
                axis=1,
            )
            for i in range(rows)
        ],
        axis=1,
    )


def numpy_resnet8(weights, x, mean, std):
    def conv_bn(x, name, stride=1, padding=1):
        x = numpy_conv(x, weights[f"{name}/kernel"], stride, padding)
        gamma, beta, moving_mean, moving_variance = (
            weights[f"{name}_bn/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return gamma * (x - moving_mean) / np.sqrt(moving_variance + 1e-5) + beta

    x = (x - np.array(mean)) / np.array(std)
    x = np.maximum(conv_bn(x, "stem"), 0)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"stage{stage}_block0"
        shortcut = x if stride == 1 else conv_bn(x, f"{block}_shortcut", stride, padding=0)
        x = np.maximum(conv_bn(x, f"{block}_conv1", stride), 0)
        x = np.maximum(conv_bn(x, f"{block}_conv2") + shortcut, 0)
    return x.mean((1, 2)) @ weights["logits/kernel"] + weights["logits/bias"]


def test_forward_pass_is_pytorchs_formula():
    model = small_resnet()  # 7x6 pixels: odd and even sizes before each stride
    random = np.random.default_rng(0)
    for weight in model.weights:  # every value away from its neutral start, variances positive
        weight.assign(random.uniform(0.5, 1.5, weight.shape) if weight.path.endswith("variance") else
                      random.normal(0, 0.5, weight.shape))  # fmt: skip
    weights = {weight.path: np.asarray(weight, "float64") for weight in model.weights}
    x = images(4, 7, 6, 2)
    expected = numpy_resnet8(weights, x.astype("float64"), (100, 120), (50, 60))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_uint8_and_float_pixels_give_the_same_logits():
    model, x = small_resnet(), images(3, 7, 6, 2)
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x.astype("float32"), verbose=0))


def test_default_normalisation_is_cifars_and_its_average_for_other_channels():
    def normalised(channels):
        model = models.resnet(8, 2, input_shape=(1, 1, channels), width=1)
        normalise = keras.Model(model.input, model.get_layer("normalize").output)
        return np.asarray(normalise(np.full((1, 1, 1, channels), 200.0)))[0, 0, 0]

    np.testing.assert_allclose(normalised(3), [70.70 / 68.17, 75.93 / 65.39, 87.57 / 70.42], rtol=1e-5)
    np.testing.assert_allclose(normalised(1), [(200 - 365.80 / 3) / (203.98 / 3)], rtol=1e-5)


def test_batch_norm_keeps_nine_tenths_of_its_statistics():
    model, x = small_resnet(), images(16, 7, 6, 2)
    stem = np.asarray(keras.Model(model.input, model.get_layer("stem").output)(x), "float64")
    model(x.astype("float32"), training=True)
    np.testing.assert_allclose(model.get_layer("stem_bn").moving_mean, 0.1 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)


def test_weight_decay_is_half_its_value_times_every_squared_trainable_value():
    model = small_resnet(weight_decay=0.02, seed=0)
    squares = sum((np.asarray(weight, "float64") ** 2).sum() for weight in model.trainable_weights)
    np.testing.assert_allclose(float(sum(model.losses)), 0.01 * squares, rtol=1e-5)
    assert not small_resnet(weight_decay=0).losses
    assert not small_resnet(weight_decay=None).losses
    default = small_resnet(seed=0)
    np.testing.assert_allclose(float(sum(default.losses)), 2.5e-4 * squares, rtol=1e-5)


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


def test_a_saved_model_loads_without_the_package_and_predicts_the_same(tmp_path):
    model, x = small_resnet(), images(3, 7, 6, 2)
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_free_height_and_width():
    model = small_resnet(input_shape=(None, None, 2))
    assert model(images(1, 9, 4, 2)).shape == model(images(1, 12, 16, 2)).shape == (1, 5)


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
