"""Figures and tables, from rows and nothing else.

python -m experiments.plot --figure=fig3 --results=experiments/results/fig3_cifar10.jsonl --out=fig3.png
"""

import collections
import itertools
import pathlib

import matplotlib.figure
import numpy as np
from absl import app, flags

from experiments import common

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(common)
flags.DEFINE_enum("figure", "fig3", ["fig3"], "Figure to draw from the rows in --results.")
flags.DEFINE_enum(
    "accuracy",
    "test_last",
    ["test_last", "test_best", "validation_last", "validation_best"],
    "Accuracy to show: of the last epoch, or of the epoch that is best on the validation images.",
)
SETTING = ("dataset", "model", "train_images", "epochs", "batch_size", "learning_rate", "smoke", "augmenter")
# Okabe and Ito's colours, which colour-blind readers can tell apart; the marker says it again.
STYLES = [("#999999", "s"), ("#56B4E9", "o"), ("#009E73", "^"), ("#E69F00", "v"), ("#D55E00", "D"), ("#0072B2", "*")]


def settings(rows):
    """Returns `{setting: rows}`: only rows of one setting can be compared."""
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[tuple((common.BEFORE | row)[name] for name in SETTING)].append(row)
    return grouped


def title(rows):
    row = rows[0]
    of = ", keras-cv's RandAugment" if row.get("augmenter") == "keras_cv" else ""
    return f"{row['model']}, {row['dataset']}, {row['images']['train']:,} images, {row['epochs']} epochs a stage{of}"


def statistics(rows, accuracy):
    """Returns `{arm: {sparsity: (mean, standard deviation, n)}}` of an accuracy in percent, in the rows' order."""
    table = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        table[row["arm"]][row["sparsity"]].append(100 * row[accuracy])
    return {
        arm: {p: (np.mean(v), np.std(v, ddof=1) if len(v) > 1 else None, len(v)) for p, v in sorted(cells.items())}
        for arm, cells in table.items()
    }


def text(mean, std, n):
    return f"{mean:.2f} ± {'–' if std is None else f'{std:.2f}'} ({n})"


def markdown(rows, accuracy):
    """Returns arms x pruning ratios, mean ± std (n) in percent, the best of each column bold."""
    table = statistics(rows, accuracy)
    ratios = sorted({p for cells in table.values() for p in cells})
    best = {p: max(cells[p][0] for cells in table.values() if p in cells) for p in ratios}
    lines = [["arm", *(f"p = {p:g}" for p in ratios)]]
    for arm, cells in table.items():
        entries = [text(*cells[p]) if p in cells else "" for p in ratios]
        lines.append(
            [
                arm,
                *(
                    f"**{e}**" if p in cells and cells[p][0] == best[p] else e
                    for p, e in zip(ratios, entries, strict=True)
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def fig3(rows, accuracy):
    """Returns accuracy over the pruning ratio, a line an arm, a panel a setting."""
    panels = settings(rows).values()
    figure = matplotlib.figure.Figure(figsize=(7.5 * len(panels), 4.2), layout="constrained", dpi=150)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        arms = statistics(panel, accuracy)
        for i, ((arm, cells), (colour, marker)) in enumerate(zip(arms.items(), itertools.cycle(STYLES), strict=False)):
            ratios = np.array(list(cells)) + 0.006 * (
                i - (len(arms) - 1) / 2
            )  # side by side, to keep the error bars apart
            means, deviations, counts = zip(*cells.values(), strict=True)
            axes.errorbar(
                ratios,
                means,
                deviations if None not in deviations else None,
                color=colour,
                marker=marker,
                markersize=10 if marker == "*" else 6,
                linewidth=2.5 if arm == "decayed" else 1.5,
                capsize=3,
                label=f"{arm} (n = {'–'.join(map(str, sorted({min(counts), max(counts)})))})",
                zorder=3 if arm == "decayed" else 2,
            )
        axes.set_xticks(sorted({row["sparsity"] for row in panel}))
        axes.set_xlabel("pruning ratio p")
        axes.set_ylabel(f"{accuracy.partition('_')[0]} accuracy (%)")
        axes.set_title(title(panel), fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(title="magnitude", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


FIGURES = {"fig3": fig3}


def show(figure, rows, out):
    """Prints a table for each setting and writes the figure."""
    for panel in settings(rows).values():
        print(f"\n{title(panel)}: {FLAGS.accuracy} in percent, mean ± std (n)\n\n{markdown(panel, FLAGS.accuracy)}\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    FIGURES[figure](rows, FLAGS.accuracy).savefig(out)
    print(f"Figure: {out}")


def main(_):
    if FLAGS.results is None:
        raise app.UsageError("Name the file of rows with --results.")
    rows = [row for row in common.read_rows(FLAGS.results) if row["figure"] == FLAGS.figure]
    if not rows:
        raise app.UsageError(f"--results={FLAGS.results} holds no row of {FLAGS.figure}.")
    show(FLAGS.figure, rows, pathlib.Path(FLAGS.out or pathlib.Path(FLAGS.results).with_suffix(".png")))


if __name__ == "__main__":
    app.run(main)
