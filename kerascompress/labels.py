"""Labels of channels, what is known of a tensor, and operations that do nothing but move channels."""

import dataclasses
import functools
import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kerascompress import graph

FIXED = 0  # the label of whatever stays: images, logits, what cannot be followed
MOVES = (layers.Flatten, layers.Reshape, layers.Permute)
# Nodes of `keras.ops`, by the names of their classes. What keeps the order moves what is left as it moves the whole.
IN_ORDER_OPS = ("Reshape", "Transpose", "Squeeze", "ExpandDims", "Swapaxes", "Moveaxis")
MOVE_OPS = (*IN_ORDER_OPS, "Split", "GetItem", "Repeat", "Flip", "Roll", "Take")


class Labels:
    """Numbers that may turn out to stand for the same: a union-find, in which `FIXED` wins."""

    def __init__(self, count: int = 1):
        self.parents = list(range(count))

    def new(self, count: int) -> np.ndarray:
        labels = np.arange(len(self.parents), len(self.parents) + count)
        self.parents.extend(labels.tolist())
        return labels

    def couple(self, *arrays: Any) -> None:
        """Makes one what stands at the same place of the arrays."""
        first, *others = np.broadcast_arrays(*arrays)
        for other in others:
            for pair in set(zip(first.ravel().tolist(), other.ravel().tolist(), strict=True)):
                one, two = map(self._root, pair)
                self.parents[max(one, two)] = min(one, two)

    def _root(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = label = self.parents[self.parents[label]]
        return label

    def roots(self) -> np.ndarray:
        return np.array([self._root(label) for label in range(len(self.parents))])


@dataclasses.dataclass
class Tensor:
    """What is known of a tensor, without its batch axis."""

    labels: np.ndarray  # of its elements; size 1 along an axis on which nothing depends
    shape: tuple[int | None, ...]
    # Where labels depend on several axes, channels are only being moved: from this tensor, from these positions in it.
    origin: "tuple[Tensor, np.ndarray] | None" = None

    @property
    def axes(self) -> list[int]:
        return [axis for axis, size in enumerate(self.labels.shape) if size > 1]

    @property
    def axis(self) -> int:
        """The axis of the channels: the first on which labels depend, or else the last."""
        return self.axes[0] if self.axes else len(self.shape) - 1

    def along(self, axis: int) -> np.ndarray | None:
        """The label of each channel on an axis, or None if labels depend on another one or the size is unknown."""
        size = self.shape[axis]
        if any(each != axis for each in self.axes) or size is None:
            return None
        return np.broadcast_to(self.labels.ravel(), (size,))

    def rectangle(self, alive: np.ndarray) -> tuple[int | None, ...] | None:
        """The shape of what is left, or None if that is none."""
        left = alive[self.labels]
        sides = [left.any(axis=tuple(i for i in range(left.ndim) if i != axis)) for axis in range(left.ndim)]
        if not np.array_equal(left, functools.reduce(np.logical_and.outer, sides, np.array(True))):
            return None
        return tuple(int(s.sum()) if len(s) > 1 else n for s, n in zip(sides, self.shape, strict=True))


def fixed(symbolic) -> Tensor:
    shape = tuple(symbolic.shape[1:])
    return Tensor(np.full((1,) * len(shape), FIXED), shape)


def vector(x, axis, symbolic) -> Tensor:
    shape = tuple(symbolic.shape[1:])
    return Tensor(_compact(x.reshape([-1 if i == axis else 1 for i in range(len(shape))])), shape)


# --- channels that are only moved ---


@dataclasses.dataclass
class Move:
    """An operation that moves channels. `takes` has what it takes from the source of `tensor`, None for itself."""

    operation: Any
    tensor: Tensor
    outputs: list[Tensor]
    takes: list[np.ndarray | None]

    def replay(self, alive: np.ndarray) -> Any:
        """What does the same to the channels that are left; None if the operation does."""
        if all(alive[each.labels].all() for each in (self.tensor, *self.outputs)):
            return None
        to = self.outputs[0].rectangle(alive)
        is_layer = isinstance(self.operation, keras.Layer)
        if to is None:  # nothing is moved before it can be done at once
            new: Any = layers.Identity(name=self.operation.name)
        elif self.takes[0] is None or (_keeps_order(self.operation) and self.tensor.rectangle(alive) is not None):
            return self._reshaped(to)
        else:
            new = self._taken(alive)
        return new if is_layer else lambda x, *args, **kwargs: new(x)

    def _reshaped(self, shape):
        key = {layers.Reshape: "target_shape"}.get(type(self.operation), "newshape")
        config = self.operation.get_config()
        if key not in config:
            return None
        target = tuple(config[key])
        batch = target[: len(target) - len(shape)]
        free = [old if old == -1 else new for old, new in zip(target[len(batch) :], shape, strict=True)]
        return type(self.operation).from_config({**config, key: (*batch, *free)})

    def _taken(self, alive):
        source = self.tensor.origin[0] if self.tensor.origin else self.tensor
        axis = source.axis
        x: Any = source.along(axis)
        position = np.cumsum(alive[x]) - 1
        indices = [position[take[alive[x[take]]]] for take in self.takes if take is not None]
        inputs = keras.Input(source.rectangle(alive), dtype=keras.tree.flatten(self.operation.output)[0].dtype)
        ends = np.cumsum([len(each) for each in indices])
        if (
            len(indices) > 1
            and np.array_equal(np.concatenate(indices), np.arange(ends[-1]))
            and ends[-1] == alive[x].sum()
        ):
            outputs = ops.split(inputs, ends[:-1].tolist(), axis=axis + 1)
        else:
            outputs = [ops.take(inputs, each.astype("int32"), axis=axis + 1) for each in indices]
        return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name=self.operation.name)


