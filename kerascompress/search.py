"""The search for the magnitude of a network (Equation 3): all of them, or the promising ones for longer and longer."""

import dataclasses
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kerascompress import losses

NEAREST = 13  # so many magnitudes around the prediction are tried: 6 on either side, if they are whole numbers
METRICS = ("accuracy", "cross_entropy")

Key = tuple[float | None, int | None, int | None]  # magnitude, epochs, seed


@dataclasses.dataclass(frozen=True)
class MagnitudeSearch:
    """What `search_magnitude` found.

    Attributes:
        optimal: The magnitude with the highest mean score, the smallest of several. It is never `None`: whether
            augmentation helps at all, `scores[None]` tells.
        maximal: The largest magnitude, of those tried, whose mean score is not below that of no RandAugment after as
            many epochs; `None` if there is none, and then the network does better without.
        scores: `{magnitude: (score with each seed, ...)}` after the longest training that the magnitude got. The key
            `None` is no RandAugment.
        trials: `{(magnitude, epochs, seed): score}`, all of them, in the order in which they were asked for.
        epochs_spent: Training epochs of all trials, those from a file included; `None` where `epochs` was not given.
        epochs_exhaustive: What training every magnitude to the end costs.
    """

    optimal: float
    maximal: float | None
    scores: dict[float | None, tuple[float, ...]]
    trials: dict[Key, float]
    epochs_spent: int | None
    epochs_exhaustive: int | None

    def __str__(self) -> str:
        lines = [f"optimal magnitude {self.optimal}, maximal magnitude {self.maximal}"]
        if self.epochs_spent is not None:
            lines[0] += f"; {self.epochs_spent} epochs, an exhaustive search takes {self.epochs_exhaustive}"
        for magnitude, scores in self.scores.items():
            deviation = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
            lines.append(f"M = {magnitude!s:>4}: {statistics.fmean(scores):.4f}{deviation} ({len(scores)})")
        return "\n".join(lines)


