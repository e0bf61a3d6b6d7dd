"""Whole channels taken out of a network: fewer filters, fewer weights, fewer multiplications."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from kerascompress import graph
from kerascompress.follow import FIXED, Followed, Labels
from kerascompress.masks import finite_weights
from kerascompress.wrapper import wrappers_in

KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel")

Importance = Callable[[keras.Layer, np.ndarray | None], Any]


def prune_channels(
    model: keras.Model,
    sparsity: float,
    *,
    importance: str | Importance = "l2",
    scope: str = "layer",
    round_to: int = 1,
    ignore: Iterable[str | keras.Layer] = (),
    images: Any = None,
) -> keras.Model:
    """A smaller network of the same kind: the least important channels are gone, the rest keeps its learned weights.

    Channels that belong together go together: those that meet in an addition or in a gate, a channel and its part of
    the normalisation, of the depthwise kernel and of every kernel that reads it. Inputs and outputs keep their shapes.
    Layers keep their names. What cannot be followed is left whole, with a warning that names it. If all that has been
    removed was zero, kernels and BatchNorm's scale and shift, the outputs are those of `model`; but not where channels
    are normalised together, by LayerNormalization, RMSNormalization or groups of GroupNormalization, where zeros count
    in mean and variance, and not behind an activation that is not 0 at 0, such as sigmoid.

    Args:
        model: A built Sequential or Functional model, nested ones included. It is left as it is.
        sparsity: Fraction of the channels to remove, in [0, 1): of each group of layers whose channels belong together,
            or of all. Of n channels int(n * (1 - sparsity)) stay, as in Torch-Pruning, at least one.
        importance: What tells which channels go. `"l2"` or `"l1"`: the norm of the filter that makes the channel, as a
            fraction of the mean norm in its layer, averaged over the layers of the group. `"batch_norm"`: the magnitude
            of BatchNorm's scale, and `"l2"` where there is none. Or a function `importance(layer, outputs)` of a layer
            whose channels may go and its outputs for `images` (None without) that returns a score for each channel.
        scope: `"layer"` removes the fraction from each group, `"global"` compares the channels of all.
        round_to: The channels that stay in a group are a multiple of it, rounded down, but at least one multiple.
            Devices like multiples of 4 or 8.
        ignore: Layers, or names of layers, that keep all the channels they make; of a model, all its layers. A name
            stands for every layer that has it, in inner models too.
        images: What the model takes, as one batch, for an `importance` that looks at outputs. Only with a function.

    Returns:
        A new, uncompiled model of the same kind. Train it on: the weights that stay have lost their neighbours.

    Raises:
        ValueError: If an argument is out of range, the model is subclassed, not built or pruned by wrappers, no channel
            can be removed, a kernel holds NaN or infinite weights, or `importance` does not return what it should.

    Example:
        >>> import kerascompress as kc
        >>> dense = kc.models.resnet20(10)
        >>> small = kc.prune_channels(dense, 0.5)
        >>> dense.count_params(), small.count_params()
        (274042, 69570)
        >>> small.get_layer("stage3_block2_conv2").filters
        32

    Reference:
        Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, 2017 (arXiv:1608.08710); Liu et al.:
        Learning Efficient Convolutional Networks through Network Slimming, 2017 (arXiv:1708.06519); Fang, Ma, Song,
        Bi Mi, Wang: DepGraph: Towards Any Structural Pruning, 2023 (arXiv:2301.12900).
    """
    _check(model, sparsity, importance, scope, round_to, images)
    followed = Followed(model, _layers_of(model, ignore))
    roots = followed.labels.roots()
    if not roots.any():
        raise ValueError(
            f"No channel of {model.name!r} can be removed: all belong to its inputs or outputs, to what cannot be "
            "followed, or to layers to `ignore`."
        )
    scores = _scores(model, followed, roots, importance, images)
    groups = _groups(followed, roots)
    kept = _chosen(groups, scores, sparsity, scope == "global", round_to, _last_ones(followed, roots, scores))
    alive = np.isin(roots, [FIXED, *kept])
    return _without(model, followed, alive)


# --- what matters least ---


def _makers(followed: Followed):
    """Each kernel that makes channels or filters them: layer, variable, axis, labels on it, whether it makes them."""
    for layer, cut in followed.cuts.values():
        for name in KERNELS:
            if name in cut.axes:
                *others, (axis, labels) = cut.axes[name].items()
                yield layer, getattr(layer, name), axis, labels, bool(others)


def _scores(model, followed: Followed, roots, importance, images) -> np.ndarray:
    """The importance of every label, at its root: the mean over the layers where it is."""
    total, count = np.zeros(len(roots)), np.zeros(len(roots))

    def add(labels, score):
        np.add.at(total, roots[labels], score)
        np.add.at(count, roots[labels], 1)

    if callable(importance):
        for layer, score in _asked(model, followed, roots, importance, images):
            add(followed.cuts[id(layer)][1].out, score)
        return total / np.maximum(count, 1)
    if importance == "batch_norm":
        for layer, cut in followed.cuts.values():
            if isinstance(layer, keras.layers.BatchNormalization) and layer.gamma is not None:
                add(cut.out, np.abs(finite_weights(layer.gamma).astype("float64")))
        gates = total / np.maximum(count, 1), count > 0
        total[:], count[:] = 0, 0
    for _, kernel, axis, labels, _ in _makers(followed):
        weights = np.abs(np.moveaxis(finite_weights(kernel).astype("float64"), axis, 0).reshape(len(labels), -1))
        norms = weights.sum(axis=1) if importance == "l1" else np.sqrt((weights**2).sum(axis=1))
        add(labels, norms / (norms.mean() or 1))
    norms = total / np.maximum(count, 1)
    return np.where(gates[1], gates[0], norms) if importance == "batch_norm" else norms


def _asked(model, followed: Followed, roots, importance, images):
    """What a user's function says of each layer that makes channels which may go, for each call of the layer."""
    makers = {id(layer): layer for layer, _, _, labels, _ in _makers(followed) if roots[labels].any()}
    answers = []

    def ask(layer, outputs):
        score = np.asarray(importance(layer, outputs), "float64")
        size = len(followed.cuts[id(layer)][1].out)
        if score.shape != (size,) or not np.isfinite(score).all():
            raise ValueError(
                "`importance(layer, outputs)` must return a finite number for each channel that the layer makes, here "
                f"({size},). Received: an array of shape {score.shape} for {layer.name!r}."
            )
        answers.append((layer, score))

    def call(operation, values, node):
        args, kwargs = graph.arguments(node, values)
        if graph.has_calls(operation):
            given = args[0] if args else kwargs["inputs"]
            return graph.compute(operation, graph.standardized(operation, given), call)
        outputs = keras.tree.flatten(operation(*args, **kwargs))
        if id(operation) in makers:
            ask(operation, ops.convert_to_numpy(outputs[0]))
        return outputs

    if images is None:
        for layer in makers.values():
            ask(layer, None)
    else:
        in_lists = np.ndim(keras.tree.flatten(images)[0]) == 0  # numbers
        tensors = keras.tree.map_structure(ops.convert_to_tensor, np.asarray(images) if in_lists else images)
        graph.compute(model, graph.standardized(model, tensors), call)
    return answers


