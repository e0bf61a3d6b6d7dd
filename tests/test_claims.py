"""Verdicts on the paper's claims, from rows."""

import json
import pathlib

import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from scipy import stats

from experiments import claims, plot, regrets

pytestmark = pytest.mark.once
README = pathlib.Path(__file__).parents[1] / "README.md"


def rows_of(arm, accuracies, sparsity=0.0, first_seed=0):
    return [
        {"arm": arm, "sparsity": sparsity, "seed": seed, "test_last": value, "validation_last": value}
        for seed, value in enumerate(accuracies, first_seed)
    ]


STRONG_OVER_NONE = claims.leads("M=14", "none", claims.DENSE)


def verdicts(*rows, parts=STRONG_OVER_NONE):
    claim = claims.Claim("study", "strong helps", "Fig. 0", parts)
    return claims.verdicts(claim, [row for some in rows for row in some])


@pytest.mark.quick
def test_a_verdict_is_that_of_the_t_interval_of_differences_seed_by_seed():
    none, strong = np.array([0.40, 0.45, 0.41, 0.47, 0.44]), np.array([0.43, 0.46, 0.44, 0.49, 0.46])
    (verdict,) = verdicts(rows_of("none", none), rows_of("M=14", strong))
    interval = stats.ttest_rel(100 * strong, 100 * none).confidence_interval(0.975)
    assert (verdict.low, verdict.high) == pytest.approx(tuple(interval))
    assert (verdict.mean, verdict.std, verdict.n) == (pytest.approx(2.2), pytest.approx(0.8367, abs=1e-4), 5)
    assert verdict.word == "reproduced"
    (verdict,) = verdicts(rows_of("none", strong), rows_of("M=14", none))
    assert verdict.word == "refuted"
    (verdict,) = verdicts(rows_of("none", none), rows_of("M=14", none[::-1]))
    assert verdict.word == "undecided"


def test_there_are_two_looks_and_the_second_is_for_what_the_first_left_undecided():
    strong = [0.5, 0.4, 0.5, 0.4, 0.5]
    assert verdicts(rows_of("none", [0.4] * 5), rows_of("M=14", strong[:4])) == []  # a run is missing
    (first,) = verdicts(rows_of("none", [0.4] * 14), rows_of("M=14", strong + [0.5] * 9))
    assert (first.n, first.word) == (5, "undecided")
    (second,) = verdicts(rows_of("none", [0.4] * 15), rows_of("M=14", strong + [0.5] * 10))
    assert (second.n, second.word) == (15, "reproduced")
    decided = [0.5, 0.5, 0.51, 0.5, 0.5] + [0.3] * 10
    (verdict,) = verdicts(rows_of("none", [0.4] * 15), rows_of("M=14", decided))
    assert (verdict.n, verdict.word) == (5, "reproduced")


def test_where_neither_arm_has_learned_anything_the_verdict_says_so():
    at_chance = rows_of("none", [0.1] * 15, 0.97) + rows_of("M=14", [0.1] * 15, 0.97)
    (verdict,) = verdicts(at_chance, parts=claims.leads("none", "M=14", claims.SPARSE))
    assert (verdict.word, verdict.n) == ("at chance", 15)  # both looks were due


def test_differences_without_a_spread_decide_nothing_and_are_at_chance_only_where_all_accuracies_are_one():
    same = rows_of("none", [0.4, 0.5, 0.4, 0.5, 0.4]), rows_of("M=14", [0.4, 0.5, 0.4, 0.5, 0.4])
    assert [verdict.word for verdict in verdicts(*same)] == ["undecided"]
    claim = claims.Claim("study", "falls", "Fig. 0", claims.falls(claims.maximal), looks=(3,))
    falling = [rows_of("none", [0.4] * 3, p) + rows_of("M=22", [0.5 - p / 4] * 3, p) for p in (0.0, 0.97)]
    (verdict,) = claims.verdicts(claim, [row for some in falling for row in some])
    assert (verdict.mean, verdict.std, verdict.word) == (22, 0, "undecided")


