"""The trajectory of pruning is tfmot's: the real one trains beside both carriers, from the same weights and batches."""

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import kerascompress as kc
from kerascompress.pruning import pruning_vars

STEPS = 60
POLYNOMIAL = {"initial_sparsity": 0.2, "final_sparsity": 0.8, "begin_step": 4, "end_step": 44, "frequency": 4}
CONSTANT = {"target_sparsity": 0.6, "begin_step": 2, "end_step": 50, "frequency": 3}
SGD, MOMENTUM = {"learning_rate": 0.2}, {"learning_rate": 0.1, "momentum": 0.9}
ADAM = {"learning_rate": 0.01, "epsilon": 1e-7}


def case(network, schedule, optimizer, l2, **wrapper):
    settings = {"PolynomialDecay": POLYNOMIAL, "ConstantSparsity": CONSTANT}[schedule]
    name = "Adam" if optimizer is ADAM else "SGD"
    trained = {"network": network, "l2": l2, "optimizer": name, "rate": optimizer}
    return trained | {"schedule": schedule, "settings": settings, "wrapper": wrapper}


CASES = {  # every pair of a network, a schedule, an optimizer, with and without L2, somewhere with blocks
    "convolution-decay-sgd": case("convolution", "PolynomialDecay", SGD, 0.0),
    "convolution-decay-momentum-l2": case("convolution", "PolynomialDecay", MOMENTUM, 0.01),
    "convolution-constant-adam-l2": case("convolution", "ConstantSparsity", ADAM, 0.01),
    "convolution-constant-momentum": case("convolution", "ConstantSparsity", MOMENTUM, 0.0),
    "dense-decay-adam": case("dense", "PolynomialDecay", ADAM, 0.0),
    "dense-constant-sgd-l2": case("dense", "ConstantSparsity", SGD, 0.01),
    "dense-decay-momentum-l2-blocks": case("dense", "PolynomialDecay", MOMENTUM, 0.01, block_size=(3, 2)),
    "dense-constant-sgd-blocks": case(
        "dense", "ConstantSparsity", SGD, 0.0, block_size=(4, 1), block_pooling_type="MAX"
    ),
}


