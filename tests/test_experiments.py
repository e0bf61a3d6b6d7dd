"""The experiment scripts: what a run leaves, and what survives a crash."""

import dataclasses
import gc
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import warnings
import weakref

import keras
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

import kerascompress as kc
from experiments import claims, engine, keeper, plot, runs, training
from experiments import fig1_magnitude_search as fig1
from experiments import fig3_magnitude_decay as fig3

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_run):
    """Folder and rows of a first call with --smoke."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, smoke_run(fig3, folder)


def without_time(rows):
    return [row | {"seconds": 0} for row in rows]


def weights_are_equal(folder, other):
    """Whether each network below the one folder is the same, bit for bit, below the other."""
    paths = [path.relative_to(folder) for path in folder.glob("checkpoints/*/done.npz")]
    for path in paths:
        for array, expected in zip(
            *(keeper.load_arrays(each / path, "weights")[1] for each in (folder, other)), strict=True
        ):
            np.testing.assert_array_equal(array, expected)
    return bool(paths)


def run_of(folder, arm="none", **changes):
    """A run of the smallest kind, by itself."""
    settings = {"figure": "fig1", "dataset": "digits", "model": "resnet8w4", "sparsity": 0.0, "magnitude": None}
    settings |= {"seed": 0, "epochs": 2, "batch_size": 32, "learning_rate": 0.1, "train_images": 64, "smoke": True}
    return runs.Run(**settings | {"arm": arm, "checkpoints": str(folder), "work": 2} | changes)


def one_layer(run, seed=None):
    """A network that compiles in no time, in place of `training.build_model`; with statistics to be kept."""
    kernel = keras.initializers.RandomNormal(seed=run.seed if seed is None else seed)
    shape = training.data_of(run).input_shape
    norm = keras.layers.BatchNormalization(name="norm")
    logits = keras.layers.Dense(10, kernel_initializer=kernel, name="logits")
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), norm, logits], name="one_layer")


@pytest.mark.once("jax")
def test_smoke_leaves_rows_and_figure(smoke):
    folder, rows = smoke
    assert [(row["arm"], row["sparsity"], row["magnitude"]) for row in rows] == [
        ("none", 0.0, None),
        ("none", 0.6, None),
        ("decayed", 0.0, 14),
        ("decayed", 0.6, 4),
    ]
    for row in rows:
        assert row["live_sparsity"] == pytest.approx(row["sparsity"], abs=1e-3)
        assert row["images"] == {"train": 64, "validation": 64, "test": 64}
        assert 0 <= row["test_last"] <= 1
        assert 64 * row["chance"] in range(7, 16)  # images of the class that has most
        assert row["best_epoch"] == 2 or row["sparsity"] == 0  # epochs before the ratio is reached do not count
        assert row["validation_best"] >= row["validation_last"]
        assert row["seconds"] > 0
        assert row["versions"]["backend"] == keras.backend.backend()
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("checkpoints/*/state.npz"))  # a finished run keeps its network, not its optimizer


@pytest.mark.once("jax")
def test_second_call_has_nothing_to_do_and_prints_the_table(smoke, monkeypatch, capsys, smoke_run):
    folder, rows = smoke
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(training, "trained", None)
    assert smoke_run(fig3, folder) == rows
    assert (folder / "rows.jsonl").read_bytes() == before
    assert "| decayed |" in capsys.readouterr().out


KILLED = """
import os
from absl import app
from experiments import fig3_magnitude_decay as fig3, keeper, training
from test_experiments import one_layer

save, saved = keeper.save_arrays, []

def save_once(path, meta, **groups):
    if saved:
        os._exit(9)
    saved.append(save(path, meta, **groups))

