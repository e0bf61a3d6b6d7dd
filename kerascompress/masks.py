"""Rules of pruning: from kernels and a sparsity to masks and thresholds; and which weights are kernels.

A rule is arithmetic: it assigns nothing and warns of nothing. Given tensors it computes with `keras.ops`, inside a
compiled step or not; given NumPy arrays it computes on the host, where selecting is faster. The masks are the same.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

# Kind of layer -> attributes that hold its prunable kernels. Biases and normalisation never appear here.
PRUNABLE_KERNELS: dict[type, tuple[str, ...]] = {
    layers.Dense: ("kernel",),
    layers.EinsumDense: ("kernel",),
    layers.Conv1D: ("kernel",),
    layers.Conv2D: ("kernel",),
    layers.Conv3D: ("kernel",),
    layers.Conv1DTranspose: ("kernel",),
    layers.Conv2DTranspose: ("kernel",),
    layers.Conv3DTranspose: ("kernel",),
    layers.DepthwiseConv1D: ("kernel",),
    layers.DepthwiseConv2D: ("kernel",),
    layers.SeparableConv1D: ("depthwise_kernel", "pointwise_kernel"),
    layers.SeparableConv2D: ("depthwise_kernel", "pointwise_kernel"),
    layers.Embedding: ("embeddings",),
    layers.SimpleRNNCell: ("kernel", "recurrent_kernel"),
    layers.GRUCell: ("kernel", "recurrent_kernel"),
    layers.LSTMCell: ("kernel", "recurrent_kernel"),
}
KERNEL_NAMES = frozenset(name for names in PRUNABLE_KERNELS.values() for name in names)


def is_kernel(variable: keras.Variable) -> bool:
    """Whether a variable is a kernel by its name and rank, for those who see variables and not layers."""
    return variable.name in KERNEL_NAMES and len(variable.shape) >= 2


def check_allow(allow: Any) -> None:
    if allow is not None and not callable(allow):
        raise TypeError(f"`allow` must be a function of a variable that returns a bool. Received: allow={allow!r}.")


def as_array(variable: Any) -> np.ndarray:
    """A variable as an array."""
    # as a tensor first: in the scope of a strategy, NumPy makes no array of a variable without axes
    return ops.convert_to_numpy(ops.convert_to_tensor(variable))


def finite_weights(kernel: keras.Variable) -> np.ndarray:
    """The kernel as an array; a ValueError that names it if it holds NaN or infinity, which a mask would hide."""
    weights = as_array(kernel)
    if not np.isfinite(weights.astype("float32")).all():
        raise ValueError(
            f"Kernel {kernel.path!r} holds NaN or infinite weights: training has diverged, which a mask would hide. "
            "Lower the learning rate, or clip the gradients, and start from finite weights."
        )
    return weights


def warn_of_collapse(sparsity: float, paths: list[str]) -> None:
    """Warns of the kernels, if there are any, of which nothing is left."""
    if paths:
        warnings.warn(
            f"Global pruning to a sparsity of {sparsity:.2f} leaves nothing of {paths}: their weights are smaller than "
            "all others. Without one of its layers a network may compute a constant. Train the dense network before it "
            "is pruned, prune less, or use scope='layer'.",
            stacklevel=3,
        )


def warn_of_zeros(kernels: list[np.ndarray], sparsity: float | None) -> None:
    """Warns of zeros that a schedule, which begins at `sparsity`, or later where it is None, lets come back."""
    zeros = sum(kernel.size - np.count_nonzero(kernel) for kernel in kernels if kernel.any())
    share = zeros / sum(kernel.size for kernel in kernels)
    if share > (sparsity or 0.0) + 1e-3:
        begins = "is not due at step 0" if sparsity is None else f"begins at a sparsity of {sparsity:g}"
        warnings.warn(
            f"{share:.1%} of the weights to prune are zero already, and this schedule lets them all come back: it "
            f"{begins}. To keep them, begin at their sparsity, at step 0, or train on with `PruningOptimizer` without "
            "a schedule.",
            stacklevel=3,
        )


# --- rules ---


def layer_masks(kernels: Sequence[Any], sparsity: Any) -> tuple[list, list]:
    """Every kernel keeps its own largest magnitudes (tfmot)."""
    return _unzip(_keep_largest(_magnitudes(kernel), sparsity) for kernel in kernels)


def global_masks(kernels: Sequence[Any], sparsity: Any) -> tuple[list, list]:
    """One threshold over all kernels, as PyTorch's `global_unstructured` with L1 (the paper)."""
    magnitudes = [_magnitudes(kernel) for kernel in kernels]
    xp = _space(magnitudes[0])
    threshold = _threshold(xp.concatenate([xp.reshape(each, (-1,)) for each in magnitudes]), sparsity)
    return _unzip((_at_least(each, threshold), threshold) for each in magnitudes)


