"""The experiment scripts: what a run leaves, and what survives a crash."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import common, plot
from experiments import fig3_magnitude_decay as fig3

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_run):
    """Folder and rows of a first call with --smoke."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, smoke_run(fig3, folder)


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
        assert row["best_epoch"] == 2 or row["sparsity"] == 0  # epochs before the ratio is reached do not count
        assert row["validation_best"] >= row["validation_last"]
        assert row["seconds"] > 0
        assert row["versions"]["backend"] == common.keras.backend.backend()
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("checkpoints/*/state.npz"))  # a finished run keeps its network, not its optimizer


def test_second_call_has_nothing_to_do_and_prints_the_table(smoke, monkeypatch, capsys, smoke_run):
    folder, rows = smoke
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(common, "train", None)
    assert smoke_run(fig3, folder) == rows
    assert (folder / "rows.jsonl").read_bytes() == before
    assert "| decayed |" in capsys.readouterr().out


KILLED = """
import os
from absl import app
from experiments import common, fig3_magnitude_decay as fig3

fig3.SMOKE["arms"] = ("decayed",)
save, saved = common.save_arrays, []

def save_once(path, meta, **groups):
    if saved:
        os._exit(9)
    saved.append(save(path, meta, **groups))

common.save_arrays = save_once
app.run(fig3.main)
"""


def test_run_killed_in_a_pruning_stage_goes_on_to_the_same_result_bit_for_bit(smoke, tmp_path, monkeypatch, smoke_run):
    folder, expected_rows = smoke
    for dense in folder.glob("checkpoints/*arm=M=14*"):
        shutil.copytree(dense, tmp_path / "checkpoints" / dense.name)
    command = [sys.executable, "-c", KILLED, "--dataset=digits", "--smoke"]
    command += [f"--results={tmp_path}/rows.jsonl", f"--checkpoints={tmp_path}/checkpoints"]
    optimize = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest.py has it: other machine code rounds otherwise
    assert subprocess.run(command, cwd=ROOT, env=os.environ | optimize, capture_output=True).returncode == 9
    assert len(list(tmp_path.glob("checkpoints/*/state.npz"))) == 1

    epochs, fit = [], common.keras.Sequential.fit
    monkeypatch.setattr(common.keras.Sequential, "fit", lambda *args, **kwargs: epochs.append(fit(*args, **kwargs)))
    monkeypatch.setitem(fig3.SMOKE, "arms", ("decayed",))
    rows = smoke_run(fig3, tmp_path)
    assert len(epochs) == 1  # the second of two
    for row, expected in zip(rows, expected_rows[-2:], strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}
    for path in tmp_path.glob("checkpoints/*/done.npz"):
        _, weights = common.load_arrays(path, "weights")
        _, expected = common.load_arrays(folder / path.relative_to(tmp_path), "weights")
        for array, expected_array in zip(weights, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)


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
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, monkeypatch, changes, message, smoke_run):
    monkeypatch.setattr(common, "train", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, OSError)) as error:
        smoke_run(fig3, tmp_path, **changes)
    assert message in str(error.value)


def test_unknown_data_set_is_refused_by_its_flag():
    with flagsaver.flagsaver(), pytest.raises(flags.IllegalFlagValueError, match=r"<digits\|cifar10\|cifar100>"):
        flags.FLAGS(["test", "--dataset=mnist"])


