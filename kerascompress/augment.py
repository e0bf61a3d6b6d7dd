"""Augmentation in the model, on the device: RandAugment with a live magnitude, and the crop that goes before it."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops as kops

from kerascompress import graph, image_ops, rounds
from kerascompress.rounds import KINDS


@keras.saving.register_keras_serializable("kerascompress")
@dataclasses.dataclass(frozen=True)
class Op:
    """A row of the operation table: what to do with an image, and how much of it at M = 30.

    One of the three functions says what to do; a row with none of them is the identity. Each gets the argument of every
    image, float32 `(batch,)`: `argument * M / 30`, with a sign drawn per image if `signed`.

    Args:
        name: How `RandAugment(ops=...)` refers to the row.
        argument: The argument at M = 30, in the unit of the function; 0 if the function ignores it.
        signed: Whether half of the images get the negative argument.
        table: `(images, argument) -> (batch, 1 or channels, 256)`: each value's replacement. The cheapest kind.
        warp: `(argument, height, width) -> (batch, 6)`: an inverse affine map, see `image_ops.warp`.
        pixels: `(images, argument) -> images`, float32 with values 0..255.

    Images come with whole values 0..255; results are clipped to 0..255 and their fractions cut off.

    Raises:
        ValueError: If more than one function is given, or what is given is not callable.

    Example:
        >>> from keras import ops
        >>> invert = Op(
        ...     "Invert", table=lambda images, argument: 255.0 - ops.arange(256, dtype="float32")[None, None, :]
        ... )
        >>> augment = RandAugment(magnitude=9, ops=["Rotate", invert])
    """

    name: str
    argument: float = 0.0
    signed: bool = False
    table: Callable[[Any, Any], Any] | None = None
    warp: Callable[[Any, Any, Any], Any] | None = None
    pixels: Callable[[Any, Any], Any] | None = None

    @property
    def kind(self) -> str:
        return next((kind for kind in KINDS[1:] if getattr(self, kind) is not None), KINDS[0])

    def __post_init__(self):
        given = [kind for kind in KINDS[1:] if getattr(self, kind) is not None]
        if len(given) > 1 or not all(callable(getattr(self, kind)) for kind in given):
            raise ValueError(
                f"An `Op` needs one function, as `table=`, `warp=` or `pixels=`. Received: {given} in Op {self.name!r}."
            )

    def get_config(self) -> dict[str, Any]:
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Op":
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})


OPS = (
    Op("Identity"),
    Op("ShearX", 0.3, signed=True, warp=image_ops.shear_x),  # slope
    Op("ShearY", 0.3, signed=True, warp=image_ops.shear_y),
    Op("TranslateX", 150.0, signed=True, warp=image_ops.translate_x),  # 331ths of the width
    Op("TranslateY", 150.0, signed=True, warp=image_ops.translate_y),  # 331ths of the height
    Op("Rotate", 30.0, signed=True, warp=image_ops.rotate),  # degrees
    Op("Brightness", 90.0, signed=True, table=image_ops.brightness),  # per cent more or less
    Op("Color", 90.0, signed=True, pixels=image_ops.color),
    Op("Contrast", 90.0, signed=True, table=image_ops.contrast),
    Op("Sharpness", 90.0, signed=True, pixels=image_ops.sharpness),
    Op("Posterize", 4.0, table=image_ops.posterize),  # bits dropped
    Op("Solarize", 255.0, table=image_ops.solarize),  # how far the threshold lies under 255
    Op("AutoContrast", table=image_ops.auto_contrast),
    Op("Equalize", table=image_ops.equalize),
)


class _Augmentation(keras.layers.Layer):
    """What the layers here share: when they act, on which images, and with what randomness."""

    def __init__(self, value_range, fill_value: float | Sequence[float], seed: int | None, **kwargs: Any):
        super().__init__(**{"autocast": False, **kwargs})
        rounds.check_value_range(value_range)
        fill = np.asarray(fill_value, dtype="float64")
        if fill.shape not in ((), (1,), (3,)) or not np.all((fill >= 0) & (fill <= 255)):
            raise ValueError(
                "`fill_value` must be in [0, 255], black to white, whatever `value_range` is, or one such number for "
                f"each channel. Received: fill_value={fill_value}."
            )
        self.value_range = (value_range[0], value_range[1])
        self.fill_value = tuple(fill.tolist()) if fill.shape else fill_value
        self.seed = seed = int(seed) if isinstance(seed, np.integer) else seed
        bits = {"torch": 31, "jax": 32}.get(keras.backend.backend())  # of a seed; Keras fails on others
        self.seed_generator = keras.random.SeedGenerator(seed % 2**bits if bits and isinstance(seed, int) else seed)
        self.has_augmented = False  # it has been called to do so
        self._worker: int | None = None  # of a Torch `DataLoader`: the seed which that has given this process

    def __call__(self, images, *args, **kwargs):
        symbolic = type(images).__module__.startswith("tensorflow") and not hasattr(images, "numpy")
        if symbolic and keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"Inside of `tf.data`, {type(self).__name__} works on the TensorFlow backend only. "
                f"Received: {images} on the {keras.backend.backend()} backend. "
                "Put the layer into the model, in front of the network: `keras.Sequential([augment, network])`."
            )
        if symbolic and getattr(images, "shape", None) is not None and images.shape.rank is None:
            raise ValueError(
                f"{type(self).__name__} needs images whose number of axes is known. Received: {images}. Decode them "
                "with `tf.io.decode_jpeg(..., channels=3)` or `tf.io.decode_image(..., expand_animations=False)`."
            )
        if keras.backend.backend() == "torch":
            self._draw_apart()
        return super().__call__(images, *args, **kwargs)

    def _draw_apart(self):
        """In a worker of a Torch `DataLoader`, a copy of this process for an epoch: draws by the seed of the two."""
        import torch

        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._worker:
            self._worker, state = worker.seed, self.seed_generator.state
            own = np.asarray(kops.convert_to_numpy(state), "uint64")
            state.assign(np.random.SeedSequence([*own.tolist(), worker.seed]).generate_state(len(own)) % 2**30)

    def _augment(self, images, training, augment_batch):
        if not (rounds.inside_tf_data() if training is None else training):
            return images
        self.has_augmented = True
        shape: Any = getattr(images, "shape", ())
        if len(shape) not in (3, 4) or shape[-1] not in (1, 3):
            has_shape = hasattr(images, "shape")
            received = f"of shape {tuple(shape)}" if has_shape else f"as a {type(images).__name__}, not one tensor"
            raise ValueError(
                f"{type(self).__name__} needs images of shape (batch, height, width, channels) or "
                f"(height, width, channels), with 1 or 3 channels. Received: images {received}."
            )
        if isinstance(self.fill_value, tuple) and len(self.fill_value) != shape[-1]:
            raise ValueError(
                f"`fill_value` must be one number, or one for each of the {shape[-1]} channels of the images. "
                f"Received: fill_value={self.fill_value}."
            )
        if 0 in images.shape:
            return images
        batch = images if len(images.shape) == 4 else images[None]
        output = augment_batch(batch, rounds.on_scale(batch, self.value_range, type(self).__name__))
        return output if len(images.shape) == 4 else output[0]

    def _integers(self, shape, low, high):
        return rounds.draw(lambda shape: keras.random.randint(shape, low, high, seed=self.seed_generator), shape)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["seed"] = kops.convert_to_numpy(
            self.seed_generator.state
        )  # Keras leaves it out; training resumes with it

    def load_own_variables(self, store):
        if "seed" in store.keys():  # noqa: SIM118 (it is not a dictionary)
            self.seed_generator.state.assign(store["seed"])
        super().load_own_variables({name: store[name] for name in store.keys() if name != "seed"})  # noqa: SIM118

    def compute_output_shape(self, input_shape, *args):
        return input_shape

    def compute_output_spec(self, images, *args, **kwargs):
        return keras.KerasTensor(images.shape, images.dtype)

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("value_range", "fill_value", "seed")}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("kerascompress")
class RandAugment(_Augmentation):
    """RandAugment in the model: every image draws operations and signs of its own, and the magnitude is live.

    An image draws `num_ops` rows of the table `OPS`, independently and with replacement. They are applied in that
    order, each with the argument `argument * M / 30` of its row and a sign. Pixels are Pillow's, bit for bit, but for
    ties between two pixels in rotate and shear (at most 0.5 % of an image; of bilinear ones, some per cent may differ
    by one level). Active where `training` is true, and in
    `tf.data` (TensorFlow backend only), where `dataset.map(augment)` takes images or batches.

    XLA compiles it for every size of images and batches, so keep them few; sizes that a trace does not know are slower.
    On Torch, nothing is compiled: an operation runs once for the images that drew it.

    Args:
        magnitude: M in [0, 30], or `(low, high)`: drawn uniformly per image. `layer.magnitude` is a variable of shape
            `()` or `(2,)`; `layer.magnitude.assign(...)` acts on the next step, without a retrace (in a callback on
            JAX, read `self.model` first, which brings the state back). In `tf.data`, it acts on the images that have
            not been prefetched yet. Assigned below 0, it is off: every operation is the identity, while at 0
            AutoContrast, Equalize and Solarize still change images.
        num_ops: How many operations an image draws, at least 1.
        ops: Names of `OPS`, or `Op` rows of your own; all of `OPS` by default. With their argument at M = 30: Identity,
            ShearX and ShearY (slope 0.3), TranslateX and TranslateY (150/331 of the side), Rotate (30 degrees);
            Brightness, Color, Contrast and Sharpness (90 % more or less); Posterize (4 bits dropped), Solarize (from 0
            on, at M = 0 from 255); AutoContrast and Equalize, which have none.
        value_range: The values of black and white in the images: `(0, 255)`, `(0, 1)`, `(-1, 1)`. Float images are
            rounded to the 256 levels in between. Images that are obviously on another scale are refused; in a step
            compiled by XLA (`fit` on JAX, or on a GPU), they become NaN instead, and so does the loss.
        fill_value: What rotate, shear and translate show outside of the image, from 0 (black) to 255 (white), whatever
            `value_range` is: a number, or one for each channel, such as the mean colour `(124, 116, 104)` of ImageNet.
        interpolation: `"nearest"`, as in the paper, or `"bilinear"`.
        seed: Makes the draws reproducible; in `tf.data`, without `num_parallel_calls`, in whose calls they come in any
            order, and about one in a hundred twice. Workers of a Torch `DataLoader` draw apart, and anew in each epoch,
            as `torch.manual_seed` says.

    Call arguments:
        images: uint8 or float, `(batch, height, width, channels)` or `(height, width, channels)`, 1 or 3 channels.
        magnitude: Overrides the variable for this call: a number, or one per image, `(batch,)`; below 0 is off.
        training: Whether to augment; outside of a model that trains, and of `tf.data`, only if it is True.

    Returns:
        The augmented images, in the shape, dtype and value range of `images`.

    Raises:
        ValueError: If an argument is out of range, an operation is unknown, or the images have a wrong shape, dtype or
            scale.
        RuntimeError: If called inside of `tf.data` on another backend than TensorFlow.

    Example:
        >>> import keras
        >>> augment = RandAugment(magnitude=14, num_ops=2, seed=0)
        >>> trainer = keras.Sequential([augment, keras.layers.Flatten(), keras.layers.Dense(10)])
        >>> _ = augment.magnitude.assign(4.0)  # from the next step on

    Reference:
        Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search space", 2020,
        with the operations of torchvision; Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression",
        Equation 2.
    """

    def __init__(
        self,
        magnitude: float | tuple[float, float] = 9,
        *,
        num_ops: int = 2,
        ops: Sequence[str | Op] | None = None,
        value_range: tuple[float, float] = (0, 255),
        fill_value: float | Sequence[float] = 0,
        interpolation: str = "nearest",
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(value_range, fill_value, seed, **kwargs)
        low_high = np.asarray(magnitude, dtype="float32")
        if low_high.shape not in ((), (2,)) or not (
            np.all((low_high >= 0) & (low_high <= 30)) and np.all(np.diff(np.atleast_1d(low_high)) >= 0)
        ):
            raise ValueError(
                "`magnitude` must be a number in [0, 30], the paper's scale, or `(low, high)` within it. "
                f"Received: magnitude={magnitude}. If yours is a fraction, multiply it by 30."
            )
        if not isinstance(num_ops, int | np.integer) or num_ops < 1:
            raise ValueError(f"`num_ops` must be a whole number of at least 1. Received: num_ops={num_ops}.")
        if interpolation not in ("nearest", "bilinear"):
            raise ValueError(
                f'`interpolation` must be "nearest" or "bilinear". Received: interpolation={interpolation!r}.'
            )
        self.num_ops = int(num_ops)
        self.ops = _rows(OPS if ops is None else ops)
        self.interpolation = interpolation
        kinds = [row.kind for row in self.ops]
        self._table = self.ops if KINDS[0] in kinds else (*self.ops, OPS[0])
        self._off = [row.kind for row in self._table].index(KINDS[0])  # what is drawn below 0
        self._initial_magnitude = low_high.tolist()
        self.magnitude = self.add_weight(
            shape=low_high.shape,
            initializer=lambda shape, dtype: kops.convert_to_tensor(low_high, dtype),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="magnitude",
        )

    def __call__(self, images, *args, **kwargs):
        magnitude = args[0] if args else kwargs.get("magnitude")
        if isinstance(magnitude, int | float | np.number | np.ndarray) and not np.all(np.less_equal(magnitude, 30)):
            raise ValueError(f"`magnitude` must be at most 30, the paper's scale. Received: magnitude={magnitude}.")
        return super().__call__(images, *args, **kwargs)

    def call(self, images, magnitude=None, training=None):
        return self._augment(images, training, lambda batch, good: self._augment_batch(batch, good, magnitude))

    def _augment_batch(self, images, good, magnitude):
        op, sign, magnitude = self.draw(kops.shape(images)[0], magnitude)
        op = kops.where(magnitude < 0, self._off, op)
        argument = _take([row.argument / 30 for row in self._table], op) * magnitude
        argument = argument * kops.where(_take([float(row.signed) for row in self._table], op) > 0, sign, 1.0)
        return rounds.apply(
            self._table,
            images,
            op,
            argument,
            good=good,
            value_range=self.value_range,
            fill_value=self.fill_value,
            interpolation=self.interpolation,
        )

    def draw(self, batch, magnitude=None):
        """Draws for a batch: the rows of `ops` and the signs, `(num_ops, batch)`, and the magnitudes, `(batch,)`."""
        shape = (self.num_ops, batch)
        op = self._integers(shape, 0, len(self.ops))
        sign = 2.0 * kops.cast(self._integers(shape, 0, 2), "float32") - 1.0
        if magnitude is None:
            return op, sign, self.draw_magnitude(batch)
        return op, sign, kops.broadcast_to(kops.cast(magnitude, "float32"), (batch,))

    def draw_magnitude(self, batch):
        """Returns the magnitude of every image of a batch, float32 `(batch,)`: drawn, if it is a pair."""
        if self.magnitude.shape != (2,):
            return kops.broadcast_to(kops.convert_to_tensor(self.magnitude), (batch,))
        share = rounds.draw(
            lambda shape: keras.random.uniform(shape, dtype="float32", seed=self.seed_generator), (batch,)
        )
        return self.magnitude[0] + (self.magnitude[1] - self.magnitude[0]) * share

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "magnitude": self._initial_magnitude,
            "num_ops": self.num_ops,
            "ops": [row.name if row in OPS else keras.saving.serialize_keras_object(row) for row in self.ops],
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RandAugment":
        ops = [row if isinstance(row, str) else keras.saving.deserialize_keras_object(row) for row in config["ops"]]
        return cls(**{**config, "ops": ops})


@keras.saving.register_keras_serializable("kerascompress")
class RandomCrop(_Augmentation):
    """Pads every image and crops it back to its size, at an offset of its own; the padding is mid-grey by default.

    As torchvision's RandomCrop with `padding` does, whose padding is black. Active when `RandAugment` is. For the
    horizontal flip beside it, use `keras.layers.RandomFlip("horizontal")`.

    Args:
        padding: Pixels on each side, at least 0.
        value_range: As for `RandAugment`: images on another scale are refused, or become NaN.
        fill_value: What the padding shows, from 0 (black, as torchvision) to 255 (white), whatever `value_range` is: a
            number, or one for each channel; mid-grey by default.
        seed: Makes the draws reproducible.

    Call arguments:
        images: `(batch, height, width, channels)` or `(height, width, channels)`, 1 or 3 channels, of any dtype.
        training: Whether to crop.

    Returns:
        The images, in the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or the images have a wrong shape or scale.
        RuntimeError: If called inside of `tf.data` on another backend than TensorFlow.

    Example:
        >>> import keras
        >>> base_augmentation = [RandomCrop(padding=4, seed=0), keras.layers.RandomFlip("horizontal", seed=1)]
    """

    def __init__(
        self,
        padding: int = 4,
        *,
        value_range: tuple[float, float] = (0, 255),
        fill_value: float | Sequence[float] = 128,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(value_range, fill_value, seed, **kwargs)
        if not isinstance(padding, int | np.integer) or padding < 0:
            raise ValueError(f"`padding` must be a whole number of pixels, at least 0. Received: padding={padding}.")
        self.padding = int(padding)

    def call(self, images, training=None):
        return self._augment(images, training, self._crop)

    def _crop(self, images, good):
        shape = (2, kops.shape(images)[0])
        offset = self._integers(shape, -self.padding, self.padding + 1)
        x, y = kops.cast(offset[0], "float32"), kops.cast(offset[1], "float32")
        black, white = self.value_range
        fill_value = black + np.multiply(self.fill_value, (white - black) / 255)
        if good is not True:  # on another scale, padding is all that is to be seen: cheaper than a pass over the images
            x, fill_value = kops.where(good, x, 2.0**14), kops.where(good, fill_value, float("nan"))
        zero, one = kops.zeros_like(x), kops.ones_like(x)
        return image_ops.warp(images, kops.stack([one, zero, x, zero, one, y], axis=1), fill_value=fill_value)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "padding": self.padding}


def check_driven(augment: Any) -> None:
    """Raises an error unless `augment` has a magnitude that a callback can move: a scalar variable."""
    if not hasattr(getattr(augment, "magnitude", None), "assign"):
        raise TypeError(
            "`augment` must have a variable `magnitude`, as `kerascompress.RandAugment` has. "
            f"Received: augment={augment!r}."
        )
    if tuple(augment.magnitude.shape) != ():
        raise ValueError(
            "`augment` draws its magnitude from a (low, high) pair, but what drives it is one number. Received: "
            f"augment={augment!r} with a magnitude of shape {tuple(augment.magnitude.shape)}. "
            "Construct it with one magnitude, or assign the pair in a callback of your own."
        )


def check_in_model(augment: Any, model: keras.Model) -> None:
    """Raises a ValueError if a model has another augmentation than `augment`; warns if nobody has called that."""
    layers = graph.walk(model)
    others = [layer for layer in layers if hasattr(getattr(layer, "magnitude", None), "assign")]
    if others and all(layer is not augment for layer in layers):
        raise ValueError(
            f"The augmentation to drive is not in the model {model.name!r}, which has others: "
            f"{[layer.name for layer in others]}. Received: augment={augment!r}. Pass that of the model: a "
            "copied model, such as `prune_low_magnitude` returns, has copies of its layers."
        )
    if not others and not getattr(augment, "has_augmented", getattr(augment, "built", True)):
        warnings.warn(
            f"Nothing is augmented yet by {augment.name!r}: it is not in the model {model.name!r}, and has not been "
            "called to augment. Put it into the model, map it over a `tf.data` dataset first, or pass `training=True` "
            "where you call it yourself.",
            stacklevel=3,
        )


def _rows(ops: Sequence[str | Op]) -> tuple[Op, ...]:
    known = {row.name: row for row in OPS}
    unknown = [row for row in ops if not isinstance(row, Op) and row not in known]
    if isinstance(ops, str) or unknown or not ops:
        raise ValueError(
            f"`ops` must be a list of names or `Op` rows. Allowed names: {', '.join(known)}. Received: ops={ops!r}."
        )
    return tuple(row if isinstance(row, Op) else known[row] for row in ops)


def _take(column: list[float], op):
    return kops.take(kops.convert_to_tensor(np.array(column, "float32")), op)
