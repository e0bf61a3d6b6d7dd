"""Claims of the paper, decided by the rows of the studies as their protocol says (experiments/README.md).

    python -m experiments.plot --all

prints them as README shows them. A claim is a difference, or several, that is positive where the paper is right, taken
seed by seed. Its t interval decides: *reproduced* where it lies above 0, *refuted* where it lies below, else
*undecided*; *at chance* is undecided where all seeds of an arm are, at a ratio, no better than a constant guess. Two
seeds decide nothing.
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
SETTING = ("dataset", "model", "train_images", "epochs", "batch_size", "learning_rate", "smoke", "augmenter")
SETTING += ("strong", "teacher", "image_size", "schedule", "carrier", "evaluate_every")
SETTING += ("content", "augment_in", "crop_area")  # of images in files


@dataclasses.dataclass(frozen=True)
class Claim:
    study: str  # the stem of the file of rows
    paper: str  # what it says
    where: str  # figure
    parts: Callable  # of the study's rows: what it compares
    looks: tuple = LOOKS


@dataclasses.dataclass(frozen=True)
class Part:
    label: str  # ratio
    arms: tuple | None  # that are compared, all where None
    ratios: tuple  # at which
    measure: Callable  # of a seed's {(arm, ratio): row}: the difference


@dataclasses.dataclass(frozen=True)
class Verdict:
    label: str
    mean: float
    std: float
    low: float
    high: float
    n: int
    chance: bool = False  # nothing has learned anything

    @property
    def word(self):
        if self.n < 3:
            return "no verdict"
        if self.chance or self.std == 0:  # without a spread there is no interval
            return "at chance" if self.chance else "undecided"
        return "reproduced" if self.low > 0 else "refuted" if self.high < 0 else "undecided"

    @property
    def text(self):
        numbers = f"{self.mean:+.2f} ± {self.std:.2f} [{self.low:+.2f}, {self.high:+.2f}]".replace("-", "−")
        return f"{self.label}: {numbers}" if self.label else numbers


def decide(label, differences, *, chance=False):
    """Returns the verdict of at least two differences, one a seed."""
    n, mean, std = len(differences), np.mean(differences), np.std(differences, ddof=1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * std / n**0.5
    return Verdict(label, mean, std, mean - half, mean + half, n, chance)


def chooses(row):
    return row["seed"] >= CHOOSING and row.get("figure") != "adaptive"  # whose rules are compared on test images


def settings(rows):
    """Returns `{setting: rows}`, those that choose apart: only rows of one setting can be compared."""
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[chooses(row), *((runs.BEFORE | row).get(name) for name in SETTING)].append(row)
    return grouped


def check_setting(rows):
    """Raises an error where rows that are to be compared are of several settings."""
    values = zip(("seed", *SETTING), zip(*settings(rows), strict=True), strict=False)
    if differ := [name for name, several in values if len(set(several)) > 1]:
        raise ValueError(
            "Rows that are compared must be of one setting. Received: rows that differ in "
            f"{', '.join(differ)}. Give each setting a file of its own."
        )


def verdicts(claim, rows):
    """Returns the verdicts of a claim's parts at the first look, or the second where that one was undecided.

    There is none before the runs that a part compares are complete; the others may be at another look.
    """
    made = []
    check_setting([row for row in rows if row["seed"] < max(claim.looks)])
    for part in claim.parts(rows):
        wanted = {(arm, ratio) for arm in part.arms or {row["arm"] for row in rows} for ratio in part.ratios}
        by_seed = collections.defaultdict(dict)
        for row in rows:
            if row["sparsity"] in part.ratios and (part.arms is None or row["arm"] in part.arms):
                by_seed[row["seed"]][row["arm"], row["sparsity"]] = row
        verdict = None
        for n in claim.looks:
            if any(by_seed[seed].keys() != wanted for seed in range(n)):
                break
            differences = [part.measure(by_seed[seed]) for seed in range(n)]
            chance = any(all(at_chance(by_seed[seed][cell]) for seed in range(n)) for cell in wanted)
            verdict = decide(part.label, differences, chance=chance)
            if verdict.word in ("reproduced", "refuted"):
                break
        made += [verdict] if verdict else []
    return made


def at_chance(row):
    """Whether a network is right no more often on the test images than a constant guess could be."""
    content, dataset = row.get("content"), row.get("dataset")
    classes = int(content.split()[0]) if content else 100 if dataset == "cifar100" else 10
    return row["test_last"] <= row.get("chance", round(1 / classes, 6))  # older rows are of classes of one size


def constant(arm):
    """Returns the magnitude that an arm holds; none is 0, and what holds none is infinite."""
    return 0.0 if arm == "none" else float(arm[2:]) if re.fullmatch(r"M=[\d.]+", arm) else math.inf


def best(validation):
    """Returns the constant arm of the best mean accuracy, the weakest of several, whatever their order."""
    return max(validation, key=lambda arm: (round(validation[arm], 9), -constant(arm)))


def optimal(test):
    return max(test, key=lambda m: (test[m], -m))


def maximal(test):
    return max(m for m in test if test[m] >= test[0.0])


def falls(chosen):
    """Returns the part that says that a seed's optimal or maximal magnitude is smaller at .97 than at 0."""

    def at(ratio, cells):  # none stands at 0, and M = 0, which is another thing, is not among the magnitudes
        test = {arm: row["test_last"] for (arm, p), row in cells.items() if p == ratio and arm != "M=0"}
        return chosen({constant(arm): accuracy for arm, accuracy in test.items()})

    return lambda rows: [Part("", None, (0.0, 0.97), lambda cells: at(0.0, cells) - at(0.97, cells))]


