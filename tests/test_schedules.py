"""Schedules: tfmot's own, safely imported; the magnitude linked to them; the step that callbacks are told."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import kerascompress as kc
from kerascompress.callbacks import StepCallback
from kerascompress.schedules import evaluate, last_due


def run_python(code: str) -> dict:
    """Runs `code` in a process of its own; what it prints last is JSON."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported():
    """What a new process sees that imports Keras, this package, tfmot by way of a schedule, and keras-cv."""
    return run_python("""
import json, os, sys
import keras
before, modules = dict(os.environ), set(sys.modules)
import kerascompress as kc
new = {name.partition(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names)
found = {"environment": dict(os.environ) == before, "new": sorted(new)}
kc.PolynomialDecay(0.0, 0.5, 0, 10)
found["keras_cv"] = "keras_cv" in sys.modules
from kerascompress import keras_cv
layer = keras_cv.RandAugment((0, 255))
layer.magnitude.assign(4)
import tensorflow as tf
found |= {"keras": tf.keras.__version__, "legacy": os.environ.get("TF_USE_LEGACY_KERAS")}
print(json.dumps(found | {"magnitude": float(layer.magnitude), "layer": type(layer).__mro__[1].__module__}))
""")


@pytest.mark.once
def test_importing_the_package_adds_nothing_to_importing_keras_and_changes_no_environment(imported):
    assert imported["environment"]
    assert imported["new"] == ["kerascompress"]


@pytest.mark.once
def test_after_a_schedule_is_used_tf_keras_is_still_keras_3_and_keras_cv_which_was_not_imported_still_imports(imported):
    assert imported["layer"].startswith("keras_cv.")
    found = [imported[name] for name in ("keras_cv", "keras", "legacy", "magnitude")]
    assert found == [False, keras.__version__, None, 4]


@pytest.mark.parametrize("name", ["PolynomialDecay", "ConstantSparsity"])
def test_the_schedules_are_tfmots_own_classes(name):
    cls = getattr(kc, name)
    assert cls.__module__.startswith("tensorflow_model_optimization.")
    assert issubclass(cls, kc.schedules.PruningSchedule)


def test_an_unknown_public_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="prune_low_magnitude"):
        _ = kc.prune_low_magnitudes


@pytest.mark.quick
def test_evaluate_returns_the_formula_of_zhu_and_gupta():
    schedule = kc.PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.7, begin_step=10, end_step=50, frequency=20)
    for step in range(0, 60, 5):
        progress = min(max((step - 10) / 40, 0), 1)
        expected = 0.7 + (0.1 - 0.7) * (1 - progress) ** 3
        should_prune, sparsity = evaluate(schedule, step)
        assert sparsity == pytest.approx(expected, abs=1e-6)
        assert should_prune is (step in (10, 30, 50))


@pytest.mark.quick
def test_the_linked_magnitude_passes_through_the_papers_optima():
    schedule = lambda step: (True, step / 100)  # noqa: E731
    weaken = kc.SparsityLinkedMagnitude(schedule, {0.6: 4, 0.0: 14, 0.2: 12, 0.4: 8})
    assert [weaken(step) for step in (0, 20, 40, 60)] == pytest.approx([14, 12, 8, 4])
    assert weaken(10) == pytest.approx(13)
    assert weaken(30) == pytest.approx(10)
    assert weaken(99) == pytest.approx(4)


def test_the_linked_magnitude_falls_with_a_polynomial_decay():
    schedule = kc.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.6, begin_step=0, end_step=100)
    weaken = kc.SparsityLinkedMagnitude(schedule, {0.0: 14, 0.2: 12, 0.4: 8, 0.6: 4})
    magnitudes = [weaken(step) for step in range(0, 120, 10)]
    assert magnitudes[0] == 14
    assert magnitudes[-1] == pytest.approx(4, abs=1e-5)
    assert np.all(np.diff(magnitudes) <= 0)


@pytest.mark.parametrize(
    ("magnitudes", "message"),
    [({}, "at least one"), ({20: 4}, "divide them by 100"), ({0.2: 31}, r"\[0, 30\]"), ({-0.1: 4}, r"\[0, 1\)")],
)
def test_points_out_of_range_are_refused(magnitudes, message):
    with pytest.raises(ValueError, match=message):
        kc.SparsityLinkedMagnitude(lambda step: (True, 0.5), magnitudes)


@pytest.mark.parametrize("make", [int, keras.ops.convert_to_tensor])
def test_percent_are_refused(make):
    with pytest.raises(ValueError, match=r"in \[0, 1\), a fraction of zeros\. Received: 60\.0 .*divide them by 100"):
        evaluate(lambda step: (step % 4 == 3, 60.0), make(3))


def test_a_schedule_that_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="ConstantSparsity"):
        kc.SparsityLinkedMagnitude(0.6, {0.0: 14})


class Steps(StepCallback):
    def on_train_begin(self, logs=None):
        self.seen = []
        super().on_train_begin(logs)

    def on_step(self, step):
        self.seen.append(step)


@pytest.mark.parametrize(
    ("compile_kwargs", "accumulation", "expected"),
    [
        ({}, None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        pytest.param({"steps_per_execution": 2}, None, [0, 2, 4, 6, 8], marks=pytest.mark.compiled),
        ({}, 2, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    ],
)
def test_on_step_is_told_the_optimizers_updates(compile_kwargs, accumulation, expected):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=accumulation), "mse", **compile_kwargs)
    steps = Steps()
    inputs, targets = np.ones((16, 3), "float32"), np.ones((16, 2), "float32")
    model.fit(inputs, targets, batch_size=4, epochs=2, verbose=0, callbacks=[steps])
    assert steps.seen == expected
    assert int(model.optimizer.iterations) == expected[-1]
    model.fit(inputs, targets, batch_size=4, verbose=0, callbacks=[steps])
    assert steps.seen[0] == expected[-1]
    assert steps.seen[-1] == int(model.optimizer.iterations)


def test_a_late_resume_looks_no_further_back_than_the_last_step_of_the_schedule(monkeypatch):
    asked = []

    def at_most_a_thousand_times(schedule, step):  # step by step it would take days
        asked.append(step)
        return evaluate(schedule, step) if len(asked) < 1000 else pytest.fail(f"is asked for step {step}")

    monkeypatch.setattr("kerascompress.schedules.evaluate", at_most_a_thousand_times)
    schedule = kc.PolynomialDecay(0.0, 0.6, begin_step=0, end_step=20_000, frequency=100)
    assert last_due(schedule, -1, 10**15) == (20_000, pytest.approx(0.6))
    assert kc.SparsityLinkedMagnitude(schedule, {0.0: 14, 0.6: 4})(10**15) == 4
