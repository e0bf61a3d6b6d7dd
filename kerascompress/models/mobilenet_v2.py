"""MobileNetV2 (Sandler et al. 2018) for CIFAR and for ImageNet."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras

from kerascompress.models.layers import classifier, conv_bn, conv_bn_relu, normalised_images

# A row is a stage: expansion, channels at width 1, blocks, stride of the first (table 2 of the paper).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    num_classes: int,
    *,
    width: float = 1.0,
    stem: str = "cifar",
    input_shape: Sequence[int | None] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    weight_decay: float | None = 5e-4,
    dropout: float = 0.0,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """MobileNetV2: 2,236,682 trainable parameters at 10 classes; with the ImageNet stem 3,504,872 at 1000.

    A 3x3 stem; seven stages of inverted residuals; a 1x1 convolution; global average pooling; one dense layer. The
    published numbers of parameters count no moving statistics of BatchNorm.

    Args:
        num_classes: Number of logits, at least 1.
        width: Multiplies the channels of stem and stages, and above 1 those of the last convolution; positive. Channels
            are rounded to multiples of 8, at least 8 and not more than 10% down.
        stem: "imagenet" halves height and width in the stem and at the start of stages 2, 3, 4 and 6; "cifar" only at
            the start of stages 3, 4 and 6.
        input_shape: (height, width, channels) of an image. Any size; `None` leaves height or width free. By default
            (32, 32, 3) with the CIFAR stem and (224, 224, 3) with the ImageNet stem.
        mean: Subtracted from the pixels, on their scale of 0 to 255: one number, or one for each channel. By default
            CIFAR-100's or ImageNet's, as the stem says, with three channels, and the average of those with any other
            number.
        std: What the pixels are divided by after that, positive. Forms and defaults as for `mean`.
        weight_decay: PyTorch's weight decay, as in `resnet`: an L2 penalty in the model's loss. 0 or `None` is none.
        dropout: Fraction of the features that is dropped before the last layer, in [0, 1). Published recipes take 0.2.
        seed: Makes the initial weights reproducible. Every layer draws from a seed made of this one and its own name.
            `None` draws from Keras' global seed.
        name: Name of the model, by default "mobilenet_v2".

    Returns:
        A functional `keras.Model` from images `(batch, height, width, channels)`, uint8 or float in [0, 255], to
        logits `(batch, num_classes)`. The stages end at the input of the layer "head".

    Raises:
        ValueError: If an argument is out of range, or `keras.config.image_data_format()` is not "channels_last".

    Example:
        >>> import kerascompress as kc
        >>> kc.models.mobilenet_v2(100, width=0.25).get_layer("head").input.shape
        (None, 4, 4, 80)

    Reference:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018
        (arXiv:1801.04381).
    """
    images, x = normalised_images(
        num_classes, width=width, stem=stem, input_shape=input_shape, mean=mean, std=std, weight_decay=weight_decay
    )
    settings: dict[str, Any] = {"weight_decay": weight_decay, "seed": seed}
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout}.")
    cifar = stem == "cifar"
    conv = partial(conv_bn_relu, max_value=6.0, weight_decay=weight_decay, seed=seed)
    x = conv(x, _channels(32 * width), 3, 1 if cifar else 2, name="stem")
    for stage, (expansion, channels, blocks, stride) in enumerate(STAGES, start=1):
        for block in range(blocks):
            x = inverted_residual(
                x,
                _channels(channels * width),
                stride=1 if block > 0 or (cifar and stage == 2) else stride,
                expansion=expansion,
                name=f"stage{stage}_block{block}",
                **settings,
            )
    x = conv(x, _channels(1280 * max(1.0, width)), 1, name="head")
    return classifier(images, x, num_classes, dropout=dropout, name=name or "mobilenet_v2", **settings)


def inverted_residual(
    x,
    filters: int,
    *,
    stride: int = 1,
    expansion: int = 6,
    name: str,
    weight_decay: float | None,
    seed: int | None,
):
    """A 1x1 convolution to `expansion` times the channels, a 3x3 depthwise one, and a linear 1x1 one to `filters`."""
    conv = partial(conv_bn_relu, max_value=6.0, weight_decay=weight_decay, seed=seed)
    shortcut = x
    if expansion != 1:
        x = conv(x, expansion * x.shape[-1], 1, name=f"{name}_expand")
    x = conv(x, None, 3, stride, name=f"{name}_depthwise")
    x = conv_bn(x, filters, 1, name=f"{name}_project", weight_decay=weight_decay, seed=seed)
    if stride != 1 or shortcut.shape[-1] != filters:
        return x
    return keras.layers.Add(name=f"{name}_add")([x, shortcut])


def _channels(exact: float) -> int:
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8