def lead(first, second, ratio, cells):
    return 100 * (cells[first, ratio]["test_last"] - cells[second, ratio]["test_last"])


def leads(first, second, ratios=RATIOS):
    """Returns the parts that say that an arm leads another at each ratio."""
    return lambda rows: [
        Part(
            (f"{ratio:g}".lstrip("0") or "0") if len(ratios) > 1 else "",
            (first, second),
            (ratio,),
            functools.partial(lead, first, second, ratio),
        )
        for ratio in ratios
    ]


def inherits(arm):
    """Returns the parts that say that inheriting leads an arm, where weak is below strong; else none is inherited."""

    def parts(rows):
        inherit = [row for row in rows if row["arm"] == "inherit"]
        below = {row["sparsity"] for row in inherit if row["magnitude"] is None or row["magnitude"] < row["strong"]}
        return [part for part in leads("inherit", arm, FEWER)(rows) if below.issuperset(part.ratios)]

    return parts


def over_tuned(rows):
    """Returns the filter's lead over the fixed magnitude that is best on the validation images."""
    validation = collections.defaultdict(list)
    for row in rows:
        if row["seed"] >= CHOOSING and row["arm"].startswith("M=") and row["sparsity"] == 0:
            validation[row["arm"]].append(row["validation_last"])
    if not validation:
        return []
    return leads("teacher filter", best({arm: np.mean(of) for arm, of in validation.items()}), STUDENTS)(rows)


def spaced(arm):
    return arm.replace("=", " = ")