def move(operation: Any, tensor: Tensor, node: Any) -> Move | None:
    """Lets the operation itself move the positions of the elements; None if some choice of channels cannot move so."""
    sizes = _sizes(tensor)
    positions = np.arange(math.prod(sizes), dtype="int32").reshape(1, *sizes)
    args, kwargs = graph.arguments(node, [ops.convert_to_tensor(positions)])
    try:
        made = [ops.convert_to_numpy(each) for each in keras.tree.flatten(operation(*args, **kwargs))]
    except Exception:  # whatever a backend may raise where a batch of one cannot be split
        return None
    if any(each.shape[:1] != (1,) for each in made):  # channels would become images
        return None
    moved = [each[0] for each in made]
    source, index = tensor.origin or (tensor, positions)
    labels = np.broadcast_to(tensor.labels, sizes).ravel()
    outputs: list[Tensor] = []
    takes: list[np.ndarray | None] = []
    for each, symbolic in zip(moved, node.outputs, strict=True):
        out = Tensor(_compact(labels[each]), tuple(symbolic.shape[1:]))
        if len(out.shape) != each.ndim or any(out.shape[axis] is None for axis in out.axes):
            return None
        index_of_source = index.ravel()[each]
        take = _as_take(source, index_of_source)
        if not _may_move(operation, tensor, out, take):
            return None
        if len(out.axes) > 1:
            out.origin = (source, index_of_source)
        alone = tensor.origin is None and (_keeps_order(operation) or _unchanged(tensor, out))
        outputs.append(out)
        takes.append(None if alone or out.origin else take)
    return Move(operation, tensor, outputs, takes)


# --- helpers ---


def name_of_node(operation) -> str:
    of_ops = not isinstance(operation, keras.Layer) and type(operation).__module__.startswith("keras.src.ops.")
    return type(operation).__name__ if of_ops else ""


def _compact(labels: np.ndarray) -> np.ndarray:
    for axis in range(labels.ndim):
        first = labels.take([0], axis)
        labels = first if (labels == first).all() else labels
    return labels


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size or 2 for size in tensor.shape)  # any number where it is free


def _keeps_order(operation) -> bool:
    return isinstance(operation, MOVES) or name_of_node(operation) in IN_ORDER_OPS


def _unchanged(tensor: Tensor, out: Tensor) -> bool:
    return len(out.axes) < 2 and np.array_equal(tensor.labels.ravel(), out.labels.ravel())


def _may_move(operation, tensor: Tensor, out: Tensor, take: np.ndarray | None) -> bool:
    """Whether what is left can be moved whichever channels go."""
    several = len(out.axes) > 1
    if not _keeps_order(operation):
        return tensor.origin is None and not several and (take is not None or _unchanged(tensor, out))
    if tensor.origin is None:
        return True
    turns = not isinstance(operation, layers.Reshape) and name_of_node(operation) != "Reshape"
    return turns if several else take is not None


def _as_take(source: Tensor, index: np.ndarray) -> np.ndarray | None:
    """Which channels of the source these positions are, if they are whole channels in their places."""
    axis, sizes = source.axis, _sizes(source)
    if index.ndim != len(sizes) or any(
        i != axis and n != m for i, (n, m) in enumerate(zip(sizes, index.shape, strict=True))
    ):
        return None
    take = np.moveaxis(np.unravel_index(index, sizes)[axis], axis, 0).reshape(index.shape[axis], -1)[:, 0]
    everything = np.arange(math.prod(sizes)).reshape(sizes)
    return take if np.array_equal(everything.take(take, axis), index) else None
