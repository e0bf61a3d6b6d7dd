"""One training on several devices: its result is that of one device."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest

import kerascompress as kc
from experiments import data as datasets
from experiments import devices, engine, training
from experiments.runs import Run

SCHEDULE = {"final_sparsity": 0.5, "begin_step": 0, "end_step": 4, "frequency": 1}


# --- what the process with several devices does ---


def images_and_labels(n):
    """Images of a class with its own shade, so that there is something to learn."""
    random = np.random.default_rng(n)
    labels = (np.arange(n) % 3).astype("int32")
    return (random.integers(0, 100, (n, 8, 8, 3)) + 70 * labels[:, None, None, None]).astype("uint8"), labels


def network(seed):
    kernels = [keras.initializers.RandomNormal(0.1, seed=seed + i) for i in range(2)]
    layers = [
        keras.layers.Rescaling(1 / 128, -1),
        keras.layers.Conv2D(4, 3, kernel_initializer=kernels[0], kernel_regularizer="l2"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, kernel_initializer=kernels[1]),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def distilled(run, net, stage):
    *base_seeds, seed = training.layer_seeds(run, 3, stage)
    augment = kc.RandAugment((0, 30), ops=["Rotate", "Solarize"], seed=seed)
    layers = keras.Sequential([*training.base_augmentation(training.data_of(run), *base_seeds), augment])
    return kc.Distiller(net, network(seed=7), augment=layers, num_candidates=2, alpha=0.5), augment


def adapts(augment):
    return kc.AdaptiveMagnitude(augment, "accuracy", 0.01, speed=2)  # which any accuracy is above


CASES = {  # what is trained, on one device and on so many
    "wrapper, AdaptiveMagnitude": {"devices": 2, "carrier": "wrapper", "moves": adapts},
    "optimizer, Distiller": {"devices": 4, "carrier": "optimizer", "around": distilled},
}


def masks_of(fitted):
    of_wrappers = [mask for _, mask, _ in kc.pruning.pruning_vars(fitted)]
    return of_wrappers or [mask for _, mask, _ in fitted.optimizer.pruning_vars]


def copies(variable):
    """The value of a variable on each device."""
    if keras.backend.backend() == "jax":
        return [np.asarray(shard.data) for shard in variable.value.addressable_shards]
    return [np.asarray(value) for value in getattr(variable.value, "values", [variable.value])]


def train(case, count, folder):
    """Returns what one training leaves."""
    settings = {name: value for name, value in CASES[case].items() if name != "devices"}
    run = Run(
        figure="fig1", dataset="cifar10", model="resnet8", arm="M=9", sparsity=0.5, magnitude=9, seed=0, epochs=2,
        batch_size=20, learning_rate=0.1, train_images=40, smoke=False, schedule="cosine", devices=count,
        carrier=settings.pop("carrier"), checkpoints=str(pathlib.Path(folder, f"{case}{count}")),
    )  # fmt: skip
    fitted, prepare = [], training._prepare
    training._prepare = lambda *args: fitted.append(prepare(*args)) or fitted[0]
    try:
        with devices.spread(count):
            net = network(seed=1)
            result = training.trained(run, net, schedule=kc.PolynomialDecay(0.0, **SCHEDULE), **settings)
    finally:
        training._prepare = prepare
    teacher = getattr(fitted[0][0], "teacher", None)
    return {
        "untouched": teacher is None or all(map(np.array_equal, teacher.get_weights(), network(seed=7).get_weights())),
        "weights": np.concatenate([weight.ravel() for weight in net.get_weights()]).tolist(),
        "accuracies": [result["train_last"], result["validation_last"], result["test_last"]],
        "magnitudes": result.get("magnitudes"),
        "sparsity": kc.sparsity(net),
        "masks": [[int(mask.sum()) for mask in copies(mask)] for mask in masks_of(fitted[0][0])],
        "same": all(np.array_equal(copy, copies(m)[0]) for m in masks_of(fitted[0][0]) for copy in copies(m)),
    }


def draws():
    """Returns the rows, signs and magnitudes that a RandAugment draws for 8 images, of all replicas, and of one."""
    augment = kc.RandAugment((0, 30), seed=3)
    alone = [keras.ops.convert_to_numpy(part).tolist() for part in augment.draw(8)]
    import tensorflow as tf

    with devices.spread(4):
        augment = kc.RandAugment((0, 30), seed=3)
        strategy = tf.distribute.get_strategy()
        parts = [strategy.experimental_local_results(part) for part in strategy.run(lambda: augment.draw(2))]
    return alone, [np.concatenate([np.asarray(piece) for piece in part], axis=-1).tolist() for part in parts]


def optimizers():
    """Returns sparsity and sum of magnitudes of a pruned kernel, trained on one device and on two, for each policy."""

    def train(policy, count):
        keras.config.set_dtype_policy(policy)
        rng = np.random.default_rng(0)
        with devices.spread(count):
            model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
            model.set_weights([rng.normal(size=(20, 10)), rng.normal(size=10)])
            optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
            model.compile(kc.PruningOptimizer(optimizer, kc.PolynomialDecay(0.0, **SCHEDULE), scope="global"), "mse")
            model.fit(rng.normal(size=(48, 20)), rng.normal(size=(48, 10)), batch_size=8, shuffle=False, verbose=0)
        keras.config.set_dtype_policy("float32")
        return kc.sparsity(model), float(np.abs(model.get_weights()[0]).sum())

    return [[train(policy, count) for count in (1, 2)] for policy in ("float32", "mixed_float16")]


def scheduled():
    """Returns the magnitude to which a scheduler has led an augmentation in four steps of two replicas."""
    with devices.spread(2):
        augment = kc.RandAugment(magnitude=14, seed=0)
        model = keras.Sequential([keras.Input((8, 8, 3)), augment, keras.layers.Flatten(), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = images_and_labels(32)
    callback = kc.MagnitudeScheduler(augment, lambda step: step)
    model.fit(images.astype("float32"), labels % 2, batch_size=8, verbose=0, callbacks=[callback])
    return float(keras.ops.convert_to_numpy(augment.magnitude))


def distillers():
    """Returns what a Distiller without augmentation leaves, on one device and on two."""

    def fitted(count):
        with devices.spread(count):
            net, teacher = network(seed=1), network(seed=7)
            net.layers[2].trainable = False  # statistics of BatchNorm are those of a replica
            distiller = kc.Distiller(net, teacher, augment=lambda images, training: images, num_candidates=1, alpha=0.5)
            distiller.compile(keras.optimizers.SGD(0.05, momentum=0.9), metrics=["accuracy"])
        before = teacher.get_weights()
        history = distiller.fit(*images_and_labels(16), batch_size=8, epochs=2, shuffle=False, verbose=0).history
        untouched = all(map(np.array_equal, before, teacher.get_weights()))
        return {"history": history, "weights": [w.ravel().tolist() for w in net.get_weights()], "untouched": untouched}

    return [fitted(count) for count in (1, 2)]


OF_TWO = {"optimizers": optimizers}
if keras.backend.backend() == "tensorflow":
    OF_TWO |= {"scheduled": scheduled, "distillers": distillers}


def main(cases):
    """Prints what the cases leave; with the first, what is asked of two devices; with the last, draws of four."""
    devices.claim(max(CASES[case]["devices"] for case in cases))
    if keras.backend.backend() == "tensorflow":  # as in conftest.py: these graphs run a few times
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    others = {name: make() for name, make in OF_TWO.items() if "wrapper, AdaptiveMagnitude" in cases}
    if keras.backend.backend() == "tensorflow" and "optimizer, Distiller" in cases:
        others["draws"] = draws()
    training.rand_augment = lambda run, seed: kc.RandAugment(run.magnitude, ops=["Rotate", "Solarize"], seed=seed)
    splits = [images_and_labels(n) for n in (40, 13, 13)]  # of 13, no number of devices has equal parts
    training._load = lambda *_: datasets.Data(*splits, 3, True, 128, (128,) * 3, (64,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        left = {case: [train(case, count, folder) for count in (1, CASES[case]["devices"])] for case in cases}
    print(json.dumps(left | others))


# --- the claims ---


@pytest.fixture(scope="module")
def report():
    if keras.backend.backend() == "torch":
        pytest.skip("Keras distributes nothing on Torch")
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(["tests", ".", os.environ.get("PYTHONPATH", "")])
    settings = {"cwd": pathlib.Path(__file__).parents[1], "env": environment, "text": True, "capture_output": True}
    report = {}
    # TensorFlow's collective operations allow one number of devices in a process
    for cases in [list(CASES)] if keras.backend.backend() == "jax" else [[case] for case in CASES]:
        code = f"import test_devices; test_devices.main({cases})"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        report |= json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("case", CASES)
def test_a_training_on_several_devices_is_that_on_one_up_to_rounding(report, case):
    alone, several = report[case]
    np.testing.assert_allclose(several["weights"], alone["weights"], rtol=1e-3, atol=1e-4)
    assert several["accuracies"] == alone["accuracies"]
    assert several["magnitudes"] == alone["magnitudes"] == ([9, 11] if "moves" in CASES[case] else None)
    assert several["sparsity"] == alone["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert several["same"]
    assert several["untouched"]  # a teacher, whose augmented candidates are chosen among
    assert [len(copies) for copies in several["masks"]] == [CASES[case]["devices"]] * 2
    assert [copies[0] for copies in several["masks"]] == [copies[0] for copies in alone["masks"]]


def test_masks_and_weights_of_a_pruning_optimizer_on_two_devices_are_those_of_one(report):
    for ((sparsity, total), of_two), tolerance in zip(report["optimizers"], (1e-5, 1e-2), strict=True):  # mixed_float16
        assert of_two == [sparsity, pytest.approx(total, rel=tolerance)]
        assert sparsity == 0.5


@pytest.mark.tensorflow_only
def test_under_a_mirrored_strategy_the_magnitude_stays_live(report):
    assert report["scheduled"] == 4


@pytest.mark.tensorflow_only
def test_under_a_mirrored_strategy_a_distiller_trains_its_student_alone(report):
    alone, spread = report["distillers"]
    for name, values in alone["history"].items():
        np.testing.assert_allclose(spread["history"][name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(spread["weights"], alone["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert alone["untouched"] is spread["untouched"] is True


@pytest.mark.tensorflow_only  # on JAX, the batch is one
def test_images_of_several_devices_draw_what_they_draw_on_one(report):
    alone, several = report["draws"]
    for of_one, of_all in zip(alone, several, strict=True):
        np.testing.assert_allclose(of_all, of_one, rtol=1e-6)
    op, _, magnitude = several
    of_replicas = np.split(np.asarray(op), 4, axis=1)
    assert not all(np.array_equal(of_replicas[0], each) for each in of_replicas)  # they draw other operations
    assert len(set(magnitude)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "`batch_size`, that of the whole training, must be a multiple of `devices`"),
        ({"batch_size": 8}, r"--devices=2 needs|--devices needs the TensorFlow or the JAX backend"),
    ],
)
def test_devices_that_are_not_there_or_do_not_share_out_a_batch_are_refused(tmp_path, changes, message):
    run = Run(
        figure="fig1", dataset="digits", model="resnet8", arm="M=9", sparsity=0.0, magnitude=9, seed=0, epochs=2,
        learning_rate=0.1, train_images=24, smoke=False, devices=2, checkpoints=str(tmp_path), **changes,
    )  # fmt: skip
    keras.ops.zeros(1)  # something has computed, on one device
    check = training.check if changes["batch_size"] % 2 else lambda run: devices.spread(run.devices)
    with pytest.raises(ValueError, match=message):
        check(run)


@pytest.mark.once
def test_runs_and_devices_go_together():
    gpus = [engine._environment(slot, 2, ["0", "1", "2", "3"], each=2) for slot in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in gpus] == ["0,1", "2,3"]
    assert {each["XLA_PYTHON_CLIENT_MEM_FRACTION"] for each in gpus} == {"0.90"}
    shared = engine._environment(1, 2, ["0", "1"], each=2)
    assert (shared["CUDA_VISIBLE_DEVICES"], shared["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("0,1", "0.45")
    with pytest.raises(ValueError, match=r"--devices must be at most 2, the GPUs of this machine\. Received: 4"):
        engine._environment(0, 1, ["0", "1"], each=4)
