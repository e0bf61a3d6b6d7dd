"""The pixel operations against Pillow, on photographs."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from kerascompress import image_ops
from kerascompress.augment import OPS, RandAugment

MAGNITUDES = (0, 4, 8, 12, 14, 22, 30)
NAMES = [row.name for row in OPS]
SIZES = ((32, 32), (40, 56))


def photographs(height, width, mode="RGB"):
    """Six views of scikit-learn's two photographs; the last one is dim, so that there is contrast to gain."""
    photos = [Image.fromarray(photo).convert(mode) for photo in load_sample_images().images]
    crops = [photo.crop((left, 60, left + 240, 300)) for photo in photos for left in (0, 200, 400)]
    views = [np.asarray(crop.resize((width, height), Image.BILINEAR)) for crop in crops]
    views[-1] = views[-1] // 3 + 40
    return np.stack(views).reshape(len(views), height, width, -1)


def pillow(name, magnitude, sign, image, fill=0, resample=Image.NEAREST):
    """The operation of torchvision's RandAugment on a PIL image."""
    u = magnitude / 30
    width, height = image.size

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, resample, fillcolor=fill)

    enhancers = {
        "Brightness": ImageEnhance.Brightness,
        "Color": ImageEnhance.Color,
        "Contrast": ImageEnhance.Contrast,
        "Sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(1 + sign * 0.9 * u)
    return {
        "Identity": lambda: image,
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Posterize": lambda: ImageOps.posterize(image, 8 - round(4 * u)),
        "Solarize": lambda: ImageOps.solarize(image, 255 - 8.5 * magnitude),
        "Rotate": lambda: image.rotate(sign * 30 * u, resample, fillcolor=fill),
        "ShearX": lambda: affine(1, sign * 0.3 * u, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, sign * 0.3 * u, 1, 0),
        "TranslateX": lambda: affine(1, 0, -sign * int(150 / 331 * u * width), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -sign * int(150 / 331 * u * height)),
    }[name]()


def pillow_batch(name, magnitude, sign, images, **kwargs):
    pil_images = [Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]) for image in images]
    return np.stack([pillow(name, magnitude, sign, image, **kwargs) for image in pil_images]).reshape(images.shape)


class Drawn(RandAugment):
    """RandAugment with draws that the test chooses."""

    def __init__(self, op, sign, **kwargs):
        super().__init__(num_ops=len(op), **kwargs)
        self.drawn = np.array(op, "int32"), np.array(sign, "float32")

    def draw(self, batch, magnitude=None):
        op, sign = (ops.convert_to_tensor(drawn) for drawn in self.drawn)
        return op, sign, ops.convert_to_tensor(magnitude, "float32")


def every_case(images, names=NAMES):
    """One batch with every operation, magnitude and sign on every image, and the draws that go with it."""
    cases = [(name, magnitude, sign) for name in names for magnitude in MAGNITUDES for sign in (1, -1)]
    repeated = np.concatenate([images] * len(cases))
    column = [np.repeat(np.array(values), len(images)) for values in zip(*cases, strict=True)]
    op = np.array([NAMES.index(name) for name in column[0]])
    return cases, repeated, op, column[2], column[1].astype("float32")


def run(layer, images, magnitude, mode):
    def call(images, magnitude):
        return layer(images, magnitude=magnitude, training=True)

    if mode != "eager" and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(call, jit_compile=mode == "xla")
    elif mode != "eager" and keras.backend.backend() == "jax":
        import jax

        call = jax.jit(call)
    return ops.convert_to_numpy(call(ops.convert_to_tensor(images), ops.convert_to_tensor(magnitude)))


def check_against_pillow(output, cases, images, **kwargs):
    for k, (name, magnitude, sign) in enumerate(cases):
        ours = output[k * len(images) : (k + 1) * len(images)]
        expected = pillow_batch(name, magnitude, sign, images, **kwargs)
        equal = np.all(ours == expected, axis=-1).mean()
        needed = 0.995 if name in ("Rotate", "ShearX", "ShearY") else 1.0
        assert equal >= needed, (name, magnitude, sign, equal)


