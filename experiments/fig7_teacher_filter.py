"""Figure 7: a student is distilled, and its teacher filters the augmented images that it learns from.

    python -m experiments.fig7_teacher_filter --dataset=cifar100 --model=resnet20 --teacher=resnet110

The paper's panels are cifar10 and cifar100 with three students and a ResNet-110 as the teacher.

Time: the teacher once, then 8 runs of 200 epochs for each seed in the paper's setting, which wants a GPU;
`--dataset=digits --seeds=0` takes some minutes on a CPU, `--smoke` less than one.

Paper (Section IV-D): the scheme beats random magnitudes (Baseline-A, 70.52 % with ResNet-20 on CIFAR-100) by far, and
the tuned magnitude (Baseline-B), which took 20 runs to find, in 4 of 6 settings. Of Equation 6, the teacher's
cross-entropy alone (a) gives +0.59 points over Baseline-A, the divergence alone (b) -1.24.

Every arm is one distillation with the same teacher, loss, images and number of updates; the student trains on one view
of each image, and the arms differ in how that view is found. Baseline-B is the fixed magnitude that is best on the
validation images. Crop and flip are drawn for each candidate, as RandAugment is.
"""

import dataclasses
import pathlib
import zlib

import keras
import matplotlib.figure
import numpy as np
from absl import app, flags

import kerascompress as kc
from experiments import common, plot

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
TEACHERS = {"digits": "resnet14", "cifar10": "resnet110", "cifar100": "resnet110"}
TEACHER_MAGNITUDE = 14
SMOKE = {"arms": ("random", "teacher filter"), "teacher": "resnet8w8"}

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(common)
flags.DEFINE_string(
    "teacher",
    None,
    "The teacher: a network's name as for --model, which is trained first, or a .keras file with a classifier of the "
    "data set's images that gives logits. Default: resnet110, and resnet14 for digits.",
)
flags.DEFINE_integer(
    "teacher_epochs", None, "Epochs for which a teacher is trained. Default: as many as --epochs.", lower_bound=1
)


def load_teacher(path):
    """Returns the teacher of a .keras file, and a name that tells its content from others'."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"--teacher must be a network's name or a readable .keras file. Received: {path} ({error.strerror})."
        ) from error
    return keras.saving.load_model(path, compile=False), f"{path.stem} {zlib.crc32(content):08x}"


def train_teacher(study, name, epochs, progress):
    """Returns the trained teacher of all runs; trains on from what a killed process has left."""
    run = dataclasses.replace(
        study.run(arm="teacher", sparsity=0.0, magnitude=TEACHER_MAGNITUDE, seed=0), model=name, epochs=epochs
    )
    teacher = study.build_model(run.seed, name)
    done = study.folder(run) / "done.npz"
    if done.exists():
        teacher.set_weights(common.load_arrays(done, "weights")[1])
        progress.update(epochs)
    else:
        *base_seeds, seed = common.layer_seeds(run, 3)
        layers = [*common.base_augmentation(study.data, *base_seeds), common.rand_augment(run, seed), teacher]
        result = common.train(run, layers, study.data, done.parent, progress=progress)
        common.save_arrays(done, result, weights=teacher.get_weights())
        (done.parent / common.STATE).unlink()
    return teacher


def make_distiller(study, run, teacher):
    """Returns the Distiller of a run, its student new."""
    magnitude, selection = ARMS[run.arm]
    *base_seeds, seed = common.layer_seeds(run, 3)
    augment = [*common.base_augmentation(study.data, *base_seeds), kc.RandAugment(magnitude, num_ops=2, seed=seed)]
    return kc.Distiller(study.build_model(run.seed), teacher, augment=keras.Sequential(augment), **selection, **LOSS)


def distil(study, run, teacher, progress):
    """Trains the student of a run and returns its result; its weights stay in the folder of the run."""
    done = study.folder(run) / "done.npz"
    if done.exists():  # killed before its row was written
        progress.update(run.epochs)
        return common.load_arrays(done, "weights")[0]
    distiller = make_distiller(study, run, teacher)
    result = common.train(run, distiller, study.data, study.folder(run), progress=progress)
    images, labels = (part[: 4 * run.batch_size] for part in study.data.train)
    views = distiller.draw_candidates(images, labels)
    chosen = {name: keras.ops.convert_to_numpy(views[name]) for name in ("chosen", "magnitude")}
    result |= common.sizes(distiller.student) | {
        "seconds_per_epoch": round(result["seconds"] / run.epochs, 2),
        "teacher_passes_per_epoch": distiller.num_candidates * study.steps_per_epoch * run.batch_size,
        "first_kept": round(float(np.mean(chosen["chosen"] == 0)), 4),
        "chosen_magnitude": round(float(chosen["magnitude"][chosen["chosen"], np.arange(len(labels))].mean()), 2),
    }
    common.save_arrays(done, result, weights=distiller.student.get_weights())
    (study.folder(run) / common.STATE).unlink()
    return result


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
        tuned = max(validation, key=validation.get)
        cost = sum(np.mean([row["seconds"] for row in by_arm[arm]]) for arm in fixed)
        print(
            f"\nBaseline-B, the best of {', '.join(fixed)} on the validation images, is {tuned}; tuning: {cost:.0f} s."
        )


def draw_candidates(study, run, teacher, path):
    """Draws real images with their candidates, what Equation 6 says of each, and the chosen one in a frame."""
    distiller = make_distiller(study, run, teacher)
    distiller.student.set_weights(common.load_arrays(study.folder(run) / "done.npz", "weights")[1])
    images, labels = (part[:6] for part in study.data.train)
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


def main(_):
    if FLAGS.augmenter != "kerascompress":
        raise ValueError(
            "Figure 7 draws magnitudes at random, which keras-cv's RandAugment does not. Leave --augmenter."
        )
    study = common.Study("fig7")
    name = FLAGS.teacher or (SMOKE["teacher"] if FLAGS.smoke else TEACHERS[FLAGS.dataset])
    if name.endswith(".keras"):
        epochs = 0
        teacher, teacher_key = load_teacher(pathlib.Path(name))
    else:
        common.check_model(name)
        epochs = FLAGS.teacher_epochs or study.settings["epochs"]
        teacher, teacher_key = None, f"{name}x{epochs}"
    runs = [
        study.run(
            arm=arm,
            sparsity=0.0,
            magnitude=None if ARMS[arm][0] == RANDOM else ARMS[arm][0],
            seed=seed,
            teacher=teacher_key,
        )
        for seed in study.seeds
        for arm in (SMOKE["arms"] if FLAGS.smoke else ARMS)
    ]
    todo = [run for run in runs if not study.row(run)]
    shown = next(run for run in runs if run.arm == "teacher filter")
    is_needed = todo or (study.folder(shown) / "done.npz").exists()
    with common.progress_bar((epochs if is_needed else 0) + sum(run.epochs for run in todo)) as progress:
        if teacher is None and is_needed:
            teacher = train_teacher(study, name, epochs, progress)
        if todo:
            common.compile_classifier(teacher, 0.0)
            teacher_test = common.accuracy(teacher, study.data.test)
        for run in todo:
            study.record(run, distil(study, run, teacher, progress) | {"teacher_test": teacher_test})
    rows = [study.row(run) for run in runs]
    plot.show("fig7", rows, study.out)
    print_costs(rows)
    if is_needed:
        draw_candidates(study, shown, teacher, study.out.with_stem(f"{study.out.stem}_candidates"))


if __name__ == "__main__":
    app.run(main)
