"""Rules of pruning: from kernels and a sparsity to masks and thresholds; and which weights are kernels."""

import numpy as np
from keras import layers

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


def magnitude_mask(weights: np.ndarray, sparsity: float) -> tuple[np.ndarray, np.floating]:
    """Keeps the largest magnitudes: `(mask, threshold)`, with tfmot's rounding; ties with the threshold are kept."""
    magnitudes = np.abs(weights)
    # float32, because tfmot computes in it: 5 weights at sparsity 0.3 are 3.5 in float32 and 3.4999 in float64.
    keep = int(np.round(np.float32(magnitudes.size) * (np.float32(1) - np.float32(sparsity))))
    keep = min(max(keep, 1), magnitudes.size)
    threshold = np.partition(magnitudes, magnitudes.size - keep, axis=None)[magnitudes.size - keep]
    return magnitudes >= threshold, threshold


def block_mask(
    weights: np.ndarray, sparsity: float, *, block_size: tuple[int, int], pooling_type: str
) -> tuple[np.ndarray, np.floating]:
    """Keeps the blocks of a 2-D kernel whose average or maximal magnitude is largest: `(mask, threshold)`."""
    height, width = block_size
    # tfmot pools with TensorFlow's "SAME" padding, half of the overhang before the first row, although the blocks of
    # its mask begin at the first row; padding takes no part in an average.
    overhang = [-size % block for size, block in zip(weights.shape, block_size, strict=True)]
    padding = [(each // 2, each - each // 2) for each in overhang]

    def in_blocks(array):
        padded = np.pad(array, padding)
        return padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)

    if pooling_type == "MAX":
        pooled = in_blocks(np.abs(weights)).max(axis=(1, 3))
    else:
        pooled = in_blocks(np.abs(weights)).sum(axis=(1, 3)) / in_blocks(np.ones_like(weights)).sum(axis=(1, 3))
    mask, threshold = magnitude_mask(pooled, sparsity)
    return np.repeat(np.repeat(mask, height, 0), width, 1)[: weights.shape[0], : weights.shape[1]], threshold


def m_by_n_mask(weights: np.ndarray, m: int, n: int) -> np.ndarray:
    """Zeroes the m smallest of every n weights along the last axis but one, the last in LiteRT's layout."""
    by_output = np.moveaxis(np.abs(weights), -1, 0)  # dense (out, in), convolution (out, height, width, in)
    size = by_output.shape[-1]
    padded = np.pad(by_output, [(0, 0)] * (weights.ndim - 1) + [(0, -size % n)])
    groups = padded.reshape(-1, n)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=1, kind="stable")[:, : n - m], True, axis=1)
    return np.moveaxis(mask.reshape(padded.shape)[..., :size], 0, -1)