def search_magnitude(
    train_and_score: Callable[..., float],
    magnitudes: Iterable[float] = range(31),
    *,
    epochs: int | None = None,
    seeds: Sequence[int] | None = None,
    halving: bool = False,
    sparsity: float | None = None,
    file: str | os.PathLike | None = None,
    verbose: int = 1,
) -> MagnitudeSearch:
    """Finds the optimal and the maximal magnitude of a network by training it with each (Equation 3).

        M* = argmax_M score(W*(M)),    W*(M) = argmin_W L_CE(f(A(X_train; M); W), Y_train)

    The network is trained without RandAugment too (magnitude `None`), as often as with any magnitude: the maximal
    magnitude is the largest that does not harm compared with it.

    With `halving`, all magnitudes are trained for a fraction of the epochs; the better third is trained anew, three
    times as long; and so on, until a few have had all epochs. Short training favours weak augmentation, so the cheaper
    search errs to smaller magnitudes, the maximal one above all. With `sparsity` it begins with the 13 magnitudes
    around M = 14.6 − 17 p, the line through the paper's optima for ResNet-20 on CIFAR-100, and warns if it ends at
    their edge.

    Args:
        train_and_score: `train_and_score(magnitude)` trains a new network and returns its score on held-out images: one
            number, higher is better, never from the test set. It also gets `epochs=` if `epochs` is given here, and
            `seed=` if `seeds` are. What the score is decides what is searched for, see `validation_score`: accuracy on
            clean images, as in Figure 1, or minus the cross-entropy on augmented images, as Equation 3 is printed. On
            augmented images the task itself gets harder with M, and is easiest without RandAugment.
        magnitudes: To choose from, numbers in [0, 30].
        epochs: Of one whole training; needed for `halving`, and for the count of epochs.
        seeds: Every magnitude is trained with each; mean scores are compared. A difference that is smaller than the
            standard deviation over seeds means little.
        halving: Whether to stop most magnitudes early.
        sparsity: Fraction of zeros in [0, 1) of the network, to begin near its likely optimum. For `halving` alone.
        file: A JSON file that keeps every finished score, and from which they are taken when the search is started
            again after a crash. One file for one network and data set.
        verbose: 0 is silent, 1 prints a line for every finished training.

    Returns:
        A `MagnitudeSearch` with `optimal`, `maximal`, `scores`; print it for a table.

    Raises:
        ValueError: If an argument is out of range, if every magnitude that got all epochs diverged, or if `file` is no
            such file.
        TypeError: If `train_and_score` does not return a number.

    Example:
        >>> import kerascompress as kc
        >>> accuracy = {None: 0.688, 0: 0.695, 7: 0.699, 14: 0.703, 22: 0.689, 30: 0.683}  # instead of a training
        >>> result = kc.search_magnitude(accuracy.get, [0, 7, 14, 22, 30], verbose=0)
        >>> result.optimal, result.maximal
        (14, 22)

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Equation 3 and Section IV-A, Figure 1.
        Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016 (halving).
    """
    choice = candidates = _check_magnitudes(magnitudes)
    each_seed = _check_settings(epochs, seeds, halving, sparsity)
    epochs = epochs and int(epochs)
    if sparsity is not None:
        line = min(max(14.6 - 17 * sparsity, 0), 30)
        candidates = sorted(choice, key=lambda magnitude: abs(magnitude - line))[:NEAREST]
    rungs = _rungs(len(candidates), epochs) if halving and epochs else [(len(candidates), epochs)]
    planned = sum(count + 1 for count, _ in rungs) * len(each_seed)
    trials = _Trials(train_and_score, each_seed, file, planned if verbose else None)
    mean = trials.mean
    longest: dict[float | None, int | None] = {}
    for count, budget in rungs:
        candidates = candidates[:count]
        for magnitude in (None, *candidates):
            longest[magnitude] = budget
            trials.run(magnitude, budget)
        # the better ones first, and of equals the weaker augmentation
        candidates = sorted(candidates, key=lambda magnitude: (-mean(magnitude, budget), magnitude))
    optimal = candidates[0]
    if mean(optimal, epochs) == -math.inf:
        raise ValueError(
            "Training diverged at every magnitude that got all epochs, so none is best. "
            f"Received: the scores {trials.scores}. "
            "Try a lower learning rate, and look at what `train_and_score` returns."
        )
    tried = sorted(each for each in longest if each is not None)
    finite = [each for each in tried if mean(each, longest[each]) > -math.inf]
    harmless = [each for each in finite if mean(each, longest[each]) >= mean(None, longest[each])]
    if (optimal == tried[0] != choice[0]) or (optimal == tried[-1] != choice[-1]):
        warnings.warn(
            f"The optimal magnitude {optimal} lies at the edge of what was tried, {tried[0]} to {tried[-1]}: this "
            "network is not like the one behind the prediction. Search again without `sparsity`.",
            stacklevel=2,
        )
    elif harmless and harmless[-1] == tried[-1] != choice[-1]:
        warnings.warn(
            f"The maximal magnitude {harmless[-1]} is the largest that was tried, of those around the prediction: a "
            "larger one may do no harm either. Search again without `sparsity`.",
            stacklevel=2,
        )
    return MagnitudeSearch(
        optimal=optimal,
        maximal=max(harmless, default=None),
        scores={each: tuple(trials.of(each, longest[each])) for each in (None, *tried)},
        trials=trials.scores,
        epochs_spent=None if epochs is None else sum(budget or 0 for _, budget, _ in trials.scores),
        epochs_exhaustive=None if epochs is None else (len(choice) + 1) * epochs * len(each_seed),
    )