keeper.save_arrays, keeper.SAVE_EVERY = save_once, 0
training.build_model = one_layer
app.run(fig3.main)
"""
OPTIMIZE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest.py has it: other machine code rounds otherwise


def test_run_killed_in_a_pruning_stage_goes_on_to_the_same_result_bit_for_bit(tmp_path, monkeypatch, smoke_run):
    monkeypatch.setattr(training, "build_model", one_layer)
    folder = tmp_path / "whole"
    expected_rows = smoke_run(fig3, folder)
    for stage in folder.glob("checkpoints/*"):
        if "arm=decayed,p=0.6" not in stage.name:
            shutil.copytree(stage, tmp_path / "checkpoints" / stage.name)
    command = [sys.executable, "-c", KILLED, "--dataset=digits", "--smoke"]
    command += [f"--results={tmp_path}/rows.jsonl", f"--checkpoints={tmp_path}/checkpoints"]
    environment = os.environ | OPTIMIZE | {"PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 9
    assert len(list(tmp_path.glob("checkpoints/*/state.npz"))) == 1

    first, fit = [], keras.Sequential.fit
    monkeypatch.setattr(
        keras.Sequential, "fit", lambda *args, **kw: first.append(kw["initial_epoch"]) or fit(*args, **kw)
    )
    rows = smoke_run(fig3, tmp_path)
    assert first == [1]  # the second of two
    assert without_time(rows) == without_time(expected_rows)
    assert weights_are_equal(tmp_path, folder)


@pytest.fixture(params=["1", "2", "ray"])
def workers(request, monkeypatch):
    """Who carries runs out."""
    if request.param == "ray":
        pytest.importorskip("ray", reason="needs Ray: pip install ray")
        monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it warns of a change to come
        # how Ray starts its processes, of which JAX, having computed here, warns
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))  # Ray's processes import what pytest has imported
    return request.param


@pytest.mark.once("jax")
@pytest.mark.parametrize("workers", ["2", "ray"], indirect=True)
def test_a_pool_and_a_ray_cluster_give_the_rows_of_a_loop(smoke, tmp_path, monkeypatch, workers):
    for name, value in OPTIMIZE.items():
        monkeypatch.setenv(name, value)
    folder, expected = smoke
    dense = [row for row in expected if row["sparsity"] == 0]
    names = {field.name for field in dataclasses.fields(runs.Run)}
    wanted = [
        runs.Run(**{k: v for k, v in row.items() if k in names}, checkpoints=str(tmp_path / "checkpoints"), work=2)
        for row in dense
    ]
    engine.carry_out(wanted, fig3.outcome, workers=workers, results=tmp_path / "rows.jsonl")
    rows = runs.read_rows(tmp_path / "rows.jsonl")
    assert sorted(map(str, without_time(rows))) == sorted(map(str, without_time(dense)))
    assert weights_are_equal(tmp_path, folder)


def raises_dies_or_returns(run):
    if run.arm == "raises":
        raise ValueError("no such luck")
    if run.arm == "dies":
        os.kill(os.getpid(), 9)
    return {"test_last": 0.5}


@pytest.mark.once("jax")
def test_a_run_that_raises_or_is_killed_costs_what_needs_it_and_no_other(tmp_path, workers):
    bad = ["raises"] if workers == "1" else ["raises", "dies"]
    first = {arm: run_of(tmp_path, arm) for arm in [*bad, "fine"]}
    then = [run_of(tmp_path, f"after {arm}", after=run) for arm, run in first.items()]
    shared = [run_of(tmp_path, f"on a stage, {i}", after=run_of(tmp_path, "stage")) for i in range(2)]
    with pytest.raises(SystemExit) as error:
        engine.carry_out(
            [*first.values(), *then, *shared],
            raises_dies_or_returns,
            workers=workers,
            results=tmp_path / "rows.jsonl",
        )
    named = [re.match("- (.*) p=0 seed 0: ", line)[1] for line in str(error.value.code).splitlines()[1:]]
    assert sorted(named) == sorted([*bad, *(f"after {arm}" for arm in bad)])
    assert "raises p=0 seed 0: ValueError: no such luck" in str(error.value.code)
    assert "after raises p=0 seed 0: needs raises p=0 seed 0, which failed" in str(error.value.code)
    if workers == "2":
        assert "dies p=0 seed 0: its process ended with signal 9 (SIGKILL)" in str(error.value.code)
    rows = runs.read_rows(tmp_path / "rows.jsonl")
    assert sorted(row["arm"] for row in rows) == ["after fine", "fine", "on a stage, 0", "on a stage, 1"]


@pytest.mark.quick
@pytest.mark.once
def test_stages_come_once_and_before_what_needs_them(tmp_path):
    stage, done = run_of(tmp_path, "stage"), run_of(tmp_path, "done")
    done.folder.mkdir(parents=True)
    (done.folder / keeper.DONE).touch()
    wanted = [run_of(tmp_path, f"{i}", after=after) for i, after in enumerate([stage, done, stage])]
    assert [run.arm for run in engine._stages_first(wanted)] == ["stage", "0", "1", "2"]


@pytest.mark.once
def test_each_process_of_a_pool_has_a_gpu_or_its_share_of_one():
    assert engine._environment(1, 2, []) == {}
    alone = engine._environment(1, 2, ["0", "3"])
    assert (alone["CUDA_VISIBLE_DEVICES"], alone["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("3", "0.90")
    assert alone["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    shared = engine._environment(2, 4, ["0", "3"])
    assert (shared["CUDA_VISIBLE_DEVICES"], shared["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("0", "0.45")


@pytest.mark.once
def test_ray_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--workers=ray needs Ray.*pip install ray"):
        engine.carry_out([run_of(tmp_path)], fig1.outcome, workers="ray", results=tmp_path / "rows.jsonl")


def test_one_folder_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    import fcntl

    def fit(run, *_):
        with open(run.folder / "lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return {"test_last": 0.5}

    run = run_of(tmp_path)
    monkeypatch.setattr(training, "_fit", fit)
    net = one_layer(run)
    assert training.trained(run, net) == runs.provenance() | {"test_last": 0.5}
    monkeypatch.setattr(training, "_fit", None)
    other = one_layer(run, seed=1)
    handed_on = {"test_last": 0.5, "device": "another", "versions": {}}
    keeper.save_arrays(run.folder / keeper.DONE, handed_on, weights=net.get_weights())
    assert training.trained(run, other) == handed_on  # what is done is handed on, with where it comes from
    np.testing.assert_array_equal(other.get_weights()[0], net.get_weights()[0])


def test_what_is_compiled_serves_the_next_run_and_changes_nothing(tmp_path):
    def weights(folder, **changes):
        run = run_of(folder, magnitude=9, **changes)
        net = one_layer(run)
        result = training.trained(run, net)
        images, labels = training.data_of(run).test
        assert result["test_last"] == pytest.approx(np.mean(net.predict(images, verbose=0).argmax(1) == labels))
        return np.concatenate([w.ravel() for w in net.get_weights()])

    training._COMPILED.clear()
    first = weights(tmp_path / "a")
    assert not np.array_equal(first, weights(tmp_path / "a", seed=1))
    np.testing.assert_array_equal(weights(tmp_path / "b"), first)
    assert len(training._COMPILED) == 1
    weights(tmp_path / "a", learning_rate=0.2)
    assert len(training._COMPILED) == 2
    models = [weakref.ref(model) for model, *_ in training._COMPILED.values()]
    training._COMPILED.clear()
    gc.collect()
    assert [model() for model in models] == [None, None]  # hundreds of megabytes each, for a large network


def test_the_best_epoch_is_one_that_was_looked_at_and_the_last_one_always_is(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(keeper.Keeper, "result", lambda kept, *_: looks.extend(kept.looks) or {})
    run = run_of(tmp_path, epochs=5, evaluate_every=2)
    training.trained(run, one_layer(run))
    assert [epoch for epoch, _ in looks] == [2, 4, 5]


@pytest.mark.once("jax")
def test_accuracies_of_the_best_and_the_last_epoch_are_those_of_their_weights(tmp_path, monkeypatch):
    weights, on_epoch_end = [], keeper.Keeper.on_epoch_end

    def first_is_best(kept, epoch, logs):
        on_epoch_end(kept, epoch, logs | {"val_accuracy": (0.9, 0.1)[epoch]})
        weights.append(kept.fitted.layers[-1].get_weights())

    monkeypatch.setattr(keeper.Keeper, "on_epoch_end", first_is_best)
    run = run_of(tmp_path, epochs=2)
    net = one_layer(run)
    result = training.trained(run, net)
    for ours, last in zip(net.get_weights(), weights[1], strict=True):
        np.testing.assert_array_equal(ours, last)
    images, labels = training.data_of(run).test
    expected = []
    for each in weights:
        net.set_weights(each)
        expected.append(np.mean(net.predict(images, verbose=0).argmax(1) == labels))
    assert expected[0] != expected[1]
    assert (result["test_best"], result["test_last"]) == pytest.approx(tuple(expected), abs=1e-6)
    assert [result[name] for name in ("best_epoch", "validation_best", "validation_last")] == [1, 0.9, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": "."}, "--results must be a file that can be appended to. Received: . (Is a directory)"),
        ({"results": f"{__file__}/rows.jsonl"}, "--results must be a file that can be appended to"),
        ({"dataset": "cifar10", "data_dir": "/nowhere"}, "No folder /nowhere/cifar-10-batches-py"),
        ({"model": "vgg16"}, "`model` must be resnet<depth>"),
        ({"model": "mobilenet_v2w"}, "`model` must be resnet<depth>"),
        ({"train_images": 2}, "between 10 and 1213"),
        ({"batch_size": 65}, "`batch_size` must be at most 64"),
        ({"image_size": 3}, "`image_size` must divide the side of the data set's images: 1, 2, 4, 8"),
        ({"sparsities": "0.2,0.6"}, "--sparsities must rise from 0"),
        ({"decayed": "14,none"}, "none cannot be weakened to"),
        ({"magnitudes": "31"}, "--magnitudes must be some magnitude(s) in [0, 30]"),
        ({"strong": 14}, "--strong is no flag of fig3"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, monkeypatch, changes, message, smoke_run):
    monkeypatch.setattr(training, "trained", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, OSError)) as error:
        smoke_run(fig3, tmp_path, **changes)
    assert message in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize(
    ("flag", "allowed"), [("dataset=mnist", r"<digits\|cifar10\|cifar100\|imagenet>"), ("workers=0", "auto")]
)
def test_unknown_value_is_refused_by_its_flag(flag, allowed):
    with flagsaver.flagsaver(), pytest.raises(absl_flags.IllegalFlagValueError, match=allowed):
        absl_flags.FLAGS(["test", f"--{flag}"])


APPENDS = """
import sys
from experiments.runs import append_row

