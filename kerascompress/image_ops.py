"""Batched pixel operations: pure functions on images and per-image arguments, equal to Pillow's to the bit.

Images are `(batch, height, width, channels)` with whole values 0..255, one channel (grey) or three (RGB); an argument
is one number per image, shape `(batch,)`. Most operations do not touch pixels at all. They describe what is to be
done, in one of two forms that are cheap to apply to a whole batch:

- a look-up table per image and channel, `(batch, 1 or channels, 256)`, applied by `lookup`;
- an inverse affine map per image, `(batch, 6)`, applied by `warp`.

`color` and `sharpness` are neither and return pixels. All but a gather is written in `keras.ops`, and all runs in
graph, eager and XLA mode. Tables and pixels come back as floats; `to_bytes` cuts their fractions off, as Pillow does.
"""

import functools

import keras
import numpy as np
from keras import ops

_FIXED_POINT = 65536.0  # Pillow walks through the source image in 16.16 fixed point


def to_bytes(values):
    """Clip to 0..255 and cut fractions off (Pillow does not round)."""
    if keras.backend.standardize_dtype(values.dtype) == "uint8":
        return values
    return ops.cast(ops.clip(values, 0, 255), "uint8")


def lookup(images, tables):
    """Replace every value by its entry in the table of its image and channel.

    Args:
        images: uint8 `(batch, height, width, channels)`.
        tables: `(batch, channels, 256)`, or `(batch, 1, 256)` for all channels alike.

    Returns:
        `(batch, height, width, channels)` of the dtype of `tables`.
    """
    batch, channels = ops.shape(tables)[0], tables.shape[1]
    start = 256 * ops.reshape(ops.arange(batch * channels, dtype="int32"), (-1, 1, 1, channels))
    if keras.backend.backend() == "torch" and channels > 1:  # rows as one axis: it loops slowly over one of 3
        height, width = images.shape[1:3]
        rows = ops.reshape(ops.cast(images, "int32"), (batch, height, 1, width * channels))
        rows = rows + ops.tile(start, (1, 1, 1, width))
        return ops.reshape(gather(ops.reshape(tables, (-1,)), rows), (batch, height, width, channels))
    return gather(ops.reshape(tables, (-1,)), ops.cast(images, "int32") + start)


def warp(images, matrix, *, fill_value=0, interpolation="nearest"):
    """Map every image through its inverse affine map, as `PIL.Image.transform` does.

    The output pixel (x, y) shows the input at `(a x + b y + c, d x + e y + f)`, where pixel centres lie at halves.

    Args:
        images: `(batch, height, width, channels)`.
        matrix: float32 `(batch, 6)`, the coefficients a to f of each image, in pixels.
        fill_value: what is shown outside of the input, a number or one for each channel.
        interpolation: `"nearest"` or `"bilinear"`.

    Returns:
        `(batch, height, width, channels)` in the dtype of `images`, or float32 if `"bilinear"`.
    """
    batch, height, width, channels = ops.shape(images)
    fill_value = ops.convert_to_tensor(fill_value)
    flat = ops.reshape(images, (-1, channels))
    start = ops.reshape(ops.arange(batch, dtype="int32"), (-1, 1, 1)) * (height * width)
    a, b, c, d, e, f = (coefficient[:, None, None] for coefficient in ops.unstack(matrix, 6, axis=1))
    x = ops.arange(width, dtype="int32")[None, None, :]
    y = ops.arange(height, dtype="int32")[None, :, None]

    def pick(source_x, source_y):
        return gather(flat, start + source_y * width + source_x)

    if interpolation == "nearest":
        a, b, c, d, e, f = (
            ops.cast(ops.floor(value * _FIXED_POINT + 0.5), "int32")
            for value in (a, b, c + (a + b) * 0.5, d, e, f + (d + e) * 0.5)
        )
        source_x = ops.right_shift(a * x + (b * y + c), 16)
        source_y = ops.right_shift(d * x + (e * y + f), 16)
        inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
        if keras.backend.backend() == "torch":  # one pixel more, the fill value: it loops slowly over an axis of 3
            fill = ops.broadcast_to(ops.cast(fill_value, flat.dtype), (1, channels))
            index = ops.where(inside, start + source_y * width + source_x, flat.shape[0])
            return gather(ops.concatenate([flat, fill]), index)
        pixels = pick(ops.where(inside, source_x, 0), ops.where(inside, source_y, 0))
    else:
        x, y = ops.cast(x, "float32") + 0.5, ops.cast(y, "float32") + 0.5
        source_x, source_y = a * x + (b * y + c), d * x + (e * y + f)
        size_x, size_y = ops.cast(width, "float32"), ops.cast(height, "float32")
        inside = (source_x >= 0) & (source_x < size_x) & (source_y >= 0) & (source_y < size_y)
        left, top = ops.floor(source_x - 0.5), ops.floor(source_y - 0.5)
        right_share, bottom_share = (source_x - 0.5 - left)[..., None], (source_y - 0.5 - top)[..., None]
        left, top = ops.cast(left, "int32"), ops.cast(top, "int32")

        def pick_row(row):
            row = ops.clip(row, 0, height - 1)
            first = ops.cast(pick(ops.clip(left, 0, width - 1), row), "float32")
            second = ops.cast(pick(ops.clip(left + 1, 0, width - 1), row), "float32")
            return first + (second - first) * right_share

        upper = pick_row(top)
        pixels = upper + (pick_row(top + 1) - upper) * bottom_share
    return ops.where(inside[..., None], pixels, ops.cast(fill_value, pixels.dtype))