def validation_score(
    model: keras.Model,
    images: Any,
    labels: Any = None,
    *,
    augment: keras.Layer | None = None,
    metric: str = "accuracy",
    batch_size: int = 256,
) -> float:
    """The score of a classifier on held-out images, clean or augmented; higher is better.

    With `augment` and `metric="cross_entropy"` it is minus the objective of Equation 3,
    L_CE(f(A(X_val; M); W*), Y_val).

    Args:
        model: The network without its augmentation, from images to logits `(batch, classes)`; for `"accuracy"`,
            probabilities will do.
        images: `(batch, height, width, channels)`, held out from training; or a dataset of batches of images and labels
            that ends: `tf.data.Dataset`, `keras.utils.PyDataset`, a Torch `DataLoader`.
        labels: int `(batch,)` or `(batch, 1)`; not given beside a dataset.
        augment: A layer that is called with `training=True`, such as `RandAugment` at the magnitude of the training.
            Make it anew with a fixed seed for each call, so that all networks are scored on the same draws. `None` is
            clean images.
        metric: `"accuracy"`, in [0, 1], or `"cross_entropy"`, minus its mean over the images, in nats.
        batch_size: Images at a time; a dataset has its own.

    Returns:
        The score; NaN where an output is, as of a network that has diverged.

    Raises:
        ValueError: If `metric` is another, there is no image, no label for every image or one that is no class, the
            model has another output, or one that ends in a softmax or sigmoid is asked for its cross-entropy.

    Example:
        >>> import keras, numpy as np, kerascompress as kc
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.GlobalMaxPooling2D(), keras.layers.ReLU()])
        >>> images, labels = np.ones((8, 4, 4, 3), "uint8"), np.zeros(8, int)
        >>> kc.validation_score(model, images, labels, augment=kc.RandAugment(14, seed=0))
        1.0

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Equation 3.
    """
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {METRICS}. Received: metric={metric!r}.")
    if metric == "cross_entropy":
        losses.check_logits("model", model)
    scores = []
    for batch, classes in _batches(images, labels, batch_size):
        logits = model.predict_on_batch(batch if augment is None else augment(batch, training=True))
        _check_classifier(model, logits, classes)
        logits = np.asarray(logits, "float64")
        if metric == "accuracy":
            scores.append(np.where(np.isnan(logits).any(-1), np.nan, logits.argmax(-1) == classes))
        else:
            logits -= logits.max(-1, keepdims=True)
            scores.append(logits[np.arange(len(classes)), classes] - np.log(np.exp(logits).sum(-1)))
    if not scores:
        raise ValueError("`images` must have at least one image. Received: none.")
    return float(np.mean(np.concatenate(scores)))


# --- helpers ---


class _Trials:
    """The scores of trainings, each with every seed; what a file knows by now is not trained again."""

    def __init__(self, train_and_score, seeds, file, planned):
        self.train_and_score, self.seeds, self.file, self.planned = train_and_score, seeds, file, planned
        self.known = _load(file)
        self.scores: dict[Key, float] = {}

    def run(self, magnitude, budget):
        for seed in self.seeds:
            key = (magnitude, budget, seed)
            settings = {name: value for name, value in (("epochs", budget), ("seed", seed)) if value is not None}
            if key not in self.known:
                score = _number(self.train_and_score(magnitude, **settings), magnitude)
                self.known |= _load(self.file) | {key: score}  # another search may have written meanwhile
                _save(self.file, self.known)
            score = self.scores[key] = self.known[key]
            if self.planned:
                said = "".join(f", {name} {value}" for name, value in settings.items())
                print(f"[{len(self.scores)}/{self.planned}] M = {magnitude}{said}: {score:.4f}", flush=True)
            if not math.isfinite(score):
                warnings.warn(f"Training at magnitude {magnitude} diverged: its score is {score}.", stacklevel=3)

    def of(self, magnitude, budget):
        return [self.scores[magnitude, budget, seed] for seed in self.seeds]

    def mean(self, magnitude, budget):
        scores = self.of(magnitude, budget)
        return statistics.fmean(scores) if all(map(math.isfinite, scores)) else -math.inf


def _batches(images, labels, batch_size):
    """Yields the images and the labels, int `(batch,)`, of arrays or of a dataset."""
    if labels is not None:
        labels = _classes(labels, len(images))
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size], labels[start : start + batch_size]
        return
    steps = range(images.num_batches) if isinstance(images, keras.utils.PyDataset) else None
    for batch in images if steps is None else map(images.__getitem__, steps):
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(
                "`images` without `labels` must be a dataset of batches `(images, labels)`. "
                f"Received: {type(images).__name__} whose batches are of type {type(batch).__name__}."
            )
        if any(each is not None for each in batch[2:]):
            raise ValueError(
                "`validation_score` counts every image alike. Received: batches with sample weights. Leave them out: "
                "`dataset.map(lambda images, labels, weights: (images, labels))`."
            )
        yield np.asarray(batch[0]), _classes(batch[1], len(batch[0]))


