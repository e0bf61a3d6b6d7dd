"""What is kept of a training: its state, so that a killed process goes on, and its best epoch."""

import json
import os
import time

import keras
import numpy as np

SAVE_EVERY = 30.0  # seconds from one state on the disk to the next
STATE, DONE = (
    "state.npz",
    "done.npz",
)  # one file each, replaced in one step: a killed process leaves one or the one before


def report(epochs, note=""):
    """Is told of every finished epoch; whoever shows progress puts another function here."""


class Keeper(keras.callbacks.Callback):
    """Keeps the state of a training, and the best of its states, in memory and now and then in a file."""

    def __init__(self, run, fitted, best_from):
        super().__init__()
        self.run, self.best_from = run, best_from
        self.fitted, self.variables = fitted, state_of(fitted)
        self.looks, self.best, self.epochs, self.seconds = [], [], 0, 0.0
        self.of_epochs = {"train": [], "magnitudes": []}

    def load(self):
        """Takes up what a killed process left."""
        path = self.run.folder / STATE
        if path.exists():
            history, state, self.best = load_arrays(path, "state", "best")
            check_backend(self.run, path, history)
            self.looks, self.epochs, self.seconds = history["looks"], history["epochs"], history["seconds"]
            self.of_epochs = history.get("of_epochs", self.of_epochs)  # older states lack it
            try:
                assign(self.variables, state)
            except ValueError as error:
                raise ValueError(
                    f"The checkpoint {path} is of another network or optimizer than {self.run} has now, as the code "
                    "has changed. Delete it: the run starts again."
                ) from error
            report(self.epochs, str(self.run))
        self.since = self.saved = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        _ = self.model  # on JAX: brings the state back before it is read
        self.epochs = epoch + 1
        self.of_epochs["train"].append(round(float(logs["accuracy"]), 6))
        self.of_epochs["magnitudes"].extend([round(float(logs["magnitude"]), 4)] if "magnitude" in logs else [])
        if "val_accuracy" in logs:
            self.looks.append([self.epochs, round(float(logs["val_accuracy"]), 6)])
            if self.epochs > self.best_from and self.epochs == self.best_epoch:
                self.best = numpy(self.variables)
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        if now - self.saved >= SAVE_EVERY and self.epochs < self.run.epochs:
            self.save()
            self.saved = now
        report(1, f"{self.run}: {self.looks[-1][1]:.3f}" if self.looks else str(self.run))

    def on_train_end(self, logs=None):
        _ = self.model
        self.save()  # evaluating on the test images takes its time, too

    def save(self):
        history = {"looks": self.looks, "epochs": self.epochs, "seconds": self.seconds, "of_epochs": self.of_epochs}
        history["backend"] = keras.backend.backend()
        save_arrays(self.run.folder / STATE, history, state=numpy(self.variables), best=self.best)

    @property
    def best_epoch(self):
        """The epoch, counted from 1, that is best on the validation images, the first of several."""
        return max((look for look in self.looks if look[0] > self.best_from), key=lambda look: look[1])[0]

    def result(self, data, accuracy):
        """Returns what a row says; `accuracy(split)` is asked of the best and of the last epoch, which stays."""
        validation = dict(self.looks)
        test = accuracy(data.test)
        labels = data.test[1]
        test_best = test
        if self.best_epoch < self.run.epochs:
            last = numpy(self.variables)
            assign(self.variables, self.best)
            test_best = accuracy(data.test)
            assign(self.variables, last)
        return {
            "validation_last": validation[self.run.epochs],
            "validation_best": validation[self.best_epoch],
            "best_epoch": self.best_epoch,
            "test_best": test_best,
            "test_last": test,
            "chance": round(float(np.max(np.bincount(labels)) / len(labels)), 6),  # of the best constant guess
            "train_last": (self.of_epochs["train"] or [None])[-1],
            **({"magnitudes": self.of_epochs["magnitudes"]} if self.of_epochs["magnitudes"] else {}),
            "seconds": round(self.seconds, 1),
            "images": {name: len(getattr(data, name)[1]) for name in ("train", "validation", "test")},
        }


def check_backend(run, path, kept):
    """Raises an error if what was kept of a run is of another backend: it would not be the same run."""
    ours = keras.backend.backend()
    if (theirs := kept.get("backend", ours)) != ours:
        raise ValueError(
            f"{run} was begun on the backend {theirs}. Received: {ours}. Go on with KERAS_BACKEND={theirs}, or delete "
            f"{path}: the run starts again."
        )


def state_of(fitted):
    return [*fitted.variables, *fitted.optimizer.variables]


def save_arrays(path, meta, **groups):
    """Writes JSON-able `meta` and groups of arrays; never a half-written file under the final name."""
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


def numpy(variables):
    return [keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)) for variable in variables]
