"""Runs, the rows that they leave, and where both are kept."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides the outcome of a run, which is its key: the same key gives the same row.

    A field that came in later has what held before as its default: older rows lack it.
    """

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
    augmenter: str = "kerascompress"
    strong: float | None = None  # magnitude of a scheme's strong augmentation
    teacher: str | None = None  # who distils
    image_size: int | None = None  # side in pixels; None is the data set's
    schedule: str = "paper"  # of the learning rate
    carrier: str = "wrapper"  # of the masks
    evaluate_every: int = 1  # epochs from one look at the validation images to the next
    target: float | None = None  # set-point of a magnitude that finds itself
    step: float | None = None  # how far it moves in an epoch
    path: str | None = None  # ratios and magnitudes that led here, where they are not the paper's
    content: str | None = None  # of the folder, where images lie in files: how many classes, and a checksum
    augment_in: str = "model"  # where RandAugment acts
    crop_area: float | None = None  # the least share of an image in a file that a random crop keeps; None is .08

    # Not of the key: where things are, what must be done before, and for how many epochs this run itself trains.
    data_dir: str | None = dataclasses.field(default=None, compare=False)
    skip_damaged: bool = dataclasses.field(default=False, compare=False)
    checkpoints: str | None = dataclasses.field(default=None, compare=False)
    devices: int = dataclasses.field(default=1, compare=False)  # among which a training is shared out
    after: "Run | None" = dataclasses.field(default=None, compare=False)
    work: int | None = dataclasses.field(default=None, compare=False)

    @property
    def key(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}

    @property
    def folder(self):
        """Where the checkpoint of this run lies: a folder of its own, named for its key."""
        key = {name: value for name, value in self.key.items() if name not in BEFORE or BEFORE[name] != value}
        key = {name: float(v) if type(v) is int else v for name, v in key.items()}  # 14 and 14.0 are one magnitude
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{self.figure},{self.dataset},{self.model},arm={self.arm[:120]},p={self.sparsity:g},seed={self.seed}"
        return pathlib.Path(self.checkpoints) / f"{name},{digest}"

    def __str__(self):
        return f"{self.arm} p={self.sparsity:g} seed {self.seed}"


BEFORE = {
    field.name: field.default
    for field in dataclasses.fields(Run)
    if field.compare and field.default is not dataclasses.MISSING
}


# Rows: one JSON line a run, appended and never edited.


def find(rows, run):
    """Returns the row of a finished run, or None."""
    return next((row for row in rows if run.key.items() <= (BEFORE | row).items()), None)


@contextlib.contextmanager
def locked(path):
    """Opens a file to read it and append to it, with nobody else doing so at the same time."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes when the file is closed, also that of a killed process
        file.seek(0)
        yield file


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


def append_row(path, row, run=None):
    """Appends one line in one write, unless `run` has a row there by now; returns the row that counts.

    What follows the last whole line, such as one that a crash cut short, makes room.
    """
    try:
        with locked(path) as file:
            lines = file.read().split(b"\n")
            while lines and not _is_json(lines[-1]):
                lines.pop()
            found = find(map(json.loads, lines), run) if run else None
            if found is None:
                file.truncate(len(b"\n".join(lines)))
                file.write((b"\n" if lines else b"") + json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            return found or row
    except OSError as error:
        error.filename = str(path)  # which an error in writing does not name
        error.add_note("The row could not be appended. Nothing else is lost: mend that and run the same command again.")
        raise


def _is_json(text):
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


@functools.cache
def provenance():
    """Returns what a row says about where it comes from."""
    import keras  # here, as rows can be read without it

    import kerascompress as kc

    versions = {
        "python": platform.python_version(),
        "kerascompress": kc.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
    for package in ("tensorflow", "jax", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device(), "versions": versions, "commit": commit()}


def cores():
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def on_gpu():
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    return keras.distribution.list_devices()[0].startswith("gpu")


def device():
    """Returns the name of the device that runs train on."""
    if not on_gpu():
        return f"CPU, {os.cpu_count()} cores"
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name()
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
