"""Schemes that let a small network inherit strong augmentation, and two ways to be large for a while.

A network is large before it is pruned (Figure 4), or while further blocks stand behind its stages (Figure 6): the same
three schemes, which call `prune_now`, `prune_low_magnitude` or `discard` to shrink it.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kerascompress import graph
from kerascompress.models.mobilenet_v2 import inverted_residual
from kerascompress.models.resnet import basic_block
from kerascompress.models.shufflenet_v2 import shuffle_unit
from kerascompress.pruning import effective_kernels, share_of_zeros
from kerascompress.wrapper import wrappers_in

Fit = Callable[[keras.Model, float | None], Any]  # fit(model, magnitude); None is no RandAugment
Shrink = Callable[[keras.Model], keras.Model]

# The last layer of a block, `stage{s}_block{b}_<part>`, tells which network it is, and so who builds one more.
BLOCKS: dict[str, Callable[..., Any]] = {
    "relu2": basic_block,
    "project_bn": inverted_residual,
    "add": inverted_residual,
    "shuffle": shuffle_unit,
}


# --- schemes ---


def inherit(large: keras.Model, *, shrink: Shrink, fit: Fit, strong: float | None, weak: float | None) -> keras.Model:
    """The large network learns strong augmentation; the small one inherits it.

    Args:
        large: The network that has more weights for now: dense, or extended.
        shrink: `shrink(large)` returns the small network with the weights of the large one: `lambda net:
            prune_now(net, 0.6)`, or `discard`.
        fit: `fit(model, magnitude)` trains a model with RandAugment at that magnitude; `None` is without RandAugment.
            Where `prune_now` shrinks, it must compile with `PruningOptimizer`, which keeps zeros; a warning says if
            it has not.
        strong: First magnitude, in [0, 30].
        weak: Second magnitude, in [0, 30], the optimum of the small network.

    Returns:
        What `shrink` returned, trained.

    Example:
        >>> import kerascompress as kc
        >>> def fit(model, magnitude):
        ...     print(f"{model.count_params()} weights at M = {magnitude}")
        >>> large = kc.extend(kc.models.resnet(8, 10), extra_blocks=3)
        >>> small = kc.inherit(large, shrink=kc.discard, fit=fit, strong=14, weak=4)
        301434 weights at M = 14
        78714 weights at M = 4

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-C, Figures 4, 5 and 6.
    """
    fit(large, strong)
    small = shrink(large)
    _fit_small(small, fit, weak)
    return small


def baseline_a(
    large: keras.Model, *, shrink: Shrink, fit: Fit, strong: float | None, weak: float | None
) -> keras.Model:
    """Baseline-A: the small network has to learn strong augmentation by itself, then goes on with a weak one.

    The large network is not trained here. For Figure 4 it has been trained without RandAugment before, `fit(dense,
    None)`, so that there is something to prune. For Figure 6 it is new, and `discard` returns the small network with
    the initial weights that it has in the other schemes.

    Args:
        large, shrink, fit, strong, weak: See `inherit`.

    Returns:
        What `shrink` returned, trained.

    Example:
        >>> import kerascompress as kc
        >>> def fit(model, magnitude):
        ...     print(f"{model.count_params()} weights at M = {magnitude}")
        >>> large = kc.extend(kc.models.resnet(8, 10), extra_blocks=3)
        >>> small = kc.baseline_a(large, shrink=kc.discard, fit=fit, strong=14, weak=4)
        78714 weights at M = 14
        78714 weights at M = 4

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-C, Figures 4 and 6.
    """
    small = shrink(large)
    _fit_small(small, fit, strong)
    _fit_small(small, fit, weak)
    return small


def baseline_b(large: keras.Model, *, shrink: Shrink, fit: Fit, weak: float | None, strong: Any = None) -> keras.Model:
    """Baseline-B: as `inherit`, but the large network learns the weak augmentation too.

    Args:
        large, shrink, fit, weak: See `inherit`.
        strong: Not used; it is here so that the three schemes can be called alike.

    Returns:
        What `shrink` returned, trained.

    Example:
        >>> import kerascompress as kc
        >>> def fit(model, magnitude):
        ...     print(f"{model.count_params()} weights at M = {magnitude}")
        >>> large = kc.extend(kc.models.resnet(8, 10), extra_blocks=3)
        >>> small = kc.baseline_b(large, shrink=kc.discard, fit=fit, weak=4)
        301434 weights at M = 4
        78714 weights at M = 4

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-C, Figures 4 and 6.
    """
    return inherit(large, shrink=shrink, fit=fit, strong=weak, weak=weak)


# --- further blocks ---


def extend(
    model: keras.Model,
    extra_blocks: int,
    *,
    features: str | None = None,
    block: Callable[..., Any] | None = None,
    seed: int | None = None,
) -> keras.Model:
    """Attaches further blocks behind the last stage of a network: ResNet-20 with 10 blocks is "ResNet20+20".

    Args:
        model: A Functional or Sequential model, with an input shape. It is left as it is.
        extra_blocks: How many, at least 1. In a ResNet or a ShuffleNetV2 they are as wide as the last stage.
        features: Name of the layer behind which they are attached. By default the end of the stages, which are the
            input of the layer "head" or else "pool", as in the networks of `kerascompress.models`.
        block: Builds one block: `block(x, filters, *, name, weight_decay, seed)` returns a tensor of the shape of `x`,
            whose channels `filters` are. By default the network's own, and a residual block of two 3x3 convolutions
            where the network is none of ours.
        seed: Makes the initial weights of the new blocks reproducible.

    Returns:
        A new, uncompiled Functional model. The layers of `model` keep their names and weights; weight decay is theirs.

    Raises:
        ValueError: If the model is subclassed, pruned or extended already, if it has no such layer, or if a block
            changes the shape.

    Example:
        >>> import kerascompress as kc
        >>> large = kc.extend(kc.models.resnet20(100), extra_blocks=10)
        >>> large.count_params() - kc.models.resnet20(100).count_params()
        742400

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-C2, Figure 5 (b).
    """
    _check_model(model, "extend")
    if not isinstance(extra_blocks, int | np.integer) or extra_blocks < 1:
        raise ValueError(f"`extra_blocks` must be a whole number of at least 1. Received: extra_blocks={extra_blocks}.")
    if any(wrappers_in(model)):
        raise ValueError(
            f"`extend` comes before pruning. Received: {model.name!r} with pruned layers. "
            "Pass the dense model, or `strip_pruning(model)`."
        )
    names = [layer.name for layer in model.layers]
    if graph.END in names:
        raise ValueError(
            f"Model {model.name!r} has extra blocks already. For another number of them, use `discard` first."
        )
    behind = next((name for name in ("head", "pool") if name in names), None) if features is None else None
    if behind is None and features not in names:
        raise ValueError(
            "`features` must be the name of the layer behind which the blocks are to stand; without it, the model "
            f"needs a layer 'head' or 'pool' that follows them. Received: features={features!r} for {model.name!r} "
            f"with the layers {names}. If the network is one of these layers, extend that one and put it back."
        )
    if block is None and any(getattr(each, "data_format", "") == "channels_first" for each in graph.walk(model)):
        raise ValueError(
            "The extra blocks take channels last. "
            f"Received: {model.name!r} with channels first. Pass a builder of your own: `block=`."
        )
    settings = {"weight_decay": _weight_decay(model), "seed": seed}
    policy = model.get_layer(features or behind).dtype_policy
    inputs: list[Any] = []

    def append(x):
        inputs.append(x)
        if len(inputs) > 1 or not isinstance(x, keras.KerasTensor):
            raise ValueError(
                "`extend` needs a place that one tensor passes once. "
                f"Received: {features or behind!r} of {model.name!r}, {len(inputs)} times, with {x}."
            )
        earlier = keras.config.dtype_policy()
        try:
            keras.config.set_dtype_policy(policy)
            return _with_blocks(x, extra_blocks, block, features or behind, **settings)
        finally:
            keras.config.set_dtype_policy(earlier)

    def call(old, layer, *args, **kwargs):
        if old.name == behind:
            return layer(append(args[0]), *args[1:], **kwargs)
        outputs = layer(*args, **kwargs)
        return append(outputs) if old.name == features else outputs

    extended = graph.rebuild(model, graph.copy, call)
    if not inputs:
        raise ValueError(f"Nothing passes {features or behind!r} of {model.name!r}, an input. Name a layer behind it.")
    return extended


def _with_blocks(x, count: int, block: Callable[..., Any] | None, place: Any, **settings):
    """Returns features behind so many blocks, between two markers at which `discard` cuts."""
    if block is None and len(x.shape) != 4:
        raise ValueError(
            "The extra blocks are convolutions, for features of shape (batch, height, width, channels). "
            f"Received: {x.shape} at {place!r}. Pass a builder of your own: `block=`."
        )
    build = block or _block_before(x)
    extended = keras.layers.Identity(name=graph.BEGIN)(x)
    for index in range(count):
        extended = build(extended, x.shape[-1], name=f"extra_block{index}", **settings)
    if extended.shape != x.shape:
        raise ValueError(
            "A block must return the shape that it got, or the classifier could not stay when it is discarded. "
            f"Received: {tuple(extended.shape)} from {tuple(x.shape)}, channels last."
        )
    return keras.layers.Identity(name=graph.END)(extended)


def discard(model: keras.Model) -> keras.Model:
    """Takes the extra blocks away again: the small network, with the weights that it has learned with them.

    Args:
        model: A model from `extend`, trained, loaded or pruned since. It is left as it is.

    Returns:
        A new, uncompiled Functional model with the layers, names and order that it had before `extend`. Its classifier
        stays too; only the retraining fits it to the features that it gets now.

    Raises:
        ValueError: If the model has no extra blocks.

    Example:
        >>> import kerascompress as kc
        >>> small = kc.models.resnet(8, 10)
        >>> kc.discard(kc.extend(small, extra_blocks=3)).get_config() == small.get_config()
        True

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-C2, Figure 5 (b).
    """
    _check_model(model, "discard")
    if graph.END not in [layer.name for layer in model.layers]:
        raise ValueError(
            f"Model {model.name!r} has no extra blocks to discard. Received: the layers "
            f"{[layer.name for layer in model.layers]}. If one of them is the extended network, pass that one."
        )
    hole = keras.KerasTensor((), name="hole")  # stands for whatever lies between the two ends
    kept: list[Any] = []

    def call(old, layer, *args, **kwargs):
        if old.name == graph.BEGIN:
            kept.append(args[0])
            return hole
        if all(each is not hole for each in keras.tree.flatten((args, kwargs))):
            return layer(*args, **kwargs)
        return kept[0] if old.name == graph.END else [hole] * len(keras.tree.flatten(old.output))

    return graph.rebuild(model, graph.copy, call)


# --- helpers ---


def _fit_small(small: keras.Model, fit: Fit, magnitude: float | None) -> None:
    before = _zeros(small)
    fit(small, magnitude)
    after = _zeros(small)
    if before > 0.01 and after < before - 1e-3:
        warnings.warn(
            f"`fit` has made the pruned network dense: of its weights {before:.1%} were zero, and {after:.1%} are. "
            "Have it compile with `PruningOptimizer(optimizer)`, which keeps zeros.",
            stacklevel=3,
        )


def _zeros(model: Any) -> float:
    """The share of zeros in the kernels of a model, 0 where there are none."""
    kernels = effective_kernels(model) if isinstance(model, keras.Model) else []
    return share_of_zeros(kernels) if kernels else 0.0


def _block_before(x) -> Callable[..., Any]:
    """The builder of such blocks as the one whose output `x` is."""
    part = re.fullmatch(r"stage\d+_block\d+_(\w+)", graph.producer(x).name)
    return BLOCKS.get(part[1], basic_block) if part else basic_block


def _weight_decay(model: keras.Model) -> float | None:
    penalties = [getattr(getattr(layer, "kernel_regularizer", None), "l2", 0) for layer in graph.walk(model)]
    return next((2 * float(penalty) for penalty in penalties if penalty), None)


def _check_model(model: Any, function: str) -> None:
    if not graph.is_graph(model):
        raise ValueError(
            f"`{function}` needs a Functional or Sequential model: of any other, the order of the layers is not known. "
            f"Received: {model!r} of type {type(model).__name__}. Use the Functional API for the network itself; a "
            "subclassed model may hold it."
        )
    if not model.built:
        raise ValueError(
            f"`{function}` needs a model with an input shape. Received: {model.name!r}, which is not built. "
            "Begin it with `keras.Input(shape)`."
        )
