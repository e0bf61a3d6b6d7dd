"""What a network costs: parameters, weights that are not zero, and multiplications."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kerascompress import graph
from kerascompress.pruning import kernels_of, strip_pruning
from kerascompress.wrapper import PruneLowMagnitude, prunable_weights


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a network holds and computes; `str(summary)` is a table.

    Attributes:
        model: Name of the network.
        sparsity: Fraction of zeros over all prunable kernels, in [0, 1].
        kernels: For each prunable kernel its `name`, `shape`, `weights`, `nonzeros`, `sparsity` and `macs`.
        parameters: Numbers that the network holds: weights and the moving statistics of BatchNorm.
        nonzeros: How many of them are not zero.
        macs: Multiplications of one image with weights, zeros included, of convolutions and dense layers; None if the
            network is subclassed, the size of its input is free, or a layer with a kernel cannot be counted.
    """

    model: str
    sparsity: float
    kernels: list[dict[str, Any]]
    parameters: int
    nonzeros: int
    macs: int | None

    def __str__(self) -> str:
        columns = ("weights", "nonzeros", "sparsity", "macs")
        weights, nonzeros = (sum(kernel[key] for kernel in self.kernels) for key in columns[:2])
        rows = [(kernel["name"], kernel["shape"], *(kernel[key] for key in columns)) for kernel in self.kernels]
        rows.append(("all kernels", "", weights, nonzeros, self.sparsity, self.macs))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'kernel':{width}}  {'shape':18} {'weights':>10} {'non-zero':>10} {'sparsity':>9} {'MACs':>13}"]
        for name, shape, weights, nonzeros, sparsity, macs in rows:
            shape, macs = " x ".join(map(str, shape)), "?" if macs is None else f"{macs:,}"
            lines.append(f"{name:{width}}  {shape:18} {weights:10,} {nonzeros:10,} {sparsity:9.2%} {macs:>13}")
        lines.append(f"{self.parameters:,} parameters, {self.nonzeros:,} of them not zero")
        return "\n".join(lines)


def summary(model: keras.Model) -> Summary:
    """Parameters, weights that are not zero, and multiplications of a network, in all and by kernel.

    Args:
        model: A built model, pruned or not. It is left as it is.

    Returns:
        A `Summary`; printed, it is a table.

    Raises:
        ValueError: If `model` is no Keras 3 model or not built.

    Example:
        >>> import kerascompress as kc
        >>> dense = kc.models.resnet20(10)
        >>> f"{kc.summary(dense).macs:,} {kc.summary(kc.prune_channels(dense, 0.5)).macs:,}"
        '40,813,184 10,314,048'
    """
    plain = isinstance(model, keras.Model) and not any(isinstance(x, PruneLowMagnitude) for x in graph.walk(model))
    small = model if plain else strip_pruning(model)
    if not small.built:
        raise ValueError(f"Build or call the model first. Received: {model.name!r}, which is not built.")
    return Summary(**facts(small, small.weights))


def facts(model: keras.Model, weights: list[keras.Variable]) -> dict[str, Any]:
    """The fields of a `Summary`, over these weights of a model without wrappers."""
    nonzeros = {id(weight): int(np.count_nonzero(ops.convert_to_numpy(weight.value))) for weight in weights}
    kernels = [kernel for kernel in kernels_of(model) if id(kernel) in nonzeros]
    sizes = {id(weight): math.prod(weight.shape) for weight in weights}
    macs = _macs(model)
    total = sum(sizes[id(kernel)] for kernel in kernels)
    counted = [macs.get(id(kernel)) for kernel in kernels]
    rows = [
        {
            "name": kernel.path,
            "shape": list(kernel.shape),
            "weights": sizes[id(kernel)],
            "nonzeros": nonzeros[id(kernel)],
            "sparsity": 1 - nonzeros[id(kernel)] / sizes[id(kernel)],
            "macs": number,
        }
        for kernel, number in zip(kernels, counted, strict=True)
    ]
    return {
        "model": model.name,
        "sparsity": 1 - sum(row["nonzeros"] for row in rows) / total if total else 0.0,
        "kernels": rows,
        "parameters": sum(sizes.values()),
        "nonzeros": sum(nonzeros.values()),
        "macs": None if None in counted else sum(number for number in counted if number is not None),
    }


def _macs(model: keras.Model) -> dict[int, int]:
    """The multiplications with each kernel, by its id, where they are known."""
    found: dict[int, int] = {}

    def call(operation, values, node):
        if graph.is_graph(operation):
            return graph.compute(operation, graph.entering(operation, values, node), call)
        positions = _positions(operation, node)
        if positions is not None:
            for kernel in prunable_weights(operation):
                found[id(kernel)] = found.get(id(kernel), 0) + positions * math.prod(kernel.shape)
        return [None] * len(node.outputs)

    if graph.is_graph(model):
        graph.compute(model, [None] * len(model.inputs), call)
    return found


def _positions(layer, node) -> int | None:
    """How often every weight of a kernel is multiplied for one image."""
    taken, made = node.input_tensors[0].shape[1:], node.outputs[0].shape[1:]
    if isinstance(layer, layers.Embedding):
        return 0
    if isinstance(layer, layers.Dense):
        sizes = made[:-1]
    elif isinstance(layer, layers.EinsumDense) and "." not in layer.equation:
        _, kernel, output = layer.equation.replace("->", ",").split(",")
        sizes = [size for letter, size in zip(output[1:], made, strict=True) if letter not in kernel]
    elif isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)):
        sizes = taken[1:] if layer.data_format == "channels_first" else taken[:-1]
    elif isinstance(layer, CONVOLUTIONS):
        sizes = made[1:] if layer.data_format == "channels_first" else made[:-1]
    else:
        return None
    return None if None in sizes else math.prod(sizes)


CONVOLUTIONS = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.SeparableConv1D, layers.SeparableConv2D),
    *(layers.DepthwiseConv1D, layers.DepthwiseConv2D),
)
