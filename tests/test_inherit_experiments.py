"""Figures 4 and 6: which stages are trained, what they are trained from, and what the arms are charged for."""

import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl import flags

import kerascompress as kc
from experiments import fig4_inherit_pruning as fig4
from experiments import fig6_inherit_layers as fig6
from experiments import keeper, plot, training

pytestmark = pytest.mark.once("jax")
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def trained(monkeypatch):
    """In place of training: `{stage: trainable parameters}` of what would have been trained, in this order."""
    stages = {}

    def fit(run, net, *_):
        assert run.arm not in stages
        stages[run.arm] = training.sizes(net)["parameters"]
        result = dict.fromkeys(["validation_last", "validation_best", "best_epoch", "test_best", "test_last"], 0.5)
        return result | {"seconds": 1.0, "images": {"train": 64}}

    monkeypatch.setattr(training, "_prepare", lambda run, net, *_: (net, lambda: net, []))
    monkeypatch.setattr(training, "_fit", fit)
    return stages


def one_layer(run, seed=None):
    """A network that compiles in no time, in place of `training.build_model`."""
    kernel = keras.initializers.RandomNormal(seed=run.seed if seed is None else seed)
    layers = [
        keras.layers.Flatten(),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(10, kernel_initializer=kernel),
    ]
    return keras.Sequential([keras.Input(training.data_of(run).input_shape), *layers])


