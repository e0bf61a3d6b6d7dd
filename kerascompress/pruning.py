"""Magnitude pruning of Keras 3 layers and models, with tfmot's names, arguments and schedules.

`wrapper` masks a layer; here, models are wrapped, pruned at once, stripped and counted. `optimizer` has the other
carrier of masks, for models whose layers cannot be wrapped.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from kerascompress import graph
from kerascompress.masks import (
    PRUNABLE_KERNELS,
    Rule,
    as_array,
    check_allow,
    finite_weights,
    is_kernel,
    warn_of_collapse,
)
from kerascompress.schedules import Schedule
from kerascompress.wrapper import (
    PruneLowMagnitude,
    check_plain,
    is_prunable,
    kernel_names,
    prunable_weights,
    wrappers_in,
)


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
        The wrapped layer, the list with its prunable layers wrapped and all others as they are, or a new uncompiled
        model.

    Raises:
        ValueError: If there is nothing to prune in a layer or model, for a subclassed model, a layer that cannot be
            copied, a policy of tfmot's, or anything that is no Keras 3 object.
        TypeError: For a policy without a model, further arguments without a layer, or a schedule that is not callable.

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
        "pruning_schedule": pruning_schedule,
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
        "scope": scope,
    }
    if pruning_policy is not None and not isinstance(to_prune, keras.Model):
        raise TypeError(
            "`pruning_policy` chooses among the layers of a model. "
            f"Received: {type(to_prune).__name__}. Choose the layers yourself, and leave `pruning_policy`."
        )
    if isinstance(to_prune, PruneLowMagnitude):
        _warn_of_wrapper(to_prune, stacklevel=3)
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
            if isinstance(layer, PruneLowMagnitude) or not is_prunable(layer)
            else PruneLowMagnitude(layer, **settings)
            for layer in to_prune
        ]

    def prune(layer):
        copy = graph.copy(layer)
        return PruneLowMagnitude(copy, **settings) if id(layer) in chosen else copy

    with _advice():
        chosen = _chosen_layers(to_prune, pruning_policy)
        return graph.rebuild(to_prune, prune)


def prune_now(
    model: keras.Model,
    sparsity: float,
    *,
    scope: str = "layer",
    block_size: tuple[int, int] = (1, 1),
    block_pooling_type: str = "AVG",
    allow: Callable[[keras.Variable], bool] | None = None,
) -> keras.Model:
    """One-shot magnitude pruning without training: a copy of a model whose smallest weights are zero.

    The copy is plain, and nothing in it keeps the zeros: train on with `PruningOptimizer(optimizer)`, without a
    schedule, which does. Any other optimizer lets them grow back.

    Args:
        model: Any built Keras 3 model, subclassed ones included. It is left as it is.
        sparsity: Fraction of zeros over the prunable kernels, in [0, 1).
        scope: `"layer"` gives every kernel this sparsity; `"global"` compares the magnitudes of all kernels.
        block_size, block_pooling_type: See `PruneLowMagnitude`.
        allow: `variable -> bool` says which weights are pruned, as for `PruningOptimizer`: all but the classifier,
            `lambda variable: variable.name == "kernel" and "logits" not in variable.path`. By default all
            kernels.

    Returns:
        A new, uncompiled model of the same class.

    Raises:
        ValueError: If an argument is out of range, there is no prunable kernel, the model is pruned by wrappers,
            quantized or has LoRA, or a kernel holds NaN or infinite weights.
        TypeError: If `allow` is not callable.

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
    check_allow(allow)
    rule = Rule(scope, block_size, block_pooling_type)
    if any(wrappers_in(model)):
        raise ValueError(
            f"Model {model.name!r} is pruned by wrappers, which have masks of their own. Use `strip_pruning` first."
        )
    for layer in graph.walk(model):
        check_plain(layer)
    small = graph.copy(model)
    kernels = _allowed(model, small, allow) if allow else kernels_of(small)
    if not kernels:
        raise ValueError(f"No variable of {model.name!r} passes `allow`.") if allow else _no_kernels(model)
    for kernel in kernels:
        rule.check(kernel, "Leave it out: `allow=lambda variable: ...`.")
    masks, _ = rule([finite_weights(kernel) for kernel in kernels], sparsity)
    for kernel, mask in zip(kernels, masks, strict=True):
        kernel.assign(kernel.value * ops.cast(mask, kernel.dtype))
    warn_of_collapse(sparsity, [each.path for each, mask in zip(kernels, masks, strict=True) if not mask.any()])
    unnamed = [kernel.path for kernel in kernels if not is_kernel(kernel) and not allow]
    if unnamed:
        warnings.warn(
            f"{unnamed} are pruned because a layer's `get_prunable_weights()` says so, which no optimizer sees: to "
            "keep their zeros, train on with `PruningOptimizer(optimizer, allow=lambda variable: ...)`.",
            stacklevel=2,
        )
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
    if not any(wrappers_in(model)):
        return graph.copy(model)
    with _advice():
        graph.leaves(model)
        copy = graph.rebuild(model, _stripped)
    hidden = [wrapper.path for wrapper in wrappers_in(copy)]
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
        ValueError: If there is no prunable kernel, or one has LoRA or is packed, as int4 is.

    Example:
        >>> import keras, kerascompress as kc
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="zeros")])
        >>> kc.sparsity(model)
        1.0
    """
    check_countable(model)
    kernels = effective_kernels(model)
    if not kernels:
        raise _no_kernels(model)
    return share_of_zeros(kernels)


# --- helpers ---


def _allowed(model: keras.Model, copy: keras.Model, allow: Callable[[keras.Variable], bool]) -> list[keras.Variable]:
    """The variables of a copy that `allow` chooses in the model itself, whose paths are those that its user knows."""
    trained = {id(each) for layer in graph.walk(model) for each in layer._trainable_variables}  # frozen ones as well
    pairs = zip(model.variables, copy.variables, strict=True)
    return [new for old, new in pairs if id(old) in trained and allow(old)]


def _chosen_layers(model: keras.Model, policy: Any) -> set[int]:
    """Ids of the layers to wrap; a warning for each that has weights and stays dense."""
    if policy is not None:
        _check_policy(policy)
        policy.ensure_model_supports_pruning(model)
    chosen = set()
    for layer in graph.leaves(model):
        if any(wrappers_in(layer)):
            _warn_of_wrapper(layer, stacklevel=4)
        elif not is_prunable(layer):
            _warn_of_dense_weights(layer)
        elif policy is None or policy.allow_pruning(layer):
            chosen.add(id(layer))
            for part in _unprunable_parts(layer):
                _warn_of_dense_weights(part)
    if not chosen and not any(wrappers_in(model)):
        raise ValueError(
            f"Model {model.name!r} has no layer to prune. Prunable are "
            f"{', '.join(kind.__name__ for kind in PRUNABLE_KERNELS)}, layers made of them, and layers with a method "
            f"`get_prunable_weights()`. Received: pruning_policy={policy!r}."
        )
    return chosen


def share_of_zeros(kernels: list[np.ndarray]) -> float:
    weights = sum(kernel.size for kernel in kernels)
    return float((weights - sum(np.count_nonzero(kernel) for kernel in kernels)) / weights)


def check_countable(model: keras.Layer) -> None:
    """Raises a ValueError where the zeros of a kernel are not those of its variable."""
    for layer in graph.walk(model):
        check_plain(layer, modes=(None, "int8"))


def _no_kernels(model) -> ValueError:
    return ValueError(f"{type(model).__name__} {model.name!r} has no prunable kernel, or is not built yet.")


def kernels_of(model: keras.Layer) -> list[keras.Variable]:
    """All kernels of a built model or layer, each once.

    By name, or by `get_prunable_weights()` of their layer; and those that the model's optimizer prunes.
    """
    decided: dict[int, bool] = {}
    for layer in graph.walk(model):
        if hasattr(layer, "get_prunable_weights") and layer.built:
            decided |= {id(variable): False for variable in layer.variables if id(variable) not in decided}
            decided |= {id(variable): True for variable in layer.get_prunable_weights()}
    decided |= {id(kernel): True for kernel, _, _ in pruning_vars(model)}  # by `allow` of an optimizer, too
    unique = {id(variable): variable for variable in model.variables}
    return [variable for key, variable in unique.items() if decided.get(key, is_kernel(variable))]


def pruning_vars(model: keras.Layer) -> list[tuple[keras.Variable, keras.Variable, keras.Variable]]:
    """`(kernel, mask, threshold)` of every pruned kernel, of whichever carrier."""
    carriers = [*wrappers_in(model), *optimizers(model)]
    carriers += [each for carrier in carriers for each in getattr(carrier, "optimizers", ()) if each not in carriers]
    return [each for carrier in carriers for each in getattr(carrier, "pruning_vars", ())]


def optimizers(model: keras.Layer) -> list[Any]:
    """The optimizer of a model and those inside it, the one that updates last; `[None]` if there is none.

    Of a Keras `MultiOptimizer` the one that prunes.
    """
    found: list[Any] = [getattr(model, "optimizer", None)]
    while found[-1] is not None:
        several = (each for each in getattr(found[-1], "optimizers", ()) if hasattr(each, "pruning_vars"))
        found.append(getattr(found[-1], "inner_optimizer", None) or next(several, None))
    return found[:-1] or found


def effective_kernels(model: keras.Layer) -> list[np.ndarray]:
    """`kernels_of` a model, as the forward pass sees them: zero where a mask is."""
    masks = {id(kernel): mask for wrapper in wrappers_in(model) for kernel, mask, _ in wrapper.pruning_vars}
    return [
        as_array(kernel) * (as_array(masks[id(kernel)]) if id(kernel) in masks else 1) for kernel in kernels_of(model)
    ]


def _unprunable_parts(layer: keras.Layer) -> Iterator[keras.Layer]:
    """The parts of a prunable layer that nothing says how to prune, such as a recurrent cell of the user's own."""
    if hasattr(layer, "get_prunable_weights") or kernel_names(layer):
        return
    for part in graph.children(layer):
        if is_prunable(part):
            yield from _unprunable_parts(part)
        else:
            yield part


