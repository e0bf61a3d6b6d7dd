"""What every figure shares: the flags, the paper's recipe, runs that resume, and the rows they leave."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import keras
import numpy as np
import tqdm
from absl import flags, logging

import kerascompress as kc
from experiments import data as datasets

HERE = pathlib.Path(__file__).parent
RECIPES = {  # stages of 200 epochs, batch 128, SGD at 0.1: the paper authors' script
    "digits": {"model": "resnet8", "epochs": 10, "batch_size": 64, "learning_rate": 0.1},
    "cifar10": {"model": "resnet20", "epochs": 200, "batch_size": 128, "learning_rate": 0.1},
    "cifar100": {"model": "resnet20", "epochs": 200, "batch_size": 128, "learning_rate": 0.1},
}
SMOKE = {"model": "resnet8w4", "epochs": 2, "batch_size": 32, "train_images": 64}

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "cifar100", datasets.DATASETS, "Images to learn; `digits` come with scikit-learn.")
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder that holds cifar-10-batches-py/ or cifar-100-python/, the official python archives, unpacked. By default "
    "they are downloaded through keras.datasets.",
)
flags.DEFINE_string(
    "model",
    None,
    "Network: resnet<depth>, mobilenet_v2 or shufflenet_v2, with w<width> at the end for another width, such as "
    "resnet8w8 (8 filters, not 16) or mobilenet_v2w0.25 (a quarter of the channels). Default: the data set's.",
)
flags.DEFINE_integer(
    "epochs", None, "Epochs of each stage. Default: 200 as in the paper, 10 for digits.", lower_bound=1
)
flags.DEFINE_integer(
    "batch_size", None, "Images of one update. Default: 128 as in the paper, 64 for digits.", lower_bound=1
)
flags.DEFINE_float(
    "learning_rate", None, "Where each stage's cosine begins. Default: 0.1 as in the paper.", lower_bound=0
)
flags.DEFINE_integer("train_images", None, "Train on so many images only, each class in proportion. Default: all.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, separated by commas; every arm is run once with each.")
flags.register_validator("seeds", lambda seeds: all(s.isdecimal() for s in seeds), "must be integers, such as 0,1,2")
flags.DEFINE_string(
    "results",
    None,
    "File to which every finished run appends one JSON line; runs that are in it already are skipped. "
    "Default: experiments/results/<figure>_<dataset>.jsonl.",
)
flags.DEFINE_string(
    "checkpoints",
    None,
    "Folder in which runs keep their state, so that a killed one continues. Default: experiments/checkpoints/.",
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


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides the outcome of a run: the same `Run` gives the same row."""

    figure: str
    dataset: str
    model: str
    arm: str
    sparsity: float
    magnitude: float | None  # None is no RandAugment, or another magnitude for each image where the arm says so
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    train_images: int | None  # None is all
    smoke: bool
    augmenter: str
    strong: float | None = None  # magnitude of a scheme's strong augmentation
    teacher: str | None = None  # who distils


# What held before a field of the key came in: older rows and folders lack it.
BEFORE = {"augmenter": "kerascompress", "strong": None, "teacher": None}


class Study:
    """The runs of one figure: their settings from the flags, their data, and the rows they leave."""

    def __init__(self, figure):
        settings = RECIPES[FLAGS.dataset] | {"train_images": None} | (SMOKE if FLAGS.smoke else {})
        logging.set_verbosity(logging.WARNING)  # an export logs much
        self.settings = {
            name: value if FLAGS[name].value is None else FLAGS[name].value for name, value in settings.items()
        }
        self.settings |= {"figure": figure} | {name: FLAGS[name].value for name in ("dataset", "smoke", "augmenter")}
        self.seeds = [0] if FLAGS.smoke and FLAGS["seeds"].using_default_value else [int(seed) for seed in FLAGS.seeds]
        name = f"{figure}_{FLAGS.dataset}{'_smoke' if FLAGS.smoke else ''}.jsonl"
        self.results = pathlib.Path(FLAGS.results or HERE / "results" / name)
        self.checkpoints = pathlib.Path(FLAGS.checkpoints or HERE / "checkpoints")
        check_writable(self.results)
        check_model(self.settings["model"])
        self.rows = read_rows(self.results)
        limit = self.settings["train_images"]
        self.data = datasets.load(
            FLAGS.dataset, FLAGS.data_dir, train_images=limit, eval_images=limit if FLAGS.smoke else None
        )
        if self.settings["batch_size"] > len(self.data.train[1]):
            raise ValueError(
                f"`batch_size` must be at most {len(self.data.train[1])}, the number of training images. "
                f"Received: batch_size={self.settings['batch_size']}."
            )

    @property
    def out(self):
        """Where the figure goes."""
        return pathlib.Path(FLAGS.out or self.results.with_suffix(".png"))

    @property
    def steps_per_epoch(self):
        return len(self.data.train[1]) // self.settings["batch_size"]

    def run(self, **key):
        return Run(**self.settings, **key)

    def row(self, run):
        """Returns the row of a finished run, or None."""
        return next((row for row in self.rows if dataclasses.asdict(run).items() <= (BEFORE | row).items()), None)

    def record(self, run, result):
        """Appends the row of a run that has just finished."""
        counts = {name: len(getattr(self.data, name)[1]) for name in ("train", "validation", "test")}
        row = dataclasses.asdict(run) | result | {"images": counts} | provenance()
        self.rows = read_rows(self.results)
        if not self.row(run):  # another process may have done it in the meantime
            append_row(self.results, row)
            self.rows.append(row)

    def folder(self, run):
        """Where the checkpoint of a run lies: a folder of its own."""
        key = {name: value for name, value in dataclasses.asdict(run).items() if BEFORE.get(name) != value}
        return self.checkpoints / ",".join(f"{name}={value}" for name, value in key.items())

    def build_model(self, seed, name=None):
        """Returns a new network: the one to compress, or another by its name."""
        data = self.data
        build = check_model(name or self.settings["model"])
        return build(data.num_classes, input_shape=data.input_shape, mean=data.mean, std=data.std, seed=seed)


