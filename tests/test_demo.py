"""What `make demo` trains, and the sentence that it ends with."""

import pytest
from test_experiments import one_layer

import kerascompress as kc
from experiments import demo, training


@pytest.mark.once("jax")
def test_the_magnitude_follows_the_sparsity_and_the_sentence_says_what_strength_costs(
    tmp_path, smoke_run, capsys, monkeypatch
):
    scheduler, followed = kc.MagnitudeScheduler, []
    followed_by = lambda augment, schedule: followed.append(schedule) or scheduler(augment, schedule)  # noqa: E731
    monkeypatch.setattr(kc, "MagnitudeScheduler", followed_by)
    monkeypatch.setattr(training, "build_model", one_layer)
    rows = smoke_run(demo, tmp_path)
    assert {(row["arm"], row["sparsity"]): row["magnitude"] for row in rows} == {
        ("none", 0.0): None,
        ("M=14", 0.0): 14,
        ("none", 0.6): None,
        ("M=14", 0.6): 14,
        ("linked", 0.6): 4,
    }
    assert [row["live_sparsity"] for row in rows] == pytest.approx([0, 0, 0.6, 0.6, 0.6], abs=1e-3)
    (weaken,) = followed
    assert [weaken(0), weaken(1000)] == [14, 4]
    test = {(row["arm"], row["sparsity"]): 100 * row["test_last"] for row in rows}
    cost = test["M=14", 0.6] - test["none", 0.6]
    assert f"and {cost:+.1f} to the one that is 60% zeros" in capsys.readouterr().out
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": ".6,.9"}, "must rise from 0"),
        ({"sparsities": "0"}, "needs two ratios"),
        ({"decayed": "none,4"}, "must be numbers"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(tmp_path, smoke_run, changes, message):
    with pytest.raises(ValueError, match=message):
        smoke_run(demo, tmp_path, **changes)
