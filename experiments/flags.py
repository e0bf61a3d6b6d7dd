"""The flags that the scripts share, and the recipes that they change."""

import pathlib
import re

from absl import flags, logging

import kerascompress as kc
from experiments import data as datasets
from experiments import devices, engine, folder, training
from experiments.runs import HERE, Run, check_writable, find, read_rows

RECIPES = {  # stages of 200 epochs, batch 128, SGD at 0.1: the paper authors' script
    "digits": {"model": "resnet8", "epochs": 10, "batch_size": 64, "learning_rate": 0.1},
    "cifar10": {"model": "resnet20", "epochs": 200, "batch_size": 128, "learning_rate": 0.1},
    "cifar100": {"model": "resnet20", "epochs": 200, "batch_size": 128, "learning_rate": 0.1},
    # The paper says MobileNetV2 and no more; this is how it is trained to its published accuracy.
    "imagenet": {
        "model": "mobilenet_v2",
        "epochs": 150,
        "batch_size": 256,
        "learning_rate": 0.05,
        "schedule": "cosine",
    },
}
SMOKE = {"model": "resnet8w4", "epochs": 2, "batch_size": 32, "train_images": 64}
SOME = ("sparsities", "magnitudes", "decayed", "strong", "weak", "teacher", "teacher_epochs", "teacher_magnitude")
SOME += ("arms", "step", "export", "augment_in", "constants")
OF_FILES = ("skip_damaged", "augment_in", "crop_area")

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "dataset",
    "cifar100",
    datasets.DATASETS,
    "Images to learn; `digits` come with scikit-learn, `imagenet` is any folder of images of its layout.",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder that holds cifar-10-batches-py/ or cifar-100-python/, the official python archives, unpacked. By default "
    "they are downloaded through keras.datasets. For imagenet: the folder that holds train/<class>/*.JPEG and "
    "val/<class>/*.JPEG, with any number of classes; required. For "
    "show_augment: CIFAR-10's; by default, it draws scikit-learn's photographs.",
)
flags.DEFINE_boolean(
    "skip_damaged",
    False,
    "imagenet: leave out files that do not decode. They are named; without this flag, they are an error before the "
    "first training.",
)
flags.DEFINE_enum(
    "augment_in",
    "model",
    ["model", "pipeline"],
    "imagenet, Figures 1, 2, 4 and 6: where RandAugment acts, in the model, on its device, or in the pipeline that "
    "reads the files, on the processor's cores (TensorFlow backend).",
)
flags.DEFINE_integer(
    "image_size",
    None,
    "Side to which images are reduced, by the mean of square blocks of pixels; it must divide the data set's. "
    "Of imagenet: the side to which crops are resized, any number. Default: the data set's, 32 or 8; 224 of imagenet.",
    lower_bound=1,
)
flags.DEFINE_float(
    "crop_area",
    None,
    "imagenet: the least share of its area that a random crop of an image keeps. Default: 0.08, the field's.",
    lower_bound=0.01,
    upper_bound=1,
)
flags.DEFINE_string(
    "model",
    None,
    "Network: resnet<depth>, mobilenet_v2 or shufflenet_v2, with w<width> at the end for another width, such as "
    "resnet8w8 (8 filters, not 16) or mobilenet_v2w0.25 (a quarter of the channels). Default: the data set's.",
)
flags.DEFINE_integer(
    "epochs",
    None,
    "Epochs of each stage. Default: 200 as in the paper, 10 for digits (60 in the demo), 150 for imagenet.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Images of one update. Default: 128 as in the paper, 64 for digits (50 in the demo), 256 for imagenet.",
    lower_bound=1,
)
flags.DEFINE_float(
    "learning_rate",
    None,
    "Where each stage begins. Default: 0.1 as in the paper, 0.05 for imagenet and in the demo.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "schedule",
    None,
    ["paper", "cosine"],
    "The learning rate of a stage: the paper's, a cosine that is divided by 10 at 45 % and at 90 % of the epochs; or "
    "one cosine to 0, the default of imagenet.",
)
flags.DEFINE_integer("train_images", None, "Train on so many images only, each class in proportion. Default: all.")
flags.DEFINE_integer(
    "evaluate_every",
    1,
    "Epochs from one look at the validation images to the next; the best epoch is one of those looked at. The last "
    "always is.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "carrier",
    None,
    ["optimizer", "wrapper"],
    "What carries the masks of a pruned network: kerascompress.PruningOptimizer, or the wrapper PruneLowMagnitude with "
    "its callback. Default: the figure's.",
)
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, separated by commas; every arm is run once with each.")
flags.register_validator("seeds", lambda seeds: all(s.isdecimal() for s in seeds), "must be integers, such as 0,1,2")
flags.DEFINE_string(
    "results",
    None,
    "File to which every finished run appends one JSON line; runs that are in it already are skipped. "
    "Default: experiments/results/<figure>_<dataset>.jsonl. To experiments.plot: the rows to draw, without a default.",
)
flags.DEFINE_string(
    "checkpoints",
    None,
    "Folder in which runs keep their state, so that a killed one continues. Default: experiments/checkpoints/.",
)
flags.DEFINE_string(
    "workers",
    "1",
    "Who carries the runs out: 1, a loop in this process; a number of processes, each with a core or a GPU of its own; "
    "auto, as many as there are GPUs, or cores; ray, or ray://<address>, a Ray cluster.",
)
flags.register_validator("workers", engine.is_workers, "must be a number of at least 1, auto, ray or ray://<address>")
flags.DEFINE_integer(
    "devices",
    1,
    "Devices of one training: so many GPUs of each worker, or virtual devices of the processor. The batch and the "
    "learning rate are those of the training, whatever their number, and so is the result, up to rounding.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "augmenter",
    "kerascompress",
    ["kerascompress", "keras_cv"],
    "Whose RandAugment: kerascompress.RandAugment, or keras-cv's, for colour images on the TensorFlow backend.",
)
flags.DEFINE_string("out", None, "File for the figure (PNG). Default: the file of rows, ending in .png.")
flags.DEFINE_boolean(
    "smoke",
    False,
    "Everything tiny, to see that it works: a net of 5 thousand weights, 64 images, 2 epochs, one seed, fewer arms.",
)
# Some figures take these.
flags.DEFINE_list("sparsities", None, "All but Figure 6: pruning ratios, separated by commas. Default: the figure's.")
flags.register_validator(
    "sparsities",
    lambda ratios: all(re.fullmatch(r"0|0?\.\d+", ratio) for ratio in ratios or []),
    "must be fractions, such as 0.4,0.8",
)
flags.DEFINE_list(
    "magnitudes",
    None,
    "Figures 1 to 3 and the adaptive study: magnitudes held constant, or none, separated by commas. Default: those of "
    "the figure.",
)
flags.DEFINE_list(
    "arms",
    None,
    "Arms, separated by commas; a name with a comma in it is in double quotes: 'inherit,\"scratch, weak\"'. Figure 3: "
    "constant, decayed, adaptive; default: the first two. Figures 4 and 7: those of their scripts; default: the "
    "paper's. The adaptive study, beside the constant magnitudes: trivial, line, accuracy=<set-point>, "
    "gap=<set-point>, held-accuracy, held-gap, entropy, entropy-image; default: all, with set-points of 0.6 and 0.1.",
)
flags.DEFINE_string(
    "constants",
    None,
    "The adaptive study: a file of Figure 1's rows. Constant magnitudes that are there in the same setting are taken "
    "from it and not trained again.",
)
flags.DEFINE_float(
    "step", None, "How far an adaptive magnitude moves in an epoch. Default: 0.5.", lower_bound=0.001, upper_bound=30
)
flags.DEFINE_list(
    "decayed",
    None,
    "Figure 3 and the demo: the magnitudes of the arm that weakens, one for each pruning ratio. Default: the paper's, "
    "and 14, 4, 0 in the demo.",
)
flags.DEFINE_float(
    "strong",
    None,
    "Figures 4 and 6: magnitude of strong augmentation. Default: the figure's.",
    lower_bound=0,
    upper_bound=30,
)
flags.DEFINE_list(
    "weak",
    None,
    "Magnitudes of weak augmentation, the optima of the small networks: one for each pruning ratio of Figure 4, or one "
    "for Figure 6; none is no RandAugment. Default: the figure's, for ResNet-20 on CIFAR-100; Figure 4 has one for "
    "each of 0.2, 0.4, 0.6 and 0.8.",
)
flags.DEFINE_string(
    "teacher",
    None,
    "The teacher of Figure 7, and of the adaptive study if it has one: a network's name as for --model, which is "
    "trained first, or a .keras file with a classifier of the data set's images that gives logits. Default in Figure "
    "7: resnet110, and resnet14 for digits.",
)
flags.DEFINE_integer(
    "teacher_epochs", None, "Epochs for which a teacher is trained. Default: as many as --epochs.", lower_bound=1
)
flags.DEFINE_float("teacher_magnitude", 14, "Magnitude at which a teacher is trained.", lower_bound=0, upper_bound=30)


