"""Which zeros a device skips: what LiteRT and XNNPACK execute sparsely, and a policy that prunes just that."""

import dataclasses

import keras
import numpy as np
from keras import layers

from kerascompress import graph
from kerascompress.masks import as_array
from kerascompress.wrapper import PruneLowMagnitude

LEAST_SPARSITY = 0.3  # LiteRT's converter stores a kernel sparsely from here on
LEAST_IN_BLOCKS = 0.9  # and in blocks, if they hold this fraction of its zeros
LEAST_IN_CLUSTER = 2 / 3  # XNNPACK multiplies sparsely if more of the 1x1 kernels of a cluster is zero

# Layers that keep a cluster going whatever their settings; others are looked at.
ELEMENTWISE = (
    *(layers.Add, layers.Multiply, layers.BatchNormalization, layers.ReLU, layers.LeakyReLU, layers.ELU),
    *(layers.Activation, layers.Dropout, layers.Identity, layers.Rescaling),
)
ELEMENTWISE_OPS = ("Add", "Multiply", "Relu", "Relu6", "Sigmoid", "HardSigmoid", "HardSilu", "LeakyRelu", "Elu", "Tanh")
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
OUTSIDE, INSIDE = "outside", "inside"


class LatencyPolicy:
    """A `pruning_policy` that prunes just the kernels that XNNPACK, the engine of LiteRT on processors, runs sparsely.

    These are the 1x1 convolutions of a cluster in float32 or float16. It begins with a 3x3 convolution of stride 2 and
    3 input channels behind `ZeroPadding2D(1)`; in it are 1x1 convolutions of stride 1, 3x3 and 5x5 depthwise ones whose
    padding is the same on all sides, element-wise layers and bilinear upsampling, no concatenation, split or
    max-pooling; it ends in a mean over height and width. Prune to more than 2/3 zeros. Arm, RISC-V and WASM have these
    kernels, x86 with AVX has not: on a PC they gain nothing.

    Example:
        >>> import keras, kerascompress as kc
        >>> net = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.ZeroPadding2D(1)])
        >>> net.add(keras.layers.Conv2D(8, 3, strides=2))
        >>> net.add(keras.layers.Conv2D(16, 1, name="pointwise"))
        >>> net.add(keras.layers.GlobalAveragePooling2D())
        >>> schedule = kc.ConstantSparsity(0.8, begin_step=0)
        >>> pruned = kc.prune_low_magnitude(net, schedule, pruning_policy=kc.LatencyPolicy())
        >>> [layer.layer.name for layer in pruned.layers if isinstance(layer, kc.PruneLowMagnitude)]
        ['pointwise']
        >>> kc.prune_low_magnitude(kc.models.resnet(8, 10), pruning_policy=kc.LatencyPolicy())
        Traceback (most recent call last):
            ...
        ValueError: XNNPACK executes no kernel of 'resnet8' sparsely: no 3x3 convolution of stride 2 and 3 channels ...

    Reference:
        Elsen, Dukhan, Gale, Simonyan: Fast Sparse ConvNets, 2019 (arXiv:1911.09723); tfmot's `PruneForLatencyOnXNNPack`
        for Keras 2.
    """

    def __init__(self):
        self._allowed: set[int] = set()

    def ensure_model_supports_pruning(self, model: keras.Model) -> None:
        """Raises a ValueError that says what keeps the kernels of the model from being executed sparsely."""
        cluster = find_cluster(model)
        if cluster.obstacles or not cluster.layers:
            raise ValueError(
                f"XNNPACK executes no kernel of {model.name!r} sparsely: {'; '.join(cluster.obstacles)}. "
                "`prune_channels` makes any network faster."
            )
        self._allowed = {id(layer) for layer in cluster.layers}

    def allow_pruning(self, layer: keras.Layer) -> bool:
        """Whether a layer of the model that was looked at last is one of these kernels."""
        return id(layer) in self._allowed


@dataclasses.dataclass
class Cluster:
    """The 1x1 convolutions that XNNPACK may execute sparsely, and what keeps it from that."""

    layers: list[keras.Layer] = dataclasses.field(default_factory=list)
    obstacles: list[str] = dataclasses.field(default_factory=list)