# --- look-up tables ---


def brightness(images, percent):
    """The table that blends with black: by `100 + percent` per cent of the image."""
    return blend(0.0, _ramp(), _factor(percent)[:, None, None])


def contrast(images, percent):
    """The table that blends with the rounded mean grey of the image: by `100 + percent` per cent of the image."""
    pixels = ops.shape(images)[1] * ops.shape(images)[2]
    # from the middle grey on: int32 holds the total of 2 ** 24 pixels, and without it of half as many
    total = ops.sum(ops.cast(grey(images), "int32") - 128, axis=(1, 2, 3))
    mean, rest = 128 + ops.floor_divide(total, pixels), ops.mod(total, pixels)  # twice the total may be too large
    mean += ops.cast(2 * rest >= pixels, "int32")
    return blend(ops.cast(mean, "float32")[:, None, None], _ramp(), _factor(percent)[:, None, None])


def posterize(images, bits):
    """The table that zeroes the `bits` lowest bits, rounded to a whole number."""
    bits = ops.clip(ops.round(bits), 0, 8)  # in a table that is made for all images, `bits` may be degrees
    step = ops.left_shift(1, ops.cast(bits, "int32"))[:, None, None]
    ramp = ops.cast(_ramp(), "int32")
    return ops.cast(ramp - ops.mod(ramp, step), "float32")


def solarize(images, depth):
    """The table that inverts the values from `255 - depth` upward."""
    return ops.where(_ramp() < 255.0 - depth[:, None, None], _ramp(), 255.0 - _ramp())


def auto_contrast(images, argument=None):
    """The table that stretches every channel to 0..255; a constant channel stays. The argument is ignored."""
    values = ops.reshape(images, (ops.shape(images)[0], -1, images.shape[-1]))
    low = ops.cast(ops.min(values, axis=1), "int32")[..., None]
    span = ops.cast(ops.max(values, axis=1), "int32")[..., None] - low
    ramp = ops.cast(_ramp(), "int32")
    scaled, divisor = 255 * (ramp - low), ops.maximum(span, 1)
    table = ops.floor_divide(scaled, divisor)
    # Pillow computes in float64, which JAX lacks: where the quotient is whole, its rounding errors may fall one short.
    error, limit = (ops.convert_to_tensor(constant) for constant in _float64_rounding())
    error = ops.reshape(error, (-1,))
    error = gather(error, 256 * span + ramp) - gather(error, 256 * span + low)
    short = (table * divisor == scaled) & (error < gather(limit, ops.clip(table, 0, 255)))
    table = ops.cast(table, "float32") - ops.cast(short, "float32")
    return ops.where(span > 0, table, _ramp())


def equalize(images, argument=None):
    """The table that flattens the histogram of every channel. The argument is ignored."""
    batch, channels = ops.shape(images)[0], images.shape[-1]
    start = 256 * ops.reshape(ops.arange(batch * channels, dtype="int32"), (-1, 1, 1, channels))
    slots = ops.reshape(ops.cast(images, "int32") + start, (-1,))
    counts = ops.segment_sum(ops.ones_like(slots), slots, num_segments=batch * channels * 256)
    counts = ops.reshape(counts, (batch, channels, 256))
    below = ops.cumsum(counts, axis=-1) - counts
    # all but the brightest value present: what lies below the last value that has anything at or above it
    total = below[..., -1:] + counts[..., -1:]
    all_but_last = ops.max(ops.where(below < total, below, 0), axis=-1, keepdims=True)
    step = ops.floor_divide(all_but_last, 255)
    table = ops.floor_divide(below + ops.floor_divide(step, 2), ops.maximum(step, 1))
    return ops.where(step > 0, ops.cast(table, "float32"), _ramp())


# --- affine maps ---


def rotate(degrees, height, width):
    """The map that turns counter-clockwise about the centre of the image."""
    radians = degrees * (np.pi / 180.0)
    cos, sin = ops.cos(radians), ops.sin(radians)
    x, y = ops.cast(width, "float32") / 2.0, ops.cast(height, "float32") / 2.0
    return ops.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], axis=1)


def shear_x(slope, height, width):
    """The map that slides rows to the left, the further down the more, about the top-left corner."""
    zero, one = ops.zeros_like(slope), ops.ones_like(slope)
    return ops.stack([one, slope, zero, zero, one, zero], axis=1)


