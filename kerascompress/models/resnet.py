"""Residual networks for small images (He et al. 2016, section 4.2), with PyTorch's geometry and initialisation."""

import zlib
from collections.abc import Sequence

import keras

# Channel means and standard deviations of the CIFAR-100 training images; CIFAR-10's lie within 6 units of them.
CIFAR_MEAN = (129.30, 124.07, 112.43)
CIFAR_STD = (68.17, 65.39, 70.42)


def resnet(
    depth: int,
    num_classes: int,
    *,
    input_shape: Sequence[int | None] = (32, 32, 3),
    width: int = 16,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    weight_decay: float | None = 5e-4,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """A CIFAR ResNet with projection shortcuts (option B): pixels in, logits out.

    A 3x3 stem; three stages of (depth - 2) / 6 basic blocks with `width`, `2 * width` and `4 * width` filters, of which
    the second and third start with stride 2; global average pooling; one dense layer.

    Args:
        depth: Number of weighted layers, 6n + 2 with n >= 1: 8, 14, 20, 26, 32, 44, 56, 110 and so on.
        num_classes: Number of logits, at least 1.
        input_shape: (height, width, channels) of an image. Any size; `None` leaves height or width free.
        width: Filters of the first stage.
        mean: Subtracted from the pixels, on their scale of 0 to 255: one number, or one for each channel. By default
            CIFAR-100's with three channels, and the average of those with any other number.
        std: What the pixels are divided by after that, positive. Forms and defaults as for `mean`.
        weight_decay: PyTorch's weight decay, as a penalty of `weight_decay / 2 * sum(w ** 2)` on every trainable
            variable, biases and BatchNorm included. It is part of the model's loss: do not set the optimizer's own
            `weight_decay` as well. 0 or `None` is no penalty.
        seed: Makes the initial weights reproducible. Every layer draws from a seed made of this one and its own name.
            `None` draws from Keras' global seed.
        name: Name of the model, by default "resnet" and the depth.

    Returns:
        A functional `keras.Model` from images `(batch, height, width, channels)`, uint8 or float in [0, 255], to
        logits `(batch, num_classes)`. The stages end at the input of the layer "pool".

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import kerascompress as kc
        >>> kc.models.resnet(8, 10, input_shape=(8, 8, 1), mean=78, std=96).output_shape
        (None, 10)

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (arXiv:1512.03385).
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"`depth` must be 6n + 2 with n >= 1, such as 8, 14, 20, 56 or 110. Received: depth={depth}.")
    if num_classes < 1 or width < 1:
        raise ValueError(
            f"`num_classes` and `width` must be at least 1. Received: num_classes={num_classes}, width={width}."
        )
    if len(input_shape) != 3 or input_shape[2] is None or any(size is not None and size < 1 for size in input_shape):
        raise ValueError(
            "`input_shape` must be (height, width, channels) of one image, without the batch and with the channels "
            f"last; height and width may be None. Received: input_shape={tuple(input_shape)}."
        )
    if weight_decay is not None and weight_decay < 0:
        raise ValueError(f"`weight_decay` must be at least 0 or None. Received: weight_decay={weight_decay}.")
    channels = input_shape[2]
    means = _per_channel("mean", mean, CIFAR_MEAN, channels)
    stds = _per_channel("std", std, CIFAR_STD, channels)
    if min(stds) <= 0:
        raise ValueError(f"`std` must be positive. Received: std={std}.")

    images = keras.Input(tuple(input_shape), name="images")
    offsets = [-m / s for m, s in zip(means, stds, strict=True)]
    x = keras.layers.Rescaling([1 / s for s in stds], offsets, name="normalize")(images)
    x = _conv_bn(x, width, 3, name="stem", weight_decay=weight_decay, seed=seed)
    x = keras.layers.ReLU(name="stem_relu")(x)
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            x = basic_block(
                x,
                width * 2 ** (stage - 1),
                stride=2 if stage > 1 and block == 0 else 1,
                name=f"stage{stage}_block{block}",
                weight_decay=weight_decay,
                seed=seed,
            )
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    bound = x.shape[-1] ** -0.5  # PyTorch's default for a linear layer: uniform in ±1 / sqrt(inputs)
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomUniform(-bound, bound, _layer_seed(seed, "logits/kernel")),
        bias_initializer=keras.initializers.RandomUniform(-bound, bound, _layer_seed(seed, "logits/bias")),
        kernel_regularizer=_penalty(weight_decay),
        bias_regularizer=_penalty(weight_decay),
        name="logits",
    )(x)
    return keras.Model(images, logits, name=name or f"resnet{depth}")


def resnet20(num_classes: int, **kwargs) -> keras.Model:
    """ResNet-20: 272,474 trainable parameters at 10 classes, 278,324 at 100.

    Args:
        num_classes: Number of logits, at least 1.
        **kwargs: Keyword arguments of `resnet`.

    Returns:
        A functional `keras.Model`, see `resnet`.

    Example:
        >>> import kerascompress as kc
        >>> kc.models.resnet20(num_classes=100).output_shape
        (None, 100)
    """
    return resnet(20, num_classes, **kwargs)


def resnet110(num_classes: int, **kwargs) -> keras.Model:
    """ResNet-110, the teacher of the paper: 1,736,564 trainable parameters at 100 classes.

    Args:
        num_classes: Number of logits, at least 1.
        **kwargs: Keyword arguments of `resnet`.

    Returns:
        A functional `keras.Model`, see `resnet`.

    Example:
        >>> import kerascompress as kc
        >>> kc.models.resnet110(num_classes=100).name
        'resnet110'
    """
    return resnet(110, num_classes, **kwargs)


def basic_block(x, filters: int, *, stride: int = 1, name: str, weight_decay: float | None, seed: int | None):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution only where the shape changes (option B)."""
    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = _conv_bn(x, filters, 1, stride, name=f"{name}_shortcut", weight_decay=weight_decay, seed=seed)
    x = _conv_bn(x, filters, 3, stride, name=f"{name}_conv1", weight_decay=weight_decay, seed=seed)
    x = keras.layers.ReLU(name=f"{name}_relu1")(x)
    x = _conv_bn(x, filters, 3, name=f"{name}_conv2", weight_decay=weight_decay, seed=seed)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu2")(x)


def _conv_bn(x, filters, size, stride=1, *, name, weight_decay, seed):
    if stride > 1 and size > 1:
        # PyTorch pads one pixel on every side; at stride 2 "same" would pad below and to the right only.
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    x = keras.layers.Conv2D(
        filters,
        size,
        strides=stride,
        padding="valid" if stride > 1 else "same",
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(
            2.0, "fan_out", "untruncated_normal", _layer_seed(seed, name)
        ),
        kernel_regularizer=_penalty(weight_decay),
        name=name,
    )(x)
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        beta_regularizer=_penalty(weight_decay),
        gamma_regularizer=_penalty(weight_decay),
        name=f"{name}_bn",
    )(x)


def _layer_seed(seed, name):
    # From the name, not from a counter: seeds of neighbouring runs do not overlap, and extra layers change no others.
    return None if seed is None else zlib.crc32(f"{seed}/{name}".encode())


def _penalty(weight_decay):
    return keras.regularizers.L2(weight_decay / 2) if weight_decay else None


def _per_channel(name, value, default, channels):
    if value is None:
        value = default if channels == len(default) else sum(default) / len(default)
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * channels
    if len(values) != channels:
        raise ValueError(
            f"`{name}` must be one number or one for each of the {channels} channels. Received: {name}={value}."
        )
    return values