DENSE, SPARSE, FEWER, STUDENTS = (0.0,), (0.97,), (0.6, 0.9, 0.97), (0.0, 0.8)
SECOND = (("cifar100", "CIFAR-100"), ("mobilenet", "MobileNetV2"))
OPTIMA, MAXIMA = falls(optimal), falls(maximal)
CLAIMS = (
    Claim("small_fig1", "the optimal magnitude falls with p: M* at 0 less M* at .97, in units of M", "1", OPTIMA),
    Claim("small_fig1", "the maximal magnitude falls with p: the same", "1", MAXIMA),
    Claim("small_fig1", "strong helps a dense network: M = 14 over none, p = 0", "1", leads("M=14", "none", DENSE)),
    Claim("small_fig1", "and harms a pruned one: none over M = 14, p = .97", "1", leads("none", "M=14", SPARSE)),
    Claim("small_fig2", "on ImageNet too: M* at 0 less M* at .97, in units of M", "2", OPTIMA, looks=(3,)),
    Claim("small_fig2", "the same of the maximal magnitude", "2", MAXIMA, looks=(3,)),
    Claim("small_fig2", "M = 14 over none, p = 0", "2", leads("M=14", "none", DENSE), looks=(3,)),
    Claim("small_fig2", "none over M = 14, p = .97", "2", leads("none", "M=14", SPARSE), looks=(3,)),
    *(
        Claim(f"small_fig1_{stem}", f"{name}: {paper}", "1", parts, looks=(3,))
        for stem, name in SECOND
        for paper, parts in (
            ("M* at 0 less M* at .97, in units of M", OPTIMA),
            ("the same of the maximal magnitude", MAXIMA),
            ("M = 14 over none, p = 0", leads("M=14", "none", DENSE)),
            ("none over M = 14, p = .97", leads("none", "M=14", SPARSE)),
        )
    ),
    Claim("nearer_fig1", "5,000 images at 32x32, 200 epochs: M = 14 over none, p = 0", "1",
          leads("M=14", "none", DENSE), looks=(2,)),
    Claim("nearer_fig1", "the same: none over M = 14, p = .9", "1", leads("none", "M=14", (0.9,)), looks=(2,)),
    *(
        Claim("small_fig3", f"decayed magnitudes beat {spaced(arm)} throughout", "3", leads("decayed", arm))
        for arm in ("none", "M=4", "M=9", "M=14")
    ),
    *(
        Claim("small_fig3", f"dense, the strongest leads: M = 14 over {spaced(arm)}", "3", leads("M=14", arm, DENSE))
        for arm in ("none", "M=4", "M=9")
    ),
    *(
        Claim("small_fig3", f"at p = .97 the weakest leads: none over {spaced(arm)}", "3", leads("none", arm, SPARSE))
        for arm in ("M=4", "M=9", "M=14")
    ),
    Claim("small_fig4", "inherit beats Baseline-A", "4", leads("inherit", "baseline-a")),
    Claim("small_fig4", "inherit beats Baseline-A at equal epochs", "4", leads("inherit", "baseline-a, equal epochs")),
    Claim("small_fig4", "inherit beats Baseline-B", "4", leads("inherit", "baseline-b")),
    Claim("small_fig4", "strong harms a pruned network with random weights (Section V)", "4",
          leads("scratch, weak", "scratch, strong")),
    *(
        Claim(f"small_fig4_{stem}", f"{name}: inherit beats {paper}", "4", inherits(arm), (3,))
        for stem, name in SECOND
        for paper, arm in (
            ("Baseline-A", "baseline-a"),
            ("Baseline-A at equal epochs", "baseline-a, equal epochs"),
            ("Baseline-B", "baseline-b"),
        )
    ),
    Claim("small_fig6", "inherit beats Baseline-B", "6", leads("inherit", "baseline-b", DENSE)),
    Claim("small_fig6", "Baseline-B beats Baseline-A", "6", leads("baseline-b", "baseline-a", DENSE)),
    Claim("small_fig6", "inherit beats plain training", "6", leads("inherit", "plain", DENSE)),
    Claim("small_fig7", "the teacher's filter beats random magnitudes", "7",
          leads("teacher filter", "random", STUDENTS)),
    Claim("small_fig7", "it beats the tuned magnitude (there in 4 of 6 settings)", "7", over_tuned),
    Claim("small_fig7", "its cross-entropy alone beats random (by 0.59)", "7",
          leads("(a) cross-entropy alone", "random", STUDENTS)),
    Claim("small_fig7", "random beats the divergence alone (by 1.24)", "7",
          leads("random", "(b) divergence alone", STUDENTS)),
)  # fmt: skip


def by_ratio(made, text):
    """Returns what a text says of each verdict, once for all of which it says the same, with their ratios."""
    labels = collections.defaultdict(list)
    for verdict in made:
        labels[text(verdict)].append(verdict.label)
    return "; ".join(each + (f" at {', '.join(of)}" if len(labels) > 1 else "") for each, of in labels.items())


def text(mean, spread, n):
    return f"{mean:.2f} ± {'–' if spread is None else f'{spread:.2f}'} ({n})"


def markdown(made):
    made = [made[0], ["---"] * len(made[0]), *made[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in made)


def table():
    """Returns the claims that have a verdict by now as a Markdown table, a line a claim."""
    head = ["the paper claims", "Figure", "difference as claimed: mean ± std [97.5 % interval]", "n", "verdict"]
    lines = [head]
    for claim in CLAIMS:
        path = RESULTS / f"{claim.study}.jsonl"
        made = verdicts(claim, runs.read_rows(path)) if path.exists() else []
        if made:
            numbers = "; ".join(verdict.text for verdict in made)
            counts, words = by_ratio(made, lambda each: str(each.n)), by_ratio(made, lambda each: f"**{each.word}**")
            lines.append([claim.paper, claim.where, numbers, counts, words])
    return markdown(lines)
