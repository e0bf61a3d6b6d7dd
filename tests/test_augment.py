"""RandAugment, RandomCrop and MagnitudeScheduler: what is drawn, when it acts, and what a running fit sees."""

import types

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from scipy import stats
from test_image_ops import NAMES, Drawn, augmented, batch_of, photographs

from kerascompress.augment import OPS, Op, RandAugment, RandomCrop
from kerascompress.callbacks import MagnitudeScheduler
from kerascompress.rounds import apply

GRADED = [row.name for row in OPS if row.argument]


# --- what is drawn ---


def test_images_of_one_batch_draw_different_operations_signs_and_magnitudes():
    image = np.repeat(photographs(32, 32)[:1], 48, axis=0)
    outputs = augmented(RandAugment(magnitude=14, seed=0), image)
    assert len(np.unique(outputs, axis=0)) > 30
    one_op = augmented(RandAugment(magnitude=14, num_ops=1, ops=["TranslateX"], seed=0), image)
    assert len(np.unique(one_op, axis=0)) == 2  # the two signs
    ranged = augmented(RandAugment(magnitude=(0, 30), num_ops=1, ops=["Solarize"], seed=0), image)
    assert len(np.unique(ranged, axis=0)) > 24


@pytest.mark.quick
def test_a_seed_reproduces_and_another_seed_does_not():
    images = batch_of(48)
    first, second = (augmented(RandAugment(magnitude=(4, 30), seed=3), images) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, augmented(RandAugment(magnitude=(4, 30), seed=4), images))


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**40, -1])
def test_a_seed_of_any_size_reproduces(seed):
    images = batch_of(48)
    first, again = (ops.convert_to_numpy(RandAugment(seed=seed)(images, training=True)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_no_images_are_no_images(dtype):
    for layer in (RandAugment(seed=0), RandomCrop(seed=0)):
        assert tuple(layer(np.zeros((0, 8, 8, 3), dtype), training=True).shape) == (0, 8, 8, 3)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_batch_of_which_a_trace_does_not_know_that_it_is_empty_is_none(dtype):
    import tensorflow as tf

    layer = RandAugment(seed=0)
    traced = tf.function(lambda images: layer(images, training=True), [tf.TensorSpec((None, 8, 8, 3), dtype)])
    assert [traced(np.zeros((count, 8, 8, 3), dtype)).shape[0] for count in (0, 1, 2)] == [0, 1, 2]


class Augmented:
    """A Torch `Dataset`; what it returns is the augmentation of one image."""

    def __init__(self):
        self.augment = RandAugment(magnitude=(0, 30), seed=0)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.augment(batch_of(48)[0], training=True)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the loader is Torch's")
def test_workers_of_a_torch_loader_draw_apart_and_anew_in_each_epoch():
    import torch

    def epochs():
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(Augmented(), batch_size=4, num_workers=2)
        return [batch.numpy() for _ in range(2) for batch in loader]

    first, again = epochs(), epochs()
    np.testing.assert_array_equal(first, again)
    assert len({image.tobytes() for batch in first for image in batch}) == 16


def test_consecutive_calls_draw_anew():
    images, layer = batch_of(48), RandAugment(magnitude=14, seed=3)
    assert not np.array_equal(augmented(layer, images), augmented(layer, images))


@pytest.mark.quick
def test_operations_signs_and_magnitudes_are_uniform():
    layer = RandAugment(magnitude=(6, 24), num_ops=2, seed=7)
    op, sign, magnitude = (ops.convert_to_numpy(drawn) for drawn in layer.draw(20_000))
    assert op.shape == sign.shape == (2, 20_000)
    pairs = np.bincount(op[0] * len(OPS) + op[1], minlength=len(OPS) ** 2)  # independent, with replacement
    assert stats.chisquare(pairs).pvalue > 0.001
    by_op_and_sign = [np.sum((op == k) & (sign == s)) for k in range(len(OPS)) for s in (-1, 1)]
    assert stats.chisquare(by_op_and_sign).pvalue > 0.001
    assert set(np.unique(sign)) == {-1.0, 1.0}
    assert magnitude.min() >= 6
    assert magnitude.max() <= 24
    assert stats.chisquare(np.histogram(magnitude, bins=18, range=(6, 24))[0]).pvalue > 0.001
    assert abs(np.corrcoef(magnitude, op[0])[0, 1]) < 0.03


def test_the_table_has_the_fourteen_operations_of_torchvision():
    expected = (
        "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize Solarize"
    )
    assert [*expected.split(), "AutoContrast", "Equalize"] == NAMES
    assert {row.name for row in OPS if row.signed} == {
        *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
    }


# --- what the magnitude does ---


def test_graded_operations_but_solarize_are_the_identity_at_magnitude_zero():
    images = batch_of(48)
    images[0, 0, 0] = 255
    graded = [name for name in GRADED if name != "Solarize"]
    np.testing.assert_array_equal(augmented(RandAugment(magnitude=0, ops=graded), images), images)
    solarized = augmented(RandAugment(magnitude=0, num_ops=1, ops=["Solarize"]), images)
    np.testing.assert_array_equal(solarized, np.where(images == 255, 0, images))


@pytest.mark.parametrize("name", GRADED)
def test_distortion_grows_with_the_magnitude(name):
    images, magnitudes = photographs(32, 32), np.arange(0, 31, 5)
    cases = [(magnitude, sign) for magnitude in magnitudes for sign in (1, -1)]
    batch = np.concatenate([images] * len(cases))
    magnitude, sign = (np.repeat(np.float32(column), len(images)) for column in zip(*cases, strict=True))
    output = augmented(Drawn([np.full(len(batch), NAMES.index(name))], [sign]), batch, magnitude=magnitude)
    distortion = np.abs(output.astype(float) - batch).reshape(len(magnitudes), -1).mean(axis=1)
    assert np.all(np.diff(distortion) >= 0)
    assert distortion[-1] > distortion[0]


def test_between_whole_magnitudes_the_table_is_linear():
    image = np.full((1, 8, 8, 3), 100, "uint8")
    output = augmented(Drawn([[NAMES.index("Brightness")]], [[1]]), image, magnitude=np.float32([5.5]))
    assert np.all(output == int(100 * (1 + 0.9 * 5.5 / 30)))


def test_a_magnitude_per_image_may_be_passed():
    images = batch_of(48)
    magnitude = np.tile(np.float32([0, 30]), 24)
    output = augmented(RandAugment(magnitude=9, num_ops=1, ops=["Posterize"]), images, magnitude=magnitude)
    np.testing.assert_array_equal(output[::2], images[::2])
    np.testing.assert_array_equal(output[1::2], images[1::2] & 0xF0)
    scalar = augmented(RandAugment(magnitude=9, num_ops=1, ops=["Posterize"]), images, magnitude=30.0)
    np.testing.assert_array_equal(scalar, images & 0xF0)


def test_a_magnitude_is_drawn_at_any_default_precision():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        layer = RandAugment(magnitude=(0, 30), ops=["Posterize"])
        assert layer.draw_magnitude(2).shape == (2,)
    finally:
        keras.config.set_floatx(before)


def test_the_magnitude_pair_is_live_too():
    layer = RandAugment(magnitude=(0, 30), num_ops=1, ops=["Posterize"])
    layer.magnitude.assign([30.0, 30.0])
    images = batch_of(48)
    np.testing.assert_array_equal(augmented(layer, images), images & 0xF0)


# --- images ---


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        ("uint8", 1),
        ("bfloat16", 3),
        *(pytest.param(*case, marks=pytest.mark.once("jax")) for case in (("float32", 3), ("float16", 1))),
    ],
)
@settings(max_examples=6, deadline=None)
@given(magnitude=st.floats(0, 30, width=32), seed=st.integers(0, 100))
def test_output_has_the_shape_dtype_and_range_of_the_input(dtype, channels, magnitude, seed):
    images = ops.cast(photographs(9, 12)[..., :channels], dtype)
    output = RandAugment(magnitude=magnitude, seed=seed)(images, training=True)
    assert output.shape == images.shape
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    values = ops.convert_to_numpy(ops.cast(output, "float32"))
    assert values.min() >= 0
    assert values.max() <= 255
    np.testing.assert_array_equal(values, np.round(values))