def test_figure_4_trains_each_stage_once_for_all_arms_and_ratios(tmp_path, trained, monkeypatch, smoke_run):
    monkeypatch.setattr(training, "build_model", one_layer)
    monkeypatch.setitem(fig4.SMOKE, "arms", fig4.PAPERS)
    rows = smoke_run(fig4, tmp_path, sparsities="0.4,0.8")
    dense = ["M=14x2", "M=nonex2", "M=8x2", "M=1x2"]
    retrained = [
        f"{first}+{stages}"
        for p, weak in (("0.4", "8"), ("0.8", "1"))
        for first, stages in (
            ("M=14x2", f"prune={p}+M={weak}x2"),
            ("M=nonex2", f"prune={p}+M=14x2"),
            ("M=nonex2", f"prune={p}+M=14x2+M={weak}x2"),
            ("M=nonex2", f"prune={p}+M=14x1"),
            ("M=nonex2", f"prune={p}+M=14x1+M={weak}x1"),
            (f"M={weak}x2", f"prune={p}+M={weak}x2"),
            ("M=14x2", f"scratch={p}+M={weak}x2"),
            ("M=14x2", f"scratch={p}+M=14x2"),
        )
    ]
    assert sorted(trained) == sorted(dense + retrained)
    assert [(row["arm"], row["magnitude"], row["total_epochs"], row["seconds"]) for row in rows[6:]] == [
        ("inherit", 1, 4, 2),
        ("baseline-a", 1, 6, 3),
        ("baseline-a, equal epochs", 1, 4, 3),
        ("baseline-b", 1, 4, 2),
        ("scratch, weak", 1, 4, 2),
        ("scratch, strong", 14, 4, 2),
    ]
    assert [row["live_sparsity"] for row in rows] == [0.4] * 6 + [0.8] * 6
    assert rows[7]["stages"] == ["M=nonex2", "prune=0.8", "M=14x2", "M=1x2"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")

    trained.clear()
    assert smoke_run(fig4, tmp_path, sparsities="0.4,0.8") == rows
    assert not trained
    smoke_run(fig4, tmp_path, sparsities="0.4", strong=20)  # other strong stages; of the arms, Baseline-B has none
    assert len(trained) == 8
    assert not [stages for stages in trained if "M=14" in stages]


def test_a_network_without_its_channels_inherits_too_with_a_row_of_its_own(tmp_path, trained, smoke_run):
    rows = smoke_run(fig4, tmp_path, arms="inherit-channels,baseline-b-channels", sparsities="0.6")
    assert [(row["arm"], row["sparsity"], row["stages"]) for row in rows] == [
        ("inherit-channels", 0.6, ["M=14x2", "channels=0.6", "M=4x2"]),
        ("baseline-b-channels", 0.6, ["M=4x2", "channels=0.6", "M=4x2"]),
    ]
    dense, small = 5_142, 2_027  # trainable parameters; 2, 5 and 10 filters are left of 4, 8 and 16
    assert list(trained.values()) == [dense, small, dense, small]
    assert [(row["parameters"], row["live_sparsity"]) for row in rows] == [(small, 0.0)] * 2


def test_figure_6_charges_every_arm_for_the_same_number_of_epochs(tmp_path, trained, monkeypatch, smoke_run):
    monkeypatch.setitem(fig6.SMOKE, "arms", tuple(fig6.ARMS))
    rows = smoke_run(fig6, tmp_path)
    assert [(row["arm"], row["magnitude"], row["total_epochs"], row["stages"]) for row in rows] == [
        ("inherit", 14, 4, ["extend=4", "M=22x2", "discard", "M=14x2"]),
        ("baseline-a", 14, 4, ["extend=4", "discard", "M=22x2", "M=14x2"]),
        ("baseline-b", 14, 4, ["extend=4", "M=14x2", "discard", "M=14x2"]),
        ("plain", 14, 4, ["extend=4", "discard", "M=14x4"]),
    ]
    small, block = 5_142, 2 * (9 * 16 * 16 + 2 * 16)  # trainable parameters of ResNet-8 with 4 filters, and of a block
    assert [row["parameters"] for row in rows] == [small] * 4
    assert list(trained.values()) == [small + 4 * block, small, small, small, small + 4 * block, small, small]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_pruning_takes_the_smallest_weights_at_once_and_scratch_keeps_the_zeros_alone():
    def dense(kernel):
        net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        net.set_weights([np.array(kernel, "float32"), np.array([0.0, 0.5], "float32")])
        return net

    pruned = kc.prune_now(dense([[1, -4], [3, -2]]), 0.5)
    kernel, _ = pruned.get_weights()
    np.testing.assert_array_equal(kernel, [[0, -4], [3, 0]])
    kernel, bias = fig4.forget(pruned, dense([[5, 6], [7, 8]])).get_weights()
    np.testing.assert_array_equal(kernel, [[0, 6], [7, 0]])
    np.testing.assert_array_equal(bias, [0, 0.5])


def only_retrained(monkeypatch):
    monkeypatch.setitem(fig4.SMOKE, "arms", ("baseline-a, equal epochs",))
    monkeypatch.setattr(training, "build_model", one_layer)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory, smoke_run):
    """Folder and row of an arm with two stages of retraining, of two epochs each."""
    folder = tmp_path_factory.mktemp("retrained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        only_retrained(monkeypatch)
        return folder, smoke_run(fig4, folder, epochs=4)


def weights_of(folder, stages):
    """The kernels that a stage left, flat, in the network's order."""
    (path,) = folder.glob(f"checkpoints/*,arm={stages},*/done.npz")
    _, weights = keeper.load_arrays(path, "weights")
    return np.concatenate([w.ravel() for w in weights if w.ndim > 1 and w.dtype == "float32"])


def test_mask_is_that_of_the_dense_network_and_stays_through_every_stage(retrained):
    folder, (row,) = retrained
    dense = np.abs(weights_of(folder, "M=nonex4"))
    kept = dense >= np.sort(dense)[round(0.4 * dense.size)]
    once = weights_of(folder, "M=nonex4+prune=0.4+M=14x2")
    twice = weights_of(folder, "M=nonex4+prune=0.4+M=14x2+M=8x2")
    np.testing.assert_array_equal(once != 0, kept)
    np.testing.assert_array_equal(twice != 0, kept)
    assert not np.array_equal(once, twice)
    assert row["live_sparsity"] == pytest.approx(0.4, abs=1 / dense.size)
    assert not list(folder.glob("checkpoints/*/state.npz"))


KILLED = """
import os
import pytest
from absl import app
from experiments import fig4_inherit_pruning as fig4, keeper
from tests import test_inherit_experiments

test_inherit_experiments.only_retrained(pytest.MonkeyPatch())
save, saved = keeper.save_arrays, []

def save_once(path, meta, **groups):
    if saved:
        os._exit(9)
    saved.append(save(path, meta, **groups))

keeper.save_arrays, keeper.SAVE_EVERY = save_once, 0
app.run(fig4.main)
"""


def test_run_killed_in_its_last_stage_goes_on_to_the_same_result_bit_for_bit(
    retrained, tmp_path, monkeypatch, smoke_run
):
    folder, expected = retrained
    for stage in folder.glob("checkpoints/*"):
        if "M=8x2" not in stage.name:
            shutil.copytree(stage, tmp_path / "checkpoints" / stage.name)
    command = [sys.executable, "-c", KILLED, "--dataset=digits", "--smoke", "--epochs=4"]
    command += [f"--results={tmp_path}/rows.jsonl", f"--checkpoints={tmp_path}/checkpoints"]
    optimize = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest.py has it: other machine code rounds otherwise
    assert subprocess.run(command, cwd=ROOT, env=os.environ | optimize, capture_output=True).returncode == 9
    assert len(list(tmp_path.glob("checkpoints/*M=8x2*/state.npz"))) == 1

    first, fit = [], keras.Sequential.fit
    monkeypatch.setattr(
        keras.Sequential, "fit", lambda *args, **kw: first.append(kw["initial_epoch"]) or fit(*args, **kw)
    )
    only_retrained(monkeypatch)
    rows = smoke_run(fig4, tmp_path, epochs=4)
    assert first == [1]  # the second of two
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]
    last = "M=nonex4+prune=0.4+M=14x2+M=8x2"
    np.testing.assert_array_equal(weights_of(tmp_path, last), weights_of(folder, last))


