"""What magnitudes that find themselves lose against the best constant one, from rows (protocol: README.md).

    python -m experiments.plot --all

prints the table that README shows once the rows are complete. The best constant of a ratio is chosen on the validation
images; the regret of an arm is the test accuracy of that constant minus its own, in points, with the same seed.
"""

import collections

import numpy as np
from scipy import stats

from experiments import claims, runs

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
RULE = "gap=0.15"  # what `kc.AdaptiveMagnitude` does by default


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
    """Returns the best constant of each ratio, and `{arm: {ratio: {seed: regret in points}}}`."""
    table = by_arm(rows)
    best = {}
    for p in sorted({row["sparsity"] for row in rows}):
        best[p] = claims.best({arm: mean(table[arm][p], "validation_last") for arm in constants(table)})

    def regret(row):
        of_best = table[best[row["sparsity"]]][row["sparsity"]][row["seed"]]
        return 100 * (of_best["test_last"] - row["test_last"])

    return best, {
        arm: {p: {seed: regret(row) for seed, row in cell.items()} for p, cell in sorted(cells.items())}
        for arm, cells in table.items()
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
        made.append([arm, *means, f"{average:.2f} ± {'–' if half is None else f'{half:.2f}'} ({n})", f"{largest:.2f}"])
    return made


def markdown(made):
    made = [made[0], ["---"] * len(made[0]), *made[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in made)


def rows_of(stem, figure_1):
    """Returns the rows of a setting, with Figure 1's of the same seeds and ratios; none before all are there."""
    paths = [claims.RESULTS / f"{name}.jsonl" for name in (stem, figure_1) if name]
    if not all(path.exists() for path in paths):
        return []
    rows, *earlier = map(runs.read_rows, paths)
    asked = {(row["sparsity"], row["seed"]) for row in rows}
    rows += [row for some in earlier for row in some if (row["sparsity"], row["seed"]) in asked]
    cells = collections.defaultdict(set)
    for row in rows:
        cells[row["arm"]].add((row["sparsity"], row["seed"]))
    ratios, seeds = ({each[i] for each in asked} for i in range(2))
    whole = len(asked) == len(ratios) * len(seeds) and all(each == asked for each in cells.values())
    return rows if whole and len(seeds) >= SEEDS and len(constants(cells)) > 1 else []


def developed():
    """Returns the rules in the order in which developing chooses, as a Markdown table; none before all rows are there.

    The regret of each setting and ratio is the median over the seeds: one network that one threshold has cut through
    would else outweigh all others.
    """
    names, *_ = zip(*DEVELOPING, strict=True)
    rows = [rows_of(*files) for _, *files in DEVELOPING]
    if not all(rows):
        return ""
    means = collections.defaultdict(list)
    for some in rows:
        for arm, cells in regrets(some)[1].items():
            seeds = [list(of_seeds.values()) for of_seeds in cells.values()]  # of each ratio
            means[arm].append((np.mean(np.median(seeds, axis=1)), np.mean(seeds)))
    made = [["regret (points)", *(f"median of seeds, {name}" for name in names), "both", "mean of seeds, both"]]
    for arm, of_settings in sorted(means.items(), key=lambda item: np.mean(item[1], axis=0)[0]):
        medians = [median for median, _ in of_settings]
        made.append([arm, *(f"{each:.2f}" for each in (*medians, *np.mean(of_settings, axis=0)))])
    return markdown(made)


def table():
    """Returns what each complete setting says, as a Markdown table: regrets against tuning for each ratio."""
    made = [["setting", "tuned for each ratio: accuracy (trainings)", "none", "TrivialAugment", "best single constant"]]
    made[0] += ["AdaptiveMagnitude (1 training)", "n"]
    for name, *files in SETTINGS:
        rows = rows_of(*files)
        if not rows:
            continue
        found, (best, cells) = by_arm(rows), regrets(rows)
        single = claims.best(
            {arm: np.mean([mean(found[arm][p], "validation_last") for p in best]) for arm in constants(found)}
        )
        accuracy = 100 * np.mean([mean(found[arm][p], "test_last") for p, arm in best.items()])
        entries = []
        for arm in ("none", "trivial", single, RULE):
            average, half, n, largest = over_ratios(cells[arm])
            shown = f"{average:+.2f} ± {half:.2f}, largest {largest:+.2f}".replace("-", "−")
            entries.append(f"{claims.spaced(arm)}: {shown}" if arm == single else shown)
        made.append([name, f"{accuracy:.2f} ({len(constants(found))} a ratio)", *entries, str(n)])
    return markdown(made) if len(made) > 1 else ""
