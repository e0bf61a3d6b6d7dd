"""Figure 7: a student is distilled, and its teacher filters the augmented images that it learns from.

    python -m experiments.fig7_teacher_filter --dataset=cifar100 --model=resnet20 --teacher=resnet110

The paper's panels are cifar10 and cifar100 with three students and a ResNet-110 as the teacher.

Paper (Section IV-D): the scheme beats random magnitudes (Baseline-A, 70.52 % with ResNet-20 on CIFAR-100) by far, and
the tuned magnitude (Baseline-B), which took 20 runs to find, in 4 of 6 settings. Of Equation 6, the teacher's
cross-entropy alone (a) gives +0.59 points over Baseline-A, the divergence alone (b) -1.24.

Measured: with a student that overfits (ResNet-8 of 8 filters, 1,000 images of CIFAR-10 at 16x16, 100 epochs; teacher
ResNet-20, 49.80 %), dense and pruned by 80 %, the scheme beats random magnitudes, by 1.30 ± 0.79 and 1.16 ± 0.97
points (n = 15), and is beaten by the tuned magnitude, by 0.93 ± 0.79 and 0.84 ± 0.81 (15); (a) beats random, by
2.07 ± 1.11 and 2.02 ± 0.94 (5); (b) against random is undecided (15). Test accuracy, mean ± std, dense and pruned:
filter 47.68 ± 0.43 and 44.26 ± 0.83, random 46.39 ± 0.65 and 43.10 ± 1.05, tuned (M = 4) 48.61 ± 0.64 and
45.11 ± 0.63, (b) 46.24 ± 0.60 and 42.93 ± 0.80 (15), (a) 48.91 ± 0.64 and 45.74 ± 0.59 (5). The rows are in
results/small_fig7.jsonl. No arm is clear of the others with a student
that underfits (1,500 images, 16 epochs; 60 min on two busy cores), n = 3: filter 37.78 ± 1.51, random 36.48 ± 1.57,
tuned (M = 9) 37.16 ± 1.91, (a) 39.06 ± 1.35, (b) 38.17 ± 1.77. Those rows are in results/fig7_cifar10.jsonl; their
teacher and the student of seed 0 began with the same kernels where names and shapes agree, which is so no more.

Time: the teacher once, then 8 runs of 200 epochs for each seed in the paper's setting, which wants a GPU;
`--dataset=digits --seeds=0` takes some minutes on a CPU, `--smoke` less than one.

Every arm is one distillation with the same teacher, loss, images and number of updates; the student trains on one view
of each image, and the arms differ in how that view is found. Baseline-B is the fixed magnitude that is best on the
validation images. Crop and flip are drawn for each candidate, as RandAugment is.
"""

import pathlib
import zlib

import keras
import matplotlib.figure
import numpy as np
from absl import app
from absl import flags as absl_flags

import kerascompress as kc
from experiments import claims, flags, keeper, plot, training

RANDOM = (0, 30)
ARMS = {  # the magnitude, and how the Distiller selects
    "random": (RANDOM, {"num_candidates": 1}),
    "M=4": (4, {"num_candidates": 1}),
    "M=9": (9, {"num_candidates": 1}),
    "M=14": (14, {"num_candidates": 1}),
    "M=22": (22, {"num_candidates": 1}),
    "teacher filter": (RANDOM, {"num_candidates": 4}),
    "(a) cross-entropy alone": (RANDOM, {"num_candidates": 4, "kl_weight": 0.0}),
    "(b) divergence alone": (RANDOM, {"num_candidates": 4, "ce_weight": 0.0}),
}
LOSS = {"temperature": 4.0, "alpha": 0.1}  # RepDistiller's; the paper gives none
TEACHERS = {"digits": "resnet14", "cifar10": "resnet110", "cifar100": "resnet110", "imagenet": "resnet110"}
TEACHER_SEED = 10_000  # no student's: initial weights are made of the seed and the names of the layers
SMOKE = {"arms": ("random", "teacher filter"), "teacher": "resnet8w8"}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def checksum(path):
    """Returns a number that tells the content of a teacher's file from others'."""
    try:
        return f"{zlib.crc32(pathlib.Path(path).read_bytes()):08x}"
    except OSError as error:
        raise FileNotFoundError(
            f"--teacher must be a network's name or a readable .keras file. Received: {path} ({error.strerror})."
        ) from error


