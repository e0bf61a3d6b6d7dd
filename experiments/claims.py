"""Claims of the paper, decided by the rows of the studies as their protocol says (experiments/README.md).

    python -m experiments.plot --all

prints them as README shows them. A claim is a difference, or several, that is positive where the paper is right, taken
seed by seed. Its t interval decides: *reproduced* where it lies above 0, *refuted* where it lies below, else
*undecided*.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np
from scipy import stats

from experiments import runs

RESULTS = runs.HERE / "results"
LOOKS = (5, 15)  # seeds from 0 on at the first look and at the second
CONFIDENCE = 0.975  # of each look, so that two of them are wrong in no more than 5 %
CHOOSING = 100  # from this seed on, runs choose magnitudes on validation images and decide nothing
RATIOS = (0.6, 0.8, 0.9, 0.97)


@dataclasses.dataclass(frozen=True)
class Claim:
    study: str  # the stem of the file of rows
    paper: str  # what it says
    where: str
    parts: Callable  # of the study's rows: {label: measure}, measure({(arm, ratio): row} of a seed) -> difference
    unit: str = " points"
    looks: tuple = LOOKS


@dataclasses.dataclass(frozen=True)
class Verdict:
    label: str
    mean: float
    std: float
    low: float
    high: float
    n: int

    @property
    def word(self):
        return "reproduced" if self.low > 0 else "refuted" if self.high < 0 else "undecided"

    def text(self, unit):
        name = f"{self.label}: " if self.label else ""
        numbers = f"{self.mean:+.2f} ± {self.std:.2f}{unit} [{self.low:+.2f}, {self.high:+.2f}] ({self.n})"
        return name + numbers.replace("-", "−")


def decide(label, differences):
    """Returns the verdict of at least two differences, one a seed."""
    n, mean, std = len(differences), np.mean(differences), np.std(differences, ddof=1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * std / n**0.5
    return Verdict(label, mean, std, mean - half, mean + half, n)


def verdicts(claim, rows):
    """Returns the verdicts of a claim's parts at the first look, or the second where that one was undecided.

    There is none before the runs of a look are complete.
    """
    by_seed = collections.defaultdict(dict)
    for row in rows:
        by_seed[row["seed"]][row["arm"], row["sparsity"]] = row
    looks = [
        n for n in claim.looks if by_seed[0] and all(by_seed[seed].keys() == by_seed[0].keys() for seed in range(n))
    ]
    made = []
    for label, measure in claim.parts(rows).items() if looks else ():
        for n in looks:
            verdict = decide(label, [measure(by_seed[seed]) for seed in range(n)])
            if verdict.word != "undecided":
                break
        made.append(verdict)
    return made


def constant(arm):
    """Returns the magnitude that an arm holds; none is 0, and what holds none is infinite."""
    return 0.0 if arm == "none" else float(arm[2:]) if re.fullmatch(r"M=[\d.]+", arm) else math.inf


def optimal(test):
    return max(test, key=lambda m: (test[m], -m))


def maximal(test):
    return max(m for m in test if test[m] >= test[0.0])


def falls(chosen):
    """Returns the part that says that a seed's optimal or maximal magnitude is smaller at .97 than at 0."""

    def at(ratio, cells):
        return chosen({constant(arm): row["test_last"] for (arm, p), row in cells.items() if p == ratio})

    return lambda rows: {"": lambda cells: at(0.0, cells) - at(0.97, cells)}


def lead(first, second, ratio, cells):
    return 100 * (cells[first, ratio]["test_last"] - cells[second, ratio]["test_last"])


def leads(first, *others, ratios=RATIOS):
    """Returns the parts that say that an arm leads each of the others at each ratio."""

    def parts(rows):
        return {
            ", ".join(
                [f"over {other}"] * (len(others) > 1) + [f"p = {ratio:g}"] * (len(ratios) > 1)
            ): functools.partial(lead, first, other, ratio)
            for ratio in ratios
            for other in others
        }

    return parts


def over_tuned(rows):
    """Returns the filter's lead over the fixed magnitude that is best on the validation images."""
    validation = collections.defaultdict(list)
    for row in rows:
        if row["seed"] >= CHOOSING and row["arm"].startswith("M=") and row["sparsity"] == 0:
            validation[row["arm"]].append(row["validation_last"])
    if not validation:
        return {}
    return leads("teacher filter", max(validation, key=lambda arm: np.mean(validation[arm])), ratios=(0.0,))(rows)