def check_model(name):
    """Returns the builder of the network that a name stands for."""
    match = re.fullmatch(r"(?:resnet(\d+)(?:w(\d+))?|(mobilenet_v2|shufflenet_v2)(?:w(\d*\.?\d+))?)", name)
    if not match:
        raise ValueError(
            "`model` must be resnet<depth>, mobilenet_v2 or shufflenet_v2, with w<width> at the end for another width, "
            f"such as resnet8w8 or mobilenet_v2w0.25. Received: {name!r}."
        )
    depth, filters, mobile, multiplier = match.groups()
    if mobile:
        return functools.partial(getattr(kc.models, mobile), width=float(multiplier or 1))
    return functools.partial(kc.models.resnet, int(depth), width=int(filters or 16))


def layer_seeds(run, count, stage=0):
    """Returns independent seeds for the random layers of a stage of a run, the same ones for every arm."""
    return np.random.SeedSequence((run.seed, round(100 * run.sparsity), stage)).generate_state(count).tolist()


def base_augmentation(data, crop_seed, flip_seed):
    """The paper's random crop, by an eighth of the side (4 pixels of 32), and its horizontal flip."""
    crop = kc.RandomCrop(padding=data.input_shape[0] // 8, fill_value=data.fill_value, seed=crop_seed)
    return [crop, keras.layers.RandomFlip("horizontal", seed=flip_seed)] if data.flip else [crop]


def rand_augment(run, seed):
    """RandAugment with two operations at the magnitude of a run, which is live."""
    if run.augmenter == "kerascompress":
        return kc.RandAugment(magnitude=run.magnitude, num_ops=2, seed=seed)
    from kerascompress import keras_cv

    return keras_cv.RandAugment((0, 255), augmentations_per_image=2, magnitude=run.magnitude, seed=seed)


def learning_rate(epoch, epochs, initial):
    """A cosine over the stage down to 5e-6, and a tenth of it from 45 % and again from 90 % of the epochs.

    The paper authors' script: steps at epochs 90 and 180 of 200.
    """
    cosine = 5e-6 + (initial - 5e-6) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return cosine * 0.1 ** ((epoch >= 0.45 * epochs) + (epoch >= 0.9 * epochs))


def train(run, layers, data, folder, *, progress, callbacks=(), best_from=0, stage=0):
    """Trains `keras.Sequential(layers)`, or a whole model, such as a Distiller, and returns its accuracies.

    Goes on where a killed process left `folder`.

    An epoch depends on the run and on the state alone. The state is all variables: weights, masks, optimizer, random
    seeds, magnitude. The best epoch is chosen on the validation images, from epoch `best_from` on. Where a run has
    several stages, `stage` counts them from 0, and each sees the images in an order of its own.
    """
    trainer = layers
    if isinstance(layers, list):
        trainer = keras.Sequential([keras.Input(data.input_shape, dtype="uint8"), *layers])
    compile_classifier(trainer, run.learning_rate)
    trainer.optimizer.build(trainer.trainable_variables)
    variables = [*trainer.variables, *trainer.optimizer.variables]
    history, best = {"validation": [], "seconds": 0.0}, []
    if (folder / STATE).exists():
        history, state, best = load_arrays(folder / STATE, "state", "best")
        assign(variables, state)
    progress.update(len(history["validation"]))
    images, labels = data.train
    used = len(labels) // run.batch_size * run.batch_size  # whole batches only: another shape is compiled anew
    for epoch in range(len(history["validation"]), run.epochs):
        started = time.monotonic()
        order = np.random.default_rng((run.seed, round(100 * run.sparsity), epoch, stage)).permutation(len(labels))
        order = order[:used]
        trainer.optimizer.learning_rate = learning_rate(epoch, run.epochs, run.learning_rate)
        trainer.fit(
            images[order],
            labels[order],
            batch_size=run.batch_size,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            callbacks=list(callbacks),
            verbose=0,
        )
        history["validation"].append(accuracy(trainer, data.validation))
        state = [keras.ops.convert_to_numpy(v) for v in variables]
        if epoch >= best_from and epoch == best_epoch(history, best_from):
            best = state
        history["seconds"] += time.monotonic() - started
        save_arrays(folder / STATE, history, state=state, best=best)
        progress.set_postfix_str(
            f"{run.arm} p={run.sparsity} seed {run.seed}: {history['validation'][-1]:.3f}", refresh=False
        )
        progress.update()
    best_at = best_epoch(history, best_from)
    assign(variables, best)
    test_best = test_last = accuracy(trainer, data.test)
    if best_at < run.epochs - 1:
        assign(variables, state)
        test_last = accuracy(trainer, data.test)
    return {
        "validation_last": history["validation"][-1],
        "validation_best": history["validation"][best_at],
        "best_epoch": best_at + 1,
        "test_best": test_best,
        "test_last": test_last,
        "seconds": round(history["seconds"], 1),
    }


def compile_classifier(model, learning_rate):
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile="auto" if keras.backend.backend() != "tensorflow" or on_gpu() else False,  # XLA is slower there
    )