@pytest.mark.parametrize("tail", ['{"figure": "fig3", "seed', "{", "nul"])
def test_last_line_cut_short_is_named_left_out_and_replaced_by_the_next_row(tmp_path, capsys, tail):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n' + tail)
    assert common.read_rows(path) == [{"seed": 0}]
    assert f"{path}: the last line was cut short" in capsys.readouterr().err
    common.append_row(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


def test_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}')
    common.append_row(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


def test_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n{"se\n{"seed": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        common.read_rows(path)


def test_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"state.npz does not load.*Delete it"):
        common.load_arrays(path, "state")


def test_learning_rate_is_a_cosine_with_steps_at_epochs_90_and_180_of_200():
    rate = [common.learning_rate(epoch, 200, 0.1) for epoch in range(200)]
    assert rate[0] == 0.1
    assert rate[50] == pytest.approx(5e-6 + (0.1 - 5e-6) * (1 + 0.5**0.5) / 2)
    assert rate[89] / rate[90] > 9.9
    assert rate[100] == pytest.approx(0.1 * (0.1 + 5e-6) / 2)
    assert rate[179] / rate[180] > 9.9
    assert all(later < earlier for earlier, later in itertools.pairwise(rate))


def test_arms_are_one_network_while_their_magnitudes_are_the_same():
    assert fig3.alike("decayed", 0.0) == "M=14"
    assert fig3.alike("decayed", 0.2) == "decayed"
    assert all(fig3.alike(arm, 0.6) == arm for arm in fig3.ARMS)


def rows_of(arm, accuracies, sparsity=0.0):
    setting = dict.fromkeys(plot.SETTING, 0) | {"images": {"train": 10}, "sparsity": sparsity}
    return [setting | {"arm": arm, "seed": seed, "test_last": value} for seed, value in enumerate(accuracies)]


def test_table_gives_mean_sample_deviation_and_n_and_marks_the_best_of_a_column():
    rows = rows_of("none", [0.5, 0.52, 0.54]) + rows_of("decayed", [0.6]) + rows_of("none", [0.7], sparsity=0.2)
    assert plot.markdown(rows, "test_last").splitlines() == [
        "| arm     | p = 0             | p = 0.2           |",
        "| ------- | ----------------- | ----------------- |",
        "| none    | 52.00 ± 2.00 (3)  | **70.00 ± – (1)** |",
        "| decayed | **60.00 ± – (1)** |                   |",
    ]


def test_plot_needs_rows_and_nothing_else(tmp_path):
    rows = [row | {"figure": "fig3"} for row in rows_of("none", [0.5, 0.6]) + rows_of("decayed", [0.6])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with flagsaver.flagsaver():
        flags.FLAGS(["test", f"--results={path}", f"--out={tmp_path}/figures/fig3.png"])
        plot.main([])
    assert (tmp_path / "figures" / "fig3.png").read_bytes().startswith(b"\x89PNG")


def test_every_flag_of_the_script_and_of_all_scripts_is_explained():
    shown = {flag.name: flag.help for flag in flags.FLAGS.get_key_flags_for_module(fig3)}
    assert {"dataset", "data_dir", "epochs", "seeds", "results", "checkpoints", "smoke", "export"} <= shown.keys()
    assert all(len(explanation) > 20 for explanation in shown.values())


def test_rows_and_folders_from_before_a_field_of_the_key_came_in_still_count(tmp_path):
    names = [field.name for field in dataclasses.fields(common.Run)]
    old = {name: 0 for name in names if name not in common.BEFORE}
    ours = common.Run(**old, **common.BEFORE)
    theirs = dataclasses.replace(ours, augmenter="keras_cv")
    strong = dataclasses.replace(ours, strong=14)
    study = types.SimpleNamespace(rows=[old], checkpoints=tmp_path)
    assert common.Study.row(study, ours) == old
    assert common.Study.row(study, theirs) is None
    assert common.Study.row(study, strong) is None
    assert common.Study.folder(study, ours).name == ",".join(f"{name}=0" for name in old)
    assert common.Study.folder(study, theirs).name.endswith(",augmenter=keras_cv")
    assert common.Study.folder(study, strong).name.endswith(",strong=14")
    settings = plot.settings([old, *(dataclasses.asdict(run) for run in (ours, theirs, strong))])
    assert [len(rows) for rows in settings.values()] == [2, 1, 1]


def test_draws_of_figure_3_are_those_of_its_published_rows():
    run = types.SimpleNamespace(seed=0, sparsity=0.6)
    assert common.layer_seeds(run, 3) == [532367487, 3568231550, 2504398261]
    assert common.layer_seeds(run, 3, stage=1) == [842528948, 464623095, 1365712456]
    assert np.random.default_rng((0, 60, 5)).integers(1000) == np.random.default_rng((0, 60, 5, 0)).integers(1000)