def test_a_ratio_at_which_no_network_has_learned_anything_says_nothing_of_magnitudes():
    noisy = [0.40, 0.45, 0.41]
    dense = [*rows_of("none", noisy), *rows_of("M=2", [0.5, 0.4, 0.45]), *rows_of("M=22", [0.3, 0.46, 0.3])]
    dead = [row for arm in ("none", "M=2", "M=22") for row in rows_of(arm, [0.1] * 3, 0.97)]
    for chosen in (claims.optimal, claims.maximal):
        claim = claims.Claim("study", "falls", "Fig. 0", claims.falls(chosen), looks=(3,))
        assert [verdict.word for verdict in claims.verdicts(claim, dense + dead)] == ["at chance"]


@pytest.mark.parametrize(
    ("of", "guess"), [({}, 0.1), ({"dataset": "cifar100"}, 0.01), ({"content": "20 classes"}, 0.05)]
)
def test_an_arm_whose_seeds_are_all_at_chance_decides_nothing(of, guess):
    others = rows_of("M=14", [0.4, 0.42, 0.41, 0.43, 0.4])
    dead = [guess] * 5
    words = [
        verdicts([row | of for row in [*rows_of("none", accuracies), *others]])[0].word
        for accuracies in ([*dead[:4], guess - 0.001], [*dead[:4], guess + 0.001])
    ]
    assert words == ["at chance", "reproduced"]


def test_classes_of_several_sizes_have_the_chance_that_their_rows_say():
    dead = [row | {"dataset": "digits", "chance": 46 / 449} for row in rows_of("none", [46 / 449, 43 / 449, 47 / 449])]
    assert [claims.at_chance(row) for row in dead] == [True, True, False]


def test_rows_of_several_settings_are_not_compared():
    rows = [*rows_of("none", [0.4] * 5), *rows_of("M=14", [0.5] * 5)]
    several = [row | {"epochs": 20 if row["arm"] == "none" else 100} for row in rows]
    for compare in (verdicts, regrets.regrets):
        with pytest.raises(ValueError, match=r"of one setting.*rows that differ in epochs"):
            compare(several)
    choosing = [row | {"epochs": 20} for row in rows_of("none", [0.3], first_seed=100)]
    assert verdicts(rows, choosing) == verdicts(rows)


def test_a_part_whose_arm_or_ratio_has_no_row_has_no_verdict_yet():
    inherit = [row for p in (0.6, 0.97) for row in rows_of("inherit", [0.4] * 5, p)]
    assert verdicts(inherit, parts=claims.leads("inherit", "baseline-a")) == []
    assert verdicts(rows_of("none", [0.4] * 5), parts=claims.falls(claims.optimal)) == []


def test_two_seeds_decide_nothing():
    claim = claims.Claim("study", "strong helps", "Fig. 0", STRONG_OVER_NONE, looks=(2,))
    (verdict,) = claims.verdicts(claim, rows_of("none", [0.4, 0.4]) + rows_of("M=14", [0.5, 0.5001]))
    assert verdict.low > 0
    assert verdict.word == "no verdict"


def test_where_weak_is_not_below_strong_nothing_is_asked_of_inheriting():
    weak = {0.6: 4, 0.9: 6, 0.97: None}  # none is below any
    rows = [
        row | {"magnitude": m, "strong": 6}
        for p, m in weak.items()
        for arm in ("inherit", "baseline-b")
        for row in rows_of(arm, [0.4, 0.41, 0.42], p)
    ]
    assert [part.label for part in claims.inherits("baseline-b")(rows)] == [".6", ".97"]
    assert claims.inherits("baseline-b")([]) == []


def test_of_equal_constants_the_weakest_is_the_best_in_any_order_of_rows():
    for arms in (["M=14", "M=2", "none"], ["none", "M=2", "M=14"]):
        assert claims.best(dict.fromkeys(arms, 0.4) | {"none": 0.3}) == "M=2"
    assert claims.best({"M=4": 0.1 + 0.2, "M=2": 0.3}) == "M=2"  # but for rounding


