"""What the networks share: PyTorch's geometry, initialisation and weight decay, pixels in and logits out."""

import zlib

import keras
import numpy as np

# Size of an image, and channel means and standard deviations: of the CIFAR-100 training images (CIFAR-10's lie within 6
# units of them), and those that are customary for ImageNet.
STEMS = {
    "cifar": ((32, 32, 3), (129.30, 124.07, 112.43), (68.17, 65.39, 70.42)),
    "imagenet": ((224, 224, 3), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def normalised_images(num_classes, *, width, stem, input_shape, mean, std, weight_decay):
    """The input and what is made of its pixels, once the arguments that all networks share are found good."""
    if stem not in STEMS:
        raise ValueError(f"`stem` must be one of {tuple(STEMS)}. Received: stem={stem!r}.")
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "These networks take images with the channels last. Received: keras.config.image_data_format() = "
            f"{keras.config.image_data_format()!r}. Call keras.config.set_image_data_format('channels_last')."
        )
    if num_classes < 1 or width <= 0:
        raise ValueError(
            "`num_classes` must be at least 1 and `width` positive. "
            f"Received: num_classes={num_classes}, width={width}."
        )
    default_shape, default_mean, default_std = STEMS[stem]
    shape = default_shape if input_shape is None else tuple(input_shape)
    if len(shape) != 3 or shape[2] is None or any(size is not None and size < 1 for size in shape):
        raise ValueError(
            "`input_shape` must be (height, width, channels) of one image, without the batch and with the channels "
            f"last; height and width may be None. Received: input_shape={shape}."
        )
    if weight_decay is not None and weight_decay < 0:
        raise ValueError(f"`weight_decay` must be at least 0 or None. Received: weight_decay={weight_decay}.")
    means = _per_channel("mean", mean, default_mean, shape[2])
    stds = _per_channel("std", std, default_std, shape[2])
    if min(stds) <= 0:
        raise ValueError(f"`std` must be positive. Received: std={std}.")

    images = keras.Input(shape, name="images")
    offsets = [-m / s for m, s in zip(means, stds, strict=True)]
    return images, keras.layers.Rescaling([1 / s for s in stds], offsets, name="normalize")(images)


def conv_bn(x, filters, size, stride=1, *, name, weight_decay, seed):
    """A convolution without bias, depthwise where `filters` is None, and BatchNorm."""
    if stride > 1 and size > 1:
        # PyTorch pads alike on every side; at stride 2 "same" would pad more below and to the right.
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    # He et al. with PyTorch's fan_out, which for a depthwise kernel counts all channels, as Keras' fan_in does.
    mode = "fan_out" if filters else "fan_in"
    initializer = keras.initializers.VarianceScaling(2.0, mode, "untruncated_normal", _layer_seed(seed, name))
    settings = {"strides": stride, "padding": "valid" if stride > 1 else "same", "use_bias": False, "name": name}
    if filters:
        convolution = keras.layers.Conv2D(
            filters, size, kernel_initializer=initializer, kernel_regularizer=_penalty(weight_decay), **settings
        )
    else:
        convolution = keras.layers.DepthwiseConv2D(
            size, depthwise_initializer=initializer, depthwise_regularizer=_penalty(weight_decay), **settings
        )
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        beta_regularizer=_penalty(weight_decay),
        gamma_regularizer=_penalty(weight_decay),
        name=f"{name}_bn",
    )(convolution(x))


def conv_bn_relu(x, filters, size, stride=1, *, max_value=None, name, weight_decay, seed):
    x = conv_bn(x, filters, size, stride, name=name, weight_decay=weight_decay, seed=seed)
    return keras.layers.ReLU(max_value, name=f"{name}_relu")(x)


def max_pool(x, *, name):
    """3x3 at stride 2. What comes out of a ReLU may be padded with zeros where PyTorch pads with −∞."""
    x = keras.layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return keras.layers.MaxPooling2D(3, 2, name=name)(x)


def classifier(images, x, num_classes, *, dropout=0.0, weight_decay, seed, name):
    """The model from `images` to the logits of what the stages make of them."""
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    if dropout:
        dropout_seed = None if seed is None else _layer_seed(seed, "dropout") % 2**31  # on Torch, Keras takes no more
        x = keras.layers.Dropout(dropout, seed=dropout_seed, name="dropout")(x)
    bound = x.shape[-1] ** -0.5  # PyTorch's default for a linear layer: uniform in ±1 / sqrt(inputs)
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomUniform(-bound, bound, _layer_seed(seed, "logits/kernel")),
        bias_initializer=keras.initializers.RandomUniform(-bound, bound, _layer_seed(seed, "logits/bias")),
        kernel_regularizer=_penalty(weight_decay),
        bias_regularizer=_penalty(weight_decay),
        name="logits",
    )(x)
    return keras.Model(images, logits, name=name)


def _layer_seed(seed, name):
    # From the name, not from a counter: seeds of neighbouring runs do not overlap, and extra layers change no others.
    return None if seed is None else zlib.crc32(f"{seed}/{name}".encode())


def _penalty(weight_decay):
    return keras.regularizers.L2(weight_decay / 2) if weight_decay else None


def _per_channel(name, value, default, channels):
    if value is None:
        value = default if channels == len(default) else sum(default) / len(default)
    values = [float(v) for v in value] if np.ndim(value) else [float(value)] * channels
    if len(values) != channels:
        raise ValueError(
            f"`{name}` must be one number or one for each of the {channels} channels. Received: {name}={value}."
        )
    return values
