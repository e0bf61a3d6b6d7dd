"""The study of magnitudes that find themselves: every arm leaves its row, and what is said of the rows."""

import json

import keras
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from test_experiments import one_layer, run_of

from experiments import adaptive_magnitude as study
from experiments import claims, keeper, plot, regrets, training
from experiments import fig1_magnitude_search as fig1
from experiments import fig3_magnitude_decay as fig3

pytestmark = pytest.mark.once("jax")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "build_model", one_layer)


def test_every_arm_leaves_a_row_with_its_set_point_and_its_magnitudes(tmp_path, small, smoke_run, capsys):
    arms = "trivial,line,accuracy=0.05,gap=-0.9,held-accuracy,held-gap,entropy,entropy-image"
    rows = smoke_run(study, tmp_path, arms=arms, sparsities="0.6", magnitudes="none,9", step=1.5)
    of = {row["arm"]: row for row in rows}
    assert list(of)[:4] == ["none", "M=9", "trivial", "line"]
    assert of["line"]["magnitude"] == 4.4  # 14.6 - 17 * 0.6
    assert (of["gap=-0.9,step=1.5"]["target"], of["gap=-0.9,step=1.5"]["step"]) == (-0.9, 1.5)
    assert of["gap=-0.9,step=1.5"]["magnitudes"] == [0, 1.5]
    moving = {arm for arm, row in of.items() if "magnitudes" in row}
    assert moving == set(of) - {"none", "M=9", "trivial", "line"}
    for row in rows:
        assert len(row.get("magnitudes", [0, 0])) == 2
        assert 0 <= row["train_last"] <= 1
        assert row["live_sparsity"] == pytest.approx(0.6, abs=0.01)
    assert all(0 < m <= 30 for arm in ("entropy", "entropy-image") for m in of[arm]["magnitudes"])
    assert "| p = 0.6: " in capsys.readouterr().out
    assert (tmp_path / "rows_magnitudes.png").exists()


def test_constants_of_figure_1_are_taken_from_its_rows_whatever_its_looks(tmp_path, small, smoke_run, capsys):
    grid = {"sparsities": "0.6", "magnitudes": "none,9"}
    given = smoke_run(fig1, tmp_path / "fig1", evaluate_every=2, **grid)
    asked = grid | {"arms": "trivial"}
    alone = smoke_run(study, tmp_path / "alone", **asked)
    taken = smoke_run(study, tmp_path / "taken", constants=tmp_path / "fig1" / "rows.jsonl", **asked)
    assert [row["arm"] for row in taken] == ["trivial"]  # none else was trained
    assert "2 of 2 runs at constant magnitudes are taken from" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--constants must have runs of this setting"):
        smoke_run(study, tmp_path / "other", constants=tmp_path / "fig1" / "rows.jsonl", epochs=3, **asked)
    assert [row["test_last"] for row in [*given, *taken]] == [row["test_last"] for row in alone]


def test_where_the_line_is_below_zero_it_is_what_was_trained_without_augmentation(
    tmp_path, small, smoke_run, monkeypatch
):
    trained, fitted = [], training._fit
    monkeypatch.setattr(training, "_fit", lambda run, *args: trained.append(run.arm) or fitted(run, *args))
    rows = smoke_run(study, tmp_path, arms="line", sparsities="0.9", magnitudes="none,9")
    none, _, line = sorted(rows, key=lambda row: ("none", "M=9", "line").index(row["arm"]))
    assert line == none | {"arm": "line"}
    assert sorted(trained) == ["M=9", "none"]
    taken = smoke_run(
        study, tmp_path / "taken", constants=tmp_path / "rows.jsonl", arms="line", sparsities="0.9", magnitudes="none"
    )
    assert taken == []  # nothing was left to train


def test_a_distilled_student_finds_its_magnitude_too(tmp_path, small, smoke_run):
    arms = {"arms": "gap=-0.9,trivial", "sparsities": "0", "magnitudes": "none", "teacher": "resnet8w8"}
    rows = smoke_run(study, tmp_path, **arms)
    assert [row["arm"] for row in rows] == ["none", "gap=-0.9", "trivial"]
    assert {row["teacher"] for row in rows} == {"resnet8w8x2 M=14 seed=10000"}
    assert next(row for row in rows if row["arm"] == "gap=-0.9")["magnitudes"] == [0, 0.5]
    with pytest.raises(ValueError, match="no arm entropy"):
        smoke_run(study, tmp_path, **arms | {"arms": "entropy"})


def test_the_magnitude_of_an_image_is_made_of_the_entropy_of_its_last_output(tmp_path):
    run = run_of(tmp_path, arm="entropy-image", epochs=0)
    net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    net.set_weights([np.zeros((64, 10)), np.log([0.5, 0.5] + [1e-9] * 8)])  # entropy ln 2
    model, _ = study.entropic(run, net, 0)
    images = training.data_of(run).train[0]
    model({"images": images[:2], "places": np.array([5, 3])}, training=True)
    certainty = keras.ops.convert_to_numpy(model.certainty)
    expected = np.zeros(64)
    expected[[3, 5]] = 1 - np.log(2) / np.log(10)  # 0.699
    np.testing.assert_allclose(certainty, expected, atol=1e-5)
    assert keras.ops.convert_to_numpy(model.magnitudes(certainty))[[3, 4]].tolist() == [21, 1]  # min(int(30 m) + 1, 30)