def test_a_line_of_the_table_names_the_ratios_of_each_verdict(tmp_path, monkeypatch):
    cells = [(0.6, 0.05), (0.8, 0.0), (0.9, -0.05), (0.97, 0.05)]
    noise = np.array([0.0, 0.01, -0.01, 0.005, -0.005])
    rows = [row for p, _ in cells for row in rows_of("none", [0.4] * 5, p)]
    rows += [row for p, lead in cells for row in rows_of("decayed", 0.4 + lead + noise, p)]
    (tmp_path / "small_fig3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", [claim for claim in claims.CLAIMS if "beat none" in claim.paper])
    line = claims.table().splitlines()[-1]
    assert line.startswith("| decayed magnitudes beat none throughout | 3 | .6: +5.00 ± 0.79 [+3.76, +6.24]; .8: +0.00")
    assert line.endswith("| 5 | **reproduced** at .6, .97; **undecided** at .8; **refuted** at .9 |")


def test_the_second_look_asks_for_what_the_claim_compares_and_for_no_more():
    strong = [0.5, 0.4, 0.5, 0.4, 0.5] + [0.5] * 10
    (second,) = verdicts(
        rows_of("none", [0.4] * 15), rows_of("M=14", strong), rows_of("M=2", [0.4] * 5), rows_of("M=14", [0.4] * 5, 0.6)
    )
    assert (second.n, second.word) == (15, "reproduced")


def test_seeds_that_choose_decide_nothing():
    rows = rows_of("none", [0.4] * 5), rows_of("M=14", [0.5] * 5)
    chosen = rows_of("M=14", [0.1] * 3, first_seed=100)
    assert verdicts(*rows, chosen) == verdicts(*rows)


def test_the_optimal_magnitude_is_the_best_and_the_maximal_one_the_largest_that_does_no_harm():
    test = {0.0: 0.4, 2.0: 0.45, 4.0: 0.45, 9.0: 0.42, 14.0: 0.3}
    assert claims.optimal(test) == 2  # the smallest of several
    assert claims.maximal(test) == 9
    assert claims.optimal(test | {0.0: 0.5}) == claims.maximal(test | {0.0: 0.5}) == 0  # none is best
    dense = [*rows_of("none", [0.4] * 5), *rows_of("M=2", [0.3] * 5), *rows_of("M=9", [0.5] * 5)]
    sparse = [*rows_of("none", [0.4] * 5, 0.97), *rows_of("M=2", [0.41] * 5, 0.97), *rows_of("M=9", [0.3] * 5, 0.97)]
    (verdict,) = verdicts(dense, sparse, parts=claims.falls(claims.optimal))
    assert verdict.mean == 9 - 2


def test_the_tuned_magnitude_is_the_best_on_the_validation_images_of_the_seeds_that_choose():
    rows = rows_of("teacher filter", [0.5] * 5) + rows_of("M=4", [0.45] * 5) + rows_of("M=9", [0.6] * 5)
    chosen = rows_of("M=4", [0.5] * 3, first_seed=100) + rows_of("M=9", [0.4] * 3, first_seed=100)
    (verdict,) = verdicts(rows, chosen, parts=claims.over_tuned)
    assert verdict.mean == pytest.approx(5)  # over M = 4, though M = 9 is better on the test images


def test_readme_shows_the_table_that_the_rows_make():
    table = claims.table()
    assert "| 3 |" in table  # Figure 2's n, at least
    assert table in README.read_text()
    assert regrets.table() in README.read_text()
    assert ("best single constant" in README.read_text()) == bool(regrets.table())


def test_all_figures_and_the_table_are_made_of_rows_alone(tmp_path, monkeypatch, capsys):
    setting = dict.fromkeys(claims.SETTING, 0) | {"images": {"train": 10}, "figure": "fig1"}
    rows = rows_of("none", [0.4, 0.42, 0.4, 0.41, 0.4]) + rows_of("M=14", [0.5, 0.51, 0.5, 0.51, 0.5])
    rows += rows_of("none", [0.4], first_seed=100) + rows_of("M=14", [0.3], first_seed=100)
    (tmp_path / "small_fig1.jsonl").write_text("".join(json.dumps(setting | row) + "\n" for row in rows))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", [claim for claim in claims.CLAIMS if "strong helps" in claim.paper])
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["test", "--all"])
        plot.main([])
    printed = capsys.readouterr().out
    assert printed.endswith(
        "| strong helps a dense network: M = 14 over none, p = 0 | 1 "
        "| +9.80 ± 0.45 [+9.10, +10.50] | 5 | **reproduced** |\n"
    )
    assert "validation_last in percent" in printed
    for name in ("small_fig1.png", "small_fig1_validation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
