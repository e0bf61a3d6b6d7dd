"""Figures and tables, from rows and nothing else.

    python -m experiments.plot --results=experiments/results/fig3_cifar10.jsonl --out=fig3.png
    python -m experiments.plot --all

The second draws every file of experiments/results/ again and prints the verdicts on the paper's claims.
"""

import collections
import pathlib
import textwrap

import cycler
import matplotlib.figure
import numpy as np
from absl import app
from absl import flags as absl_flags

import kerascompress as kc
from experiments import claims, flags, regrets, runs

FLAGS = flags.FLAGS
absl_flags.declare_key_flag("results")
absl_flags.declare_key_flag("out")
absl_flags.DEFINE_enum(
    "accuracy",
    "test_last",
    ["test_last", "test_best", "validation_last", "validation_best"],
    "Accuracy to show: of the last epoch, or of the epoch that is best on the validation images. Seeds from "
    f"{claims.CHOOSING} on choose magnitudes: theirs is always validation_last, but in the adaptive study.",
)
absl_flags.DEFINE_boolean("all", False, "Draw all files of rows in experiments/results/, and print the verdicts.")
CELL = ("magnitude", "path", "target", "step")  # what rows of one arm and ratio have in common
OURS = ("decayed", "linked", "inherit", "teacher filter")  # the paper's own arms stand out
BASELINES = {  # of Figures 4 and 6, the same in both
    "baseline-a": {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    "baseline-a, equal epochs": {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    "baseline-b": {"color": "#009E73", "marker": "^", "linestyle": "-"},
}
# Okabe and Ito's colours, which colour-blind readers can tell apart; the marker says it again.
COLOURS = ["#999999", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000"]
STYLES = cycler.cycler(linestyle=["-", "--", ":"]) * cycler.cycler(color=COLOURS, marker=list("so^vDPX"))
PAPER = {0.0: 14, 0.2: 12, 0.4: 8, 0.6: 4}  # its optimal magnitudes: ResNet-20, CIFAR-100
STAND_OUT = {"color": "#0072B2", "marker": "*", "linestyle": "-", "markersize": 10, "linewidth": 2.5, "zorder": 3}


def shown_accuracy(row):
    return "validation_last" if claims.chooses(row) else FLAGS.accuracy


def title(rows):
    row = rows[0]
    of = "" if row.get("image_size") is None else f" of {row['image_size']}x{row['image_size']}"
    stages = f", {row['epochs']} epochs a stage" + (" along one cosine" if row.get("schedule") == "cosine" else "")
    of += f"{stages}, keras-cv's RandAugment" if row.get("augmenter") == "keras_cv" else stages
    of += f", crops from {100 * row['crop_area']:g} %" if row.get("crop_area") else ""
    of += ", RandAugment in the pipeline" if row.get("augment_in") == "pipeline" else ""
    of += "" if row.get("strong") is None else f", strong is M\u00a0=\u00a0{row['strong']:g}"
    of += "" if row.get("teacher") is None else f"\nteacher: {row['teacher']}"
    name = f"{row['dataset']} ({row['content'].rpartition(' ')[0]})" if row.get("content") else row["dataset"]
    return f"{row['model']}, {name}, {row['images']['train']:,} images{of}"


def statistics(rows, accuracy):
    """Returns `{arm: {sparsity: (mean, standard deviation, n)}}` of an accuracy in percent.

    None and the constant magnitudes come first, by size; the other arms in the rows' order.
    """
    table = collections.defaultdict(lambda: collections.defaultdict(dict))
    keys = {}
    for row in sorted(rows, key=lambda row: claims.constant(row["arm"])):
        cell = row["arm"], row["sparsity"]
        key = [(runs.BEFORE | row).get(name) for name in CELL]
        if keys.setdefault(cell, key) != key:
            raise ValueError(
                f"Rows of one arm and ratio, {cell}, differ in {', '.join(CELL)}: {keys[cell]} and {key}. Give each a "
                "file of its own."
            )
        table[row["arm"]][row["sparsity"]][row["seed"]] = 100 * row[accuracy]

    def statistic(of_seeds):
        values = list(of_seeds.values())
        return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None, len(values)

    return {arm: {p: statistic(v) for p, v in sorted(cells.items())} for arm, cells in table.items()}


def markdown(rows, accuracy):
    """Returns arms x pruning ratios, mean ± std (n) in percent, the best of each column bold."""
    table = statistics(rows, accuracy)
    ratios = sorted({p for cells in table.values() for p in cells})
    best = {p: max(cells[p][0] for cells in table.values() if p in cells) for p in ratios}
    lines = [["arm", *(["accuracy"] if ratios == [0] else [f"p = {p:g}" for p in ratios])]]
    for arm, cells in table.items():
        entries = {p: claims.text(*cell) for p, cell in cells.items()}
        entries |= {p: f"**{entry}**" for p, entry in entries.items() if cells[p][0] == best[p]}
        lines.append([arm, *(entries.get(p, "") for p in ratios)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def lines(axes, arms):
    """Draws accuracy over the pruning ratios, at equal distances, a line an arm."""
    ratios = sorted({p for cells in arms.values() for p in cells})
    for i, (arm, cells) in enumerate(arms.items()):
        apart = 0.05 * (i - (len(arms) - 1) / 2)  # side by side, to keep the error bars apart
        points(axes, arm, [ratios.index(p) + apart for p in cells], cells.values())
    axes.set_xticks(range(len(ratios)), [f"{p:g}" for p in ratios])
    axes.set_xlabel("pruning ratio p")


def columns(axes, arms):
    """Draws the accuracy of each arm, one beside the other, a group for each ratio if there are several."""
    ratios, width = sorted({p for cells in arms.values() for p in cells}), len(arms) + 2
    for i, (arm, cells) in enumerate(arms.items()):
        points(axes, arm, [i + width * ratios.index(p) for p in cells], cells.values(), linestyle="none")
    centers = [(len(arms) - 1) / 2 + width * k for k in range(len(ratios))] if len(ratios) > 1 else []
    axes.set_xticks(centers, [f"p = {p:g}" for p in ratios] if centers else [])
    axes.margins(x=0.2)


def curves(axes, arms):
    """Draws accuracy over the magnitude, a line a ratio, and what `kc.search_magnitude` finds in it."""
    places = {arm: -2 if arm == "none" else claims.constant(arm) for arm in arms}
    for p in sorted({p for cells in arms.values() for p in cells}):
        cells = {arm: cells[p] for arm, cells in arms.items() if p in cells}
        points(axes, f"p = {p:g}", [places[arm] for arm in cells], cells.values())
        mean = {None if arm == "none" else places[arm]: accuracy for arm, (accuracy, *_) in cells.items()}
        if None not in mean or len(mean) == 1:
            continue
        if len(set(mean.values())) == 1:
            print(f"p = {p:g}: at chance")  # nothing has learned anything, and no magnitude is best
        else:
            found = kc.search_magnitude(mean.get, [m for m in mean if m is not None], verbose=0)
            best = found.optimal if mean[found.optimal] > mean[None] else None  # of equals the weakest, as in `claims`
            shown = ["none" if magnitude is None else f"{magnitude:g}" for magnitude in (best, found.maximal)]
            print(f"p = {p:g}: optimal magnitude {shown[0]}, maximal {shown[1]}")
            for magnitude, marker, face in ((best, "*", None), (found.maximal or best, "o", "none")):
                x, colour = -2 if magnitude is None else magnitude, axes.lines[-1].get_color()
                axes.plot(x, mean[magnitude], marker, markersize=16, markerfacecolor=face or colour, color=colour)
    axes.set_xticks(list(places.values()), [arm.removeprefix("M=") for arm in places])
    axes.set_xlabel("magnitude M (star: optimal, ring: maximal)")


def dots(axes, arms, rows):
    """Draws by how much each arm leads the first, none if it is there: a row an arm, a marker for each ratio.

    Markers are hollow where networks of the first are at chance: what leads it there need not be any good.
    """
    base, *names = arms
    dead = collections.Counter(row["sparsity"] for row in rows if row["arm"] == base and claims.at_chance(row))
    for p, style in zip(sorted(arms[base]), STYLES, strict=False):
        leads = {arm: arms[arm][p][0] - arms[base][p][0] for arm in names if p in arms[arm]}
        if not leads:
            continue  # there is nothing else yet
        counts = {arms[arm][p][2] for arm in leads}
        label = f"p = {p:g} (n = {'–'.join(map(str, sorted({min(counts), max(counts)})))})"
        style |= {"linestyle": "none"}
        if dead[p]:
            label += f",\n{dead[p]} of {claims.spaced(base)} at chance"
            style |= {"markerfacecolor": "none"}
        axes.plot([*leads.values()], [names.index(arm) for arm in leads], label=label, **style)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"points over {claims.spaced(base)}, mean over the seeds")


FIGURES = {"fig1": curves, "fig2": curves, "fig3": lines, "fig4": lines, "fig6": columns, "fig7": columns}
FIGURES |= {"demo": lines, "adaptive": dots}


def draw(figure, rows):
    """Returns a figure with a panel for each setting."""
    panels = claims.settings(rows).values()
    canvas = matplotlib.figure.Figure(figsize=(7.5 * len(panels), 4.2), layout="constrained", dpi=150)
    for axes, panel in zip(np.atleast_1d(canvas.subplots(1, len(panels))), panels, strict=True):
        axes.set_prop_cycle(STYLES)
        accuracy = shown_accuracy(panel[0])
        of_means = FIGURES[figure] is not dots
        FIGURES[figure](axes, statistics(panel, accuracy), *([] if of_means else [panel]))
        axes.set_ylabel(f"{accuracy.partition('_')[0]} accuracy (%)" if of_means else "")
        wrapped = (textwrap.fill(line, 64) for line in title(panel).splitlines())
        axes.set_title("\n".join(wrapped), fontsize="medium")
        axes.grid(alpha=0.3)
        meaning = "mean ± std" if of_means else f"{accuracy.partition('_')[0]} accuracy"
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=meaning, alignment="left")
    return canvas


def magnitudes(rows):
    """Returns a figure of M over the epochs: a panel for each rule that moves it, a line for each ratio."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    ratios = sorted({row["sparsity"] for row in rows})
    shape = -(-len(arms) // 3), min(len(arms), 3)
    figure = matplotlib.figure.Figure(figsize=(4.2 * shape[1], 3.6 * shape[0]), layout="constrained", dpi=150)
    wrapped = (textwrap.fill(line, 44 * shape[1]) for line in title(rows).splitlines())
    figure.suptitle("\n".join(wrapped), fontsize="medium")
    panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    for axes in panels[len(arms) :]:
        axes.remove()
    for axes, arm in zip(panels, arms, strict=False):
        for p, magnitude in PAPER.items():
            axes.axhline(magnitude, color="#cccccc", linestyle="--", linewidth=1, zorder=0)
            if axes is figure.axes[0]:
                axes.text(0, magnitude, f"the paper's at p = {p:g}", fontsize="x-small", color="#888888", va="bottom")
        for p, colour in zip(ratios, (COLOURS[1:] + COLOURS[:1]) * len(ratios), strict=False):
            seeds = [row["magnitudes"] for row in rows if row["arm"] == arm and row["sparsity"] == p]
            if seeds:
                epochs = np.arange(1, len(seeds[0]) + 1)
                axes.plot(epochs, np.mean(seeds, axis=0), color=colour, label=f"p = {p:g} (n = {len(seeds)})")
                axes.fill_between(epochs, np.min(seeds, axis=0), np.max(seeds, axis=0), color=colour, alpha=0.2)
        axes.set(title=arm, xlabel="epoch", ylim=(-2, 30))
        axes.set_yticks([-0.75, *range(5, 31, 5)], ["off", *range(5, 31, 5)])  # -0.5 or -1, one move below 0
        axes.legend(fontsize="x-small", frameon=False)
    figure.axes[0].set_ylabel("magnitude M")
    return figure


def points(axes, arm, x, cells, **style):
    """Draws mean ± standard deviation of an arm at each `x`."""
    means, deviations, counts = zip(*cells, strict=True)
    axes.errorbar(
        x,
        means,
        [np.nan if deviation is None else deviation for deviation in deviations],  # no bar for one seed
        capsize=3,
        label=f"{arm} (n = {'–'.join(map(str, sorted({min(counts), max(counts)})))})",
        **(STAND_OUT if arm in OURS else BASELINES.get(arm, {})) | style,
    )


def show(figure, rows, out):
    """Prints a table for each setting and writes the figure; that of seeds which choose lies beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for choosing in (False, True):
        some = [row for row in rows if claims.chooses(row) == choosing]
        for panel in claims.settings(some).values():
            accuracy = shown_accuracy(panel[0])
            print(f"\n{title(panel)}: {accuracy} in percent, mean ± std (n)\n\n{markdown(panel, accuracy)}\n")
        if some:
            path = out.with_stem(f"{out.stem}_validation") if choosing else out
            draw(figure, some).savefig(path)
            print(f"Figure: {path}")
    moving = claims.settings(row for row in rows if figure == "adaptive" and "magnitudes" in row)
    for i, panel in enumerate(moving.values()):
        path = out.with_stem(f"{out.stem}_magnitudes{i + 1 if len(moving) > 1 else ''}")
        magnitudes(panel).savefig(path)
        print(f"Magnitudes: {path}")


def main(_):
    if FLAGS.all == (FLAGS.results is not None):
        raise app.UsageError("Name the file of rows with --results, or draw them all with --all.")
    if FLAGS.all and FLAGS.out is not None:
        raise app.UsageError(f"--all draws each figure beside its rows. Received: --out={FLAGS.out}. Leave it.")
    of_settings = {files[0]: files for _, *files in regrets.SETTINGS}
    for path in sorted(claims.RESULTS.glob("*.jsonl")) if FLAGS.all else [pathlib.Path(FLAGS.results)]:
        rows = runs.read_rows(path)
        if FLAGS.all and not rows:
            continue  # a study that has just begun
        if path.stem in of_settings and path.resolve().parent == claims.RESULTS.resolve():
            rows = regrets.rows_of(*of_settings[path.stem]) or rows  # Figure 1's constants too
        if not rows or rows[0]["figure"] not in FIGURES:
            raise app.UsageError(f"{path} holds no row of a figure.")
        show(rows[0]["figure"], rows, path.with_suffix(".png") if FLAGS.out is None else pathlib.Path(FLAGS.out))
    if FLAGS.all:
        print("\n\n".join(["", claims.table(), regrets.table(), regrets.developed()]).rstrip())


if __name__ == "__main__":
    app.run(main)