def _warn_of_dense_weights(layer: keras.Layer) -> None:
    own = type(layer).__module__.partition(".")[0] not in ("keras", "kerascompress")
    dense = [v.path for v in layer.trainable_variables if is_kernel(v) or (own and len(v.shape) > 1)]
    if not dense and not layer.built and not hasattr(layer, "get_prunable_weights"):
        parts = graph.walk(layer)  # before it is built, only what builds kernels can be told
        makes = own and type(layer).build is not keras.Layer.build
        makes |= any(kernel_names(each) or hasattr(each, "kernel_initializer") for each in parts)
        dense = ["whatever it will build"] if makes else []
    if dense:
        warnings.warn(
            f"Layer {layer.name!r} of type {type(layer).__name__} stays dense, {dense} included. "
            "Give a layer of your own a method `get_prunable_weights()` that returns the variables to prune, or [].",
            stacklevel=4,
        )


def _warn_of_wrapper(layer: keras.Layer, stacklevel: int) -> None:
    warnings.warn(
        f"Layer {layer.name!r} is pruned already and keeps its schedule. For another one, use `strip_pruning` first.",
        stacklevel=stacklevel,
    )


def _stripped(layer: keras.Layer) -> keras.Layer:
    if not isinstance(layer, PruneLowMagnitude):
        return graph.copy(layer)
    copy = graph.copy(layer.layer)
    for kernel, (raw, mask, _) in zip(prunable_weights(copy) if layer.built else [], layer.pruning_vars, strict=True):
        kernel.assign(raw.value * ops.cast(mask.value, raw.dtype))
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
            + " tfmot's own policies read the graphs of Keras 2: `kc.LatencyPolicy()` stands for its latency policy; "
            "of another, write the two methods for Keras 3." * of_tfmot
        )