def _classes(labels, count):
    labels = np.asarray(labels)
    if labels.shape not in ((count,), (count, 1)):
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        raise ValueError(
            "`labels` must be integers of shape (batch,), one for each image. "
            f"Received: labels of shape {labels.shape} for {count} images."
            + " For one-hot labels, use `argmax(-1)`."
            * one_hot
        )
    return labels.reshape(-1)


def _check_classifier(model, logits, labels):
    classes: Any = getattr(logits, "shape", ())[1:]
    if len(classes) != 1 or classes[0] < 2:
        raise ValueError(
            "`model` must have one output, (batch, classes), of two classes or more; of another, compute a score of "
            f"your own. Received: {model.name!r} with outputs "
            f"{keras.tree.map_structure(lambda each: (None, *each.shape[1:]), logits)}."
        )
    if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < classes[0]:
        raise ValueError(
            f"`labels` must be integers from 0 to {classes[0] - 1}, as the model has {classes[0]} classes. "
            f"Received: {labels.dtype} labels from {labels.min()} to {labels.max()}."
        )


def _rungs(count: int, epochs: int) -> list[tuple[int, int]]:
    """`[(magnitudes, epochs), ...]`: a third of the magnitudes goes on, three times as long; the last rung is whole."""
    last = 0
    while 3 ** (last + 1) <= min(count, epochs):
        last += 1
    return [(math.ceil(count / 3**rung), round(epochs / 3 ** (last - rung))) for rung in range(last + 1)]


def _number(score: Any, magnitude: float | None) -> float:
    try:
        return float(score)
    except (TypeError, ValueError):
        raise TypeError(
            "`train_and_score` must return one number, higher is better, such as the accuracy on held-out images. "
            f"Received: {score!r} of type {type(score).__name__} at magnitude {magnitude}."
        ) from None


def _check_magnitudes(magnitudes: Iterable[float]) -> list[float]:
    given = list(magnitudes)
    if not given or not all(isinstance(each, (int, float, np.number)) and 0 <= each <= 30 for each in given):
        raise ValueError(
            "`magnitudes` must be at least one number in [0, 30], the paper's scale; no RandAugment is always tried. "
            f"Received: magnitudes={given}. If yours are fractions, multiply them by 30."
        )
    return sorted({int(each) if each == int(each) else float(each) for each in given})


def _check_settings(epochs, seeds, halving, sparsity) -> tuple[int | None, ...]:
    if epochs is not None and (not isinstance(epochs, int | np.integer) or epochs < 1):
        raise ValueError(f"`epochs` must be a whole number of at least 1. Received: epochs={epochs}.")
    if halving and epochs is None:
        raise ValueError("`halving` needs `epochs`, the length of a whole training. Received: epochs=None.")
    if sparsity is not None and not (halving and 0 <= sparsity < 1):
        raise ValueError(
            "`sparsity` is a fraction of zeros in [0, 1), and goes with `halving=True`. "
            f"Received: sparsity={sparsity}, halving={halving}. If yours are percent, divide them by 100."
        )
    if seeds is None:
        return (None,)
    if isinstance(seeds, int) or not len(seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different integers, such as range(3). Received: seeds={seeds}.")
    return tuple(int(seed) for seed in seeds)


def _load(file: str | os.PathLike | None) -> dict[Key, float]:
    if file is None or not Path(file).exists():
        return {}
    try:
        rows = json.loads(Path(file).read_text())
        return {
            (row["magnitude"], row["epochs"], row["seed"]): math.nan if row["score"] is None else row["score"]
            for row in rows
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`file` must be one that `search_magnitude` wrote, or a new one. Received: file={str(file)!r}, in which "
            f"this is wrong: {error!r}."
        ) from None


def _save(file: str | os.PathLike | None, known: dict[Key, float]) -> None:
    if file is None:
        return
    rows = [
        {"magnitude": magnitude, "epochs": epochs, "seed": seed, "score": score if math.isfinite(score) else None}
        for (magnitude, epochs, seed), score in known.items()
    ]
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}.part")  # a crash while it is written leaves the scores before it
    whole.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    whole.replace(path)