def best_epoch(history, best_from):
    return best_from + int(np.argmax(history["validation"][best_from:]))


def accuracy(model, split):
    images, labels = split
    return round(model.evaluate(images, labels, batch_size=500, verbose=0, return_dict=True)["accuracy"], 6)


def sizes(model):
    """Returns the trainable parameters of a model, how many are not zero, and its sparsity over prunable kernels."""
    weights = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    return {
        "parameters": sum(w.size for w in weights),
        "nonzeros": int(sum(np.count_nonzero(w) for w in weights)),
        "live_sparsity": round(kc.sparsity(model), 6),
    }


# Checkpoints: one file, replaced in one step, so that a killed process leaves the last epoch or the one before it.

STATE = "state.npz"


def save_arrays(path, meta, **groups):
    """Writes JSON-able `meta` and groups of arrays; never a half-written file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}/{i}": array for name, group in groups.items() for i, array in enumerate(group)}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, meta=json.dumps(meta), **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_arrays(path, *names):
    """Returns `meta` and each named group."""
    try:
        with np.load(path) as file:
            groups = [
                [file[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in file))] for name in names
            ]
            return json.loads(str(file["meta"])), *groups
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(
            f"The checkpoint {path} does not load ({type(error).__name__}: {error}). Delete it: its run starts again."
        ) from error


def assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# Rows: one JSON line a run, appended and never edited.


def check_writable(path):
    """Creates the file of rows where there is none; an error if rows could not be appended to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise OSError(
            f"--results must be a file that can be appended to. Received: {path} ({error.strerror}). Name another file."
        ) from error


def read_rows(path):
    """Returns the rows of a file; a last line that a crash cut short is named and left out."""
    lines = pathlib.Path(path).read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not a row: {error}. Restore or delete the line.") from error
            print(f"{path}: the last line was cut short and is left out; its run is done again.", file=sys.stderr)
    return rows


def append_row(path, row):
    """Appends one line in one write; a last line that a crash cut short makes room for it."""
    with open(path, "r+b") as file:
        *_, tail = content = file.read().split(b"\n")
        if tail and not _is_json(tail):
            file.truncate(sum(map(len, content)) + len(content) - 1 - len(tail))
            tail = b""
        file.seek(0, os.SEEK_END)
        file.write((b"\n" if tail else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_json(text):
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


@functools.cache
def provenance():
    """Returns what a row says about where it comes from."""
    versions = {
        "python": platform.python_version(),
        "kerascompress": kc.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
    for package in ("tensorflow", "jax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device(), "versions": versions, "commit": commit()}


def on_gpu():
    return keras.distribution.list_devices()[0].startswith("gpu")


def device():
    """Returns the name of the device that runs train on."""
    if not on_gpu():
        return f"CPU, {os.cpu_count()} cores"
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    return tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])["device_name"]


def commit():
    """Returns the commit of this repository, "-dirty" where code differs from it, or None outside of one."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy may lie in some other repository
        changed = git("status", "--porcelain", "--", ":/kerascompress", ":/experiments/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# Progress


def progress_bar(epochs):
    """A bar on a terminal; in a log, a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        total=epochs,
        unit="epoch",
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else 30,
        ncols=100,
    )


class _Lines:
    """Standard error, with the bar's carriage returns made into new lines."""

    def write(self, text):
        sys.stderr.write(text.replace("\r", "\n"))

    def flush(self):
        sys.stderr.flush()