flags.DEFINE_string(
    "export",
    None,
    "Figure 3 and the demo: folder for the most pruned network whose magnitude follows (first seed), as a SavedModel. "
    "Default: none.",
)


class Study:
    """The runs of one figure: their settings from the flags, and the rows they leave.

    `takes` names the flags of `SOME` that this figure takes; given another, it says so.
    """

    def __init__(self, figure, takes=(), carrier="optimizer"):
        for name in SOME:
            if FLAGS[name].present and name not in takes:
                raise ValueError(f"--{name} is no flag of {figure}. Received: --{name}={FLAGS[name].value}.")
        for name in OF_FILES:
            if FLAGS[name].present and FLAGS.dataset != "imagenet":
                raise ValueError(f"--{name} is a flag of --dataset=imagenet. Received: --dataset={FLAGS.dataset}.")
        logging.set_verbosity(logging.WARNING)  # an export logs much
        recipe = {"schedule": "paper", "train_images": None} | RECIPES[FLAGS.dataset] | (SMOKE if FLAGS.smoke else {})
        self.settings = {
            name: default if FLAGS[name].value is None else FLAGS[name].value
            for name, default in (recipe | {"carrier": carrier}).items()
        }
        names = ("dataset", "smoke", "augmenter", "image_size", "evaluate_every", "data_dir", "devices", *OF_FILES)
        self.settings |= {"figure": figure} | {name: FLAGS[name].value for name in names}
        self.settings["checkpoints"] = str(pathlib.Path(FLAGS.checkpoints or HERE / "checkpoints").absolute())
        self.seeds = [0] if FLAGS.smoke and FLAGS["seeds"].using_default_value else [int(seed) for seed in FLAGS.seeds]
        name = f"{figure}_{FLAGS.dataset}{'_smoke' if FLAGS.smoke else ''}.jsonl"
        self.results = pathlib.Path(FLAGS.results or HERE / "results" / name)
        check_writable(self.results)
        devices.claim(FLAGS.devices)
        if FLAGS.dataset == "imagenet":
            found = folder.listing(FLAGS.data_dir)
            self.settings["content"] = found.content
            folder.write_labels(found, self.results)
        self.out = pathlib.Path(FLAGS.out or self.results.with_suffix(".png"))  # where the figure goes

    @property
    def epochs(self):
        return self.settings["epochs"]

    def run(self, *, work=None, **key):
        return Run(**self.settings | key, work=self.epochs if work is None else work)

    def carry_out(self, runs, outcome):
        """Returns the rows of all runs, once those that have none yet are carried out."""
        runs, rows = list(dict.fromkeys(runs)), read_rows(self.results)  # a seed that is named twice counts once
        todo = [run for run in runs if find(rows, run) is None]
        for run in {run.model: run for run in todo}.values():
            training.check(run)
        engine.carry_out(todo, outcome, workers=FLAGS.workers, results=self.results)
        rows = read_rows(self.results)
        if len(rows) > len(runs):
            print(
                f"{self.results} has {len(rows) - len(runs)} other row(s), which this figure leaves out: python -m "
                f"experiments.plot --results={self.results} draws all."
            )
        return [find(rows, run) for run in runs]

    def export(self, network):
        """Writes what `network()` returns to the folder of --export, unless something is there."""
        if FLAGS.export and pathlib.Path(FLAGS.export).exists():
            print(f"SavedModel: {FLAGS.export} is there already and stays as it is.")
        elif FLAGS.export:
            print(f"SavedModel: {FLAGS.export}\n{kc.export_saved_model(network(), FLAGS.export)}")


