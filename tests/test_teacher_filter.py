"""Figure 7: one teacher for all students, rows and pictures, and a killed distillation that goes on."""

import keras
import numpy as np
import pytest

from experiments import common
from experiments import fig7_teacher_filter as fig7

SECONDS = {"seconds": 0, "seconds_per_epoch": 0}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_run):
    """Folder and rows of a first call with --smoke that was killed within its second distillation, and called again."""
    folder = tmp_path_factory.mktemp("smoke")
    save, saved = common.save_arrays, []

    def save_and_die(path, meta, **groups):
        save(path, meta, **groups)
        saved.append(path.parent.name)
        if sum("arm=teacher filter" in name for name in saved) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(common, "save_arrays", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            smoke_run(fig7, folder)
    keras.utils.clear_session()
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained = []
        train = common.train
        monkeypatch.setattr(
            common, "train", lambda run, *args, **kwargs: trained.append(run.arm) or train(run, *args, **kwargs)
        )
        rows = smoke_run(fig7, folder)
        assert trained == ["teacher filter"]  # neither the teacher nor the finished run again
    return folder, rows


def test_smoke_leaves_rows_and_two_pictures(smoke):
    folder, rows = smoke
    assert [(row["arm"], row["teacher"], row["magnitude"]) for row in rows] == [
        ("random", "resnet8w8x2", None),
        ("teacher filter", "resnet8w8x2", None),
    ]
    assert [row["teacher_passes_per_epoch"] for row in rows] == [64, 4 * 64]
    assert rows[0]["first_kept"] == 1
    assert rows[1]["first_kept"] < 1
    assert rows[0]["teacher_test"] == rows[1]["teacher_test"]
    for name in ("rows.png", "rows_candidates.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_killed_distillation_goes_on_to_the_same_result_bit_for_bit(smoke, tmp_path, monkeypatch, smoke_run):
    folder, rows = smoke
    monkeypatch.setitem(fig7.SMOKE, "arms", ("teacher filter",))
    (row,) = smoke_run(fig7, tmp_path)
    assert row | SECONDS == rows[1] | SECONDS
    (done,) = tmp_path.glob("checkpoints/*teacher filter*/done.npz")
    _, weights = common.load_arrays(done, "weights")
    _, expected = common.load_arrays(folder / done.relative_to(tmp_path), "weights")
    for array, expected_array in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)


def test_second_call_has_nothing_to_do_and_says_what_selecting_costs(smoke, monkeypatch, capsys, smoke_run):
    folder, rows = smoke
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(common, "train", None)
    assert smoke_run(fig7, folder) == rows
    assert (folder / "rows.jsonl").read_bytes() == before
    printed = capsys.readouterr().out
    assert "| teacher filter |" in printed
    assert "| 256 | none |" in printed


def test_what_tuning_costs_is_all_runs_with_a_fixed_magnitude(capsys):
    def row(arm, validation, seconds):
        return {"arm": arm, "validation_last": validation, "seconds": seconds, "seconds_per_epoch": seconds / 10,
                "teacher_passes_per_epoch": 100}  # fmt: skip

    fixed = [("M=4", 0.5, 30), ("M=4", 0.7, 50), ("M=9", 0.65, 60), ("M=9", 0.65, 60)]
    fig7.print_costs([row("teacher filter", 0.9, 80), *(row(*cell) for cell in fixed)])
    printed = capsys.readouterr().out
    assert "| M=4 | 4.0 | 100 | 2 (the paper: 20) |" in printed
    assert "the best of M=4, M=9 on the validation images, is M=9; tuning: 100 s." in printed


def test_a_teacher_from_a_file_is_known_by_its_content(tmp_path):
    nets = [
        keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]) for _ in range(2)
    ]
    for i, net in enumerate(nets):
        net.layers[-1].bias.assign(np.full(10, i, "float32"))
        net.save(tmp_path / f"net{i}.keras")
    teacher, key = fig7.load_teacher(tmp_path / "net1.keras")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(teacher.layers[-1].bias), np.ones(10))
    assert key.startswith("net1 ")
    assert key[5:] != fig7.load_teacher(tmp_path / "net0.keras")[1][5:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "vgg16"}, "`model` must be resnet"),
        ({"teacher": "nowhere.keras"}, r"readable .keras file. Received: nowhere.keras \(No such file"),
        ({"augmenter": "keras_cv"}, "Leave --augmenter"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, monkeypatch, changes, message, smoke_run):
    monkeypatch.setattr(common, "train", None)
    with pytest.raises((ValueError, OSError), match=message):
        smoke_run(fig7, tmp_path, **changes)
