"""What magnitudes that find themselves lose against the best constant one, from rows (protocol: README.md).

    python -m experiments.plot --all

prints the table that README shows, of the settings whose rows are complete. The best constant of a ratio is chosen on
the validation images; the regret of an arm is the test accuracy of that constant minus its own, in points, with the
same seed.
"""

import collections
import inspect

import numpy as np
from scipy import stats

from experiments import claims, runs
from kerascompress import adaptive

DEVELOPING = (  # name, its rows, and Figure 1's rows where the constants are there
    ("CIFAR-10, 500 images; developed on", "adaptive_500", None),
    ("CIFAR-10, 2,000 images; developed on", "adaptive_2000", None),
)
SETTINGS = (
    *DEVELOPING,
    ("CIFAR-10, 1,000 images", "adaptive_1000", "small_fig1"),
    ("CIFAR-100, 2,000 images", "adaptive_cifar100", "small_fig1_cifar100"),
    ("MobileNetV2, CIFAR-10, 1,000 images", "adaptive_mobilenet", "small_fig1_mobilenet"),
    ("digits, 200 images", "adaptive_digits", None),
    ("a distilled student, CIFAR-10, 1,000 images", "adaptive_distilled", None),
)
SEEDS = 3  # of a complete setting, at least
SIGNAL = inspect.signature(adaptive.AdaptiveMagnitude).parameters["signal"].default
RULE = f"{SIGNAL}={adaptive.TARGETS[SIGNAL]:g}"  # what `kc.AdaptiveMagnitude` does by default
MEAN, LARGEST = 0.3, 1.5  # its targets, in points


def line(sparsity):
    """Returns the magnitude of the line through the paper's optima, None where it is below 0."""
    magnitude = round(14.6 - 17 * sparsity, 2)
    return magnitude if magnitude >= 0 else None


def by_arm(rows):
    """Returns `{arm: {ratio: {seed: row}}}`."""
    table = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows:
        table[row["arm"]][row["sparsity"]][row["seed"]] = row
    return table


def constants(table):
    return [arm for arm in table if claims.constant(arm) < np.inf]


def mean(cell, accuracy):
    return np.mean([row[accuracy] for row in cell.values()])


def regrets(rows):
    """Returns the best constant of each ratio, and `{arm: {ratio: {seed: regret in points}}}`.

    A ratio at which all are at chance is left out.
    """
    claims.check_setting(rows)
    table, best = by_arm(rows), {}
    for p in sorted({row["sparsity"] for row in rows if not claims.at_chance(row)}):
        best[p] = claims.best({arm: mean(table[arm][p], "validation_last") for arm in constants(table)})

    def regret(row):
        of_best = table[best[row["sparsity"]]][row["sparsity"]][row["seed"]]
        return 100 * (of_best["test_last"] - row["test_last"])

    return best, {
        arm: regrets_of
        for arm, cells in table.items()
        if (regrets_of := {p: {seed: regret(row) for seed, row in cells[p].items()} for p in best if p in cells})
    }


def interval(values):
    """Returns the mean and half the width of its 95 % t interval, or None for a single value."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else None
    return np.mean(values), half


def over_ratios(cells):
    """Returns the mean regret over the ratios with its interval and n, seed by seed, and the largest of the ratios."""
    seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in cells.values())))
    average, half = interval([np.mean([cells[p][seed] for p in cells]) for seed in seeds])
    return average, half, len(seeds), max(np.mean(list(of_seeds.values())) for of_seeds in cells.values())


def lines(rows):
    """Returns arms x ratios: mean regret in points, and over the ratios with its interval and the largest."""
    best, table = regrets(rows)
    made = [["regret (points)", *(f"p = {p:g}: {arm}" for p, arm in best.items()), "mean ± t (n)", "largest"]]
    for arm, cells in table.items():
        average, half, n, largest = over_ratios(cells)
        means = (f"{np.mean(list(cells[p].values())):.2f}" if p in cells else "" for p in best)
        made.append([arm, *means, claims.text(average, half, n), f"{largest:.2f}"])
    return made


def rows_of(stem, figure_1):
    """Returns the rows of a setting, with Figure 1's of the same seeds and ratios; none before all are there."""
    paths = [claims.RESULTS / f"{name}.jsonl" for name in (stem, figure_1) if name]
    if not all(path.exists() for path in paths):
        return []
    rows, *earlier = map(runs.read_rows, paths)
    asked = {(row["sparsity"], row["seed"]) for row in rows}
    alike = {name: rows[0][name] for name in ("figure", "evaluate_every") if rows and name in rows[0]}
    taken = [row | alike for some in earlier for row in some if (row["sparsity"], row["seed"]) in asked]
    if any(row["arm"] == "line" for row in rows):  # where it is none, `--constants` has left no row
        taken += [row | {"arm": "line"} for row in taken if row["arm"] == "none" and line(row["sparsity"]) is None]
    rows += taken
    cells = collections.defaultdict(set)
    for row in rows:
        cells[row["arm"]].add((row["sparsity"], row["seed"]))
    ratios, seeds = ({each[i] for each in asked} for i in range(2))
    whole = len(asked) == len(ratios) * len(seeds) and all(each == asked for each in cells.values())
    return rows if whole and len(seeds) >= SEEDS and len(constants(cells)) > 1 else []


