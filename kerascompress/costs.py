"""What a network costs: parameters, weights that are not zero, and multiplications."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import layers

from kerascompress import graph
from kerascompress.masks import as_array, is_kernel
from kerascompress.pruning import check_countable, kernels_of
from kerascompress.wrapper import PruneLowMagnitude, wrappers_in


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a network holds and computes; `str(summary)` is a table.

    Attributes:
        model: Name of the network.
        sparsity: Fraction of zeros over all prunable kernels, in [0, 1].
        kernels: For each prunable kernel its `name`, `shape`, `weights`, `nonzeros`, `sparsity` and `macs`.
        parameters: Numbers that the network holds: weights and the moving statistics of BatchNorm.
        nonzeros: How many of them are not zero.
        macs: Multiplications of one image with weights, zeros included, of convolutions and dense layers, those in
            attention and other layers made of layers among them; None if the network is subclassed, the size of its
            input is free, or a layer with a kernel cannot be counted.
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
        model: A built model, pruned or not, subclassed or not. It is left as it is. What is masked counts as zero, and
            what pruning keeps beside the weights does not count.

    Returns:
        A `Summary`; printed, it is a table.

    Raises:
        ValueError: If `model` is no Keras 3 model or not built, or a kernel has LoRA or is packed, as int4 is.

    Example:
        >>> import kerascompress as kc
        >>> dense = kc.models.resnet20(10)
        >>> f"{kc.summary(dense).macs:,} {kc.summary(kc.prune_channels(dense, 0.5)).macs:,}"
        '40,813,184 10,314,048'
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`summary` needs a Keras 3 model. Received: {model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f"Build or call the model first. Received: {model.name!r}, which is not built.")
    wrappers = [wrapper for wrapper in wrappers_in(model) if wrapper.built]
    beside = {id(wrapper.pruning_step) for wrapper in wrappers}
    beside |= {id(each) for wrapper in wrappers for _, *others in wrapper.pruning_vars for each in others}
    return Summary(**facts(model, [weight for weight in model.weights if id(weight) not in beside]))


def facts(model: keras.Model, weights: list[keras.Variable]) -> dict[str, Any]:
    """The fields of a `Summary`, over these weights of a model."""
    check_countable(model)
    pruned = [(wrapper, kernel, mask) for wrapper in wrappers_in(model) for kernel, mask, _ in wrapper.pruning_vars]
    masks = {id(kernel): as_array(mask) for _, kernel, mask in pruned}
    names = {id(kernel): kernel.path.replace(f"{wrapper.name}/", "", 1) for wrapper, kernel, _ in pruned}
    values = {id(weight): as_array(weight) for weight in weights}
    nonzeros = {key: int(np.count_nonzero((value != 0) & masks.get(key, True))) for key, value in values.items()}
    kernels = [kernel for kernel in kernels_of(model) if id(kernel) in nonzeros]
    sizes = {id(weight): math.prod(weight.shape) for weight in weights}
    macs = _macs(model)
    total = sum(sizes[id(kernel)] for kernel in kernels)
    # What an optimizer's `allow` has chosen beside kernels multiplies nothing.
    counted = [macs.get(id(each), None if is_kernel(each) or len(each.shape) > 1 else 0) for each in kernels]
    rows = [
        {
            "name": names.get(id(kernel), kernel.path),
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


def _macs(model: keras.Model) -> dict[int, int | None]:
    """The multiplications with each kernel, by its id; None if those of one of its calls are not known."""
    found: dict[int, int | None] = {}
    images = next((each.shape[0] for each in getattr(model, "inputs", None) or () if each.shape[0]), 1)

    def call(operation, tensors, node):
        if graph.has_calls(operation):
            return graph.compute(operation, graph.entering(operation, tensors, node), call)
        outputs = _outputs(operation, tensors, node)
        layer = operation.layer if isinstance(operation, PruneLowMagnitude) else operation
        if not isinstance(layer, keras.Layer):
            return outputs
        positions = _times(_positions(layer, tensors[0].shape[1:], outputs[0].shape[1:]), outputs[0].shape[0])
        parts = {} if positions is not None else _positions_inside(layer, node, tensors)
        for kernel in kernels_of(layer):
            now, before = parts.get(id(kernel), positions), found.get(id(kernel), 0)
            if now is None or before is None or now % images:
                found[id(kernel)] = None
            else:
                found[id(kernel)] = before + now // images * math.prod(kernel.shape)
        return outputs

    if graph.has_calls(model):
        graph.compute(model, [keras.KerasTensor((images, *each.shape[1:]), each.dtype) for each in model.inputs], call)
    return found


def _positions_inside(layer, node, tensors) -> dict[int, int | None]:
    """What `_positions` says of the layers that a layer calls, attention for example, by the ids of their kernels.

    Of all images and parts of images, such as windows.
    """
    if not graph.children(layer) or any(isinstance(each, LOOPS) for each in graph.walk(layer)):
        return {}
    found: dict[int, int | None] = {}

    def watch(part, inputs, outputs):
        inputs, outputs = keras.tree.flatten(inputs), keras.tree.flatten(outputs)
        if part is layer or not inputs or graph.children(part):
            return
        now = _times(_positions(part, inputs[0].shape[1:], outputs[0].shape[1:]), outputs[0].shape[0])
        for kernel in kernels_of(part):
            before = found.get(id(kernel), 0)
            found[id(kernel)] = None if now is None or before is None else before + now

    args, kwargs = graph.arguments(node, tensors)
    try:
        with graph.watched_calls(watch):
            keras.Operation.compute_output_spec(layer, *args, **kwargs)
    except Exception:  # whatever a layer may raise
        return {}
    return found


def _times(positions: int | None, count: Any) -> int | None:
    """How often for so many images; on JAX, a number that is free is a symbol."""
    return None if positions is None or not isinstance(count, int) else positions * count


def _outputs(operation, tensors, node) -> list:
    """The symbolic outputs of a call, of the sizes that these tensors give them where its own leave them free."""
    args, kwargs = graph.arguments(node, tensors)
    try:
        return keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
    except Exception:  # whatever a layer may raise
        return node.outputs


def _positions(layer, taken, made) -> int | None:
    """How often every weight of a kernel is multiplied for one image."""
    if isinstance(layer, layers.Embedding):
        return 0 if len(made) > len(taken) else None  # else it is a product, as `ReversibleEmbedding` can be
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
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None  # on JAX, symbols are free


LOOPS = (layers.RNN, layers.TimeDistributed)  # they call a layer once for many steps, or for each
CONVOLUTIONS = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.SeparableConv1D, layers.SeparableConv2D),
    *(layers.DepthwiseConv1D, layers.DepthwiseConv2D),
)
