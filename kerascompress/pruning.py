"""Magnitude pruning of Keras 3 layers and models, with tfmot's names, arguments and schedules.

A wrapper masks its layer's kernels in the forward pass; `UpdatePruningStep` recomputes the masks between batches, as
the schedule says. `optimizer` has the other carrier of masks, for models whose layers cannot be wrapped.
"""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kerascompress import graph, schedules
from kerascompress.masks import PRUNABLE_KERNELS, Rule, finite_weights, is_kernel
from kerascompress.schedules import Schedule, check_schedule

# --- the wrapper ---


def prunable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The kernels that a wrapper may prune in a built layer, by `get_prunable_weights()` or `PRUNABLE_KERNELS`."""
    if hasattr(layer, "get_prunable_weights"):
        return list(layer.get_prunable_weights())
    weights = [getattr(layer, name) for name in _kernel_names(layer)]
    for child in graph.children(layer):
        weights += [weight for weight in prunable_weights(child) if all(weight is not known for known in weights)]
    return weights


@keras.saving.register_keras_serializable("kerascompress")
class PruneLowMagnitude(layers.Wrapper):
    """Prunes the kernels of a Keras 3 layer by magnitude while it trains.

    The forward pass computes with `kernel * mask`, while the gradient is that of the kernel, masked weights included.
    `UpdatePruningStep` recomputes the masks at the steps of the schedule from what the last update has made of the
    kernels, in which masked weights were zero before: so a weight that the network needs comes back, as in tfmot. Where
    that is not wanted, a schedule of one update does: `ConstantSparsity(p, begin_step=0, end_step=0)`.

    Between batches masked weights are zero, in checkpoints too. On the JAX backend, where looking at variables inside
    an epoch is expensive, they are zeroed only before and at a scheduled step, at the end of an epoch, and when the
    model is saved. With `steps_per_execution`, masks are recomputed after the last step of an execution, from weights
    that all its steps have moved; `PruningOptimizer` keeps the schedule exactly.

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
        if not _is_prunable(layer):
            raise ValueError(
                f"Layer {layer.name!r} of type {type(layer).__name__} has no kernel that can be pruned. Prunable are "
                f"{', '.join(kind.__name__ for kind in PRUNABLE_KERNELS)} and layers made of them. "
                "Give a layer of your own a method `get_prunable_weights()` that returns the variables to prune."
            )
        if pruning_schedule is None:
            pruning_schedule = schedules.ConstantSparsity(0.5, 0)
        check_schedule(pruning_schedule, "pruning_schedule")
        self.rule = Rule(scope, block_size, block_pooling_type, sparsity_m_by_n)
        kwargs.setdefault("name", f"prune_low_magnitude_{layer.name}")
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.pruning_schedule = pruning_schedule
        self.supports_masking = layer.supports_masking
        graph.keep_config(layer)
        self._masks: list[keras.Variable] = []
        self._thresholds: list[keras.Variable] = []
        self.step = -1  # `pruning_step` on the host while training; `settle` writes it to the variable
        self._stored_step = -1  # what this layer last wrote there
        self._is_driven = False  # whether an UpdatePruningStep drives this layer

    def __call__(self, *args, **kwargs):
        # Keras takes the shape and the mask of what comes first, and refuses tensors beside other keywords.
        for name in list(inspect.signature(self.layer.call).parameters)[len(args) :]:
            if not hasattr(kwargs.get(name), "shape"):
                break
            args += (kwargs.pop(name),)
        if len(args) > 1 and not self.built:
            graph.build(self.layer, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        with graph.unbuilt_parts():
            super().build(input_shape)
        if not all(each.built for each in graph.walk(self.layer)):
            graph.build(self.layer, keras.KerasTensor(input_shape, self.layer.input_dtype))
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

    def call(self, inputs, *args, training=None, **kwargs):
        if training and not self._is_driven:
            raise RuntimeError(
                "A model with pruned layers needs the `UpdatePruningStep` callback, which tells them the step. "
                "Make and compile the model again, and add it: "
                "`model.fit(..., callbacks=[kerascompress.UpdatePruningStep()])`. In your own training loop, call its "
                "`set_model`, `on_train_begin`, `on_epoch_begin`, `on_train_batch_end` and `on_epoch_end`."
            )
        # Inside a StatelessScope a variable has the value given here, so the masked kernel takes the kernel's place in
        # whatever the layer computes.
        values = {id(variable): variable.value for variable in self.layer.variables}
        for kernel, mask, _ in self.pruning_vars:
            kept = kernel.value * ops.cast(mask.value, kernel.dtype)
            # with the gradient of the kernel: what is masked moves too, and may come back
            values[id(kernel)] = kernel.value + ops.stop_gradient(kept - kernel.value)
        state = [(variable, values[id(variable)]) for variable in self.layer.variables]
        with keras.StatelessScope(state_mapping=state, collect_losses=True) as scope:
            outputs = self.layer(inputs, *args, **kwargs)
        for variable in self.layer.non_trainable_variables:
            if scope.get_current_value(variable) is not values[id(variable)]:
                variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return keras.Operation.compute_output_spec(self, *args, **kwargs)  # by tracing: the shape may be unknown

    @property
    def pruning_vars(self) -> list[tuple[keras.Variable, keras.Variable, keras.Variable]]:
        if not self._masks:
            return []
        return list(zip(prunable_weights(self.layer), self._masks, self._thresholds, strict=True))

    def get_prunable_weights(self) -> list[keras.Variable]:
        """The wrapped layer's kernels, raw: under the mask they may be anything."""
        return [kernel for kernel, _, _ in self.pruning_vars]

    def effective_weights(self) -> list[np.ndarray]:
        """The kernels as the forward pass sees them: zero where the mask is."""
        return [_numpy(kernel) * _numpy(mask) for kernel, mask, _ in self.pruning_vars]

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
        return int(_numpy(self.pruning_step))

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
        self.regularizer = regularizer
        self.mask = mask

    def __call__(self, kernel):
        return self.regularizer(kernel * ops.cast(self.mask.value, kernel.dtype))


def update_masks(wrappers: list[PruneLowMagnitude], sparsity: float) -> None:
    """Recomputes the masks of wrappers of one rule from their raw kernels."""
    variables = [each for wrapper in wrappers for each in wrapper.pruning_vars]
    kernels = [finite_weights(kernel) for kernel, _, _ in variables]
    new_masks, new_thresholds = wrappers[0].rule(kernels, sparsity)
    gone = []
    for (kernel, mask, threshold), new_mask, new_threshold in zip(variables, new_masks, new_thresholds, strict=True):
        if not new_mask.any() and _numpy(mask).any():
            gone.append(kernel.path)
        mask.assign(new_mask)
        threshold.assign(new_threshold)
    if gone:
        _warn_of_collapse(sparsity, gone)


def _warn_of_collapse(sparsity: float, paths: list[str]) -> None:
    warnings.warn(
        f"Global pruning to a sparsity of {sparsity:.2f} leaves nothing of {paths}: their weights are smaller than "
        "all others. Without one of its layers a network may compute a constant. Train the dense network before it "
        "is pruned, prune less, or use scope='layer'.",
        stacklevel=3,
    )


# --- models ---


def prune_low_magnitude(
    to_prune: Any,
    pruning_schedule: Schedule | None = None,
    block_size: tuple[int, int] = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: Any = None,
    sparsity_m_by_n: tuple[int, int] | None = None,
    scope: str = "layer",
    **kwargs,
) -> Any:
    """Makes a layer, a list of layers or a model prunable: tfmot's function of that name, for Keras 3.

    Args:
        to_prune: A Keras 3 layer, a list of layers, or a Sequential or Functional model, nested ones included. A model
            is copied with its weights and left as it is; its layers without kernels stay as they are.
        pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n, scope: See `PruneLowMagnitude`.
        pruning_policy: An object with `allow_pruning(layer) -> bool`, asked for every prunable layer of a model, and
            `ensure_model_supports_pruning(model)`, which may raise.
        **kwargs: Passed to the wrapper when `to_prune` is a layer.

    Returns:
        The wrapped layer, the list of wrapped layers, or a new uncompiled model.

    Raises:
        ValueError: If there is nothing to prune, for a subclassed model, a layer that cannot be copied, a policy of
            tfmot's, or anything that is no Keras 3 object.

    Example:
        >>> import keras, kerascompress as kc
        >>> dense = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(4), keras.layers.ReLU(), keras.layers.Dense(2)]
        ... )
        >>> pruned = kc.prune_low_magnitude(
        ...     dense, pruning_schedule=kc.ConstantSparsity(0.5, begin_step=0), scope="global"
        ... )
        >>> [layer.name.startswith("prune_low_magnitude") for layer in pruned.layers]
        [True, False, True]

    Reference:
        TensorFlow Model Optimization's `tfmot.sparsity.keras.prune_low_magnitude`.
    """
    settings: dict[str, Any] = {
        "pruning_schedule": schedules.ConstantSparsity(0.5, 0) if pruning_schedule is None else pruning_schedule,
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
        "scope": scope,
    }
    if isinstance(to_prune, PruneLowMagnitude):
        _warn_of_wrapper(to_prune)
        return to_prune
    if not isinstance(to_prune, (list, tuple, keras.Model)):
        return PruneLowMagnitude(to_prune, **settings, **kwargs)
    if kwargs:
        raise TypeError(
            f"`prune_low_magnitude` passes further arguments to the wrapper of a single layer only. Received: {kwargs} "
            f"with {type(to_prune).__name__}. Its own arguments are {', '.join(settings)} and pruning_policy."
        )
    if not isinstance(to_prune, keras.Model):
        return [
            layer
            if isinstance(layer, PruneLowMagnitude) or not _is_prunable(layer)
            else PruneLowMagnitude(layer, **settings)
            for layer in to_prune
        ]
    if pruning_policy is not None:
        _check_policy(pruning_policy)
        pruning_policy.ensure_model_supports_pruning(to_prune)
    chosen = set()
    with _advice():
        layers_of_model = graph.leaves(to_prune)
    for layer in layers_of_model:
        if any(_wrappers(layer)):
            _warn_of_wrapper(layer)
        elif not _is_prunable(layer):
            _warn_of_dense_weights(layer)
        elif pruning_policy is None or pruning_policy.allow_pruning(layer):
            chosen.add(id(layer))
            for part in _unprunable_parts(layer):
                _warn_of_dense_weights(part)
    if not chosen and not any(_wrappers(to_prune)):
        raise ValueError(
            f"Model {to_prune.name!r} has no layer to prune. Prunable are "
            f"{', '.join(kind.__name__ for kind in PRUNABLE_KERNELS)}, layers made of them, and layers with a method "
            f"`get_prunable_weights()`. Received: pruning_policy={pruning_policy!r}."
        )

    def prune(layer):
        copy = graph.copy(layer)
        return PruneLowMagnitude(copy, **settings) if id(layer) in chosen else copy

    with _advice():
        return graph.rebuild(to_prune, prune)


def prune_now(model: keras.Model, sparsity: float, *, scope: str = "layer") -> keras.Model:
    """One-shot magnitude pruning without training: a copy of a model whose smallest weights are zero.

    The copy is plain, and nothing in it keeps the zeros: train on with `PruningOptimizer(optimizer)`, without a
    schedule, which does. Any other optimizer lets them grow back.

    Args:
        model: Any built Keras 3 model, subclassed ones included. It is left as it is.
        sparsity: Fraction of zeros over the prunable kernels, in [0, 1).
        scope: `"layer"` gives every kernel this sparsity; `"global"` compares the magnitudes of all kernels.

    Returns:
        A new, uncompiled model of the same class.

    Raises:
        ValueError: If an argument is out of range, there is no prunable kernel, the model is pruned by wrappers, or a
            kernel holds NaN or infinite weights.

    Example:
        >>> import keras, kerascompress as kc
        >>> dense = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> small = kc.prune_now(dense, 0.75, scope="global")
        >>> kc.sparsity(small), kc.sparsity(dense)
        (0.75, 0.0)
        >>> small.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.01)), "mse")  # to train on: zeros stay

    Reference:
        Equation 5 of Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression"; its Figure 4 prunes so.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`prune_now` needs a Keras 3 model. Received: {model!r} of type {type(model).__name__}.")
    if not 0 <= sparsity < 1:
        raise ValueError(
            "`sparsity` must be in [0, 1), a fraction of zeros. "
            f"Received: sparsity={sparsity}. If yours is percent, divide it by 100."
        )
    rule = Rule(scope)
    if any(_wrappers(model)):
        raise ValueError(
            f"Model {model.name!r} is pruned by wrappers, which have masks of their own. Use `strip_pruning` first."
        )
    small = graph.copy(model)
    kernels = kernels_of(small)
    if not kernels:
        raise _no_kernels(model)
    masks, _ = rule([finite_weights(kernel) for kernel in kernels], sparsity)
    for kernel, mask in zip(kernels, masks, strict=True):
        kernel.assign(kernel.value * ops.cast(mask, kernel.dtype))
    gone = [kernel.path for kernel, mask in zip(kernels, masks, strict=True) if not mask.any()]
    if gone:
        _warn_of_collapse(sparsity, gone)
    return small


def strip_pruning(model: keras.Model) -> keras.Model:
    """A plain copy of a pruned model, without wrappers, its masked weights exactly zero.

    Args:
        model: A Sequential or Functional model, nested ones included; without wrappers, any model. It is left as it is.

    Returns:
        A new, uncompiled model with the layers and names that the model had before pruning.

    Raises:
        ValueError: If `model` is no Keras 3 model, if it is subclassed and holds wrappers, or if it cannot be copied.

    Example:
        >>> import keras, kerascompress as kc
        >>> pruned = kc.prune_low_magnitude(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")]))
        >>> [layer.name for layer in kc.strip_pruning(pruned).layers]
        ['head']
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`strip_pruning` needs a Keras 3 model. Received: {model!r} of type {type(model).__name__}.")
    if not any(_wrappers(model)):
        return graph.copy(model)
    with _advice():
        graph.leaves(model)
        copy = graph.rebuild(model, _stripped)
    hidden = [wrapper.path for wrapper in _wrappers(copy)]
    if hidden:
        raise ValueError(
            f"Layers of {model.name!r} hold wrappers of their own, which cannot be taken out of them: {hidden}. "
            "Make such a layer without them and set its weights, or prune it whole with `get_prunable_weights()`."
        )
    return copy


def sparsity(model: keras.Layer) -> float:
    """The fraction of zeros over the prunable kernels of a model or layer, as the forward pass sees them.

    Args:
        model: A built model or layer, pruned, stripped or dense.

    Returns:
        Zeros / weights, in [0, 1] (1 − Card/Num of Equation 5, over the kernels).

    Raises:
        ValueError: If there is no prunable kernel.

    Example:
        >>> import keras, kerascompress as kc
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="zeros")])
        >>> kc.sparsity(model)
        1.0
    """
    kernels = effective_kernels(model)
    if not kernels:
        raise _no_kernels(model)
    weights = sum(kernel.size for kernel in kernels)
    return float((weights - sum(np.count_nonzero(kernel) for kernel in kernels)) / weights)


# --- helpers ---


def _no_kernels(model) -> ValueError:
    return ValueError(f"{type(model).__name__} {model.name!r} has no prunable kernel, or is not built yet.")


def _numpy(variable) -> np.ndarray:
    # as a tensor first: in the scope of a strategy, NumPy makes no array of a variable without axes
    return ops.convert_to_numpy(ops.convert_to_tensor(variable))


def _wrappers(layer: keras.Layer) -> Iterator[PruneLowMagnitude]:
    return (each for each in graph.walk(layer) if isinstance(each, PruneLowMagnitude))


def _kernel_names(layer: keras.Layer) -> tuple[str, ...]:
    return next((names for kind, names in PRUNABLE_KERNELS.items() if isinstance(layer, kind)), ())


def _is_prunable(layer: keras.Layer) -> bool:
    if hasattr(layer, "get_prunable_weights"):
        return not layer.built or bool(layer.get_prunable_weights())
    # these write to what a masked kernel stands for, or to state that is no variable of theirs
    if isinstance(layer, layers.SpectralNormalization) or getattr(layer, "stateful", False):
        return False
    return bool(_kernel_names(layer)) or any(_is_prunable(child) for child in graph.children(layer))


def kernels_of(model: keras.Layer) -> list[keras.Variable]:
    """All kernels of a built model or layer, each once: by name, or by `get_prunable_weights()` of their layer."""
    decided: dict[int, bool] = {}
    for layer in graph.walk(model):
        if hasattr(layer, "get_prunable_weights") and layer.built:
            decided |= {id(variable): False for variable in layer.variables if id(variable) not in decided}
            decided |= {id(variable): True for variable in layer.get_prunable_weights()}
    unique = {id(variable): variable for variable in model.variables}
    return [variable for key, variable in unique.items() if decided.get(key, is_kernel(variable))]


def pruning_vars(model: keras.Layer) -> list[tuple[keras.Variable, keras.Variable, keras.Variable]]:
    """`(kernel, mask, threshold)` of every pruned kernel, of whichever carrier."""
    optimizer: Any = getattr(model, "optimizer", None)
    while not hasattr(optimizer, "pruning_vars") and hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer  # under a loss scale
    carriers = [*_wrappers(model), *([optimizer] if hasattr(optimizer, "pruning_vars") else [])]
    return [each for carrier in carriers for each in carrier.pruning_vars]


def effective_kernels(model: keras.Layer) -> list[np.ndarray]:
    """`kernels_of` a model, as the forward pass sees them: zero where a mask is."""
    pruned = pruning_vars(model)
    masks = {id(kernel): mask for kernel, mask, _ in pruned}
    chosen = [kernel for kernel, _, _ in pruned]  # by `allow` of an optimizer, too
    kernels = {id(kernel): kernel for kernel in [*kernels_of(model), *chosen]}
    return [_numpy(kernel) * (_numpy(masks[key]) if key in masks else 1) for key, kernel in kernels.items()]


def _unprunable_parts(layer: keras.Layer) -> Iterator[keras.Layer]:
    """The parts of a prunable layer that nothing says how to prune, such as a recurrent cell of the user's own."""
    if hasattr(layer, "get_prunable_weights") or _kernel_names(layer):
        return
    for part in graph.children(layer):
        if _is_prunable(part):
            yield from _unprunable_parts(part)
        else:
            yield part


def _warn_of_dense_weights(layer: keras.Layer) -> None:
    own = type(layer).__module__.partition(".")[0] not in ("keras", "kerascompress")
    kernels = {name for names in PRUNABLE_KERNELS.values() for name in names}
    dense = [v.path for v in layer.trainable_variables if len(v.shape) > 1 and (own or v.name in kernels)]
    if not dense and not layer.built and not hasattr(layer, "get_prunable_weights"):
        parts = graph.walk(layer)  # before it is built, only what builds kernels can be told
        makes = own and type(layer).build is not keras.Layer.build
        makes |= any(_kernel_names(each) or hasattr(each, "kernel_initializer") for each in parts)
        dense = ["whatever it will build"] if makes else []
    if dense:
        warnings.warn(
            f"Layer {layer.name!r} of type {type(layer).__name__} stays dense, {dense} included. "
            "Give a layer of your own a method `get_prunable_weights()` that returns the variables to prune, or [].",
            stacklevel=3,
        )


def _warn_of_wrapper(layer: keras.Layer) -> None:
    warnings.warn(
        f"Layer {layer.name!r} is pruned already and keeps its schedule. For another one, use `strip_pruning` first.",
        stacklevel=3,
    )


@graph.copy.register
def _(wrapper: PruneLowMagnitude, dtype: Any = None) -> PruneLowMagnitude:
    settings = dataclasses.asdict(wrapper.rule) | {"name": wrapper.name}
    copy = PruneLowMagnitude(graph.copy(wrapper.layer, dtype), wrapper.pruning_schedule, **settings)
    if wrapper.built:
        copy.build_from_config(wrapper.get_build_config())
        copy.set_weights(wrapper.get_weights())
        copy.settle()
    return copy


def _stripped(layer: keras.Layer) -> keras.Layer:
    if not isinstance(layer, PruneLowMagnitude):
        return graph.copy(layer)
    copy = graph.copy(layer.layer)
    for kernel, weights in zip(prunable_weights(copy) if layer.built else [], layer.effective_weights(), strict=True):
        kernel.assign(weights)
    return copy


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Says what to do where a model cannot be copied layer by layer."""
    try:
        yield
    except graph.CopyError as error:
        raise ValueError(
            f"{error} Wrap its layers where they are made, e.g. "
            "`self.conv = prune_low_magnitude(keras.layers.Conv2D(...), schedule)`, or use the Functional API; or let "
            "the optimizer prune the model as it is, without wrappers: "
            "`model.compile(kc.PruningOptimizer(keras.optimizers.AdamW(1e-3), schedule), loss)`."
        ) from error


def _check_policy(policy: Any) -> None:
    methods = [getattr(type(policy), name, None) for name in ("allow_pruning", "ensure_model_supports_pruning")]
    of_tfmot = any(getattr(each, "__module__", "").startswith("tensorflow_model_optimization.") for each in methods)
    if of_tfmot or None in methods:
        raise ValueError(
            "`pruning_policy` must have the methods `allow_pruning(layer) -> bool` and "
            f"`ensure_model_supports_pruning(model)`. Received: {policy!r} of type {type(policy).__name__}."
            + " tfmot's own policies read the graphs of Keras 2: write the two methods for Keras 3."
            * of_tfmot
        )