def load_teacher(run):
    """Returns the teacher of a run, and its test accuracy."""
    if run.after:
        teacher = training.build_model(run.after)
        return teacher, training.trained(run.after, teacher)["test_last"]
    path, _, content = run.teacher.rpartition(" ")
    if checksum(path) != content:
        raise ValueError(f"The teacher {path} has changed since the run was planned. Received: {checksum(path)}.")
    teacher = keras.saving.load_model(path, compile=False)
    training.compile_classifier(teacher, keras.optimizers.SGD(0.0))
    return teacher, training.accuracy(teacher, training.data_of(run).test)


def make_distiller(run, student, teacher):
    """Returns the Distiller of a run, and its RandAugment."""
    magnitude, selection = ARMS[run.arm]
    *base_seeds, seed = training.layer_seeds(run, 3)
    augment = kc.RandAugment(magnitude, num_ops=2, seed=seed)
    layers = keras.Sequential([*training.base_augmentation(training.data_of(run), *base_seeds), augment])
    return kc.Distiller(student, teacher, augment=layers, **selection, **LOSS), augment


def distil(run):
    """Returns the student of a run, its teacher, that one's test accuracy, and the result."""
    teacher, teacher_test = load_teacher(run)
    student = training.build_model(run)
    around = {"around": lambda run, student, stage: make_distiller(run, student, teacher)}
    return student, teacher, teacher_test, training.trained(run, student, schedule=training.ramp(run), **around)


def outcome(run):
    if run.arm == "teacher":
        return training.trained(run, training.build_model(run))
    student, teacher, teacher_test, result = distil(run)
    distiller, _ = make_distiller(run, student, teacher)
    images, labels = (np.asarray(part[: 4 * run.batch_size]) for part in training.data_of(run).train)
    views = distiller.draw_candidates(images, labels)
    chosen = {name: keras.ops.convert_to_numpy(views[name]) for name in ("chosen", "magnitude")}
    return (
        result
        | training.sizes(student)
        | {
            "seconds_per_epoch": round(result["seconds"] / run.epochs, 2),
            "teacher_passes_per_epoch": distiller.num_candidates * training.steps_per_epoch(run) * run.batch_size,
            "first_kept": round(float(np.mean(chosen["chosen"] == 0)), 4),
            "chosen_magnitude": round(float(chosen["magnitude"][chosen["chosen"], np.arange(len(labels))].mean()), 2),
            "teacher_test": teacher_test,
        }
    )


def print_costs(rows):
    """Prints what selecting costs, and what tuning the magnitude costs, from the rows."""
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    by_arm = {arm: of_arm for arm, of_arm in by_arm.items() if of_arm}
    print("| arm | seconds an epoch | teacher's passes an epoch | runs to find the magnitude |\n|---|---|---|---|")
    fixed = [arm for arm in by_arm if ARMS[arm][0] != RANDOM]
    for arm, of_arm in by_arm.items():
        seconds = np.mean([row["seconds_per_epoch"] for row in of_arm])
        runs = f"{len(fixed)} (the paper: 20)" if arm in fixed else "none"
        print(f"| {arm} | {seconds:.1f} | {of_arm[0]['teacher_passes_per_epoch']:,} | {runs} |")
    if fixed:
        validation = {arm: np.mean([row["validation_last"] for row in by_arm[arm]]) for arm in fixed}
        tuned = claims.best(validation)
        cost = sum(np.mean([row["seconds"] for row in by_arm[arm]]) for arm in fixed)
        print(
            f"\nBaseline-B, the best of {', '.join(fixed)} on the validation images, is {tuned}; tuning: {cost:.0f} s."
        )