@pytest.fixture(scope="module")
def tfmots(pytestconfig):
    """Folder of what tfmot makes of all cases; kept for the other backend's tests."""
    oracle = pathlib.Path(__file__).parent / "fixtures" / "tfmot_oracle.py"
    parts = [oracle.read_text(), pathlib.Path(__file__).read_text()]
    parts += [importlib.metadata.version(name) for name in ("tensorflow", "tf_keras", "tensorflow-model-optimization")]
    folder = pytestconfig.cache.mkdir(f"tfmot-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}")
    if (folder / "done").exists():
        return folder
    rng = np.random.default_rng(0)
    shapes = {
        "convolution": [(3, 3, 2, 4), (4,), (64, 3), (3,)],
        "dense": [(72, 12), (12,), (12, 3), (3,)],
    }
    start = {
        f"{network}{i}": (0.2 * rng.normal(size=shape)).astype("float32")
        for network, each in shapes.items()
        for i, shape in enumerate(each)
    }
    start["inputs"] = rng.normal(size=(8 * STEPS, 6, 6, 2)).astype("float32")
    start["labels"] = rng.integers(0, 3, 8 * STEPS)
    np.savez(folder / "start.npz", **start)
    (folder / "cases.json").write_text(json.dumps(CASES))
    done = subprocess.run([sys.executable, "-W", "ignore", oracle, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "done").touch()
    return folder


class Masks(keras.callbacks.Callback):
    """The masks with which each batch is computed."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append([keras.ops.convert_to_numpy(mask.value) for _, mask, _ in pruning_vars(self.model)])


def train(case, start, carrier):
    """Our training: the kernels and masks of every batch, and the kernels at the end."""
    settings = {"kernel_regularizer": keras.regularizers.L2(case["l2"]) if case["l2"] else None}
    if case["network"] == "convolution":
        body = [layers.Conv2D(4, 3, activation="relu", **settings), layers.Flatten(), layers.Dense(3, **settings)]
    else:
        body = [layers.Flatten(), layers.Dense(12, activation="relu", **settings), layers.Dense(3, **settings)]
    model = keras.Sequential([keras.Input((6, 6, 2)), *body])
    model.set_weights([start[name] for name in start if name.startswith(case["network"])])
    # tfmot counts from 1, so its step n is the moment after n - 1 updates
    shifted = {name: value - 1 if name.endswith("_step") else value for name, value in case["settings"].items()}
    schedule = getattr(kc, case["schedule"])(**shifted)
    optimizer = getattr(keras.optimizers, case["optimizer"])(**case["rate"])
    callbacks = []
    if carrier == "wrapper":
        model = kc.prune_low_magnitude(model, pruning_schedule=schedule, **case["wrapper"])
        callbacks = [kc.UpdatePruningStep()]
    else:
        optimizer = kc.PruningOptimizer(optimizer, schedule, **case["wrapper"])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)  # Keras would do it in the first batch
    masks = Masks()
    model.fit(start["inputs"], start["labels"], batch_size=8, shuffle=False, verbose=0, callbacks=[*callbacks, masks])
    return masks.seen, [keras.ops.convert_to_numpy(kernel.value) for kernel, _, _ in pruning_vars(model)]


def arrays(path):
    with np.load(path) as saved:  # which stays open otherwise, until it is collected in another test
        return dict(saved)


@pytest.mark.parametrize("carrier", ["wrapper", "optimizer"])
@pytest.mark.parametrize("name", CASES)
def test_masks_equal_tfmots_at_every_step_and_weights_at_the_end(tfmots, name, carrier):
    theirs = arrays(tfmots / f"{name}.npz")
    masks, kernels = train(CASES[name], arrays(tfmots / "start.npz"), carrier)
    assert len(masks) == STEPS
    assert len(kernels) == 2
    for i, kernel in enumerate(kernels):
        expected = theirs[f"masks{i}"]
        for step, mask in enumerate(masks):
            np.testing.assert_array_equal(mask[i], expected[step], err_msg=f"kernel {i}, batch {step + 1}")
        np.testing.assert_allclose(kernel, theirs[f"kernel{i}"], atol=2e-5)
        assert not expected[-1].all()  # tfmot did prune


def test_tfmot_does_let_weights_come_back_in_these_cases(tfmots):
    masks = [theirs[key] for path in tfmots.glob("*-*.npz") for theirs in [arrays(path)] for key in theirs]
    assert sum(int(np.sum(mask[1:] & ~mask[:-1])) for mask in masks if mask.dtype == bool) > 50


@pytest.mark.quick
@pytest.mark.parametrize("carrier", ["wrapper", "optimizer"])
def test_a_weight_that_the_network_needs_comes_back_with_plain_sgd(carrier):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(80 * 16, 2)).astype("float32")
    targets = inputs @ np.array([[3.0], [0.5]], "float32")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.1], [0.5]])  # of the two, the one that matters is smaller
    schedule, optimizer = kc.ConstantSparsity(0.5, 0, frequency=1), keras.optimizers.SGD(0.2)
    if carrier == "wrapper":
        model = kc.prune_low_magnitude(model, schedule)
        model.compile(optimizer, "mse")
    else:
        model.compile(kc.PruningOptimizer(optimizer, schedule), "mse")
    callbacks = [kc.UpdatePruningStep()] if carrier == "wrapper" else []
    model.fit(inputs, targets, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
    ((kernel, _, _),) = pruning_vars(model)
    first, second = keras.ops.convert_to_numpy(kernel.value).ravel()
    assert first == pytest.approx(3.0, abs=0.05)
    assert second == 0


def test_a_schedule_of_one_update_gives_permanent_masks():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.1], [0.5]])
    once = kc.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=0)
    model.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.2), once), "mse")
    inputs = np.random.default_rng(0).normal(size=(320, 2)).astype("float32")
    model.fit(inputs, inputs @ np.array([[3.0], [0.5]], "float32"), batch_size=16, verbose=0)
    assert [bool(weight) for weight in keras.ops.convert_to_numpy(model.layers[0].kernel).ravel()] == [False, True]