def find_cluster(model: keras.Model) -> Cluster:
    """Follows the tensors of a Functional or Sequential model from a stem to a mean over height and width."""
    cluster = Cluster()
    if not graph.has_calls(model):
        cluster.obstacles.append("it is no built Sequential or Functional model")
        return cluster
    begun = False

    def call(operation, values, node):
        nonlocal begun
        if graph.has_calls(operation):
            return graph.compute(operation, graph.entering(operation, values, node), call)
        layer = operation.layer if isinstance(operation, PruneLowMagnitude) else operation
        inside = [place == INSIDE for place, _ in values]
        if any(inside):
            after = _inside(layer, values[0][1], node)
            if (
                any(pad for _, pad in values)
                and not isinstance(after, str)
                and type(layer) is not layers.DepthwiseConv2D
            ):
                after = "takes what is padded, which only a depthwise convolution may"
            if isinstance(after, str):
                cluster.obstacles.append(f"{layer.name!r} {after}")
                after = (OUTSIDE, 0)
            elif isinstance(layer, layers.Conv2D):
                cluster.layers.append(layer)
        elif _is_stem(layer, values, node):
            begun, after = True, (INSIDE, 0)
        else:
            after = (OUTSIDE, _padding(layer))
        return [after] * len(node.outputs)

    ends = graph.compute(model, [(OUTSIDE, 0)] * len(model.inputs), call)
    if not begun:
        cluster.obstacles.append("no 3x3 convolution of stride 2 and 3 channels follows a ZeroPadding2D(1)")
    elif not cluster.layers and not cluster.obstacles:
        cluster.obstacles.append("there is no 1x1 convolution behind its stem")
    if any(place == INSIDE for place, _ in ends):
        cluster.obstacles.append("it does not end in a mean over height and width")
    return cluster


def _is_stem(layer, values, node) -> bool:
    return (
        type(layer) is layers.Conv2D
        and (layer.kernel_size, layer.strides, layer.padding) == ((3, 3), (2, 2), "valid")
        and (layer.dilation_rate, layer.groups, layer.data_format) == ((1, 1), 1, "channels_last")
        and node.input_tensors[0].shape[-1] == 3
        and values[0][1] == 1
    )


def _inside(layer, pad, node) -> tuple[str, int] | str:
    """Where the tensor is after a layer in the cluster, and how far it is padded; or why the layer cannot be in it."""
    name = type(layer).__name__
    if type(layer) is layers.DepthwiseConv2D:
        return (INSIDE, 0) if _is_symmetric(layer, pad) else "is padded unevenly, or is no plain 3x3 or 5x5 one"
    if isinstance(layer, layers.ZeroPadding2D):
        return (INSIDE, _padding(layer)) if _padding(layer) else "pads unevenly"
    if type(layer) is layers.Conv2D:
        size, others = layer.kernel_size, (layer.strides, layer.dilation_rate, layer.groups)
        return (INSIDE, 0) if (size, others) == ((1, 1), ((1, 1), (1, 1), 1)) else "is no 1x1 convolution of stride 1"
    if isinstance(layer, layers.GlobalAveragePooling2D):
        return OUTSIDE, 0
    if name == "Mean" and sorted(np.atleast_1d(layer.axis) % len(node.input_tensors[0].shape)) == [1, 2]:
        return OUTSIDE, 0
    if isinstance(layer, layers.UpSampling2D) and layer.interpolation == "bilinear":
        return INSIDE, 0
    if isinstance(layer, ELEMENTWISE) or (not isinstance(layer, keras.Layer) and name in ELEMENTWISE_OPS):
        return INSIDE, 0
    return f"is a {name}"