def test_a_single_image_is_augmented_like_a_batch_of_one():
    image = photographs(32, 32)[0]
    single = augmented(RandAugment(magnitude=14, seed=1), image)
    np.testing.assert_array_equal(single, augmented(RandAugment(magnitude=14, seed=1), image[None])[0])


def test_without_training_it_is_the_identity():
    images = ops.convert_to_tensor(batch_of(8).astype("float32") + 0.25)
    for layer in (RandAugment(magnitude=30), RandomCrop()):
        for training in (False, None):
            np.testing.assert_array_equal(layer(images, training=training), images)
        model = keras.Sequential([layer])
        np.testing.assert_array_equal(model.predict(images, verbose=0), images)


# --- operations of one's own ---


@keras.saving.register_keras_serializable("test_augment")
def darken(images, argument):
    return images - argument[:, None, None, None]


@keras.saving.register_keras_serializable("test_augment")
def swap(argument, height, width):
    """Mirror left and right."""
    one = ops.ones_like(argument)
    return ops.stack([-one, 0 * one, one * width, 0 * one, one, 0 * one], axis=1)


def test_ops_takes_names_and_rows_of_ones_own():
    images = batch_of(16)
    invert = Op("Invert", table=lambda images, argument: 255.0 - ops.arange(256, dtype="float32")[None, None, :])
    np.testing.assert_array_equal(augmented(RandAugment(num_ops=1, ops=[invert]), images), 255 - images)
    mirrored = augmented(RandAugment(num_ops=1, ops=[Op("Mirror", warp=swap)]), images)
    np.testing.assert_array_equal(mirrored, images[:, :, ::-1])
    dark = augmented(RandAugment(magnitude=15, num_ops=1, ops=[Op("Darken", 60.0, pixels=darken)]), images)
    np.testing.assert_array_equal(dark, np.maximum(images.astype(int) - 30, 0))
    drawn = ops.convert_to_numpy(RandAugment(ops=["Rotate", invert]).draw(200)[0])
    assert set(np.unique(drawn)) == {0, 1}