def developed():
    """Returns the rules in the order in which developing chooses, as a Markdown table; none before all rows are there.

    A ratio of a setting at which any network is at chance takes no part in the order: that one threshold has cut
    through it says nothing of its magnitude, and it would outweigh all others. The regret of each other is the median
    over the seeds; of these, in both settings, the mean is taken.
    """
    rows = [rows_of(*files) for _, *files in DEVELOPING]
    if not all(rows):
        return ""
    found, heads = collections.defaultdict(list), []
    for (name, *_), some in zip(DEVELOPING, rows, strict=True):
        dead = sorted({row["sparsity"] for row in some if claims.at_chance(row)})
        heads.append(f"median of seeds, {name}" + "".join(f", without p = {p:g}" for p in dead))
        for arm, cells in regrets(some)[1].items():
            counted = [np.median(list(of_seeds.values())) for p, of_seeds in cells.items() if p not in dead]
            every = [np.mean(list(of_seeds.values())) for of_seeds in cells.values()]
            found[arm].append((counted, every))
    lines = []
    for arm, of_settings in found.items():
        if len(of_settings) == len(DEVELOPING):
            medians, means = zip(*of_settings, strict=True)
            lines.append([arm, *map(np.mean, medians), *(np.mean(np.concatenate(each)) for each in (medians, means))])
    made = [["regret (points)", *heads, "both", "mean of seeds, all ratios, both"]]
    made += [[arm, *(f"{each:.2f}" for each in means)] for arm, *means in sorted(lines, key=lambda line: line[-2])]
    return claims.markdown(made).replace("-0.", "−0.")


def missed(cells, rivals):
    """Returns by how much the rule misses its targets: of the mean, of the largest, and to be below each rival's."""
    average, _, _, largest = over_ratios(cells[RULE])
    lower = {arm: over_ratios(cells[arm])[0] for arm in rivals}
    over = [f"{MEAN} by {average - MEAN:.2f}"] if average > MEAN else []
    over += [f"largest {LARGEST} by {largest - LARGEST:.2f}"] if largest > LARGEST else []
    over += [f"{claims.spaced(arm)} by {average - its:.2f}" for arm, its in lower.items() if its <= average]
    return "missed: " + ", ".join(over) if over else "met"


def table():
    """Returns what each complete setting says, as a Markdown table: regrets against tuning for each ratio."""
    made = [
        ["mean regret ± half of its 95 % t interval, largest", "tuned for each ratio: accuracy (trainings)", "none"]
    ]
    made[0] += ["TrivialAugment", "best single constant", "AdaptiveMagnitude (1 training)", "its targets", "n"]
    for name, *files in SETTINGS:
        rows = rows_of(*files)
        if not rows:
            continue
        found, (best, cells) = by_arm(rows), regrets(rows)
        if missing := {"none", "trivial", RULE} - cells.keys():
            raise ValueError(f"The rows of {name}, {files[0]}, are complete, but have no arm {', '.join(missing)}.")
        single = claims.best(
            {arm: np.mean([mean(found[arm][p], "validation_last") for p in best]) for arm in constants(found)}
        )
        accuracy = 100 * np.mean([mean(found[arm][p], "test_last") for p, arm in best.items()])
        entries = []
        for i, arm in enumerate(("none", "trivial", single, RULE)):
            average, half, n, largest = over_ratios(cells[arm])
            shown = f"{average:+.2f} ± {half:.2f}, largest {largest:+.2f}".replace("-", "−")
            entries.append(f"{claims.spaced(arm)}: {shown}" if i == 2 else shown)
        name += "".join(f"; p = {p:g} is at chance" for p in sorted(found["none"].keys() - best.keys()))
        tuned = f"{accuracy:.2f} ({len(constants(found))} magnitudes x {n} seeds a ratio)"
        made.append([name, tuned, *entries, missed(cells, ["trivial", *constants(found)]), str(n)])
    return claims.markdown(made) if len(made) > 1 else ""