@pytest.mark.parametrize(
    ("figure", "changes", "message"),
    [
        (fig4, {"epochs": 3}, "--epochs must be even"),
        (fig4, {"weak": "8,1"}, "--weak must be 1 magnitude(s) in [0, 30]"),
        (fig4, {"weak": "40"}, "--weak must be 1 magnitude(s) in [0, 30]"),
        (fig4, {"weak": "low"}, "--weak must be 1 magnitude(s) in [0, 30]"),
        (fig4, {"sparsities": "0.5"}, "--weak must be 1 magnitude(s) in [0, 30]"),  # the paper has none for it
        (fig4, {"sparsities": "0.4,40"}, "must be fractions"),
        (fig4, {"decayed": "4"}, "--decayed is no flag of fig4"),
        (fig6, {"model": "resnet14"}, "`model` must be one of resnet8, resnet20, mobilenet_v2, shufflenet_v2"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, trained, figure, changes, message, smoke_run):
    with pytest.raises((ValueError, flags.IllegalFlagValueError)) as error:
        smoke_run(figure, tmp_path, **changes)
    assert message in str(error.value)
    assert not trained


@pytest.mark.parametrize(
    ("name", "function", "width"),
    [
        ("resnet20", kc.models.resnet, 16),
        ("resnet8w8", kc.models.resnet, 8),
        ("mobilenet_v2", kc.models.mobilenet_v2, 1.0),
        ("mobilenet_v2w0.25", kc.models.mobilenet_v2, 0.25),
        ("shufflenet_v2w.5", kc.models.shufflenet_v2, 0.5),
    ],
)
def test_name_of_a_network_gives_its_builder_and_width(name, function, width):
    build = training.find_builder(name)
    assert (build.func, build.keywords) == (function, {"width": width})


@pytest.mark.parametrize("name", ["magnitude", "path", "target", "step"])
def test_rows_of_one_arm_and_ratio_that_differ_otherwise_are_not_averaged(name):
    rows = [{"arm": "inherit", "sparsity": 0.4, name: value, "seed": 0, "test_last": 0.5} for value in (8, 4)]
    with pytest.raises(ValueError, match="differ in magnitude, path, target, step"):
        plot.statistics(rows, "test_last")


@pytest.mark.parametrize("figure", [fig4, fig6])
def test_every_flag_is_explained(figure):
    shown = {flag.name: flag.help for flag in flags.FLAGS.get_key_flags_for_module(figure)}
    assert {"dataset", "data_dir", "epochs", "seeds", "smoke", "strong", "weak"} <= shown.keys()
    assert all(len(explanation) > 20 for explanation in shown.values())