def test_a_killed_run_goes_on_with_its_magnitudes(tmp_path, monkeypatch):
    def outcome(folder):
        run = run_of(folder, arm="gap=-0.9", magnitude=0.0, target=-0.9, step=0.5, epochs=4)
        return training.trained(run, one_layer(run), moves=training.adapts(run)) | {"seconds": 0}

    whole = outcome(tmp_path / "whole")
    assert whole["magnitudes"] == [0, 0.5, 1, 1.5]
    monkeypatch.setattr(keeper, "SAVE_EVERY", 0)
    save, saved = keeper.save_arrays, []

    def save_twice(*args, **groups):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*args, **groups))

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "save_arrays", save_twice)
        with pytest.raises(KeyboardInterrupt):
            outcome(tmp_path / "killed")
    assert outcome(tmp_path / "killed") == whole


def test_a_magnitude_of_figure_3_that_finds_itself_goes_on_from_stage_to_stage(tmp_path, small, smoke_run, monkeypatch):
    monkeypatch.setitem(study.kc.adaptive.TARGETS, "gap", -0.9)
    rows = smoke_run(fig3, tmp_path, arms="adaptive", sparsities="0,0.3,0.6", carrier="optimizer")
    assert [(row["arm"], row["sparsity"], row["target"]) for row in rows] == [
        ("adaptive", p, -0.9) for p in (0.0, 0.3, 0.6)
    ]
    assert [row["magnitudes"] for row in rows] == [[0, 0.5], [0.5, 1], [1, 1.5]]


def row_of(arm, seed, validation, test, sparsity=0.0):
    return {"arm": arm, "sparsity": sparsity, "seed": seed, "validation_last": validation, "test_last": test}


def test_regret_is_against_the_constant_that_is_best_on_the_validation_images_seed_by_seed():
    rows = [row_of("none", 0, 0.5, 0.9), row_of("none", 1, 0.5, 0.9)]  # best on test, but chosen is M=4
    rows += [row_of("M=4", 0, 0.7, 0.60), row_of("M=4", 1, 0.7, 0.70)]
    rows += [row_of("gap=0.15", 0, 0.9, 0.59), row_of("gap=0.15", 1, 0.9, 0.67)]
    best, table = regrets.regrets(rows)
    assert best == {0.0: "M=4"}
    assert table["gap=0.15"][0.0] == pytest.approx({0: 1.0, 1: 3.0})
    *_, last = claims.markdown(regrets.lines(rows)).splitlines()
    assert last == "| gap=0.15 | 2.00 | 2.00 ± 12.71 (2) | 2.00 |"  # t(0.975, 1) = 12.706, sd / sqrt(2) = 1