def _is_symmetric(layer, pad) -> bool:
    size = layer.kernel_size[0]
    return (
        layer.kernel_size in ((3, 3), (5, 5))
        and layer.depth_multiplier == 1
        and tuple(layer.dilation_rate) == (1, 1)
        and (
            (layer.padding == "same" and layer.strides == (1, 1) and not pad)
            or (layer.padding == "valid" and layer.strides in ((1, 1), (2, 2)) and pad == size // 2)
        )
    )


def _padding(layer) -> int:
    """How far a layer pads alike on all sides; 0 if it does not."""
    sides = {each for pair in layer.padding for each in pair} if isinstance(layer, layers.ZeroPadding2D) else {0}
    return sides.pop() if len(sides) == 1 else 0


# --- the report ---


def stores_sparsely(model: keras.Model, kernels: list[keras.Variable], quantize: str | None) -> bool:
    """Whether LiteRT can run a file in which kernels with many zeros are stored sparsely.

    With int8 it computes garbage, or fails to begin. With float16 it reads kernels in blocks, and those of transposed
    convolutions, as if they were float32.
    """
    if quantize != "float16":
        return quantize is None
    transposed = {id(layer.kernel) for layer in graph.walk(model) if isinstance(layer, TRANSPOSED) and layer.built}

    def fails(kernel):
        weights = as_array(kernel)
        if id(kernel) in transposed:
            return (weights == 0).mean() >= LEAST_SPARSITY
        flat = (weights.reshape(len(weights), -1), weights.reshape(-1, weights.shape[-1]))  # as attention multiplies
        return weights.ndim in (2, 3) and any(map(_in_blocks, flat))

    return not any(map(fails, kernels))


def execution(model: keras.Model, kernels: list[keras.Variable], quantize: str | None) -> list[str]:
    """For each kernel, whether LiteRT executes its zeros sparsely, only stores them so, or neither, and why."""
    if not stores_sparsely(model, kernels, quantize):
        half = "float16 and zeros in blocks or in transposed convolutions"
        what = half if quantize == "float16" else "int8 and sparse storage"
        return [f"dense: LiteRT cannot run {what}"] * len(kernels)
    cluster = find_cluster(model)
    ones = [as_array(layer.kernel) for layer in cluster.layers]
    zeros = sum(int((each == 0).sum()) for each in ones) / max(sum(each.size for each in ones), 1)
    in_cluster = {id(layer.kernel) for layer in cluster.layers if not cluster.obstacles}
    dense = {id(layer.kernel) for layer in graph.walk(model) if isinstance(layer, layers.Dense) and layer.built}
    return [_verdict(as_array(each), id(each) in dense, id(each) in in_cluster, zeros) for each in kernels]


def _verdict(weights: np.ndarray, is_dense: bool, in_cluster: bool, zeros_of_cluster: float) -> str:
    if (weights == 0).mean() < LEAST_SPARSITY:
        return f"dense: fewer than {LEAST_SPARSITY:.0%} zeros"
    if weights.ndim > 4:
        return f"dense: LiteRT stores kernels of up to 4 axes sparsely, not of {weights.ndim}"
    if in_cluster and zeros_of_cluster > LEAST_IN_CLUSTER:
        return "sparse: by XNNPACK on Arm, RISC-V and WASM; only stored on x86"
    if in_cluster:
        return f"stored: the 1x1 kernels have {zeros_of_cluster:.0%} zeros; XNNPACK skips them from 67% on"
    if weights.ndim == 4:
        return "stored: no 1x1 convolution that XNNPACK runs sparsely"
    if is_dense and _in_blocks(weights):
        return "sparse: in blocks of (4, 1); it pays for batches of a few rows"
    return "stored: the zeros are not in blocks of (4, 1)" if is_dense else "stored: no dense layer"


def _in_blocks(weights: np.ndarray) -> bool:
    """Whether LiteRT's converter takes the zeros for blocks, which are four neighbouring inputs of an output."""
    zeros = float((weights == 0).mean())
    padded = np.pad(weights != 0, [(0, -len(weights) % 4), (0, 0)])
    blocks = 4 * int(padded.reshape(-1, 4, weights.shape[1]).any(axis=1).sum())
    return zeros >= LEAST_SPARSITY and 1 - blocks / weights.size > LEAST_IN_BLOCKS * zeros