def sparsities(default):
    """Returns the pruning ratios of the flag, or the default."""
    return [float(ratio) for ratio in FLAGS.sparsities or default]


def magnitudes(name, default, count=None):
    """Returns the magnitudes of a flag, or the default; None is "none". If `count` is given, there must be so many."""
    try:
        chosen = [None if each == "none" else float(each) for each in FLAGS[name].value]
    except TypeError:  # the flag is not given
        chosen = list(default)
    except ValueError:
        chosen = []
    if not chosen or len(chosen) != (count or len(chosen)) or not all(m is None or 0 <= m <= 30 for m in chosen):
        raise ValueError(
            f"--{name} must be {count or 'some'} magnitude(s) in [0, 30], or none, separated by commas. "
            f"Received: {FLAGS[name].value}."
        )
    return chosen


def arms(allowed, default, name=str):
    """Returns the arms of the flag, or the default; `name(arm)` is what must be allowed."""
    chosen = FLAGS.arms or list(default)
    if not all(name(arm) in allowed for arm in chosen):
        quoted, received = ([f'"{arm}"' if "," in arm else arm for arm in some] for some in (allowed, chosen))
        raise ValueError(f"--arms must be among {', '.join(quoted)}. Received: {','.join(received)}.")
    return chosen


def check_used(why_not, *names):
    """Raises an error where flags are given that would do nothing."""
    for name in names:
        if FLAGS[name].present:
            raise ValueError(f"--{name} does nothing {why_not}. Received: --{name}={FLAGS[name].value}.")


def step():
    return 0.5 if FLAGS.step is None else FLAGS.step


def rising_sparsities(default):
    """Returns the pruning ratios of the flag, from 0 on, or the default."""
    ratios = sparsities(default)
    if ratios[0] != 0 or ratios != sorted(set(ratios)):
        raise ValueError(f"--sparsities must rise from 0, the dense network. Received: {FLAGS.sparsities}.")
    return ratios


def decayed(default, count):
    """Returns the magnitude at each of so many pruning ratios, of the flag, or the default."""
    chosen = magnitudes("decayed", default, count)
    if None in chosen:
        raise ValueError(f"--decayed must be numbers: none cannot be weakened to. Received: {FLAGS.decayed}.")
    return chosen


def magnitude_name(magnitude):
    return "none" if magnitude is None else f"M={magnitude:g}"