SCOPES: dict[str, Callable[[Sequence[Any], Any], tuple[list, list]]] = {"layer": layer_masks, "global": global_masks}
POOLING_TYPES = ("AVG", "MAX")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The settings that choose a rule, checked; called with kernels and a sparsity, it gives `(masks, thresholds)`.

    Args:
        scope: A key of `SCOPES`.
        block_size: `(height, width)` of the blocks in which 2-dimensional kernels are zeroed.
        block_pooling_type: `"AVG"` or `"MAX"`.
        sparsity_m_by_n: `(m, n)`, m zeros in every n weights of a 2- or 4-dimensional kernel, or `None`.

    Call arguments:
        kernels: Float tensors or NumPy arrays of any shape.
        sparsity: In [0, 1): a number, or a scalar tensor.

    Raises:
        ValueError: If a setting is not allowed, or two do not go together.

    Example:
        >>> import numpy as np
        >>> masks, thresholds = Rule()([np.array([[0.1, -4.0], [3.0, 0.2]])], 0.5)
        >>> masks[0].tolist(), float(thresholds[0])
        ([[False, True], [True, False]], 3.0)
    """

    scope: str = "layer"
    block_size: tuple[int, int] = (1, 1)
    block_pooling_type: str = "AVG"
    sparsity_m_by_n: tuple[int, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "block_size", _pair(self.block_size, "block_size"))
        if self.sparsity_m_by_n is not None:
            object.__setattr__(self, "sparsity_m_by_n", _pair(self.sparsity_m_by_n, "sparsity_m_by_n"))
            if not 0 < self.sparsity_m_by_n[0] < self.sparsity_m_by_n[1]:
                raise ValueError(
                    "`sparsity_m_by_n=(m, n)` means m zeros in every n weights, with 0 < m < n. "
                    f"Received: sparsity_m_by_n={self.sparsity_m_by_n}."
                )
        if self.block_pooling_type not in POOLING_TYPES:
            raise ValueError(
                f"`block_pooling_type` must be one of {POOLING_TYPES}. Received: {self.block_pooling_type!r}."
            )
        if self.scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {tuple(SCOPES)}. Received: scope={self.scope!r}.")
        if min(self.block_size) < 1:
            raise ValueError(f"`block_size` must be positive. Received: block_size={self.block_size}.")
        if self.scope != "layer" and (self.sparsity_m_by_n or self.block_size != (1, 1)):
            raise ValueError(
                f"`scope={self.scope!r}` compares single weights across kernels, so it does not go with `block_size` "
                f"or `sparsity_m_by_n`. Received: block_size={self.block_size}, "
                f"sparsity_m_by_n={self.sparsity_m_by_n}. Use scope='layer' for these."
            )
        if self.sparsity_m_by_n and self.block_size != (1, 1):
            raise ValueError(
                "`sparsity_m_by_n` zeroes single weights, so it does not go with `block_size`. "
                f"Received: block_size={self.block_size}, sparsity_m_by_n={self.sparsity_m_by_n}. Leave one out."
            )

    @property
    def once(self) -> bool:
        """Whether the masks are set when training begins, and no schedule is asked."""
        return self.sparsity_m_by_n is not None

    def check(self, kernel: keras.Variable, remedy: str) -> None:
        """Raises a ValueError that ends in `remedy` if a kernel's rank is not the rule's."""
        rank = len(kernel.shape)
        for name, allowed, is_set in (
            ("block_size", (2,), self.block_size != (1, 1)),
            ("sparsity_m_by_n", (2, 4), self.sparsity_m_by_n is not None),
        ):
            if is_set and rank not in allowed:
                raise ValueError(
                    f"`{name}` needs {'- or '.join(map(str, allowed))}-dimensional kernels. "
                    f"Received: {name}={getattr(self, name)} for kernel {kernel.path!r} of shape {kernel.shape}. "
                    f"{remedy}"
                )

    def __call__(self, kernels: Sequence[Any], sparsity: Any) -> tuple[list, list]:
        if self.sparsity_m_by_n is not None:
            m, n = self.sparsity_m_by_n
            return _unzip((_keep_of_each_group(_magnitudes(kernel), n - m, n), np.float32(0)) for kernel in kernels)
        if self.block_size != (1, 1):
            return _unzip(_keep_blocks(each, sparsity, self.block_size, self.block_pooling_type) for each in kernels)
        return SCOPES[self.scope](kernels, sparsity)


# --- helpers ---


def _space(array: Any) -> Any:
    """NumPy for its own arrays, `keras.ops` for tensors: they name what is needed here alike."""
    return np if isinstance(array, np.ndarray) else ops


def _magnitudes(kernel):
    if isinstance(kernel, np.ndarray):
        return np.abs(kernel.astype("float32", copy=False))
    return ops.abs(ops.cast(kernel, "float32"))


def _at_least(magnitudes, threshold):
    """NaN stays too, so that a diverged training is seen."""
    if isinstance(magnitudes, np.ndarray):
        return ~(magnitudes < threshold)
    return ops.view(magnitudes, "int32") >= ops.view(threshold, "int32")  # compilers turn "not less" into "at least"


def _keep_largest(magnitudes, sparsity):
    threshold = _threshold(magnitudes, sparsity)
    return _at_least(magnitudes, threshold), threshold


def _threshold(magnitudes, sparsity):
    """The smallest magnitude that stays, with tfmot's rounding of how many do; at least one does."""
    size = math.prod(magnitudes.shape)
    # float32, because tfmot computes in it: 5 weights at sparsity 0.3 are 3.5 in float32 and 3.4999 in float64.
    if isinstance(magnitudes, np.ndarray):
        keep = int(np.round(np.float32(size) * (np.float32(1) - np.float32(sparsity))))
        keep = min(max(keep, 1), size)
        return np.partition(magnitudes, size - keep, axis=None)[size - keep]
    keep = ops.round((1.0 - ops.cast(sparsity, "float32")) * float(size))
    # As a whole number: one beyond 2 ** 24 may have been rounded up to more than there are.
    return _kth_largest(magnitudes, ops.clip(ops.cast(keep, "int32"), 1, size))