for seed in range(150):
    append_row(sys.argv[1], {"who": sys.argv[2], "seed": seed})
"""


@pytest.mark.quick
@pytest.mark.once
def test_two_processes_that_append_150_rows_each_leave_300(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"cut sho')  # so that the first one truncates
    both = [subprocess.Popen([sys.executable, "-c", APPENDS, path, who], cwd=ROOT) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    rows = runs.read_rows(path)
    assert [[row["seed"] for row in rows if row["who"] == who] for who in "ab"] == [list(range(150))] * 2


@pytest.mark.once
def test_a_run_that_another_process_has_done_leaves_no_second_row(tmp_path):
    run, path = run_of(tmp_path), tmp_path / "rows.jsonl"
    first = runs.append_row(path, run.key | {"test_last": 0.5}, run)
    assert runs.append_row(path, run.key | {"test_last": 0.5, "seconds": 9}, run) == first
    assert runs.read_rows(path) == [first]


@pytest.mark.once
@pytest.mark.parametrize("tail", ['{"figure": "fig3", "seed', "{", "nul", "nul\n", "\n"])
def test_last_line_cut_short_is_named_left_out_and_replaced_by_the_next_row(tmp_path, capsys, tail):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n' + tail)
    assert runs.read_rows(path) == [{"seed": 0}]
    assert f"{path}: the last line was cut short" in capsys.readouterr().err
    run = run_of(tmp_path)
    runs.append_row(path, {"seed": 1}, run)
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


@pytest.mark.once
def test_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}')
    runs.append_row(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


FULL = """
import resource, sys
from experiments.runs import append_row
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
append_row(sys.argv[1], {"seed": 1})
"""


@pytest.mark.once
def test_row_that_does_not_reach_the_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    runs.append_row(path, {"seed": 0})
    failed = subprocess.run([sys.executable, "-c", FULL, path], cwd=ROOT, capture_output=True, text=True)
    assert f"File too large: '{path}'\nThe row could not be appended" in failed.stderr
    assert path.stat().st_size == 20  # eight bytes of the row
    runs.append_row(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


@pytest.mark.once
def test_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n{"se\n{"seed": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        runs.read_rows(path)


@pytest.mark.once
def test_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"state.npz does not load.*Delete it"):
        keeper.load_arrays(path, "state")


@pytest.mark.once
def test_a_state_of_another_backend_is_an_error_that_names_both(tmp_path, monkeypatch):
    run = run_of(tmp_path, "M=9", epochs=2)
    fitted = one_layer(run)
    fitted.compile("sgd")
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    kept = keeper.Keeper(run, fitted, 0)
    run.folder.mkdir(parents=True)
    kept.save()
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"begun on the backend numpy\. Received: (tensorflow|jax|torch)\..*KERAS_BACKEND"
    ):
        kept.load()
    result = {"versions": {"backend": "numpy"}}
    keeper.save_arrays(run.folder / keeper.DONE, result, weights=fitted.get_weights())
    with pytest.raises(ValueError, match=r"begun on the backend numpy.*or delete .*done.npz"):
        training.trained(run, fitted)


@pytest.mark.once
def test_a_state_of_another_network_is_an_error_that_names_it(tmp_path):
    run = run_of(tmp_path, "M=9", epochs=2)
    fitted, other = one_layer(run), keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for model in (fitted, other):
        model.compile("sgd")
    run.folder.mkdir(parents=True)
    keeper.Keeper(run, other, 0).save()
    with pytest.raises(ValueError, match=r"state.npz is of another network or optimizer than M=9 .* Delete it"):
        keeper.Keeper(run, fitted, 0).load()


@pytest.mark.once
def test_a_seed_that_is_named_twice_counts_once_and_rows_that_a_figure_leaves_out_are_told(tmp_path, capsys):
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", "--dataset=digits", f"--results={tmp_path}/rows.jsonl", "--seeds=0,0"])
        study = fig3.flags.Study("fig3", takes=("sparsities",), carrier="wrapper")
        planned = [study.run(arm="none", sparsity=0.0, magnitude=None, seed=seed) for seed in study.seeds]
        runs.append_row(tmp_path / "rows.jsonl", planned[0].key | {"test_last": 0.5})
        assert len(study.carry_out(planned, raises_dies_or_returns)) == 1
        assert capsys.readouterr().out == ""
        runs.append_row(tmp_path / "rows.jsonl", planned[0].key | {"seed": 7, "test_last": 0.5})
        assert len(study.carry_out(planned, raises_dies_or_returns)) == 1
        assert "rows.jsonl has 1 other row(s), which this figure leaves out" in capsys.readouterr().out


@pytest.mark.once
def test_the_recipe_is_a_crop_by_4_of_32_pixels_two_operations_and_half_of_the_epochs_to_prune(tmp_path, monkeypatch):
    data = types.SimpleNamespace(input_shape=(32, 32, 3), fill_value=120, flip=True, in_files=False)
    data.train = None, np.zeros(200)
    monkeypatch.setattr(training, "data_of", lambda run: data)
    run = run_of(tmp_path, magnitude=9, sparsity=0.6, epochs=5)
    net = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()])
    whole, augment = training.classifier(run, net, 0)
    crop, flip, *rest = whole.layers
    assert rest == [augment, net]
    assert (crop.padding, flip.mode) == (4, "horizontal")
    assert (augment.num_ops, float(augment.magnitude)) == (2, 9)
    schedule = training.ramp(run)
    assert (schedule.begin_step, schedule.end_step) == (0, 2 * 6)  # 5 // 2 epochs of 200 // 32 batches
    assert (schedule.initial_sparsity, schedule.final_sparsity) == (0, 0.6)


@pytest.mark.once
def test_learning_rate_is_a_cosine_with_steps_at_epochs_90_and_180_of_200():
    rate = [training.learning_rate(epoch, 200, 0.1) for epoch in range(200)]
    assert rate[0] == 0.1
    assert rate[50] == pytest.approx(5e-6 + (0.1 - 5e-6) * (1 + 0.5**0.5) / 2)
    assert rate[89] / rate[90] > 9.9
    assert rate[100] == pytest.approx(0.1 * (0.1 + 5e-6) / 2)
    assert rate[179] / rate[180] > 9.9
    assert all(later < earlier for earlier, later in itertools.pairwise(rate))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("paper", [training.learning_rate(epoch, 200, 0.1) for epoch in (0, 0, 90, 199, 199)]),
        ("cosine", [0.1, 0.1, 0.1 * (1 + np.cos(np.pi * 0.45)) / 2, 0.0, 0.0]),
    ],
)
def test_optimizer_follows_the_schedule_of_the_run(tmp_path, schedule, expected):
    run = run_of(tmp_path, schedule=schedule, epochs=200, learning_rate=0.1)
    optimizer = training.make_optimizer(run, steps=7)
    optimizer.build([])
    rates = []
    for step in (0, 6, 7 * 90, 7 * 200 - 1, 7 * 200):
        optimizer.iterations.assign(step)
        rates.append(float(keras.ops.convert_to_numpy(optimizer.learning_rate)))
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.parametrize(("frequency", "together"), [(3, 1), (6, 2), (40, 8)])
def test_what_acts_between_calls_is_called_at_every_step_at_which_masks_are_due(tmp_path, frequency, together):
    run = run_of(tmp_path, sparsity=0.5, batch_size=8)  # 8 steps an epoch
    schedule = kc.PolynomialDecay(0.0, 0.5, 0, 400, frequency=frequency)
    fitted, _, (update,) = training._prepare(run, one_layer(run), schedule, None, training.classifier, 0)
    assert isinstance(update, kc.UpdatePruningStep)
    assert fitted.steps_per_execution == together


def rows_of(arm, accuracies, sparsity=0.0):
    setting = dict.fromkeys(claims.SETTING, 0) | {"images": {"train": 10}, "sparsity": sparsity}
    return [setting | {"arm": arm, "seed": seed, "test_last": value} for seed, value in enumerate(accuracies)]


@pytest.mark.once
def test_table_gives_mean_sample_deviation_and_n_and_marks_the_best_of_a_column():
    rows = rows_of("none", [0.5, 0.52, 0.54]) + rows_of("decayed", [0.6]) + rows_of("none", [0.7], sparsity=0.2)
    assert plot.markdown(rows, "test_last").splitlines() == [
        "| arm     | p = 0             | p = 0.2           |",
        "| ------- | ----------------- | ----------------- |",
        "| none    | 52.00 ± 2.00 (3)  | **70.00 ± – (1)** |",
        "| decayed | **60.00 ± – (1)** |                   |",
    ]


@pytest.mark.once
@pytest.mark.parametrize("figure", ["fig1", "fig3"])
def test_plot_needs_rows_and_nothing_else(tmp_path, capsys, figure):
    rows = rows_of("none", [0.5, 0.6]) + rows_of("M=4", [0.6, 0.7]) + rows_of("M=14", [0.5, 0.61])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"figure": figure}) + "\n" for row in rows))
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", f"--results={path}", f"--out={tmp_path}/figures/{figure}.png"])
        plot.main([])
    assert (tmp_path / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    found = "p = 0: optimal magnitude 4, maximal 14" in capsys.readouterr().out
    assert found == (figure == "fig1")  # Equation 3


@pytest.mark.once
@pytest.mark.parametrize("figure", [fig1, fig3])
def test_every_flag_of_the_script_and_of_all_scripts_is_explained(figure):
    shown = {flag.name: flag.help for flag in absl_flags.FLAGS.get_key_flags_for_module(figure)}
    assert {"dataset", "data_dir", "epochs", "seeds", "results", "checkpoints", "smoke", "workers"} <= shown.keys()
    assert all(len(explanation) > 20 for explanation in shown.values())


@pytest.mark.once
def test_a_flag_that_a_figure_has_no_use_for_is_refused(tmp_path, smoke_run):
    with pytest.raises(ValueError, match="--export needs the arm decayed or adaptive"):
        smoke_run(fig3, tmp_path, export=tmp_path / "net", arms="constant")
    with pytest.raises(ValueError, match="--export is no flag of fig1"):
        smoke_run(fig1, tmp_path, export=tmp_path / "net")
    with pytest.raises(ValueError, match=r"--decayed does nothing without the arm decayed\. Received: .*99"):
        smoke_run(fig3, tmp_path, decayed="99", arms="constant")


@pytest.mark.once
def test_rows_from_before_a_field_of_the_key_came_in_still_count(tmp_path):
    names = [field.name for field in dataclasses.fields(runs.Run) if field.compare]
    old = {name: 0 for name in names if name not in runs.BEFORE}
    old |= {"figure": "fig3", "arm": "none", "dataset": "digits", "model": "resnet8"}
    ours = runs.Run(**old, checkpoints=tmp_path)
    others = [dataclasses.replace(ours, **change) for change in ({"augmenter": "keras_cv"}, {"strong": 14})]
    assert runs.find([old], ours) == old
    assert [runs.find([old], run) for run in others] == [None, None]
    assert runs.find([old], dataclasses.replace(ours, data_dir="/elsewhere", work=5)) == old  # a place is no setting
    assert len({run.folder for run in (ours, *others)}) == 3
    assert dataclasses.replace(ours, strong=14.0).folder == others[1].folder
    settings = claims.settings([old, ours.key, *(run.key for run in others)])
    assert [len(rows) for rows in settings.values()] == [2, 1, 1]


@pytest.mark.quick
@pytest.mark.once
@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_published_rows_are_known_as_the_runs_that_they_are(path):
    names = {field.name for field in dataclasses.fields(runs.Run)}
    rows = runs.read_rows(path)
    for row in rows:
        run = runs.Run(**{name: value for name, value in row.items() if name in names})
        assert runs.find(rows, run) == row


def test_arms_are_one_network_while_their_magnitudes_are_the_same(tmp_path):
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", "--dataset=digits", f"--results={tmp_path}/rows.jsonl", "--seeds=0"])
        planned = fig3.plan(fig3.flags.Study("fig3", takes=("sparsities",), carrier="wrapper"))
    runs_of = {(run.arm, run.sparsity): run for run in planned}
    assert len(planned) == len(runs_of) == 24
    assert runs_of["decayed", 0.0].after == runs_of["M=14", 0.0]  # at the same ratio: it is that network
    assert runs_of["decayed", 0.2].after == runs_of["M=14", 0.0]
    assert runs_of["decayed", 0.4].after == runs_of["decayed", 0.2]
    assert sum(run.work > 0 for run in planned) == 23
    assert {run.path for run in planned} == {None}  # the paper's


def test_constant_arms_alone_ask_for_no_decayed_magnitudes_at_other_ratios(tmp_path):
    with flagsaver.flagsaver():
        given = ["--dataset=digits", f"--results={tmp_path}/rows.jsonl", "--seeds=0", "--arms=constant"]
        absl_flags.FLAGS(["test", *given, "--sparsities=0,.9", "--magnitudes=14"])
        planned = fig3.plan(fig3.flags.Study("fig3", takes=("sparsities", "magnitudes", "arms"), carrier="wrapper"))
    assert [(run.arm, run.sparsity) for run in planned] == [("M=14", 0.0), ("M=14", 0.9)]


def test_draws_of_figure_3_are_those_of_its_published_rows(tmp_path):
    if training.keras.backend.backend() == "torch":
        pytest.skip("the rows were made on TensorFlow; Keras takes no such seeds on Torch")
    run = run_of(tmp_path, sparsity=0.6)
    assert training.layer_seeds(run, 3) == [532367487, 3568231550, 2504398261]
    assert training.layer_seeds(run, 3, stage=1) == [842528948, 464623095, 1365712456]
    images = training._Epochs(run, 0)
    images.begin(5)
    np.testing.assert_array_equal(images.order, np.random.default_rng((0, 60, 5)).permutation(64))