def draw_candidates(run, path):
    """Draws real images with their candidates, what Equation 6 says of each, and the chosen one in a frame."""
    student, teacher, *_ = distil(run)
    distiller, _ = make_distiller(run, student, teacher)
    images, labels = (np.asarray(part[:6]) for part in training.data_of(run).train)
    views = {k: keras.ops.convert_to_numpy(v) for k, v in distiller.draw_candidates(images, labels).items()}
    n = distiller.num_candidates
    figure = matplotlib.figure.Figure(figsize=(1.7 * (n + 1), 2.05 * len(images)), layout="constrained", dpi=100)
    figure.suptitle("teacher's cross-entropy − divergence; the least (in the frame) is learned", fontsize="medium")
    for i, cells in enumerate(figure.subplots(len(images), n + 1, squeeze=False)):
        for k, axis in enumerate(cells):
            axis.set(xticks=[], yticks=[])
            shown = images[i] if k == 0 else views["images"][k - 1, i].astype("uint8")
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255)
            if k == 0:
                axis.set_title("image", fontsize="small")
                axis.spines[:].set_visible(False)
                continue
            axis.set_title(f"M = {views['magnitude'][k - 1, i]:.0f}", fontsize="small")
            axis.set_xlabel(
                f"{views['teacher_loss'][k - 1, i]:.2f} − {views['divergence'][k - 1, i]:.2f}", fontsize="small"
            )
            is_chosen = views["chosen"][i] == k - 1
            axis.spines[:].set(visible=is_chosen, color=plot.STAND_OUT["color"], linewidth=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Candidates: {path}")


def plan_teacher(study, name):
    """Returns the run of a teacher, or None if it is a file, and what keys of students call it."""
    if name.endswith(".keras"):
        flags.check_used("for a teacher from a file", "teacher_epochs", "teacher_magnitude")
        return None, f"{name} {checksum(name)}"
    training.find_builder(name)
    epochs, magnitude = FLAGS.teacher_epochs or study.epochs, FLAGS.teacher_magnitude
    changes = {"model": name, "epochs": epochs, "carrier": "wrapper", "work": epochs}
    teacher = study.run(arm="teacher", sparsity=0.0, magnitude=magnitude, seed=TEACHER_SEED, **changes)
    return teacher, f"{name}x{epochs} M={magnitude:g} seed={TEACHER_SEED}"


def plan(study):
    """Returns the runs of all arms, after that of their teacher if it is trained here."""
    name = FLAGS.teacher or (SMOKE["teacher"] if FLAGS.smoke else TEACHERS[FLAGS.dataset])
    teacher, key = plan_teacher(study, name)
    return [
        study.run(
            arm=arm,
            sparsity=sparsity,
            magnitude=None if ARMS[arm][0] == RANDOM else ARMS[arm][0],
            seed=seed,
            teacher=key,
            after=teacher,
        )
        for seed in study.seeds
        for sparsity in flags.sparsities([0.0])
        for arm in flags.arms(ARMS, SMOKE["arms"] if FLAGS.smoke else ARMS)
    ]


def main(_):
    if FLAGS.augmenter != "kerascompress":
        raise ValueError(
            "Figure 7 draws magnitudes at random, which keras-cv's RandAugment does not. Leave --augmenter."
        )
    study = flags.Study("fig7", takes=("sparsities", "arms", "teacher", "teacher_epochs", "teacher_magnitude"))
    runs = plan(study)
    rows = study.carry_out(runs, outcome)
    plot.show("fig7", rows, study.out)
    print_costs(rows)
    shown = next((run for run in runs if run.arm == "teacher filter"), None)
    if shown and (shown.folder / keeper.DONE).exists():
        draw_candidates(shown, study.out.with_stem(f"{study.out.stem}_candidates"))


if __name__ == "__main__":
    app.run(main)