def augmented(layer, images, **kwargs):
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(images), training=True, **kwargs))


def batch_of(count, height=32, width=32):
    images = photographs(height, width)
    return np.concatenate([images] * -(-count // len(images)))[:count]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_every_operation_equals_pillow_at_every_magnitude_and_sign(size, mode):
    if mode != "xla" and keras.backend.backend() != "tensorflow":
        pytest.skip("one mode is enough where there is only one")
    images = photographs(*size)
    cases, batch, op, sign, magnitude = every_case(images)
    output = run(Drawn([op], [sign]), batch, magnitude, mode)
    assert output.dtype == np.uint8
    check_against_pillow(output, cases, images)


@pytest.mark.quick
def test_two_operations_in_a_row_equal_pillow_in_that_order():
    images = photographs(32, 32)
    exact = [name for name in NAMES if name not in ("Rotate", "ShearX", "ShearY")]
    first, second = np.array([(a, b) for a in exact for b in exact]).T
    op = np.array([[NAMES.index(name) for name in names] for names in (first, second)])
    batch = images[np.arange(op.shape[1]) % len(images)]
    output = run(Drawn(op, np.ones_like(op)), batch, np.full(len(batch), 14.0, "float32"), "xla")
    for k, image in enumerate(batch):
        expected = pillow(second[k], 14, 1, pillow(first[k], 14, 1, Image.fromarray(image)))
        np.testing.assert_array_equal(output[k], expected, err_msg=f"{first[k]}, {second[k]}")


def test_grey_images_equal_pillow_in_mode_l():
    images = photographs(32, 32, "L")
    cases, batch, op, sign, magnitude = every_case(images)
    check_against_pillow(run(Drawn([op], [sign]), batch, magnitude, "xla"), cases, images)


@pytest.mark.once
def test_the_mean_of_a_large_bright_image_is_its_own():
    white = np.full((1, 3000, 3000, 1), 255, "uint8")  # its sum is beyond int32
    table = ops.convert_to_numpy(image_ops.contrast(ops.convert_to_tensor(white), np.float32([-90])))
    assert table[0, 0, 255] == 255


@pytest.mark.parametrize("fill", [0, 128, (250, 30, 100)])
def test_bilinear_interpolation_and_fill_equal_pillow(fill):
    images = photographs(40, 56)
    names = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"]
    cases, batch, op, sign, magnitude = every_case(images, names)
    output = run(Drawn([op], [sign], interpolation="bilinear", fill_value=fill), batch, magnitude, "xla")
    kwargs = {"fill": fill if isinstance(fill, tuple) else (fill,) * 3, "resample": Image.BILINEAR}
    for k, (name, level, direction) in enumerate(cases):
        expected = pillow_batch(name, level, direction, images, **kwargs)
        difference = np.abs(output[k * len(images) : (k + 1) * len(images)].astype(int) - expected)
        assert (difference == 0).mean() > 0.98, (name, level, direction)
        assert (difference <= 1).mean() > 0.998, (name, level, direction)


def test_auto_contrast_equals_pillow_for_every_pair_of_extremes():
    low, high = np.array([(low, high) for low in range(256) for high in range(low, 256)]).T
    images = np.stack([low, high], axis=1).astype("uint8")[:, :, None, None]
    tables = ops.convert_to_numpy(image_ops.to_bytes(image_ops.auto_contrast(ops.convert_to_tensor(images))))[:, 0]
    value = np.arange(256)
    for k in range(len(low)):  # the loop of PIL.ImageOps.autocontrast
        if high[k] == low[k]:
            expected = value
        else:
            scale = 255.0 / (high[k] - low[k])
            expected = np.clip((value * scale - low[k] * scale).astype(int), 0, 255)
        np.testing.assert_array_equal(tables[k], expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (3, 3), (16, 17)])
def test_tiny_flat_and_two_valued_images_equal_pillow(size):
    rng = np.random.default_rng(0)
    shape = (*size, 3)
    images = np.stack(
        [
            np.full(shape, 7),
            np.full(shape, 255),
            rng.integers(0, 2, shape) * 200,
            rng.integers(0, 256, shape),
            np.zeros(shape),
        ]
    ).astype("uint8")
    names = ["AutoContrast", "Equalize", "Sharpness", "Contrast", "Color"]
    cases, batch, op, sign, magnitude = every_case(images, names)
    check_against_pillow(run(Drawn([op], [sign]), batch, magnitude, "xla"), cases, images)


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_enhance_rounds_like_pillow_at_every_whole_magnitude(mode):
    """All 65536 pairs of a value and its grey, at all 31 magnitudes: no compiler may fuse or reorder the blend."""
    grey, value = np.meshgrid(np.arange(256.0, dtype="float32"), np.arange(256.0, dtype="float32"))
    percent = np.array([sign * 3.0 * m for m in range(31) for sign in (1, -1)], "float32")

    def call(percent, grey, value):
        return image_ops.to_bytes(image_ops.blend(grey[None], value[None], image_ops._factor(percent)[:, None, None]))

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        arguments = [tf.constant(argument) for argument in (percent, grey, value)]
        ours = tf.function(call, jit_compile=mode == "xla")(*arguments)
    elif keras.backend.backend() == "jax":
        import jax

        ours = jax.jit(call)(percent, grey, value)
    else:
        ours = call(*map(ops.convert_to_tensor, (percent, grey, value)))
    ours = ops.convert_to_numpy(ours)
    for k, m_sign in enumerate(percent):
        factor = np.float32((100 + float(m_sign)) / 100)
        expected = np.clip(grey + factor * (value - grey), 0, 255).astype("uint8")
        np.testing.assert_array_equal(ours[k], expected, err_msg=str(m_sign))


def test_operations_come_as_functions_too():
    images = ops.convert_to_tensor(photographs(32, 32))
    table = image_ops.solarize(images, ops.convert_to_tensor(np.linspace(0, 255, 6, dtype="float32")))
    solarized = ops.convert_to_numpy(image_ops.lookup(images, image_ops.to_bytes(table)))
    for k, image in enumerate(ops.convert_to_numpy(images)):
        np.testing.assert_array_equal(solarized[k], ImageOps.solarize(Image.fromarray(image), 255 - k * 51))


# --- the layer, to the bit ---


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_result_of_an_image_does_not_depend_on_its_neighbours(data):
    images = batch_of(12)
    op = np.array(data.draw(st.lists(st.integers(0, 13), min_size=12, max_size=12)))
    sign = np.array(data.draw(st.lists(st.sampled_from([-1, 1]), min_size=12, max_size=12)))
    magnitude = np.float32(data.draw(st.lists(st.floats(0, 30, width=32), min_size=12, max_size=12)))
    together = augmented(Drawn([op, op[::-1]], [sign, sign]), images, magnitude=magnitude)
    k = data.draw(st.integers(0, 11))
    alone = augmented(
        Drawn([op[k : k + 1], op[::-1][k : k + 1]], [sign[k : k + 1]] * 2),
        images[k : k + 1],
        magnitude=magnitude[k : k + 1],
    )
    np.testing.assert_array_equal(together[k], alone[0])


@pytest.mark.parametrize("value_range", [(0, 255), (0, 1), (-1, 1)])
def test_float_images_of_any_range_get_the_same_pixels(value_range):
    images, (black, white) = batch_of(48), value_range
    expected = augmented(RandAugment(magnitude=14, seed=1), images).astype("float64")
    floats = (images / 255 * (white - black) + black).astype("float32")
    output = augmented(RandAugment(magnitude=14, seed=1, value_range=value_range), floats)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected / 255 * (white - black) + black, atol=1e-6 * 255, rtol=0)
    np.testing.assert_array_equal(np.round((output - black) / (white - black) * 255), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_does_not_touch_the_pixels(policy):
    images = batch_of(48)
    expected = augmented(RandAugment(magnitude=(0, 30), seed=1), images)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        mixed = RandAugment(magnitude=(0, 30), seed=1)
        output = augmented(mixed, images.astype("float32"))
    finally:
        keras.config.set_dtype_policy(before)
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output, expected)
