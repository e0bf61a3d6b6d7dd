"""What an accelerator must do as a processor does: other kernels, the same claims."""

import keras
import numpy as np
import pytest
from keras import ops
from test_image_ops import Drawn, check_against_pillow, every_case, photographs, run

import kerascompress as kc
from kerascompress.masks import Rule

pytestmark = pytest.mark.gpu


def pruned_network(schedule):
    network = kc.models.resnet(8, 10, width=4, input_shape=(8, 8, 3), seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.1), schedule, scope="global"), loss)
    return network


def data(n):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (n, 8, 8, 3)).astype("uint8"), (np.arange(n) % 10).astype("int32")


def test_compiled_rand_augment_equals_pillow_at_every_magnitude_and_sign():
    images = photographs(32, 32)
    cases, batch, op, sign, magnitude = every_case(images)
    check_against_pillow(run(Drawn([op], [sign]), batch, magnitude, "xla"), cases, images)


def test_masks_of_a_compiled_step_are_those_of_numpy_and_the_model_is_exactly_sparse():
    network = pruned_network(kc.ConstantSparsity(0.8, 0, 0, frequency=1))
    network.optimizer.build(network.trainable_variables)
    kernels = [ops.convert_to_numpy(kernel.value) for kernel, _, _ in network.optimizer.pruning_vars]
    expected, _ = Rule("global")(kernels, 0.8)
    network = pruned_network(kc.ConstantSparsity(0.8, 1, 1, frequency=1))
    network.optimizer.inner_optimizer.learning_rate = 0.0  # so that the step prunes what was drawn
    network.fit(*data(16), batch_size=16, verbose=0)
    for mask, (kernel, ours, _) in zip(expected, network.optimizer.pruning_vars, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.value), mask)
        assert not ops.convert_to_numpy(kernel.value)[~mask].any()
    assert kc.sparsity(network) == pytest.approx(0.8, abs=1e-3)


def test_the_teacher_chooses_by_equation_6():
    student, teacher = (kc.models.resnet(8, 10, width=4, input_shape=(8, 8, 3), seed=seed) for seed in (0, 1))
    distiller = kc.Distiller(student, teacher, augment=kc.RandAugment((0, 30), seed=0), num_candidates=4)
    distiller.compile("sgd")
    history = distiller.fit(*data(16), batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"][0])
    views = {name: ops.convert_to_numpy(view) for name, view in distiller.draw_candidates(*data(16)).items()}
    np.testing.assert_array_equal(views["chosen"], np.argmin(views["teacher_loss"] - views["divergence"], axis=0))
