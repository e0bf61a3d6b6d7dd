"""keras-cv's RandAugment with a live magnitude. keras-cv is imported when this module is, and not before."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from kerascompress import rounds

# keras-cv takes its layers from `tf.keras`. Where nobody has asked for `tf.keras` by the time that tfmot sets
# TF_USE_LEGACY_KERAS, it becomes Keras 2 for the whole process. So: ask for it before keras-cv does.
if tf.keras.layers.Layer is not keras.layers.Layer:
    raise ImportError(
        "keras-cv needs a `tf.keras` that is Keras 3. Received: Keras 2, which TF_USE_LEGACY_KERAS=1 selects. Unset "
        "it, and import `kerascompress.keras_cv` before `tensorflow_model_optimization`, which sets it."
    )

import keras_cv


@keras.saving.register_keras_serializable("kerascompress.keras_cv")
class RandAugment(keras_cv.layers.RandAugment):
    """keras-cv's RandAugment on the paper's scale, with a magnitude that is live.

    At magnitude M it is `keras_cv.layers.RandAugment(magnitude=M / 30)`, for pipelines that use keras-cv already.
    Unlike keras-cv's, it also works in a model that is fitted, and leaves images alone in `evaluate` and `predict`.
    `kerascompress.RandAugment` differs:

    - It has Rotate, Posterize, Sharpness and an Identity; here `rate` stands for the latter.
    - It applies M itself. Here some operations draw from a normal distribution around M, the others uniformly up to M.
    - It works on whole batches, every backend and under mixed precision. This one maps over single images, slower, and
      needs TensorFlow and a float32 policy.
    - Its `seed` makes everything reproducible. keras-cv's does not reach all of its random numbers.

    Args:
        value_range: The values of black and white in the images: `(0, 255)`, `(0, 1)`.
        augmentations_per_image: How many operations an image draws.
        magnitude: M in [0, 30]: 30 times keras-cv's. `layer.magnitude` is a scalar variable;
            `layer.magnitude.assign(...)` acts on the next step, without a retrace. In `tf.data`, it acts on the images
            that have not been prefetched yet. Assigned below 0, it is off: no operation is applied.
        magnitude_stddev: Of the normal distributions, in [0, 1] as in keras-cv: 0.15 is 4.5 on the paper's scale.
        rate: The probability in [0, 1] that an operation is applied when it is drawn.
        geometric: Whether to shear and translate.
        seed: As in keras-cv.

    Call arguments:
        inputs: Images `(batch, height, width, 3)` or `(height, width, 3)`, or a dictionary as keras-cv takes it.
        training: Whether to augment; if nobody says, it does.

    Returns:
        As `inputs`, with images in float32.

    Raises:
        ImportError: On import, where `tf.keras` is Keras 2, as TF_USE_LEGACY_KERAS makes it.
        RuntimeError: On another backend than TensorFlow.
        ValueError: If an argument is out of range, or the images have other than 3 channels or another scale.

    Example:
        >>> import keras
        >>> from kerascompress import MagnitudeScheduler
        >>> if keras.backend.backend() == "tensorflow":
        ...     augment = RandAugment(value_range=(0, 255), augmentations_per_image=2, magnitude=14)
        ...     weaken = MagnitudeScheduler(augment, lambda step: 14 if step < 1000 else 4)

    Reference:
        Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search space", 2020;
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Equation 2.
    """

    def __init__(
        self,
        value_range: tuple[float, float],
        augmentations_per_image: int = 3,
        *,
        magnitude: float = 15,
        magnitude_stddev: float = 0.15,
        rate: float = 10 / 11,
        geometric: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        _check(value_range, augmentations_per_image, magnitude, magnitude_stddev=magnitude_stddev, rate=rate)
        super().__init__(
            value_range,
            augmentations_per_image,
            magnitude=0.5,  # at 0, some samplers would be constants
            magnitude_stddev=magnitude_stddev,
            rate=rate,
            geometric=geometric,
            seed=seed,
            **kwargs,
        )
        self.supports_jit = False  # XLA knows no ImageProjectiveTransformV3, which shears and translates
        self._initial_magnitude = float(magnitude)
        self.magnitude = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(magnitude),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="magnitude",
        )
        self._initial_rate, self.rate = rate, _Live(self.magnitude, lambda u: tf.where(u < 0, -1.0, rate))
        self._follow(*self.layers)

    def _follow(self, _contrast, _equalize, solarize, color, contrast, brightness, *geometric):
        """Has the samplers of keras-cv's standard policy read the variable wherever they had u = M / 30 put in."""

        def live(owner, **values):
            for name, of in values.items():
                setattr(owner, name, _Live(self.magnitude, of))

        live(solarize.addition_factor, mean=lambda u: u * 110)
        live(solarize.threshold_factor, mean=lambda u: 255 - u * 255)
        live(color.factor, mean=lambda u: u)
        live(contrast.factor, lower=lambda u: 1 - tf.maximum(u, 0.001), upper=lambda u: 1 + tf.maximum(u, 0.001))
        live(brightness.factor, lower=lambda u: -u, upper=lambda u: u)
        if geometric:
            shear_x, shear_y, translate_x, translate_y = geometric
            live(shear_x.x_factor, mean=lambda u: u)
            live(shear_y.y_factor, mean=lambda u: u)
            live(translate_x, width_lower=lambda u: -u, width_upper=lambda u: u)
            live(translate_y, height_lower=lambda u: -u, height_upper=lambda u: u)

    def call(self, inputs, training=None):
        given = inputs["images"] if isinstance(inputs, dict) else inputs
        inputs = self._ensure_inputs_are_compute_dtype(inputs)
        images = inputs["images"] if isinstance(inputs, dict) else inputs
        if images.shape[-1] not in (3, None):
            raise ValueError(
                "keras-cv's RandAugment needs images with 3 channels. Received: images of shape "
                f"{tuple(images.shape)}. `kerascompress.RandAugment` takes greyscale images too."
            )
        if training is not None and not training:
            return inputs
        if not isinstance(given, tf.RaggedTensor):
            batch = given if len(given.shape) == 4 else given[None]
            rounds.on_scale(batch, self.value_range, type(self).__name__)
        if tf.executing_eagerly():
            return super().call(inputs)
        return tf.function(super().call)(inputs)  # Keras turns AutoGraph off, without which keras-cv does not trace

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "magnitude": self._initial_magnitude, "rate": self._initial_rate}