# --- which go ---


def _groups(followed: Followed, roots) -> list[np.ndarray]:
    """The channels that compete: of layers that share some of them. What is fixed takes no part."""
    together = Labels(len(roots))
    own = [np.unique(roots[labels]) for *_, labels, makes in _makers(followed) if makes]
    for each in own:
        together.couple(each[each != FIXED], each[-1])
    members = np.unique(np.concatenate(own))
    members = members[members != FIXED]
    group = together.roots()[members]
    return [members[group == each] for each in np.unique(group)]


def _last_ones(followed: Followed, roots, scores) -> np.ndarray:
    """The most important channel of every tensor: without it, there would be no tensor."""
    arrays = {np.unique(roots[labels]).tobytes() for labels in followed.seen}
    arrays |= {np.unique(roots[x]).tobytes() for _, cut in followed.cuts.values() for x in (cut.out, *_axes(cut))}
    each = [np.frombuffer(array, roots.dtype) for array in arrays]
    most = [labels[np.argmax(scores[labels])] for labels in each if FIXED not in labels]
    return np.unique(np.array(most, roots.dtype))


def _axes(cut):
    return [labels for axes in cut.axes.values() for labels in axes.values()]


def _chosen(groups, scores, sparsity, over_all, round_to, last_ones) -> np.ndarray:
    """The channels that stay."""
    scores = scores.copy()
    scores[last_ones] = np.inf
    ranked = [group[np.argsort(-scores[group], kind="stable")] for group in groups]
    if over_all:
        everything = np.concatenate(ranked)
        staying = everything[np.argsort(-scores[everything], kind="stable")][: _left(len(everything), sparsity)]
        counts = [int(np.isin(group, staying).sum()) for group in ranked]
    else:
        counts = [_left(len(group), sparsity) for group in ranked]
    kept = []
    for group, count in zip(ranked, counts, strict=True):
        least = max(int(np.isin(group, last_ones).sum()), min(round_to, len(group)), 1)
        rounded = count - count % round_to
        kept.append(group[: rounded if rounded >= least else -(-least // round_to) * round_to])
    return np.concatenate(kept)


def _left(count: int, sparsity: float) -> int:
    return max(int(count * (1 - sparsity) + 1e-6), 1)  # 10 * (1 - 0.9) is a little less than 1


# --- the smaller network ---


def _without(model, followed: Followed, alive) -> keras.Model:
    pairs = []

    def replace(old):
        if id(old) in followed.moves:
            return followed.moves[id(old)].replay(alive) or graph.copy(old)
        _, cut = followed.cuts.get(id(old), (None, None))
        if cut is None or all(alive[labels].all() for labels in _axes(cut)):
            return graph.copy(old)
        sizes = {key: int(alive[labels].sum()) for key, labels in cut.sizes.items()}
        config = graph.config_of(old)
        initial = dict.fromkeys(
            (key for key in config if key.endswith("_initializer")), "zeros"
        )  # quicker, and any shape
        new = type(old).from_config({**config, **initial, **sizes})
        pairs.append((old, new, cut))
        return new

    def replace_input(old):
        config = old.get_config()
        shape = followed.inputs[id(old)].rectangle(alive) or ()
        return type(old).from_config({**config, "batch_shape": (config["batch_shape"][0], *shape)})

    small = graph.rebuild(model, replace, replace_input=replace_input)
    for old, new, cut in pairs:
        for key in old.get_config():
            if key.endswith("_initializer"):
                setattr(new, key, getattr(old, key))
        named = {id(getattr(old, name, None)): axes for name, axes in cut.axes.items()}
        for one, other in zip(new.variables, old.variables, strict=True):
            weights = ops.convert_to_numpy(other.value)
            for axis, labels in named.get(id(other), {}).items():
                weights = np.compress(alive[labels], weights, axis=axis)
            one.assign(weights)
            one.trainable, one.regularizer, one.constraint = other.trainable, other.regularizer, other.constraint
    return small


# --- arguments ---


def _layers_of(model, ignore) -> list[keras.Layer]:
    known = graph.walk(model)
    found = []
    for each in [ignore] if isinstance(ignore, (str, keras.Layer)) else ignore:
        chosen = [layer for layer in known if layer is each or layer.name == each]
        if not chosen:
            raise ValueError(
                f"`ignore` must hold layers of {model.name!r} or their names. Received: {each!r}. "
                f"The layers are {list(dict.fromkeys(layer.name for layer in known))}."
            )
        found += [part for layer in chosen for part in graph.walk(layer)]
    return found


def _check(model, sparsity, importance, scope, round_to, images) -> None:
    if not isinstance(model, keras.Model) or not graph.is_graph(model):
        raise ValueError(
            "`prune_channels` needs a Functional or Sequential model: of any other, the way of the channels is not "
            f"known. Received: {model!r} of type {type(model).__name__}. `PruningOptimizer` prunes any model's weights."
        )
    if not model.built:
        raise ValueError(f"Build or call the model before pruning it. Received: {model.name!r}, which is not built.")
    graph.check_calls(model)
    if any(wrappers_in(model)):
        raise ValueError(f"Model {model.name!r} is pruned by wrappers. Use `strip_pruning` first.")
    if not 0 <= sparsity < 1:
        raise ValueError(
            "`sparsity` must be in [0, 1), a fraction of the channels. "
            f"Received: sparsity={sparsity}. If yours is percent, divide it by 100."
        )
    if importance not in ("l2", "l1", "batch_norm") and not callable(importance):
        raise ValueError(
            "`importance` must be 'l2', 'l1', 'batch_norm' or a function `importance(layer, outputs)`. "
            f"Received: importance={importance!r}."
        )
    if images is not None and not callable(importance):
        raise ValueError(
            f"`images` are for an `importance` that looks at outputs. Received: images with importance={importance!r}, "
            "which looks at weights alone. Leave them out."
        )
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be one of ('layer', 'global'). Received: scope={scope!r}.")
    if not isinstance(round_to, int | np.integer) or round_to < 1:
        raise ValueError(f"`round_to` must be a whole number of at least 1. Received: round_to={round_to!r}.")