# --- in a model ---


class Traced(RandAugment):
    """Counts how often Python runs through it: once per trace."""

    traces = 0

    def call(self, images, magnitude=None, training=None):
        type(self).traces += bool(training)
        return super().call(images, magnitude, training)


@keras.saving.register_keras_serializable("test_augment")
def output_mean(labels, output):
    return ops.mean(output)


def mean_output(augment):
    """A model whose loss is the mean of the augmented images."""
    model = keras.Sequential(
        [keras.Input((4, 4, 3)), augment, keras.layers.Flatten(), keras.layers.Dense(1, use_bias=False)]
    )
    model.layers[-1].set_weights([np.full((48, 1), 1 / 48)])
    model.compile(keras.optimizers.SGD(0.0), loss=output_mean)
    return model


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.total = [0.0]
        self.traces = []

    def on_train_batch_end(self, batch, logs=None):
        self.total.append(float(logs["loss"]) * (batch + 1))  # logs hold the mean since the epoch began
        self.traces.append(Traced.traces)


@pytest.mark.parametrize("jit_compile", [pytest.param(True, marks=pytest.mark.compiled), False])
def test_an_assignment_acts_on_the_next_step_of_a_running_fit_without_a_retrace(jit_compile):
    if not jit_compile and keras.backend.backend() == "jax":
        pytest.skip("JAX traces nothing then")
    Traced.traces = 0
    augment = Traced(magnitude=0, num_ops=1, ops=["Solarize"])  # at M = 30 everything is inverted
    model = mean_output(augment)
    model.jit_compile = jit_compile
    losses = Losses()
    images = np.full((12, 4, 4, 3), 10.0, "float32")
    scheduler = MagnitudeScheduler(augment, lambda step: 30.0 if step == 3 else 0.0)
    model.fit(images, np.zeros(12), batch_size=2, verbose=0, callbacks=[scheduler, losses])
    np.testing.assert_allclose(np.diff(losses.total), [10, 10, 10, 245, 10, 10], rtol=1e-4)
    if keras.backend.backend() != "torch":  # there, every step is one
        assert losses.traces[1] == losses.traces[-1]
    assert float(augment.magnitude.value) == 0.0
    assert float(model.evaluate(images, np.zeros(12), verbose=0)) == pytest.approx(10)


