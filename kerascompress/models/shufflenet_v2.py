"""ShuffleNetV2 (Ma et al. 2018) for CIFAR and for ImageNet."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from kerascompress.models.layers import classifier, conv_bn, conv_bn_relu, max_pool, normalised_images

# Channels of the three stages by width (table 5 of the paper; 2.0 as torchvision has it).
STAGES = {0.5: (48, 96, 192), 1.0: (116, 232, 464), 1.5: (176, 352, 704), 2.0: (244, 488, 976)}


def shufflenet_v2(
    num_classes: int,
    *,
    width: float = 1.0,
    stem: str = "cifar",
    input_shape: Sequence[int | None] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    weight_decay: float | None = 5e-4,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """ShuffleNetV2: 1,263,854 trainable parameters at 10 classes; with the ImageNet stem 2,278,604 at 1000.

    A 3x3 stem of 24 filters; stages of 4, 8 and 4 units, each of which halves height and width in its first; a 1x1
    convolution; global average pooling; one dense layer.

    Args:
        num_classes: Number of logits, at least 1.
        width: Chooses the channels of the stages, positive: as published at 0.5, 1.0, 1.5 and 2.0, otherwise those of
            1.0 multiplied and rounded to even numbers. The last convolution has 1024 filters, from 2.0 on 2048.
        stem: "cifar", a 3x3 convolution, or "imagenet", the same and a max-pooling, both with stride 2.
        input_shape: (height, width, channels) of an image. Any size; `None` leaves height or width free. By default
            (32, 32, 3) with the CIFAR stem and (224, 224, 3) with the ImageNet stem. With both free,
            channels are shuffled by slower operations.
        mean: Subtracted from the pixels, on their scale of 0 to 255: one number, or one for each channel. By default
            CIFAR-100's or ImageNet's, as the stem says, with three channels, and the average of those with any other
            number.
        std: What the pixels are divided by after that, positive. Forms and defaults as for `mean`.
        weight_decay: PyTorch's weight decay, as in `resnet`: an L2 penalty in the model's loss. 0 or `None` is none.
        seed: Makes the initial weights reproducible. Every layer draws from a seed made of this one and its own name.
            `None` draws from Keras' global seed.
        name: Name of the model, by default "shufflenet_v2".

    Returns:
        A functional `keras.Model` from images `(batch, height, width, channels)`, uint8 or float in [0, 255], to
        logits `(batch, num_classes)`. The stages end at the input of the layer "head".

    Raises:
        ValueError: If an argument is out of range, or `keras.config.image_data_format()` is not "channels_last".

    Example:
        >>> import kerascompress as kc
        >>> kc.models.shufflenet_v2(100, width=0.25).get_layer("head").input.shape
        (None, 4, 4, 116)

    Reference:
        Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018
        (arXiv:1807.11164).
    """
    images, x = normalised_images(
        num_classes, width=width, stem=stem, input_shape=input_shape, mean=mean, std=std, weight_decay=weight_decay
    )
    settings: dict[str, Any] = {"weight_decay": weight_decay, "seed": seed}
    conv = partial(conv_bn_relu, weight_decay=weight_decay, seed=seed)
    x = conv(x, 24, 3, 1 if stem == "cifar" else 2, name="stem")
    if stem == "imagenet":
        x = max_pool(x, name="stem_pool")
    stages = STAGES.get(width) or [max(2, 2 * round(channels * width / 2)) for channels in STAGES[1.0]]
    for stage, (channels, units) in enumerate(zip(stages, (4, 8, 4), strict=True), start=1):
        for unit in range(units):
            x = shuffle_unit(x, channels, stride=1 if unit > 0 else 2, name=f"stage{stage}_block{unit}", **settings)
    x = conv(x, 1024 if width < 2 else 2048, 1, name="head")
    return classifier(images, x, num_classes, name=name or "shufflenet_v2", **settings)


def shuffle_unit(x, filters: int, *, stride: int = 1, name: str, weight_decay: float | None, seed: int | None):
    """One half of the channels as it is, three convolutions of the other, shuffled; where the shape changes, both."""
    conv = partial(conv_bn_relu, weight_decay=weight_decay, seed=seed)
    depthwise = partial(conv_bn, filters=None, size=3, stride=stride, weight_decay=weight_decay, seed=seed)
    if stride != 1 or x.shape[-1] != filters:
        shortcut = depthwise(x, name=f"{name}_shortcut_depthwise")
        shortcut = conv(shortcut, filters // 2, 1, name=f"{name}_shortcut")
    else:
        shortcut, x = _as_layer(_halves, x, f"{name}_split")
    x = conv(x, filters // 2, 1, name=f"{name}_conv1")
    x = depthwise(x, name=f"{name}_depthwise")
    x = conv(x, filters // 2, 1, name=f"{name}_conv2")
    x = keras.layers.Concatenate(name=f"{name}_concat")([shortcut, x])
    return _shuffle(x, name)


def _shuffle(x, name):
    """Alternates between the channels of the first and of the second half."""
    *size, channels = x.shape[1:]
    if size == [None, None]:  # more than a Reshape can leave free
        return _as_layer(_interleaved, x, f"{name}_shuffle")
    size = [-1 if each is None else each for each in size]
    x = keras.layers.Reshape((*size, 2, channels // 2), name=f"{name}_halves")(x)
    x = keras.layers.Permute((1, 2, 4, 3), name=f"{name}_permute")(x)
    return keras.layers.Reshape((*size, channels), name=f"{name}_shuffle")(x)


def _as_layer(compute, x, name):
    # The operations of `keras.ops` get names from a counter, which in a model that was loaded could be taken.
    inputs = keras.Input(x.shape[1:], dtype=x.dtype)
    return keras.Model(inputs, compute(inputs), name=name)(x)


def _halves(x):
    return keras.ops.split(x, 2, axis=-1)


def _interleaved(x):
    first, second = (keras.ops.repeat(half, 2, axis=-1) for half in _halves(x))
    return keras.ops.where(np.arange(x.shape[-1]) % 2 == 0, first, second)
