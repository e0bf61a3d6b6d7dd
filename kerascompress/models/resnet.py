"""Residual networks (He et al. 2016), of the kind made for small images."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras

from kerascompress.models.layers import classifier, conv_bn, conv_bn_relu, max_pool, normalised_images


def resnet(
    depth: int,
    num_classes: int,
    *,
    width: int = 16,
    stem: str = "cifar",
    input_shape: Sequence[int | None] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    weight_decay: float | None = 5e-4,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """A ResNet with projection shortcuts (option B): pixels in, logits out.

    A stem; three stages of (depth - 2) / 6 basic blocks with `width`, `2 * width` and `4 * width` filters, of which the
    second and third start with stride 2; global average pooling; one dense layer.

    Args:
        depth: Number of weighted layers, 6n + 2 with n >= 1: 8, 14, 20, 26, 32, 44, 56, 110 and so on.
        num_classes: Number of logits, at least 1.
        width: Filters of the stem and the first stage.
        stem: "cifar", a 3x3 convolution, or "imagenet", a 7x7 convolution and a max-pooling, both with stride 2.
        input_shape: (height, width, channels) of an image. Any size; `None` leaves height or width free. By default
            (32, 32, 3) with the CIFAR stem and (224, 224, 3) with the ImageNet stem.
        mean: Subtracted from the pixels, on their scale of 0 to 255: one number, or one for each channel. By default
            CIFAR-100's or ImageNet's, as the stem says, with three channels, and the average of those with any other
            number.
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
        ValueError: If an argument is out of range, or `keras.config.image_data_format()` is not "channels_last".

    Example:
        >>> import kerascompress as kc
        >>> kc.models.resnet(8, 10, input_shape=(8, 8, 1), mean=78, std=96).output_shape
        (None, 10)

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, and for the ImageNet
        stem table 1 (arXiv:1512.03385).
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"`depth` must be 6n + 2 with n >= 1, such as 8, 14, 20, 56 or 110. Received: depth={depth}.")
    images, x = normalised_images(
        num_classes, width=width, stem=stem, input_shape=input_shape, mean=mean, std=std, weight_decay=weight_decay
    )
    settings: dict[str, Any] = {"weight_decay": weight_decay, "seed": seed}
    size, stride = (3, 1) if stem == "cifar" else (7, 2)
    x = conv_bn_relu(x, width, size, stride, name="stem", **settings)
    if stem == "imagenet":
        x = max_pool(x, name="stem_pool")
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 1 and block == 0 else 1
            x = basic_block(x, width * 2 ** (stage - 1), stride=stride, name=f"stage{stage}_block{block}", **settings)
    return classifier(images, x, num_classes, name=name or f"resnet{depth}", **settings)


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
    conv = partial(conv_bn, weight_decay=weight_decay, seed=seed)
    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = conv(x, filters, 1, stride, name=f"{name}_shortcut")
    x = conv(x, filters, 3, stride, name=f"{name}_conv1")
    x = keras.layers.ReLU(name=f"{name}_relu1")(x)
    x = conv(x, filters, 3, name=f"{name}_conv2")
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu2")(x)