def test_the_table_of_all_settings_is_made_of_their_rows_and_of_figure_1s(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert regrets.table() == ""
    constants = [
        row_of(arm, seed, v, v, p) for arm, v in (("none", 0.5), ("M=4", 0.6)) for p in (0, 0.9) for seed in (0, 1, 2)
    ]
    constants += [row_of("M=4", 3, 0.1, 0.1)]  # a seed of Figure 1 alone
    ours = [
        row_of(arm, seed, 0, 0.57 + 0.01 * seed, p)
        for arm in ("trivial", regrets.RULE)
        for p in (0, 0.9)
        for seed in (0, 1, 2)
    ]
    (tmp_path / "small_fig1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in constants))
    two_seeds = [row for row in ours if row["seed"] < 2]
    one_ratio_more = [row for row in ours if row["seed"] < 2 or row["sparsity"] == 0]
    for rows in (ours[:-1], two_seeds, one_ratio_more, ours):
        assert regrets.table() == ""  # a run is missing, or another seed, or a ratio of it
        (tmp_path / "adaptive_1000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    *_, last = regrets.table().splitlines()
    t = 4.303 * np.std([3, 2, 1], ddof=1) / 3**0.5
    ours = f"+2.00 ± {t:.2f}, largest +2.00"
    assert last == (
        "| CIFAR-10, 1,000 images | 60.00 (2 magnitudes x 3 seeds a ratio) | +10.00 ± 0.00, largest +10.00 "
        f"| {ours} | M = 4: +0.00 ± 0.00, largest +0.00 | {ours} "
        "| missed: 0.3 by 1.70, largest 1.5 by 0.50, trivial by 0.00, M = 4 by 2.00 | 3 |"
    )


@pytest.mark.parametrize("named", [True, False])
def test_the_figure_of_a_setting_shows_figure_1s_constants_too(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    setting = dict.fromkeys(claims.SETTING, 0) | {"images": {"train": 10}}
    for name, figure, arms in (("small_fig1", "fig1", ("none", "M=4")), ("adaptive_1000", "adaptive", ("trivial",))):
        rows = [setting | {"figure": figure} | row_of(arm, seed, 0.5, 0.5) for arm in arms for seed in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(regrets, "table", str)  # the rows have no arm of the rule
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", f"--results={tmp_path}/adaptive_1000.jsonl" if named else "--all"])
        plot.main([])
    last = capsys.readouterr().out.split("| arm ")[1]
    assert all(f"| {arm} " in last for arm in ("none", "M=4", "trivial"))


def test_constants_of_figure_1_serve_the_line_too_where_it_is_without_augmentation(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    ratios, seeds = (0.6, 0.9), range(3)

    def rows(arm, test, p):
        return [row_of(arm, seed, test, test + 0.001 * seed, p) for seed in seeds]

    given = [row for p in ratios for arm, v in (("none", 0.5), ("M=4", 0.4)) for row in rows(arm, v, p)]
    taken = [row for p in ratios for arm in ("trivial", regrets.RULE) for row in rows(arm, 0.5, p)]
    trained = taken + rows("line", 0.45, 0.6)  # at .9 it is none
    for name, some in (("small_fig1", given), ("adaptive_1000", trained)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    _, cells = regrets.regrets(regrets.rows_of("adaptive_1000", "small_fig1"))
    assert {p: pytest.approx(of_seeds) for p, of_seeds in cells["line"].items()} == {
        0.6: dict.fromkeys(seeds, 5.0),
        0.9: dict.fromkeys(seeds, 0.0),
    }


def test_a_ratio_at_which_all_are_at_chance_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    tests = {"none": 0.5, "M=4": 0.6, "trivial": 0.58, regrets.RULE: 0.61}
    rows = [row_of(arm, seed, v, v + 0.01 * seed) for arm, v in tests.items() for seed in range(3)]
    rows += [row_of(arm, seed, 0.1, 0.09 + 0.005 * seed, 0.97) for arm in tests for seed in range(3)]
    (tmp_path / "adaptive_digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = regrets.table().splitlines()[-1]
    assert line.startswith("| digits, 200 images; p = 0.97 is at chance | 61.00 (2 magnitudes x 3 seeds a ratio) ")
    assert line.endswith("| −1.00 ± 0.00, largest −1.00 | met | 3 |")
    others = "".join(json.dumps(row) + "\n" for row in rows if row["arm"] != "trivial")
    (tmp_path / "adaptive_digits.jsonl").write_text(others)
    with pytest.raises(ValueError, match="adaptive_digits, are complete, but have no arm trivial"):
        regrets.table()


def test_developing_ranks_by_the_median_over_the_seeds_so_that_one_broken_network_chooses_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    rows = [row_of(arm, seed, v, v) for arm, v in (("none", 0.5), ("M=4", 0.6)) for seed in range(3)]
    rows += [row_of("gap=0.15", seed, 0, v) for seed, v in enumerate((0.59, 0.154, 0.59))]
    rows += [row_of("trivial", seed, 0, 0.57) for seed in range(3)]
    rows += [row | {"sparsity": 0.97, "test_last": 0.5} for row in rows]
    for name, last in (("adaptive_500", 0.1), ("adaptive_2000", 0.5)):  # at chance: the ratio takes no part there
        assert regrets.developed() == ""
        rows[-1]["test_last"] = last
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, _, constant, rule, trivial, none = regrets.developed().splitlines()
    assert "500 images; developed on, without p = 0.97 |" in head
    assert "2,000 images; developed on |" in head
    assert constant.startswith("| M=4 | 0.00 ")
    assert rule == "| gap=0.15 | 1.00 | 0.50 | 0.67 | 7.77 |"  # every ratio weighs the same
    assert trivial == "| trivial | 3.00 | 1.50 | 2.00 | 4.83 |"
    assert none.startswith("| none | 10.00 ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "gab=0.15"}, "--arms must be among trivial"),
        ({"arms": "accuracy"}, r"such as gap=0.15. Received: accuracy\."),
        ({"arms": "trivial=4"}, r"for accuracy and gap alone.*trivial=4"),
        ({"arms": "gap="}, r"for accuracy and gap alone.*gap="),
        ({"teacher_epochs": "3"}, "--teacher_epochs does nothing without --teacher"),
        ({"arms": "trivial", "step": "1"}, "--step does nothing without an arm of which M moves"),
        ({"augmenter": "keras_cv"}, "Leave --augmenter"),
    ],
)
def test_impossible_settings_are_errors(tmp_path, smoke_run, changes, message):
    with pytest.raises(ValueError, match=message):
        smoke_run(study, tmp_path, **changes)


def test_a_set_point_is_one_arm_however_it_is_written():
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test"])
        assert {study.settings(f"gap={target}", 0.0)["arm"] for target in (".15", "0.15", "0.150")} == {"gap=0.15"}


def test_the_line_through_the_papers_optima_ends_in_none():
    assert [regrets.line(p) for p in (0.0, 0.6, 0.9)] == [14.6, 4.4, None]
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", "--dataset=digits", "--seeds=0"])
        shown = {flag.name: flag.help for flag in absl_flags.FLAGS.get_key_flags_for_module(study)}
    assert {"arms", "step"} <= shown.keys()