def shear_y(slope, height, width):
    """The map that slides columns upward, the further right the more, about the top-left corner."""
    zero, one = ops.zeros_like(slope), ops.ones_like(slope)
    return ops.stack([one, zero, zero, slope, one, zero], axis=1)


def translate_x(share, height, width):
    """The map that moves to the right by `share` 331ths of the width, truncated to whole pixels."""
    zero, one = ops.zeros_like(share), ops.ones_like(share)
    return ops.stack([one, zero, -_truncated(share, width), zero, one, zero], axis=1)


def translate_y(share, height, width):
    """The map that moves down by `share` 331ths of the height, truncated to whole pixels."""
    zero, one = ops.zeros_like(share), ops.ones_like(share)
    return ops.stack([one, zero, zero, zero, one, -_truncated(share, height)], axis=1)


# --- pixels ---


def color(images, percent):
    """Blend with the grey image: by `100 + percent` per cent of the image. A grey image stays."""
    return blend(grey(images), ops.cast(images, "float32"), _factor(percent)[:, None, None, None])


def sharpness(images, percent):
    """Blend with the smoothed image: by `100 + percent` per cent of the image. The border of one pixel stays."""
    height, width, channels = ops.shape(images)[1:]
    flat = ops.reshape(ops.cast(images, "float32"), (-1, height, width * channels))
    padded = ops.pad(flat, ((0, 0), (1, 1), (channels, channels)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    weighted = rows[:, :, : -2 * channels] + rows[:, :, channels:-channels] + rows[:, :, 2 * channels :] + 4.0 * flat
    x, y = ops.arange(width * channels, dtype="int32"), ops.arange(height, dtype="int32")[:, None]
    inner = (x >= channels) & (x < (width - 1) * channels) & (y >= 1) & (y < height - 1)
    smooth = ops.where(inner, ops.floor((weighted + 6.5) / 13.0), flat)
    return ops.reshape(blend(smooth, flat, _factor(percent)[:, None, None]), (-1, height, width, channels))


def grey(images):
    """Pillow's luminance, float32 `(batch, height, width, 1)`, whole numbers."""
    images = ops.cast(images, "float32")
    if images.shape[-1] == 1:
        return images
    red, green, blue = images[..., 0:1], images[..., 1:2], images[..., 2:3]
    return ops.floor((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) / 65536.0)  # exact: all under 2 ** 24


def blend(degenerate, values, factor):
    """`degenerate + factor * (values - degenerate)` in float32, rounded after the product and after the sum.

    Compilers like to fuse the two into one instruction that rounds once, which changes pixels where the result is near
    a whole number. Splitting the factor makes both products exact, so that fused or not the result is the same.
    """
    high, rest = _split(factor)
    difference = values - degenerate
    return degenerate + (
        high * difference - rest * difference
    )  # a sum of three would be reordered by TensorFlow's graphs


def _split(factor):
    """Two floats whose difference is `factor` and that leave room for an exact product with a number of 8 bits."""
    high = ops.round(factor * 4096.0) / 4096.0
    return high, high - factor


def _factor(percent):
    """`(100 + percent) / 100`, rounded once: compilers multiply by 0.01 instead, which a step of Newton's corrects."""
    quotient = (100.0 + percent) * 0.01
    high, rest = _split(quotient)
    return quotient + 0.01 * ((100.0 + percent - 100.0 * high) + 100.0 * rest)


def _truncated(share, size):
    # the nudge, far under a pixel, keeps whole quotients whole where a compiler multiplies by 1 / 331
    return ops.sign(share) * ops.floor((ops.abs(share) * ops.cast(size, "float32") + 2.0**-6) / 331.0)


def _ramp():
    return ops.reshape(ops.arange(256, dtype="float32"), (1, 1, 256))


@functools.lru_cache
def _float64_rounding():
    """How far `value * (255 / span)` is off in float64, (span, value), and what is too far for each result, (256,)."""
    span, value = np.arange(256.0)[:, None], np.arange(256.0)[None, :]
    product = value * (255.0 / np.maximum(span, 1.0))
    high = product.astype("float32").astype("float64")  # the two halves times 8 bits are exact
    error = ((high * span - 255.0 * value) + (product - high) * span) / np.maximum(span, 1.0)
    half_step = 0.504 * np.spacing(np.maximum(np.arange(256.0), 1.0) - 1e-9)  # a tie still rounds to the whole number
    return error.astype("float32"), -half_step.astype("float32")


def gather(values, indices):
    """`values[indices]` along the first axis, for indices that are known to be inside."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(values, indices)
    if keras.backend.backend() == "jax":
        return values.at[indices].get(mode="promise_in_bounds")
    import torch

    return torch.index_select(values, 0, indices.reshape(-1)).reshape(*indices.shape, *values.shape[1:])