def _check(value_range, augmentations_per_image, magnitude, **shares):
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`kerascompress.keras_cv.RandAugment` works on the TensorFlow backend only. "
            f"Received: the {keras.backend.backend()} backend. Use `kerascompress.RandAugment`."
        )
    rounds.check_value_range(value_range)
    if not isinstance(augmentations_per_image, int) or augmentations_per_image < 1:
        raise ValueError(
            "`augmentations_per_image` must be a whole number of at least 1. "
            f"Received: augmentations_per_image={augmentations_per_image}."
        )
    if not 0 <= magnitude <= 30:
        raise ValueError(
            "`magnitude` must be a number in [0, 30], the paper's scale. "
            f"Received: magnitude={magnitude}. If yours is keras-cv's, multiply it by 30."
        )
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a number in [0, 1]. Received: {name}={value}.")


class _Live:
    """A number that keras-cv's samplers hold in place of a constant: TensorFlow computes it whenever it reads it."""

    def __init__(self, magnitude: keras.Variable, of: Callable[[Any], Any]):
        self.magnitude = magnitude
        self.of = of

    def __tf_tensor__(self, dtype=None, name=None):
        share = tf.cast(self.magnitude, "float64") / 30  # as precise as the Python number that keras-cv puts in
        return tf.cast(self.of(share), dtype or "float32", name)
