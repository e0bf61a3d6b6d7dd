"""Which channels of a network belong together: their labels are followed through the graph.

Every channel that a layer makes has a label. Labels pass through the graph as values do: where channels are added they
become one, where channels are only moved they go along. What bears the same label goes together. Which labels a layer
takes in and gives out, and which axes of its weights they are, is a row of a table (as in Torch-Pruning's DepGraph).
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from kerascompress import graph
from kerascompress.labels import FIXED, MOVE_OPS, MOVES, Labels, Move, Tensor, fixed, move, name_of_node, vector

# --- the table: kind of layer -> labels out, labels of the axes of its weights, numbers of its config ---


@dataclasses.dataclass
class Cut:
    """What goes with the labels. The last axis named of a kernel is that of the channels that it makes."""

    out: np.ndarray
    axes: dict[str, dict[int, np.ndarray]]
    sizes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _convolution(layer, x, labels):
    if layer.groups == len(x) > 1:  # every channel by itself, as a depthwise one
        out = np.repeat(x, layer.filters // len(x))
        return Cut(out, {"kernel": {-1: out}, "bias": {0: out}}, {"filters": out, "groups": x})
    inputs, *others = np.split(x, layer.groups)  # every group loses the same
    labels.couple(inputs, *others)
    out = np.tile(labels.new(layer.filters // layer.groups), layer.groups)
    return Cut(out, {"kernel": {-2: inputs, -1: out}, "bias": {0: out}}, {"filters": out})


def _transposed(layer, x, labels):
    out = labels.new(layer.filters)
    return Cut(out, {"kernel": {-1: x, -2: out}, "bias": {0: out}}, {"filters": out})


def _depthwise(layer, x, labels):
    out = np.repeat(x, layer.depth_multiplier)
    return Cut(out, {"kernel": {-2: x}, "bias": {0: out}})


def _separable(layer, x, labels):
    out, between = labels.new(layer.filters), np.repeat(x, layer.depth_multiplier)
    kernels = {"depthwise_kernel": {-2: x}, "pointwise_kernel": {-2: between, -1: out}}
    return Cut(out, {**kernels, "bias": {0: out}}, {"filters": out})


def _dense(layer, x, labels):
    out = labels.new(layer.units)
    return Cut(out, {"kernel": {0: x, 1: out}, "bias": {0: out}}, {"units": out})


def _normalisation(layer, x, labels):
    names = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    return Cut(x, {name: {-1: x} for name in (("scale",) if type(layer) is layers.RMSNormalization else names)})


def _group_normalisation(layer, x, labels):
    if layer.groups == len(x):
        return dataclasses.replace(_normalisation(layer, x, labels), sizes={"groups": x})
    labels.couple(*np.split(x, layer.groups))
    return _normalisation(layer, x, labels)


def _prelu(layer, x, labels):
    return Cut(x, {"alpha": {-1: x}} if layer.alpha.shape[-1] == len(x) else {})


def _layer_scale(layer, x, labels):
    return Cut(x, {"gamma": {0: x}}, {"projection_dim": x})


ROWS: dict[Any, Callable[[Any, np.ndarray, Labels], Cut]] = {
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), _convolution),
    **dict.fromkeys((layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose), _transposed),
    **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise),
    **dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), _separable),
    layers.Dense: _dense,
    **dict.fromkeys((layers.BatchNormalization, layers.LayerNormalization, layers.RMSNormalization), _normalisation),
    layers.GroupNormalization: _group_normalisation,
    layers.PReLU: _prelu,
    graph.CONVNEXT_LAYERS[0]: _layer_scale,
}
NORMALISATIONS = (
    *(layers.BatchNormalization, layers.LayerNormalization, layers.RMSNormalization, layers.GroupNormalization),
)
# Every channel by itself, wherever the axes are; with positions moved or joined along the others.
SAME = (
    *(layers.Activation, layers.Softmax, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity, layers.Rescaling),
    *(layers.ActivityRegularization, layers.GaussianNoise, layers.GaussianDropout, layers.AlphaDropout),
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D),
    *(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),
    *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
    *(layers.Cropping1D, layers.Cropping2D, layers.Cropping3D),
    *(layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D),
    graph.CONVNEXT_LAYERS[1],
)
GLOBAL_POOLING = (
    *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D),
    *(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
)
TOGETHER = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)
# Nodes of `keras.ops`, by the names of their classes.
SAME_OPS = (
    *("Abs", "Absolute", "Cast", "Clip", "Elu", "Exp", "Gelu", "HardSigmoid", "HardSilu", "HardTanh", "Identity"),
    *("LeakyRelu", "Log", "Negative", "Relu", "Relu6", "Rsqrt", "Selu", "Sigmoid", "Sign", "Silu", "Softplus"),
    *("Softsign", "Sqrt", "Square", "StopGradient", "Tanh"),
)
TOGETHER_OPS = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum")
REDUCTIONS = ("Mean", "Sum", "Max", "Min")
ACROSS_CHANNELS = ("softmax", "log_softmax", "sparsemax", "sparse_softmax", "glu")  # activations


# --- following ---


class Followed:
    """What belongs together in a model.

    Args:
        model: A built Sequential or Functional model; models in it are followed too.
        ignored: Layers that keep the channels they make.

    Attributes:
        labels: Of all channels; equal ones after `roots` go together.
        cuts: By the id of a layer with weights, the layer and its `Cut`.
        moves: By the id of an operation that only moves channels, what it is given and makes, as for `replay`.
        inputs: By the id of an input layer, also of models in the model, its tensor.
        seen: The labels of every tensor: of each, something has to stay.
    """

    def __init__(self, model: keras.Model, ignored: list[keras.Layer]):
        self.labels = Labels()
        self.cuts: dict[int, tuple[keras.Layer, Cut]] = {}
        self.moves: dict[int, Move] = {}
        self.inputs: dict[int, Tensor] = {}
        self.seen: list[np.ndarray] = []
        self._before_blocks: Tensor | None = None  # that `schemes.extend` has attached: `discard` leaves what entered
        self._lost: list[tuple[str, np.ndarray]] = []
        for tensor in self._enter(model, [fixed(each) for each in model.inputs]):
            self.labels.couple(tensor.labels, FIXED)
        for layer in ignored:
            if id(layer) in self.cuts:
                self.labels.couple(self.cuts[id(layer)][1].out, FIXED)
        self._leave_whole(model)

    def _enter(self, model, tensors):
        for layer, tensor in zip(map(graph.producer, model.inputs), tensors, strict=True):
            self._alike(model.name, self.inputs.setdefault(id(layer), tensor), tensor)
        return graph.compute(model, tensors, self._call)

    def _alike(self, name, one, other):
        """Two tensors lose the same channels, or none."""
        if one.labels.shape == other.labels.shape and not (one.origin or other.origin):
            self.labels.couple(one.labels, other.labels)
        else:
            self._lost += [(name, one.labels), (name, other.labels)]

    def _call(self, operation, tensors, node):
        if graph.has_calls(operation):
            return self._enter(operation, graph.entering(operation, tensors, node))
        outputs = self._outputs(operation, tensors, node)
        if outputs is None:
            self._lost += [(operation.name, tensor.labels) for tensor in tensors]
            outputs = [fixed(each) for each in node.outputs]
        self.seen += [tensor.labels for tensor in outputs]
        if operation.name == graph.BEGIN:
            self._before_blocks = outputs[0]
        elif operation.name == graph.END and self._before_blocks:
            self._alike(operation.name, self._before_blocks, outputs[0])
        return outputs

    def _outputs(self, operation, tensors, node) -> list[Tensor] | None:
        """The outputs of a call, or None if it cannot be followed."""
        kind, name = type(operation), name_of_node(operation)
        if kind is layers.Concatenate or name == "Concatenate":
            return self._concatenated(operation, tensors, node)
        if kind in TOGETHER or name in TOGETHER_OPS:
            return self._together(tensors, node)
        if len(tensors) != 1:
            return None
        if kind in ROWS:
            return self._cut(operation, tensors[0], node)
        if kind in SAME or (name in SAME_OPS and not _has_array(node)):
            return self._same(operation, tensors[0], node)
        if kind in GLOBAL_POOLING or name in REDUCTIONS:
            return self._reduced(operation, tensors[0], node)
        return self._moved(operation, tensors[0], node) if kind in MOVES or name in MOVE_OPS else None

    def _cut(self, layer, tensor, node):
        axis = _channel_axis(layer, tensor)
        x = tensor.along(axis)
        if x is None or getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
            return None
        cut = ROWS[type(layer)](layer, x, self.labels)
        if id(layer) in self.cuts:  # a shared layer: what one call loses, all do
            known = self.cuts[id(layer)][1]
            for name in known.axes:
                for one, other in zip(known.axes[name].values(), cut.axes[name].values(), strict=True):
                    self.labels.couple(one, other)
            self.labels.couple(known.out, cut.out)
        self.cuts.setdefault(id(layer), (layer, cut))
        if not _is_elementwise(layer):
            self._lost.append((layer.name, cut.out))
        if node.outputs[0].shape[axis + 1] != len(cut.out):  # an activation that joins channels
            return [fixed(node.outputs[0])]
        return [vector(cut.out, axis, node.outputs[0])]

    def _same(self, operation, tensor, node):
        axis = _channel_axis(operation, tensor)
        shape = tuple(node.outputs[0].shape[1:])
        if tensor.along(axis) is None or len(shape) != len(tensor.shape) or shape[axis] != tensor.shape[axis]:
            return None
        noise = getattr(operation, "noise_shape", None) or ()
        if len(noise) > axis + 1 and noise[axis + 1] not in (None, 1):
            return None
        if np.ndim(getattr(operation, "scale", 0)) or np.ndim(getattr(operation, "offset", 0)):
            return None
        if not _is_elementwise(operation):
            self._lost.append((operation.name, tensor.labels))
        return [Tensor(tensor.labels, shape)]

    def _reduced(self, operation, tensor, node):
        axis, rank = _channel_axis(operation, tensor), len(tensor.shape)
        x, over = tensor.along(axis), getattr(operation, "axis", None)
        if type(operation) in GLOBAL_POOLING:
            over = [each + 1 for each in range(rank) if each != axis]
        if x is None or over is None:
            return None
        over = [each % (rank + 1) - 1 for each in np.atleast_1d(over).tolist()]  # without the batch
        if axis in over or -1 in over:
            return None
        keeps = len(node.outputs[0].shape) == rank + 1
        return [vector(x, axis if keeps else axis - sum(each < axis for each in over), node.outputs[0])]

    def _together(self, tensors, node):
        shape = tuple(node.outputs[0].shape[1:])
        if any(len(tensor.axes) > 1 for tensor in tensors) or _has_array(node):
            return None
        padded = [(1,) * (len(shape) - len(tensor.shape)) for tensor in tensors]
        arrays = [
            tensor.labels.reshape(ones + tensor.labels.shape) for ones, tensor in zip(padded, tensors, strict=True)
        ]
        axes = {axis for labels in arrays for axis, size in enumerate(labels.shape) if size > 1}
        if len(axes) > 1 or any(shape[axis] is None for axis in axes):
            return None
        coupled = []
        for ones, tensor, labels in zip(padded, tensors, arrays, strict=True):
            sizes = ones + tuple(tensor.shape)
            if any(sizes[axis] == 1 for axis in axes):  # one value for all channels: it is none of theirs
                self.labels.couple(labels, FIXED)
            else:
                coupled.append(labels)
        self.labels.couple(*coupled)
        return [Tensor(max(coupled, key=np.size), shape)]

    def _concatenated(self, operation, tensors, node):
        shape = tuple(node.outputs[0].shape[1:])
        axis = operation.axis - 1 if operation.axis >= 0 else operation.axis + len(shape)
        if axis < 0 or any(len(tensor.axes) > 1 for tensor in tensors):
            return None
        if not any(each != axis for tensor in tensors for each in tensor.axes):
            parts = [tensor.along(axis) for tensor in tensors]
            return None if any(x is None for x in parts) else [vector(np.concatenate(parts), axis, node.outputs[0])]
        if any(axis in tensor.axes for tensor in tensors):
            return None
        self.labels.couple(*(tensor.labels for tensor in tensors))  # further positions of the same channels
        return [Tensor(max((tensor.labels for tensor in tensors), key=np.size), shape)]

    def _moved(self, operation, tensor, node):
        if id(operation) in self.moves:  # shared: what suits one call may not suit the other
            self._lost.append((operation.name, self.moves[id(operation)].tensor.labels))
            return None
        moved = move(operation, tensor, node)
        if moved is None:
            return None
        self.moves[id(operation)] = moved
        return moved.outputs

    def _leave_whole(self, model) -> None:
        roots = self.labels.roots()
        names = dict.fromkeys(repr(name) for name, labels in self._lost if roots[labels].any())
        for _, labels in self._lost:
            self.labels.couple(labels, FIXED)
        if names:
            warnings.warn(
                f"Channels of {model.name!r} cannot be followed through {', '.join(names)}: they are left whole.",
                stacklevel=4,
            )


# --- helpers ---


def _channel_axis(operation, tensor: Tensor) -> int:
    """The axis of the channels, without the batch."""
    last = len(tensor.shape) - 1
    if isinstance(operation, NORMALISATIONS):
        axes = [each % (last + 2) - 1 for each in np.atleast_1d(operation.axis).tolist()]
        return last if last in axes else axes[0]
    if type(operation) in ROWS or hasattr(operation, "data_format"):
        return 0 if getattr(operation, "data_format", "") == "channels_first" else last
    return tensor.axis


def _is_elementwise(layer) -> bool:
    """Whether the activation of a layer, if it has one, takes each channel by itself."""
    if isinstance(layer, layers.Softmax):
        return False
    function = getattr(layer, "activation", None)
    if isinstance(function, keras.Layer):
        return isinstance(function, SAME) and not function.variables and _is_elementwise(function)
    known = getattr(function, "__module__", None) or type(function).__module__
    return function is None or (
        known.startswith("keras.src.") and getattr(function, "__name__", "") not in ACROSS_CHANNELS
    )


def _has_array(node) -> bool:
    flat = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    flat += [each for each in vars(node.operation).values() if hasattr(each, "shape")]  # as the limits of `clip`
    return any(np.size(each) > 1 for each in flat if not isinstance(each, keras.KerasTensor))