CONSTANTS = ("none", "M=4", "M=9", "M=14")
CLAIMS = (
    Claim("small_fig1", "the optimal magnitude falls with p: M* at 0 less M* at .97", "Fig. 1", falls(optimal), ""),
    Claim("small_fig1", "the maximal magnitude falls with p: the same", "Fig. 1", falls(maximal), ""),
    Claim("small_fig1", "strong augmentation helps a dense network: M = 14 over none at p = 0", "Fig. 1, 2",
          leads("M=14", "none", ratios=(0.0,))),
    Claim("small_fig1", "and harms a pruned one: none over M = 14 at p = .97", "Fig. 1, 2",
          leads("none", "M=14", ratios=(0.97,))),
    *(
        Claim("small_fig2", f"on ImageNet too: {paper}", "Fig. 2", parts, unit, looks=(3,))
        for paper, parts, unit in (
            ("M* at 0 less M* at .97", falls(optimal), ""),
            ("the same of the maximal magnitude", falls(maximal), ""),
            ("M = 14 over none at p = 0", leads("M=14", "none", ratios=(0.0,)), " points"),
            ("none over M = 14 at p = .97", leads("none", "M=14", ratios=(0.97,)), " points"),
        )
    ),
    Claim("small_fig3", "decayed magnitudes beat each constant one", "Fig. 3, A", leads("decayed", *CONSTANTS)),
    Claim("small_fig3", "of the constants, the strongest leads at p = 0", "Fig. 3, B",
          leads("M=14", *CONSTANTS[:-1], ratios=(0.0,))),
    Claim("small_fig3", "and the weakest at p = .97", "Fig. 3, B", leads("none", *CONSTANTS[1:], ratios=(0.97,))),
    Claim("small_fig4", "inherit beats Baseline-A", "Fig. 4", leads("inherit", "baseline-a")),
    Claim("small_fig4", "inherit beats Baseline-A at equal epochs", "Fig. 4",
          leads("inherit", "baseline-a, equal epochs")),
    Claim("small_fig4", "inherit beats Baseline-B", "Fig. 4", leads("inherit", "baseline-b")),
    Claim("small_fig4", "strong augmentation harms a pruned network with random weights", "Section V",
          leads("scratch, weak", "scratch, strong")),
    Claim("small_fig6", "inherit beats Baseline-B", "Fig. 6", leads("inherit", "baseline-b", ratios=(0.0,))),
    Claim("small_fig6", "Baseline-B beats Baseline-A", "Fig. 6", leads("baseline-b", "baseline-a", ratios=(0.0,))),
    Claim("small_fig6", "inherit beats plain training", "Fig. 6", leads("inherit", "plain", ratios=(0.0,))),
    Claim("small_fig7", "the teacher's filter beats random magnitudes", "Fig. 7",
          leads("teacher filter", "random", ratios=(0.0,))),
    Claim("small_fig7", "it beats the tuned magnitude", "Fig. 7", over_tuned),
    Claim("small_fig7", "the teacher's cross-entropy alone beats random", "+0.59",
          leads("(a) cross-entropy alone", "random", ratios=(0.0,))),
    Claim("small_fig7", "the divergence alone is beaten by random", "−1.24",
          leads("random", "(b) divergence alone", ratios=(0.0,))),
)  # fmt: skip


def table():
    """Returns the claims that have a verdict by now as a Markdown table, a line a claim."""
    head = ["the paper claims", "where", "difference as claimed: mean ± std [97.5 % interval] (n)", "verdict"]
    lines = [head, ["---"] * len(head)]
    for claim in CLAIMS:
        path = RESULTS / f"{claim.study}.jsonl"
        made = verdicts(claim, runs.read_rows(path)) if path.exists() else []
        if made:
            of = f" in {{}} of {len(made)}" if len(made) > 1 else ""
            words = collections.Counter(verdict.word for verdict in made).most_common()
            found = "; ".join(verdict.text(claim.unit) for verdict in made)
            lines.append(
                [claim.paper, claim.where, found, ", ".join(f"**{word}**{of.format(count)}" for word, count in words)]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