def test_the_scheduler_assigns_only_changes_and_counts_optimizer_steps():
    assigned = []

    peer = types.SimpleNamespace(magnitude=types.SimpleNamespace(shape=(), assign=assigned.append))

    steps = []
    model = mean_output(keras.layers.Identity())

    def schedule(step):
        steps.append(step)
        return 14 if step < 4 else 4

    for _ in range(2):
        model.fit(
            np.zeros((6, 4, 4, 3)), np.zeros(6), batch_size=2, verbose=0, callbacks=[MagnitudeScheduler(peer, schedule)]
        )
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5, 6]
    assert assigned == [14, 14, 4]


def test_a_saved_model_keeps_the_live_magnitude_and_rows_of_ones_own(tmp_path):
    layer = RandAugment(
        magnitude=14,
        ops=["Rotate", Op("Darken", 60.0, pixels=darken), "Equalize"],
        seed=5,
        fill_value=(124, 116, 104),
        interpolation="bilinear",
    )
    model = mean_output(layer)
    layer.magnitude.assign(7.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False).layers[0]
    assert float(loaded.magnitude.value) == 7.5
    assert loaded.ops == layer.ops
    assert loaded.interpolation == "bilinear"
    assert loaded.get_config() == layer.get_config()
    images = batch_of(16)
    fresh = RandAugment.from_config(layer.get_config())
    np.testing.assert_array_equal(augmented(fresh, images, magnitude=7.5), augmented(layer, images))


def test_a_saved_model_goes_on_with_the_draws_where_it_was(tmp_path):
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), RandomCrop(4, seed=1), RandAugment(14, num_ops=1, ops=["Solarize"], seed=2)]
    )
    images = batch_of(12).astype("float32")
    augmented(model, images)
    model.save(tmp_path / "augment.keras")
    model.save_weights(tmp_path / "augment.weights.h5")
    expected = augmented(model, images)
    loaded = keras.saving.load_model(tmp_path / "augment.keras")
    np.testing.assert_array_equal(augmented(loaded, images), expected)
    assert not np.array_equal(augmented(loaded, images), expected)
    loaded.load_weights(tmp_path / "augment.weights.h5")
    np.testing.assert_array_equal(augmented(loaded, images), expected)


def test_a_crop_reloads_from_its_config():
    crop = RandomCrop(2, value_range=(0, 1), fill_value=0, seed=3)
    again = RandomCrop.from_config(crop.get_config()).get_config()
    assert {"padding": 2, "value_range": (0, 1), "fill_value": 0, "seed": 3}.items() <= again.items()


# --- crop and flip ---


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_random_crop_shows_a_window_of_the_padded_image_per_image(dtype):
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 10, 3)).astype(dtype)
    output = augmented(RandomCrop(padding=4, seed=0), images)
    assert output.dtype == dtype
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=128)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 10), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    found = np.all(windows == output[:, None, None], axis=(3, 4, 5))
    assert np.all(found.sum(axis=(1, 2)) == 1)
    _, y, x = np.nonzero(found)
    assert stats.chisquare(np.bincount(y, minlength=9)).pvalue > 0.001
    assert stats.chisquare(np.bincount(x, minlength=9)).pvalue > 0.001


@pytest.mark.parametrize("fill", [128, (124, 16, 204)])
@pytest.mark.parametrize("value_range", [(0, 255), (0, 1), (-1, 1)])
def test_random_crop_pads_with_the_same_colour_on_every_scale(value_range, fill):
    images, (black, white) = batch_of(24).astype("float32"), value_range
    expected = augmented(RandomCrop(seed=0, fill_value=fill), images)
    assert np.any(np.all(expected == np.float32(fill), axis=(2, 3)))
    crop = RandomCrop(value_range=value_range, seed=0, fill_value=fill)
    output = augmented(crop, images / 255 * (white - black) + black)
    np.testing.assert_allclose((output - black) / (white - black) * 255, expected, atol=1e-3)


