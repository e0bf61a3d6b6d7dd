"""Figure 7: one teacher for all students, rows and pictures, and a killed distillation that goes on."""

import keras
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from test_experiments import one_layer

from experiments import fig7_teacher_filter as fig7
from experiments import keeper, training

pytestmark = pytest.mark.once("jax")

TEACHER = "resnet8w8x2 M=14 seed=10000"
SECONDS = {"seconds": 0, "seconds_per_epoch": 0}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Teacher and students that compile in no time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "build_model", one_layer)
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, smoke_run):
    """Folder and rows of a first call with --smoke that was killed within its second distillation, and called again."""
    folder = tmp_path_factory.mktemp("smoke")
    save = keeper.save_arrays

    def save_and_die(path, meta, **groups):
        save(path, meta, **groups)
        if "arm=teacher filter" in path.parent.name:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(keeper, "save_arrays", save_and_die)
        monkeypatch.setattr(keeper, "SAVE_EVERY", 0)
        with pytest.raises(KeyboardInterrupt):
            smoke_run(fig7, folder)
    keras.utils.clear_session()
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained = []
        fit = training._fit
        monkeypatch.setattr(training, "_fit", lambda run, *args: trained.append(run.arm) or fit(run, *args))
        rows = smoke_run(fig7, folder)
        assert trained == ["teacher filter"]  # neither the teacher nor the finished run again
    return folder, rows


def test_smoke_leaves_rows_and_two_pictures(smoke):
    folder, rows = smoke
    assert [(row["arm"], row["teacher"], row["magnitude"]) for row in rows] == [
        ("random", TEACHER, None),
        ("teacher filter", TEACHER, None),
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
    _, weights = keeper.load_arrays(done, "weights")
    _, expected = keeper.load_arrays(folder / done.relative_to(tmp_path), "weights")
    for array, expected_array in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)


def test_second_call_has_nothing_to_do_and_says_what_selecting_costs(smoke, monkeypatch, capsys, smoke_run):
    folder, rows = smoke
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(training, "_fit", None)
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


def plan(folder, **given):
    with flagsaver.flagsaver():
        given = {"dataset": "digits", "results": folder / "rows.jsonl", "checkpoints": folder, "smoke": True} | given
        flags.FLAGS(["test", *(f"--{name}={value}" for name, value in given.items())])
        return fig7.plan(fig7.flags.Study("fig7", takes=("teacher", "teacher_epochs", "teacher_magnitude")))


SELECTIONS = {  # magnitude, candidates, weight of the cross-entropy, weight of the divergence
    "random": ([0, 30], 1, 1.0, 1.0),
    "M=4": (4, 1, 1.0, 1.0),
    "M=9": (9, 1, 1.0, 1.0),
    "M=14": (14, 1, 1.0, 1.0),
    "M=22": (22, 1, 1.0, 1.0),
    "teacher filter": ([0, 30], 4, 1.0, 1.0),
    "(a) cross-entropy alone": ([0, 30], 4, 1.0, 0.0),
    "(b) divergence alone": ([0, 30], 4, 0.0, 1.0),
}


def test_every_arm_selects_as_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setitem(fig7.SMOKE, "arms", tuple(fig7.ARMS))
    found = {}
    for run in plan(tmp_path):
        student, teacher = (one_layer(run, seed) for seed in (0, 1))
        distiller, augment = fig7.make_distiller(run, student, teacher)
        magnitude = keras.ops.convert_to_numpy(augment.magnitude).tolist()
        found[run.arm] = magnitude, distiller.num_candidates, distiller.ce_weight, distiller.kl_weight
        assert (augment.num_ops, distiller.temperature, distiller.alpha) == (2, 4, 0.1)
        assert run.magnitude == (None if magnitude == [0, 30] else magnitude)
    assert found == SELECTIONS


def test_teacher_and_student_of_one_architecture_and_any_seed_begin_with_other_kernels_and_see_other_orders(tmp_path):
    *_, run = plan(tmp_path, teacher="resnet8w4", seeds=0)
    teacher, student = run.after, run
    assert teacher.model == student.model
    nets = [training.build_model(each) for each in (teacher, student)]
    for ours, theirs in zip(*(net.trainable_variables for net in nets), strict=True):
        if len(ours.shape) > 1:
            assert ours.path == theirs.path
            assert np.mean(keras.ops.convert_to_numpy(ours) == keras.ops.convert_to_numpy(theirs)) < 0.01
    assert not set(training.layer_seeds(teacher, 3)) & set(training.layer_seeds(student, 3))
    assert not np.array_equal(training._Epochs(teacher, 0).order, training._Epochs(student, 0).order)


def test_a_teacher_is_known_by_what_it_was_trained_as(tmp_path):
    (usual, *_), (longer, *_), (weaker, *_) = (
        plan(tmp_path, **given) for given in ({}, {"teacher_epochs": 3}, {"teacher_magnitude": 4})
    )
    assert [run.teacher for run in (usual, longer, weaker)] == [
        "resnet8w8x2 M=14 seed=10000",
        "resnet8w8x3 M=14 seed=10000",
        "resnet8w8x2 M=4 seed=10000",
    ]
    assert (longer.after.epochs, longer.after.work, longer.epochs) == (3, 3, 2)


def test_a_teacher_from_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "net.keras"
    net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    keys = []
    for i in range(2):
        net.layers[-1].bias.assign(np.full(10, i, "float32"))
        net.save(path)
        run, *_ = plan(tmp_path, teacher=path)
        assert run.after is None
        assert run.teacher.startswith(f"{path} ")
        keys.append(run)
    assert keys[0].teacher != keys[1].teacher
    teacher, accuracy = fig7.load_teacher(keys[1])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(teacher.layers[-1].bias), np.ones(10))
    assert 0 <= accuracy <= 1
    with pytest.raises(ValueError, match="has changed since the run was planned"):
        fig7.load_teacher(keys[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "vgg16"}, "`model` must be resnet"),
        ({"teacher": "nowhere.keras"}, r"readable .keras file. Received: nowhere.keras \(No such file"),
        ({"augmenter": "keras_cv"}, "Leave --augmenter"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, monkeypatch, changes, message, smoke_run):
    monkeypatch.setattr(training, "_fit", None)
    with pytest.raises((ValueError, OSError), match=message):
        smoke_run(fig7, tmp_path, **changes)
