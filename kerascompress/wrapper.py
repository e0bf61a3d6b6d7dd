"""The wrapper that masks its layer's kernels in the forward pass: tfmot's `PruneLowMagnitude`, for Keras 3.

`UpdatePruningStep` recomputes the masks between batches, as the schedule says. `pruning` wraps and strips models.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import layers, ops

from kerascompress import graph, schedules
from kerascompress.masks import PRUNABLE_KERNELS, Rule, as_array, finite_weights, warn_of_collapse
from kerascompress.schedules import Schedule, check_schedule


def prunable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The kernels that a wrapper may prune in a built layer, by `get_prunable_weights()` or `PRUNABLE_KERNELS`."""
    if hasattr(layer, "get_prunable_weights"):
        return list(layer.get_prunable_weights())
    check_plain(layer)
    weights = [getattr(layer, name) for name in kernel_names(layer)]
    for child in graph.children(layer):
        weights += [weight for weight in prunable_weights(child) if all(weight is not known for known in weights)]
    return weights


def check_plain(layer: keras.Layer, *, modes: tuple[str | None, ...] = (None,)) -> None:
    """Raises a ValueError where a kernel is made of several variables, or is stored as other numbers than it means."""
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"A kernel with LoRA is a sum of which only one part could be pruned. Received: layer {layer.name!r} with "
            "`enable_lora`. Prune the model before; to count or export it, load its saved weights into the model "
            "without LoRA, which merges them."
        )
    if getattr(layer, "quantization_mode", None) not in modes:
        raise ValueError(
            "The stored numbers of a quantized kernel are not its weights. Received: layer "
            f"{layer.name!r}, quantized to {layer.quantization_mode}. Prune first, then quantize: zeros stay zero."
        )