def _kth_largest(magnitudes, k):
    """The k-th largest of non-negative numbers, exactly, without sorting.

    Their bit patterns, read as integers, have the same order. So the pattern of the k-th largest is found bit by bit
    from the top: a bit is set if at least k numbers have no smaller pattern. Over several devices, a count is a sum.
    """
    patterns = ops.view(magnitudes, "int32")

    def fix_bit(i, found):
        candidate = found + ops.left_shift(ops.ones((), "int32"), 30 - ops.cast(i, "int32"))
        enough = ops.sum(ops.cast(patterns >= candidate, "int32")) >= k
        return ops.where(enough, candidate, found)

    return ops.view(ops.fori_loop(0, 31, fix_bit, ops.zeros((), "int32")), "float32")


def _keep_blocks(kernel, sparsity, block_size, pooling_type):
    """The blocks of a 2-D kernel whose average or maximal magnitude is largest (tfmot), and the threshold."""
    magnitudes = _magnitudes(kernel)
    xp = _space(magnitudes)
    height, width = block_size
    # tfmot pools with TensorFlow's "SAME" padding, half of the overhang before the first row, although the blocks of
    # its mask begin at the first row; padding takes no part in an average.
    overhang = [-size % block for size, block in zip(magnitudes.shape, block_size, strict=True)]
    padding = [(each // 2, each - each // 2) for each in overhang]

    def in_blocks(xp, array):
        rows, columns = (size + extra for size, extra in zip(array.shape, overhang, strict=True))
        return xp.reshape(xp.pad(array, padding), (rows // height, height, columns // width, width))

    if pooling_type == "MAX":
        pooled = xp.max(in_blocks(xp, magnitudes), axis=(1, 3))
    else:
        weights = in_blocks(np, np.ones(magnitudes.shape, "float32")).sum(axis=(1, 3))
        pooled = xp.divide(xp.sum(in_blocks(xp, magnitudes), axis=(1, 3)), weights)
    mask, threshold = _keep_largest(pooled, sparsity)
    mask = xp.repeat(xp.repeat(mask, height, axis=0), width, axis=1)
    return mask[: magnitudes.shape[0], : magnitudes.shape[1]], threshold


def _keep_of_each_group(magnitudes, keep, n):
    """The largest of every n weights, along the last axis but one, which is the last in LiteRT's layout (tfmot)."""
    xp = _space(magnitudes)
    by_output = xp.moveaxis(magnitudes, -1, 0)  # dense (out, in), convolution (out, height, width, in)
    *others, size = by_output.shape
    padded = xp.pad(by_output, [(0, 0)] * len(others) + [(0, -size % n)])
    groups = xp.reshape(padded, (-1, n))
    one, other = groups[:, :, None], groups[:, None, :]
    earlier = np.tri(n, k=-1, dtype=bool)[None]  # of equal ones, the first stays
    rank = xp.sum(xp.logical_or(other > one, xp.logical_and(other == one, earlier)), axis=-1)
    mask = xp.reshape(rank < keep, (*others, size + -size % n))
    return xp.moveaxis(mask[..., :size], 0, -1)


def _unzip(pairs) -> tuple[list, list]:
    pairs = list(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(each, int | np.integer) for each in pair):
        raise ValueError(f"`{name}` must be two integers. Received: {name}={value!r}.")
    return int(pair[0]), int(pair[1])