def test_keras_random_flip_flips_per_image_and_keeps_the_values():
    images = batch_of(60).astype("float32")
    output = augmented(keras.layers.RandomFlip("horizontal", seed=0), images)
    flipped = np.all(output == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(output == images, axis=(1, 2, 3))
    assert np.all(flipped | same)
    assert 15 < flipped.sum() < 45


# --- images on another scale ---

LAYERS = {
    "RandAugment": lambda value_range=(0, 255): RandAugment(9, num_ops=1, ops=["Solarize"], value_range=value_range),
    "RandomCrop": lambda value_range=(0, 255): RandomCrop(1, value_range=value_range),
}
OTHER_SCALES = {
    "from 0 to 1 under (0, 255)": ((0, 255), lambda images: images / 255),
    "from -1 to 1 under (0, 255)": ((0, 255), lambda images: images / 127.5 - 1),
    "standardised under (0, 255)": ((0, 255), lambda images: (images - 120) / 60),
    "divided by 255 twice": ((0, 1), lambda images: images / 255 / 255),
    "from 0 to 255 under (0, 1)": ((0, 1), lambda images: images),
    "from -1 to 1 under (0, 1)": ((0, 1), lambda images: images / 127.5 - 1),
    "from 0 to 255 under (-1, 1)": ((-1, 1), lambda images: images),
}
REFUSED = (
    r"(?s)needs images with values in value_range=\(0, 255\). Received: values from\W+0\W+to\W+1\W+Give it the range"
)


def full_range(count):
    images = batch_of(count, 4, 4).astype("float32")
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    return images


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scale", OTHER_SCALES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_on_another_scale_are_refused(layer, scale, dtype):
    value_range, change = OTHER_SCALES[scale]
    images = ops.cast(change(full_range(4)), dtype)
    for one_or_many in (images, images[0]):
        with pytest.raises(ValueError, match=rf"{layer} needs images with values in value_range=.*Received: values"):
            LAYERS[layer](value_range)(one_or_many, training=True)
    untouched = LAYERS[layer](value_range)(images, training=False)
    np.testing.assert_array_equal(ops.convert_to_numpy(untouched), ops.convert_to_numpy(images))


@pytest.mark.parametrize("layer", [*LAYERS, "both"])
@pytest.mark.parametrize("jit_compile", [pytest.param(True, marks=pytest.mark.compiled), False])
def test_a_fit_on_another_scale_is_refused_and_in_a_step_compiled_by_xla_the_loss_is_nan(layer, jit_compile):
    chain = [LAYERS[name]() for name in ("RandomCrop", "RandAugment")]  # what is NaN by the first stays NaN
    model = mean_output(keras.Sequential(chain) if layer == "both" else LAYERS[layer]())
    model.jit_compile = jit_compile
    images = full_range(40) / 255
    if jit_compile:
        assert np.isnan(model.fit(images, np.zeros(40), batch_size=20, verbose=0).history["loss"]).all()
        return
    with pytest.raises(Exception, match=REFUSED):  # ValueError on JAX, InvalidArgumentError on TensorFlow
        model.fit(images, np.zeros(40), batch_size=20, verbose=0)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batched", [False, True])
def test_in_tf_data_images_on_another_scale_are_refused(layer, batched):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(full_range(4) / 255)
    dataset = (dataset.batch(4) if batched else dataset).map(LAYERS[layer]())
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{layer} needs images with values in value_range="):
        next(iter(dataset))


@pytest.mark.parametrize("layer", LAYERS)
def test_dark_images_and_slight_overshoots_are_not_taken_for_another_scale(layer):
    black, ones, overshoot = np.zeros((4, 4, 4, 3)), np.ones((4, 4, 4, 3)), full_range(4) * 1.3 - 30
    one_bright_pixel = ones * 0.5
    one_bright_pixel[2, 1, 1] = 90
    for images in (black, ones.astype("uint8"), overshoot, one_bright_pixel):
        images = images if images.dtype == "uint8" else images.astype("float32")
        assert np.all(np.isfinite(augmented(LAYERS[layer](), images)))


# --- tf.data ---


@pytest.mark.tensorflow_only
def test_images_of_a_size_that_the_trace_does_not_know_get_the_same_pixels():
    import tensorflow as tf

    images, random = batch_of(48), np.random.default_rng(0)
    op = np.stack([random.permutation(48) % len(OPS) for _ in range(2)]).astype("int32")
    sign = np.where(np.array([row.signed for row in OPS])[op], random.choice([-1, 1], op.shape), 1)
    argument = (0.6 * sign * np.array([row.argument for row in OPS])[op]).astype("float32")
    per_image = [tf.TensorSpec((2, None), dtype) for dtype in ("int32", "float32")]
    signature = [tf.TensorSpec((None, None, None, 3), "uint8"), *per_image]
    of_any_size = tf.function(lambda *args: apply(OPS, *args), input_signature=signature)
    expected = apply(OPS, *map(tf.constant, (images, op, argument)))
    np.testing.assert_array_equal(of_any_size(images, op, argument), expected)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("batched", [False, True])
def test_in_tf_data_it_augments_images_and_batches_with_a_live_magnitude(batched):
    import tensorflow as tf

    images = batch_of(12)
    layer = RandAugment(magnitude=30, num_ops=1, ops=["Posterize"])
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = (dataset.batch(4).map(layer) if batched else dataset.map(layer).batch(4)).unbatch().batch(12)
    np.testing.assert_array_equal(next(iter(dataset)), images & 0xF0)
    layer.magnitude.assign(0.0)
    np.testing.assert_array_equal(next(iter(dataset)), images)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_in_tf_data_single_images_of_unknown_size_get_the_same_pixels(dtype):
    import tensorflow as tf

    images = [photographs(*size)[0].astype(dtype) for size in ((9, 12), (20, 7), (9, 12))]
    signature = tf.TensorSpec((None, None, 3), dtype)  # what decoded JPEGs are
    dataset = tf.data.Dataset.from_generator(lambda: iter(images), output_signature=signature)
    of_each_kind = ["Identity", "Solarize", "TranslateX", "Color"]
    for build in (lambda: RandAugment(14, ops=of_each_kind, seed=3), lambda: RandomCrop(2, seed=3)):
        mapped, alone = dataset.map(build()), build()
        assert mapped.element_spec == signature
        for output, image in zip(mapped, images, strict=True):
            np.testing.assert_array_equal(output, augmented(alone, image))


@pytest.mark.tensorflow_only
def test_in_tf_data_every_image_of_every_epoch_draws_anew():
    import tensorflow as tf

    images = np.repeat(photographs(32, 32)[:1], 32, axis=0)
    dataset = tf.data.Dataset.from_tensor_slices((images, np.arange(32)))
    augment = RandAugment(magnitude=14, seed=0)
    dataset = dataset.map(lambda image, label: (augment(image), label), num_parallel_calls=2).batch(32)
    first, second = (next(iter(dataset))[0].numpy() for _ in range(2))
    assert len(np.unique(first, axis=0)) > 15
    assert not np.array_equal(first, second)


def test_in_tf_data_on_another_backend_the_error_says_to_put_it_into_the_model():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("it works there")
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(batch_of(4))
    with pytest.raises(RuntimeError, match=r"(?s)TensorFlow backend only.*Put the layer into the model"):
        dataset.map(RandAugment())


@pytest.mark.tensorflow_only
def test_an_exported_saved_model_has_no_augmentation_in_it(tmp_path):
    import tensorflow as tf

    model = mean_output(RandAugment(magnitude=14))
    model.export(tmp_path / "export", verbose=False)
    serve = tf.saved_model.load(tmp_path / "export").signatures["serving_default"]
    operations = {node.op for function in serve.graph.as_graph_def().library.function for node in function.node_def}
    assert "MatMul" in operations
    assert not any("Random" in operation or "Gather" in operation for operation in operations)
    images = np.full((2, 4, 4, 3), 10.0, "float32")
    np.testing.assert_allclose(next(iter(serve(tf.constant(images)).values())), [[10.0], [10.0]], rtol=1e-5)


# --- errors ---


def images_of_any_rank():
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(b"").map(tf.io.decode_image)


@pytest.mark.once("jax")
def test_numpys_seed_is_one_and_64_bits_of_jax_change_nothing():
    images = batch_of(12)
    expected = augmented(RandAugment(9, seed=3), images)
    np.testing.assert_array_equal(augmented(RandAugment(9, seed=np.int64(3)), images), expected)
    with jax_of_64_bits():
        np.testing.assert_array_equal(augmented(RandAugment(9, seed=3), images), expected)


def jax_of_64_bits():
    jax = pytest.importorskip("jax")
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandAugment(magnitude=31), r"in \[0, 30\].*Received: magnitude=31"),
        (lambda: RandAugment(magnitude=-1), r"Received: magnitude=-1"),
        (lambda: RandAugment(magnitude=(9, 3)), r"`\(low, high\)`.*Received: magnitude=\(9, 3\)"),
        (lambda: RandAugment(magnitude=float("nan")), r"Received: magnitude=nan"),
        (lambda: RandAugment()(np.zeros((1, 8, 8, 3), "uint8"), magnitude=99), r"at most 30.*Received: magnitude=99"),
        (lambda: RandAugment()(np.zeros((1, 8, 8, 3), "uint8"), np.array([31.0])), r"at most 30.*magnitude=\[31.\]"),
        (lambda: RandAugment(num_ops=0), r"`num_ops` must be a whole number of at least 1. Received: num_ops=0"),
        (lambda: RandAugment(ops=["Invert"]), r"Allowed names: Identity, ShearX.*Received: ops=\['Invert'\]"),
        (lambda: RandAugment(ops="Rotate"), r"must be a list.*Received: ops='Rotate'"),
        (lambda: RandAugment(ops=[]), r"Received: ops=\[\]"),
        (lambda: RandAugment(value_range=(1, 0)), r"black < white.*Received: value_range=\(1, 0\)"),
        (lambda: RandAugment(fill_value=256), r"Received: fill_value=256"),
        (lambda: RandAugment(fill_value=(0, 256, 0)), r"for each channel. Received: fill_value=\(0, 256, 0\)"),
        (lambda: RandAugment(fill_value=(1, 2)), r"Received: fill_value=\(1, 2\)"),
        pytest.param(
            lambda: images_of_any_rank().map(RandAugment()),
            r"number of axes is known.*expand_animations=False",
            marks=pytest.mark.tensorflow_only,
        ),
        (
            lambda: RandomCrop(fill_value=(1, 2, 3))(np.zeros((1, 8, 8, 1), "uint8"), training=True),
            r"each of the 1 channels.*Received: fill_value=\(1.0, 2.0, 3.0\)",
        ),
        (lambda: RandAugment(interpolation="cubic"), r"\"nearest\" or \"bilinear\". Received: interpolation='cubic'"),
        (lambda: RandomCrop(padding=-1), r"Received: padding=-1"),
        (lambda: RandomCrop(value_range=(1, 1)), r"black < white.*Received: value_range=\(1, 1\)"),
        (lambda: RandomCrop(fill_value=-1), r"`fill_value` must be in \[0, 255\].*Received: fill_value=-1"),
        (lambda: Op("Twice", table=darken, pixels=darken), r"needs one function.*Received.*Twice"),
        (lambda: RandAugment()(np.zeros((2, 8, 8, 4), "float32"), training=True), r"1 or 3.*channels.*\(2, 8, 8, 4\)"),
        (lambda: RandAugment()(np.zeros((8, 8), "float32"), training=True), r"\(height, width, channels\).*\(8, 8\)"),
        (lambda: RandAugment()(np.zeros((2, 8, 8, 3), "int32"), training=True), r"float images, or uint8.*int32"),
        (
            lambda: RandAugment(value_range=(0, 1))(np.zeros((2, 8, 8, 3), "uint8"), training=True),
            r"Received: uint8 images with value_range=\(0, 1\)",
        ),
        (lambda: MagnitudeScheduler(RandAugment((0, 30)), lambda step: 3), r"\(low, high\) pair.*shape \(2,\)"),
        (lambda: MagnitudeScheduler(RandAugment(), lambda step: 31).on_step(7), r"Received: 31.0 at step 7"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed_and_what_came(build, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build()


def test_the_scheduler_refuses_what_is_not_a_schedule_or_has_no_magnitude():
    with pytest.raises(TypeError, match=r"`schedule` must be a function of the step.*Received: schedule=4"):
        MagnitudeScheduler(RandAugment(), 4)
    with pytest.raises(TypeError, match="must have a variable `magnitude`"):
        MagnitudeScheduler(keras.layers.Dense(2), lambda step: 4)


def test_a_dictionary_of_images_is_an_error_that_says_what_is_wanted():
    with pytest.raises(ValueError, match=r"needs images of shape.*as a dict, not one tensor"):
        RandAugment()({"images": np.zeros((2, 4, 4, 3), "uint8")}, training=True)