@keras.saving.register_keras_serializable("kerascompress")
class PruneLowMagnitude(layers.Wrapper):
    """Prunes the kernels of a Keras 3 layer by magnitude while it trains.

    The forward pass computes with `kernel * mask`, while the gradient is that of the kernel, masked weights included.
    `UpdatePruningStep` recomputes the masks at the steps of the schedule from what the last update has made of the
    kernels, in which masked weights were zero before: so a weight that the network needs comes back, as in tfmot. Where
    that is not wanted, a schedule of one update does: `ConstantSparsity(p, begin_step=0, end_step=0)`.

    Between batches masked weights are zero, in checkpoints too. On the JAX backend, where looking at variables inside
    an epoch is expensive, they are zeroed only before and at a scheduled step, at the end of an epoch, and when the
    model is saved: a constraint, or an optimizer that looks at whole kernels (LAMB, Adafactor), sees more there than
    the network computes with. With `steps_per_execution`, masks are recomputed after the last step of an execution,
    from weights that all its steps have moved; `PruningOptimizer` keeps the schedule exactly.

    Args:
        layer: A layer with prunable kernels: dense, convolution (also transposed, separable, depthwise),
            `EinsumDense`, `Embedding`, `LSTM`, `GRU`, `SimpleRNN`, built attention layers, `Bidirectional` and
            `TimeDistributed` of these, or a layer of your own whose `get_prunable_weights()` returns the variables to
            prune.
        pruning_schedule: When to prune and to which sparsity: `PolynomialDecay`, `ConstantSparsity` or any callable
            `step -> (should_prune, sparsity)` with sparsity in [0, 1). Step 0 is the moment before the first update,
            step n the moment after n of them; tfmot counts from 1: its `begin_step=4` is 3 here. Defaults to
            `ConstantSparsity(0.5, 0)`.
        block_size: `(height, width)` of the blocks in which a 2-dimensional kernel is zeroed. LiteRT skips blocks of
            `(4, 1)`: from a sparsity of about .7 on, and for batches of a few rows, dense layers become faster.
        block_pooling_type: `"AVG"` or `"MAX"`, how a block's magnitude is computed from its weights.
        sparsity_m_by_n: `(m, n)`, e.g. `(2, 4)`: m zeros in every n consecutive weights along the last axis but one of
            2- or 4-dimensional kernels, the input channels of dense and convolution. The mask is computed once, when
            training begins; the schedule is not asked.
        scope: `"layer"` gives every kernel the sparsity of the schedule (tfmot). `"global"` compares the magnitudes of
            all kernels in the model that have this schedule and prunes the smallest, wherever they are (the paper).
        **kwargs: Passed to `keras.layers.Layer`.

    Attributes:
        pruning_vars: List of `(kernel, mask, threshold)` variables; in a mask, True keeps.
        pruning_step: Variable, optimizer updates seen, -1 before the first.

    Raises:
        ValueError: If an argument is out of range or the layer has nothing to prune.
        TypeError: If `pruning_schedule` is not callable.

    Example:
        >>> import keras, kerascompress as kc
        >>> model = keras.Sequential([keras.Input((8,)), kc.PruneLowMagnitude(keras.layers.Dense(4))])
        >>> [(tuple(kernel.shape), tuple(mask.shape)) for kernel, mask, _ in model.layers[0].pruning_vars]
        [((8, 4), (8, 4))]

    Reference:
        Zhu, Gupta, "To prune, or not to prune", 2017; TensorFlow Model Optimization's `PruneLowMagnitude`; Equation 5
        of Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression".
    """

    def __init__(
        self,
        layer: keras.Layer,
        pruning_schedule: Schedule | None = None,
        block_size: tuple[int, int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: tuple[int, int] | None = None,
        scope: str = "layer",
        **kwargs,
    ):
        if not isinstance(layer, keras.Layer) or isinstance(layer, keras.Model):
            raise ValueError(
                "`PruneLowMagnitude` wraps one Keras 3 layer. "
                f"Received: layer={layer!r} of type {type(layer).__module__}.{type(layer).__name__}. "
                "Use `prune_low_magnitude(model)` for a model; a Keras 2 (tf_keras) layer must be rebuilt with Keras 3."
            )
        if not is_prunable(layer) and not _has_unbuilt_parts(layer):  # a part may make its kernels when it is built
            raise _no_kernel(layer)
        if pruning_schedule is None:
            pruning_schedule = schedules.ConstantSparsity(0.5, 0)
        check_schedule(pruning_schedule, "pruning_schedule")
        self.rule = Rule(scope, block_size, block_pooling_type, sparsity_m_by_n)
        kwargs.setdefault("name", f"prune_low_magnitude_{layer.name}")
        kwargs.setdefault("dtype", layer.dtype_policy)
        kwargs.setdefault("trainable", layer.trainable)
        super().__init__(layer, **kwargs)
        self.pruning_schedule = pruning_schedule
        self.supports_masking = layer.supports_masking
        self._call_signature = inspect.signature(layer.call)  # by which Keras tells tensors, masks and flags apart
        graph.keep_config(layer)
        self._masks: list[keras.Variable] = []
        self._thresholds: list[keras.Variable] = []
        self.step = -1  # `pruning_step` on the host while training; `settle` writes it to the variable
        self._stored_step = -1  # what this layer last wrote there
        self._is_driven: Callable[[], bool] = bool  # whether an UpdatePruningStep drives this layer: not yet

    def __call__(self, *args, **kwargs):
        tensors = [each for each in keras.tree.flatten((args, kwargs)) if hasattr(each, "shape")]
        if len(tensors) > 1 and not self.built:  # `build` knows the shape of one
            graph.build(self.layer, *args, **{name: value for name, value in kwargs.items() if name != "training"})
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        with graph.unbuilt_parts():
            super().build(input_shape)
        if not all(each.built for each in graph.walk(self.layer)):
            graph.build(self.layer, keras.KerasTensor(input_shape, self.layer.input_dtype))
        if not hasattr(self.layer, "get_prunable_weights") and not is_prunable(self.layer):
            raise _no_kernel(self.layer)
        settings = {"trainable": False, "autocast": False, "aggregation": "only_first_replica"}
        for i, kernel in enumerate(prunable_weights(self.layer)):
            self.rule.check(kernel, "Exclude the layer with a `pruning_policy`.")
            suffix = f"_{i}" if i else ""  # variables of one name have one path, under which only one is saved
            mask = self.add_weight(
                name=f"mask{suffix}", shape=kernel.shape, dtype="bool", initializer="ones", **settings
            )
            threshold = self.add_weight(
                name=f"threshold{suffix}", shape=(), dtype=kernel.dtype, initializer="zeros", **settings
            )
            self._masks.append(mask)
            self._thresholds.append(threshold)
            # as attributes too: in a list, tf.train.Checkpoint does not see them
            setattr(self, f"_mask{suffix}", mask)
            setattr(self, f"_threshold{suffix}", threshold)
            if kernel.regularizer is not None:
                kernel.regularizer = _OfMasked(kernel.regularizer, mask)
        self.pruning_step = self.add_weight(
            name="pruning_step",
            shape=(),
            dtype="int32",
            initializer=keras.initializers.Constant(-1),
            trainable=False,
            aggregation="only_first_replica",
        )

    def call(self, *args, training=None, **kwargs):
        if training and not self._is_driven():
            raise RuntimeError(
                "A model with pruned layers needs the `UpdatePruningStep` callback, which tells them the step. "
                "Make and compile the model again, and add it: "
                "`model.fit(..., callbacks=[kerascompress.UpdatePruningStep()])`. In your own training loop, call its "
                "`set_model`, `on_train_begin`, `on_epoch_begin`, `on_train_batch_end` and `on_epoch_end`. To call a "
                "trained model with training=True, use `strip_pruning` first."
            )
        # Inside a StatelessScope a variable has the value given here, so the masked kernel takes the kernel's place in
        # whatever the layer computes.
        with graph.without_autocast():
            values = {id(variable): variable.value for variable in self.layer.variables}
            for kernel, mask, _ in self.pruning_vars:
                kept = kernel.value * ops.cast(mask.value, kernel.dtype)
                # with the gradient of the kernel: what is masked moves too, and may come back
                values[id(kernel)] = kernel.value + ops.stop_gradient(kept - kernel.value)
            state = [(variable, values[id(variable)]) for variable in self.layer.variables]
            scope = keras.StatelessScope(state_mapping=state, collect_losses=True)
        with scope:
            outputs = self.layer(*args, **kwargs)
        for variable in self.layer.non_trainable_variables:
            if scope.get_current_value(variable) is not values[id(variable)]:
                variable.assign(scope.get_current_value(variable))
        losses = list(scope.losses)
        graph.forget_losses(self.layer)  # or on JAX, Keras would find each in both layers
        for loss in losses:
            self.add_loss(loss)
        return outputs

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, training=None, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    @property
    def pruning_vars(self) -> list[tuple[keras.Variable, keras.Variable, keras.Variable]]:
        if not self._masks:
            return []
        return list(zip(prunable_weights(self.layer), self._masks, self._thresholds, strict=True))

    def get_prunable_weights(self) -> list[keras.Variable]:
        """The wrapped layer's kernels, raw: under the mask they may be anything."""
        return [kernel for kernel, _, _ in self.pruning_vars]

    def settle(self) -> None:
        """Makes the state what it means: masked weights become zero, the step variable current."""
        if not self.built:
            return
        for kernel, mask, _ in self.pruning_vars:
            kernel.assign(kernel.value * ops.cast(mask.value, kernel.dtype))  # times, so that NaN stays NaN
        self.sync_step()
        self.pruning_step.assign(self.step)
        self._stored_step = self.step

    def sync_step(self) -> None:
        """Takes the step over from the variable if somebody else has written it: weights were loaded or restored."""
        stored = self.stored_step()
        if stored != self._stored_step:
            self.step = self._stored_step = stored

    def stored_step(self) -> int:
        """The value of the variable, on the host."""
        return int(as_array(self.pruning_step))

    def save_own_variables(self, store):
        self.settle()
        super().save_own_variables(store)

    def get_config(self):
        return {
            **super().get_config(),
            "pruning_schedule": schedules.serialize(self.pruning_schedule, f"pruning_schedule of {self.name!r}"),
            **dataclasses.asdict(self.rule),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        schedule = schedules.deserialize(config["pruning_schedule"], custom_objects)
        with graph.unbuilt_parts():
            return super().from_config({**config, "pruning_schedule": schedule}, custom_objects)


class _OfMasked:
    """A regularizer that sees the kernel as the forward pass does."""

    def __init__(self, regularizer: Callable[[Any], Any], mask: keras.Variable):
        self.unmasked = regularizer
        self.mask = mask

    def __call__(self, kernel):
        return self.unmasked(kernel * ops.cast(self.mask.value, kernel.dtype))


def update_masks(wrappers: list[PruneLowMagnitude], sparsity: float) -> None:
    """Recomputes the masks of wrappers of one rule from their raw kernels."""
    variables = [each for wrapper in wrappers for each in wrapper.pruning_vars]
    kernels = [finite_weights(kernel) for kernel, _, _ in variables]
    new_masks, new_thresholds = wrappers[0].rule(kernels, sparsity)
    gone = []
    for (kernel, mask, threshold), new_mask, new_threshold in zip(variables, new_masks, new_thresholds, strict=True):
        if not new_mask.any() and as_array(mask).any():
            gone.append(kernel.path)
        mask.assign(new_mask)
        threshold.assign(new_threshold)
    warn_of_collapse(sparsity, gone)


def wrappers_in(layer: keras.Layer) -> Iterator[PruneLowMagnitude]:
    return (each for each in graph.walk(layer) if isinstance(each, PruneLowMagnitude))


def kernel_names(layer: keras.Layer) -> tuple[str, ...]:
    return next((names for kind, names in PRUNABLE_KERNELS.items() if isinstance(layer, kind)), ())


def _has_unbuilt_parts(layer: keras.Layer) -> bool:
    return layer.built and not all(each.built for each in graph.walk(layer))


def _no_kernel(layer: keras.Layer) -> ValueError:
    return ValueError(
        f"Layer {layer.name!r} of type {type(layer).__name__} has no kernel that can be pruned. Prunable are "
        f"{', '.join(kind.__name__ for kind in PRUNABLE_KERNELS)} and layers made of them. "
        "Give a layer of your own a method `get_prunable_weights()` that returns the variables to prune."
    )


def is_prunable(layer: keras.Layer) -> bool:
    if hasattr(layer, "get_prunable_weights"):
        return not layer.built or bool(layer.get_prunable_weights())
    # these write to what a masked kernel stands for, or to state that is no variable of theirs
    if isinstance(layer, layers.SpectralNormalization) or getattr(layer, "stateful", False):
        return False
    return bool(kernel_names(layer)) or any(is_prunable(child) for child in graph.children(layer))


@graph.copy.register
def _(wrapper: PruneLowMagnitude, dtype: Any = None) -> PruneLowMagnitude:
    settings = dataclasses.asdict(wrapper.rule) | {"name": wrapper.name}
    copy = PruneLowMagnitude(graph.copy(wrapper.layer, dtype), wrapper.pruning_schedule, **settings)
    if wrapper.built:
        copy.build_from_config(wrapper.get_build_config())
        copy.set_weights(wrapper.get_weights())
        copy.settle()
    return copy
