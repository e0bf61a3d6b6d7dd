"""Magnitude pruning of Keras 3 layers and models, with tfmot's names, arguments and schedules.

A wrapper masks its layer's kernels in the forward pass; a callback recomputes the masks between batches, as the
schedule says. The masks are arithmetic on NumPy arrays, so that they are the same on every backend.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kerascompress import graph, schedules
from kerascompress.masks import PRUNABLE_KERNELS, block_mask, m_by_n_mask, magnitude_mask
from kerascompress.schedules import Schedule, check_schedule

SCOPES = ("layer", "global")
POOLING_TYPES = ("AVG", "MAX")

# --- the wrapper ---


def prunable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The kernels that pruning may zero in a built layer or model, by `get_prunable_weights()` or the table above."""
    if hasattr(layer, "get_prunable_weights"):
        return list(layer.get_prunable_weights())
    weights = [getattr(layer, name) for name in _kernel_names(layer)]
    for child in graph.children(layer):
        weights += [weight for weight in prunable_weights(child) if all(weight is not known for known in weights)]
    return weights


@keras.saving.register_keras_serializable("kerascompress")
class PruneLowMagnitude(layers.Wrapper):
    """Prunes the kernels of a Keras 3 layer by magnitude while it trains.

    The forward pass computes with `kernel * mask`; gradients of masked weights are zero. `UpdatePruningStep` recomputes
    the masks from the raw kernels at the steps of the schedule. Raw kernels are zeroed under the mask at every update,
    at the end of every epoch and whenever the layer is saved, so that checkpoints are sparse.

    Args:
        layer: A layer with prunable kernels: dense, convolution (also transposed, separable, depthwise),
            `EinsumDense`, `Embedding`, `LSTM`, `GRU`, `SimpleRNN`, built attention layers, `Bidirectional` and
            `TimeDistributed` of these, or a layer of your own whose `get_prunable_weights()` returns the variables to
            prune.
        pruning_schedule: When to prune and to which sparsity: `PolynomialDecay`, `ConstantSparsity` or any callable
            `step -> (should_prune, sparsity)` with sparsity in [0, 1). Step 0 is the moment before the first batch.
            Defaults to `ConstantSparsity(0.5, 0)`.
        block_size: `(height, width)` of the blocks in which a 2-dimensional kernel is zeroed.
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
        if block_pooling_type not in POOLING_TYPES:
            raise ValueError(f"`block_pooling_type` must be one of {POOLING_TYPES}. Received: {block_pooling_type!r}.")
        if scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {SCOPES}. Received: scope={scope!r}.")
        self.block_size = _pair(block_size, "block_size")
        if min(self.block_size) < 1:
            raise ValueError(f"`block_size` must be positive. Received: block_size={block_size}.")
        self.sparsity_m_by_n = None if sparsity_m_by_n is None else _pair(sparsity_m_by_n, "sparsity_m_by_n")
        if self.sparsity_m_by_n and not 0 < self.sparsity_m_by_n[0] < self.sparsity_m_by_n[1]:
            raise ValueError(
                "`sparsity_m_by_n=(m, n)` means m zeros in every n weights, with 0 < m < n. "
                f"Received: sparsity_m_by_n={sparsity_m_by_n}."
            )
        if scope == "global" and (self.sparsity_m_by_n or self.block_size != (1, 1)):
            raise ValueError(
                "`scope='global'` compares single weights across kernels, so it does not go with `block_size` or "
                f"`sparsity_m_by_n`. Received: block_size={block_size}, sparsity_m_by_n={sparsity_m_by_n}. "
                "Use scope='layer' for these."
            )
        kwargs.setdefault("name", f"prune_low_magnitude_{layer.name}")
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.pruning_schedule = pruning_schedule
        self.block_pooling_type = block_pooling_type
        self.scope = scope
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
        for kernel in prunable_weights(self.layer):
            self._check_rank(kernel)
            settings = {"trainable": False, "aggregation": "only_first_replica"}
            self._masks.append(
                self.add_weight(name="mask", shape=kernel.shape, dtype="bool", initializer="ones", **settings)
            )
            self._thresholds.append(
                self.add_weight(
                    name="threshold", shape=(), dtype=kernel.dtype, initializer="zeros", autocast=False, **settings
                )
            )
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
            values[id(kernel)] = _masked(kernel, mask)
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
        return [np.where(_numpy(mask), _numpy(kernel), 0) for kernel, mask, _ in self.pruning_vars]

    def settle(self) -> None:
        """Makes the state what it means: masked weights become zero, the step variable current."""
        if not self.built:
            return
        for kernel, mask, _ in self.pruning_vars:
            kernel.assign(_masked(kernel, mask))
        self.sync_step()
        self.pruning_step.assign(self.step)
        self._stored_step = self.step

    def sync_step(self) -> None:
        """Takes the step over from the variable if somebody else has written it: weights were loaded or restored."""
        stored = int(_numpy(self.pruning_step))
        if stored != self._stored_step:
            self.step = self._stored_step = stored

    def update_masks(self, sparsity: float) -> None:
        """Recomputes the masks of this layer alone, from its raw kernels."""
        for kernel, mask, threshold in self.pruning_vars:
            weights = _numpy(kernel)
            if self.sparsity_m_by_n:
                mask.assign(m_by_n_mask(weights, *self.sparsity_m_by_n))
                continue
            if self.block_size == (1, 1):
                new_mask, new_threshold = magnitude_mask(weights, sparsity)
            else:
                new_mask, new_threshold = block_mask(
                    weights, sparsity, block_size=self.block_size, pooling_type=self.block_pooling_type
                )
            mask.assign(new_mask)
            threshold.assign(new_threshold)

    def save_own_variables(self, store):
        self.settle()
        super().save_own_variables(store)

    def get_config(self):
        schedule: Any = self.pruning_schedule
        if getattr(schedule, "__name__", "") == "<lambda>":
            raise ValueError(
                f"A lambda cannot be saved. Received: a lambda as pruning_schedule of {self.name!r}. "
                "Make a function of it with the decorator `keras.saving.register_keras_serializable()`."
            )
        config = keras.saving.serialize_keras_object(schedule)
        if set(config["config"]) == {"class_name", "config"}:  # tfmot's get_config wraps its own
            config["config"] = config["config"]["config"]
        return {
            **super().get_config(),
            "pruning_schedule": config,
            "block_size": self.block_size,
            "block_pooling_type": self.block_pooling_type,
            "sparsity_m_by_n": self.sparsity_m_by_n,
            "scope": self.scope,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        own = {name: getattr(schedules, name) for name in ("ConstantSparsity", "PolynomialDecay")}
        config["pruning_schedule"] = keras.saving.deserialize_keras_object(
            config["pruning_schedule"], {**own, **(custom_objects or {})}
        )
        with graph.unbuilt_parts():
            return super().from_config(config, custom_objects)

    def _check_rank(self, kernel) -> None:
        rank = len(kernel.shape)
        if self.block_size != (1, 1) and rank != 2:
            raise ValueError(
                f"`block_size` needs 2-dimensional kernels. Received: block_size={self.block_size} for kernel "
                f"{kernel.path!r} of shape {kernel.shape}. Exclude the layer with a `pruning_policy`."
            )
        if self.sparsity_m_by_n and rank not in (2, 4):
            raise ValueError(
                "`sparsity_m_by_n` needs 2- or 4-dimensional kernels. "
                f"Received: sparsity_m_by_n={self.sparsity_m_by_n} for kernel "
                f"{kernel.path!r} of shape {kernel.shape}. Exclude the layer with a `pruning_policy`."
            )


def update_global_masks(wrappers: list[PruneLowMagnitude], sparsity: float) -> None:
    """One threshold over the raw kernels of all wrappers, like PyTorch's `global_unstructured` with L1."""
    variables = [each for wrapper in wrappers for each in wrapper.pruning_vars]
    weights = [_numpy(kernel).astype("float32") for kernel, _, _ in variables]
    flat_mask, new_threshold = magnitude_mask(np.concatenate([each.ravel() for each in weights]), sparsity)
    ends = np.cumsum([each.size for each in weights])[:-1]
    gone = []
    for (kernel, mask, threshold), part in zip(variables, np.split(flat_mask, ends), strict=True):
        if not part.any() and _numpy(mask).any():
            gone.append(kernel.path)
        mask.assign(part.reshape(mask.shape))
        threshold.assign(new_threshold)
    if gone:
        warnings.warn(
            f"Global pruning to a sparsity of {sparsity:.2f} leaves nothing of {gone}: their weights are smaller than "
            "all others. Without one of its layers a network may compute a constant. Train the dense network before it "
            "is pruned, prune less, or use scope='layer'.",
            stacklevel=2,
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
    kernels = list(_effective_kernels(model, set()))
    if not kernels:
        raise ValueError(f"{type(model).__name__} {model.name!r} has no prunable kernel, or is not built yet.")
    weights = sum(kernel.size for kernel in kernels)
    return float((weights - sum(np.count_nonzero(kernel) for kernel in kernels)) / weights)


# --- helpers ---


def _numpy(variable) -> np.ndarray:
    return ops.convert_to_numpy(variable.value)


def _masked(kernel, mask):
    return ops.where(mask.value, kernel.value, ops.zeros_like(kernel.value))


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


def _effective_kernels(layer: keras.Layer, seen: set[int]) -> Iterator[np.ndarray]:
    """The kernels of a layer and its children, each once, as the forward pass sees them."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if isinstance(layer, PruneLowMagnitude):
        yield from layer.effective_weights()
    elif hasattr(layer, "get_prunable_weights") or _kernel_names(layer):
        yield from (_numpy(weight) for weight in prunable_weights(layer))
    else:
        for child in graph.children(layer):
            yield from _effective_kernels(child, seen)


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
    settings = ("pruning_schedule", "block_size", "block_pooling_type", "sparsity_m_by_n", "scope", "name")
    copy = PruneLowMagnitude(graph.copy(wrapper.layer, dtype), **{name: getattr(wrapper, name) for name in settings})
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


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(each, int) for each in pair):
        raise ValueError(f"`{name}` must be two integers. Received: {name}={value!r}.")
    return pair
