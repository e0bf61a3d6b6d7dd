"""Rules: masks and thresholds held against tfmot and NumPy, on the host, eagerly, and inside a compiled step."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import kerascompress as kc
from kerascompress.masks import Rule, finite_weights, is_kernel


def host(kernels, rule, sparsity):
    return rule(kernels, sparsity)


def eager(kernels, rule, sparsity):
    return to_numpy(rule([ops.convert_to_tensor(kernel) for kernel in kernels], sparsity))


def compiled(kernels, rule, sparsity):
    """Inside of `tf.function` or `jax.jit`, the sparsity a tensor of the trace too."""
    kernels = [ops.convert_to_tensor(kernel) for kernel in kernels]
    if keras.backend.backend() == "jax":
        import jax

        return to_numpy(jax.jit(rule)(kernels, sparsity))
    import tensorflow as tf

    return to_numpy(tf.function(rule, autograph=False)(kernels, tf.constant(sparsity, "float32")))


def xla(kernels, rule, sparsity):
    import tensorflow as tf

    kernels = [tf.convert_to_tensor(kernel) for kernel in kernels]
    return to_numpy(tf.function(rule, autograph=False, jit_compile=True)(kernels, tf.constant(sparsity, "float32")))


def to_numpy(masks_and_thresholds):
    return [[ops.convert_to_numpy(each) for each in part] for part in masks_and_thresholds]


WAYS = {host: (), eager: (), compiled: pytest.mark.compiled, xla: pytest.mark.tensorflow_only}
everywhere = pytest.mark.parametrize(
    "how", [pytest.param(how, marks=marks, id=how.__name__) for how, marks in WAYS.items()]
)


def all_on_host(names, cases, elsewhere):
    """All cases on the host, and a few of them eagerly and compiled."""
    params = [
        pytest.param(how, *case, marks=marks, id="-".join(map(str, (how.__name__, *case))))
        for how, marks in WAYS.items()
        for case in (cases if how is host else elsewhere)
    ]
    return pytest.mark.parametrize(("how", *names), params)


def kernels_with_ties_and_zeros(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    for shape in shapes:
        flat = rng.normal(size=np.prod(shape)).astype("float32")
        flat[rng.integers(0, flat.size, 3)] = 0.0
        flat[1], flat[3] = -flat[0], flat[2]
        yield flat.reshape(shape)


@pytest.fixture(scope="module")
def tfmots():
    """`masks(kernel, sparsity, **settings)` of the real tfmot."""
    _ = kc.PolynomialDecay
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    def masks(kernel, sparsity, block_size=(1, 1), block_pooling_type="AVG", sparsity_m_by_n=None):
        kernel = tf.Variable(kernel)
        pruning = pruning_impl.Pruning(
            training_step_fn=lambda: 0,
            pruning_vars=[(kernel, tf.Variable(tf.ones(kernel.shape)), tf.Variable(0.0))],
            pruning_schedule=lambda step: (True, tf.constant(sparsity, "float32")),
            block_size=block_size,
            block_pooling_type=block_pooling_type,
            sparsity_m_by_n=sparsity_m_by_n,
        )
        if sparsity_m_by_n:
            return pruning._update_mask_sparsity_m_by_n(kernel, sparsity_m_by_n).numpy().astype(bool), 0.0
        threshold, mask = pruning._maybe_update_block_mask(kernel)
        return mask.numpy().astype(bool), float(threshold)

    return masks


@everywhere
@pytest.mark.parametrize("shape", [(13, 7), (3, 3, 5, 4)])
@pytest.mark.parametrize("p", [0.0, 0.83, 0.999])
def test_layer_masks_and_thresholds_equal_tfmots(tfmots, how, shape, p):
    (kernel,) = kernels_with_ties_and_zeros(shape)
    expected, threshold = tfmots(kernel, p)
    (mask,), (ours,) = how([kernel], Rule(), p)
    np.testing.assert_array_equal(mask, expected)
    assert ours == threshold


@everywhere
def test_five_weights_at_sparsity_three_tenths_keep_four_as_in_float32(how):
    assert how([np.arange(1, 6, dtype="float32")], Rule(), 0.3)[0][0].sum() == 4


@all_on_host(
    ("block_size", "pooling"),
    itertools.product([(2, 2), (4, 1), (3, 5)], ["AVG", "MAX"]),
    elsewhere=[((3, 5), "AVG"), ((4, 1), "MAX")],
)
def test_block_masks_equal_tfmots(tfmots, how, block_size, pooling):
    (kernel,) = kernels_with_ties_and_zeros((14, 9))
    settings = {"block_size": block_size, "block_pooling_type": pooling}
    expected, threshold = tfmots(kernel, 0.7, **settings)
    (mask,), (ours,) = how([kernel], Rule(**settings), 0.7)
    np.testing.assert_array_equal(mask, expected)
    assert ours == pytest.approx(threshold, rel=1e-6)


@all_on_host(
    ("shape", "m_by_n"),
    itertools.product([(16, 5), (10, 3), (3, 3, 8, 4), (1, 1, 6, 4)], [(2, 4), (1, 4), (3, 5)]),
    elsewhere=[((16, 5), (2, 4)), ((10, 3), (1, 4)), ((3, 3, 8, 4), (3, 5)), ((1, 1, 6, 4), (2, 4))],
)
def test_m_by_n_masks_equal_tfmots(tfmots, how, shape, m_by_n):
    (kernel,) = kernels_with_ties_and_zeros(shape)
    expected, _ = tfmots(kernel, 0.5, sparsity_m_by_n=m_by_n)
    (mask,), _ = how([kernel], Rule(sparsity_m_by_n=m_by_n), 0.5)
    np.testing.assert_array_equal(mask, expected)
    assert not mask.all()


@pytest.mark.quick
@everywhere
@pytest.mark.parametrize("p", [0.2, 0.8])
def test_global_masks_equal_numpys_partition_over_all_kernels(how, p):
    kernels = [
        scale * kernel for scale, kernel in zip((1, 5, 0.3), kernels_with_ties_and_zeros(*[(9, 8)] * 3), strict=True)
    ]
    magnitudes = np.abs(np.concatenate([kernel.ravel() for kernel in kernels]))
    cut = magnitudes.size - round(magnitudes.size * (1 - p))
    expected = np.partition(magnitudes, cut)[cut]
    masks, thresholds = how(kernels, Rule(scope="global"), p)
    assert all(threshold == expected for threshold in thresholds)
    for kernel, mask in zip(kernels, masks, strict=True):
        np.testing.assert_array_equal(mask, np.abs(kernel) >= expected)


@everywhere
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_kernels_of_other_precision_are_compared_in_float32(how, dtype):
    if dtype == "float64" and keras.backend.backend() == "jax" and how is not host:
        pytest.skip("JAX has no float64 by default")
    (kernel,) = kernels_with_ties_and_zeros((40, 10))
    kernel = kernel.astype(dtype)
    expected = host([kernel.astype("float32")], Rule(), 0.6)
    (mask,), (threshold,) = how([kernel], Rule(), 0.6)
    np.testing.assert_array_equal(mask, expected[0][0])
    assert threshold == expected[1][0]


@pytest.mark.once
def test_what_is_equal_in_float32_stays_together():
    (mask,), _ = Rule()([np.array([1, 1 + 1e-12])], 0.5)
    assert mask.tolist() == [True, True]


@everywhere
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nan_and_infinity_are_never_masked_so_that_a_diverged_training_is_seen(how, scope):
    kernel = np.arange(1, 21, dtype="float32").reshape(4, 5)
    kernel[0, 0], kernel[1, 1] = np.nan, -np.inf
    (mask,), _ = how([kernel], Rule(scope=scope), 0.8)
    assert mask[0, 0]
    assert mask[1, 1]


def test_finite_weights_name_the_kernel_that_has_diverged():
    dense = keras.layers.Dense(2, name="head")
    dense.build((3,))
    np.testing.assert_array_equal(finite_weights(dense.kernel), ops.convert_to_numpy(dense.kernel))
    dense.kernel.assign(np.full((3, 2), np.inf))
    with pytest.raises(ValueError, match="'head/kernel' holds NaN or infinite weights: training has diverged"):
        finite_weights(dense.kernel)


@pytest.mark.quick
def test_kernels_are_told_by_name_and_rank():
    layer = keras.layers.Bidirectional(keras.layers.LSTM(3))
    layer.build((1, 4, 2))
    names = [(variable.name, is_kernel(variable)) for variable in layer.trainable_variables]
    assert names == [("kernel", True), ("recurrent_kernel", True), ("bias", False)] * 2
    norm = keras.layers.BatchNormalization()
    norm.build((1, 3))
    assert not any(is_kernel(variable) for variable in norm.variables)
    assert not is_kernel(keras.Variable(np.ones(3), name="kernel"))


@pytest.mark.parametrize("how", [host, eager])
@given(size=st.integers(1, 3000), sparsity=st.floats(0, 0.999))
@settings(max_examples=30, deadline=None)
def test_a_magnitude_mask_keeps_the_largest_and_the_number_tfmots_formula_says(how, size, sparsity):
    weights = np.random.default_rng(size).permutation(size).astype("float32") + 1
    (mask,), (threshold,) = how([weights], Rule(), sparsity)
    keep = max(round(float(np.float32(size) * (np.float32(1) - np.float32(sparsity)))), 1)
    assert mask.sum() == keep
    assert threshold == np.sort(weights)[-keep]
    assert weights[mask].min() > weights[~mask].max(initial=0)


@pytest.mark.parametrize("how", [host, pytest.param(compiled, marks=pytest.mark.compiled)])
def test_sparsity_zero_keeps_every_weight_of_a_kernel_too_large_for_float32(how):
    (mask,), _ = how([np.ones(2**24 + 3, "float32")], Rule(), 0.0)
    assert mask.all()
