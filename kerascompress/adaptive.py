"""A magnitude that finds itself: neither a search nor a table, and nothing that knows the sparsity."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from kerascompress import graph
from kerascompress.augment import check_driven, check_in_model
from kerascompress.masks import as_array

TARGETS = {"gap": 0.1, "accuracy": None}
NAMES = ("accuracy", "acc", "binaryaccuracy", "categoricalaccuracy", "sparsecategoricalaccuracy")  # as Keras reads them
CLASSES = (
    keras.metrics.Accuracy,
    keras.metrics.BinaryAccuracy,
    keras.metrics.CategoricalAccuracy,
    keras.metrics.SparseCategoricalAccuracy,
)


class AdaptiveMagnitude(keras.callbacks.Callback):
    """Moves the magnitude of an augmentation by what training itself shows, for any model, pruned or not.

    After an epoch, `M <- M + speed` if the signal is above its set-point, `M - speed` if it is below. The signal is the
    gap between the accuracy on the augmented training images and the one on held-out images, which `fit` computes
    anyway. A network that fits augmented images better than held-out ones has room for stronger augmentation; one that
    has lost its weights has not, and the magnitude falls with them.

    M lies in [0, 30], and one move below 0 is off: `RandAugment` then leaves images alone, which at M = 0 it does not
    (AutoContrast and Equalize have no strength). At high sparsity, where no augmentation is best, that is where M ends;
    where the signal crosses its set-point between off and 0, M alternates.

    The gap is no larger than what is missing to 100 % on held-out images: where these reach 90 %, the default set-point
    lowers M until it is off. Give a `target` below the gap that the network has without augmentation.

    M is a function of itself and the signal, and is a variable of the layer: whoever saves the model has saved all. Put
    what saves or shows epochs (`BackupAndRestore`, `ModelCheckpoint`, `TensorBoard`) behind this callback, which also
    logs `magnitude`, with which the epoch was trained. A layer outside of the model, as in `tf.data`, is not saved with
    it.

    The accuracy is the one among the model's `metrics`, whatever its name. If there is none, one is measured while
    `fit` runs, without weights of samples or classes, for integer or one-hot labels, where the loss is a categorical
    cross-entropy or KL, or one of your own.

    Args:
        augment: A layer with a scalar variable `magnitude` that is off below 0, such as `RandAugment`, in the model or,
            if there is no augmentation in it, outside. Where its magnitude stands, it begins: `RandAugment(0)` for a
            new network.
        signal: `"gap"`; or `"accuracy"`, on the augmented training images; or a function of the epoch's logs, such as
            `lambda logs: logs["accuracy"] - logs["val_accuracy"]`, that rises with what the network could still take.
        target: The set-point, in (-1, 1) unless `signal` is a function. Default: 0.1 for the gap,
            which of 0.1, 0.15 and 0.2, and of 0.4 and 0.6 of the accuracy, lost least against the best constant
            magnitude on CIFAR-10 with 500 and 2,000 images, dense and pruned (experiments/README.md; three seeds;
            README has what it loses elsewhere). An accuracy has no default, as its set-point depends on the number of
            classes.
        speed: How far M moves at a time, in [0.001, 30]. The default goes from 0 to 15 in 30 epochs.
        frequency: Epochs from one move to the next: `validation_freq` of `fit`.

    Raises:
        TypeError: If `augment` has no variable `magnitude`, or `signal` is neither a name nor callable.
        ValueError: If an argument is out of range, the magnitude of `augment` is a `(low, high)` pair, training begins
            with a model that does not contain `augment`, but another augmentation, or that has no accuracy
            and a loss that is not of classes, or an epoch that moves M has no signal or several accuracies.

    Example:
        >>> import keras, kerascompress as kc
        >>> augment = kc.RandAugment(magnitude=0, seed=0)
        >>> trainer = keras.Sequential([augment, kc.models.resnet(8, 10, width=4)])
        >>> trainer.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        >>> callbacks = [kc.AdaptiveMagnitude(augment)]  # in fit(..., validation_data=..., callbacks=callbacks)

    Reference:
        Karras et al., "Training Generative Adversarial Networks with Limited Data" (StyleGAN2-ADA), 2020, Section 3:
        the probability of augmenting moves by the sign of an indicator of overfitting minus 0.6.
    """

    def __init__(
        self,
        augment: Any,
        signal: str | Callable[[dict[str, float]], float] = "gap",
        target: float | None = None,
        *,
        speed: float = 0.5,
        frequency: int = 1,
    ):
        super().__init__()
        check_driven(augment)
        if not callable(signal) and signal not in TARGETS:
            raise TypeError(
                '`signal` must be "gap", "accuracy" or a function of the logs of an epoch. '
                f"Received: signal={signal!r}."
            )
        target = TARGETS.get(signal) if target is None and isinstance(signal, str) else target
        if target is None or not math.isfinite(target):
            raise ValueError(
                "`target` must be a number, the set-point of the signal; only the gap has a default. "
                f"Received: target={target}, signal={signal!r}."
            )
        if signal in TARGETS and not -1 < target < 1:
            raise ValueError(
                "`target` must be a fraction, as accuracies are. "
                f"Received: target={target}. If yours is in percent, divide it by 100."
            )
        if not 0.001 <= speed <= 30:
            raise ValueError(f"`speed` must be in [0.001, 30], on the scale of magnitudes. Received: speed={speed}.")
        if not isinstance(frequency, int | np.integer) or frequency < 1:
            raise ValueError(f"`frequency` must be a whole number of epochs, at least 1. Received: {frequency}.")
        self.augment, self.signal, self.target = augment, signal, target
        self.speed, self.frequency = speed, frequency

    def set_model(self, model):
        super().set_model(model)
        if isinstance(self.signal, str):
            graph.remove_metric(model)  # that of a training that was interrupted
            if not _accuracies(model):
                _check_classifies(model)
                # weights of the training images alone, such as `class_weight`, would be taken for a gap
                name = "unweighted_accuracy" if graph.weighted_metrics(model) else "accuracy"
                graph.add_metric(model, _Accuracy(name))  # now, as the step is about to be compiled
                if not _accuracies(model):
                    graph.remove_metric(model)
                    raise ValueError(
                        f"`AdaptiveMagnitude` cannot measure an accuracy in {model.name!r}, whose class has `metrics` "
                        f"of its own, {[metric.name for metric in model.metrics]}. Add an accuracy there, or pass a "
                        "function of the logs as `signal`."
                    )

    _trains = False

    def on_train_begin(self, logs=None):
        self._trains = True
        check_in_model(self.augment, self.model)
        if isinstance(self.signal, str) and not _accuracies(self.model):
            raise ValueError(
                "The accuracy that an earlier training has measured is no longer in the model. Received: a "
                "`CallbackList` of that training. Pass `callbacks` as a list."
            )

    def on_test_end(self, logs=None):
        if not self._trains:  # it has been passed to `evaluate`
            self.on_train_end()

    def on_predict_end(self, logs=None):
        self.on_test_end()

    def on_train_end(self, logs=None):
        self._trains = False
        if isinstance(self.signal, str):
            _ = self.model  # on JAX: brings the state back, which has that of the metric
            graph.remove_metric(self.model)

    def on_epoch_end(self, epoch, logs=None):
        _ = self.model  # on JAX: brings the state back before it is read and changed
        logs = {} if logs is None else logs
        magnitude = round(float(as_array(self.augment.magnitude)), 4)
        if (epoch + 1) % self.frequency == 0:
            signal = self._read(epoch, logs)
            moved = magnitude + self.speed * ((signal > self.target) - (signal < self.target))
            # rounded: tenths that add up to just below 0 would be off
            self.augment.magnitude.assign(min(max(round(moved, 4), -self.speed), 30.0))
        logs["magnitude"] = magnitude

    def _read(self, epoch, logs) -> float:
        if callable(self.signal):
            signal = float(self.signal(logs))
        else:
            name = _name_in_logs(self.model, logs)
            signal = float(logs[name])
            if self.signal == "gap":
                if f"val_{name}" not in logs:
                    raise ValueError(
                        f"The gap needs a held-out accuracy, `val_{name}`, every {self.frequency} epoch(s). Received: "
                        f"{sorted(logs)} after epoch {epoch + 1}. Call fit with `validation_data` or "
                        "`validation_split`, and if it has a `validation_freq`, give that number as `frequency` (a "
                        "list of epochs needs a function of the logs as `signal`); or "
                        'take signal="accuracy" with a `target`.'
                    )
                signal -= float(logs[f"val_{name}"])
        if not math.isfinite(signal):
            raise ValueError(
                f"The signal must be a finite number. Received: {signal} after epoch {epoch + 1}, from {logs}. A "
                "`train_step` of your own measures an accuracy by `self.compute_metrics(x, y, y_pred)`."
            )
        return signal


class _Accuracy(keras.metrics.Mean):
    """The share of images whose largest output is their label's: integers, (batch,) or (batch, 1), or one-hot."""

    def result(self):
        return ops.where(ops.equal(self.count, 0), float("nan"), super().result())  # nobody has called it

    def update_state(self, y_true, y_pred, sample_weight=None):
        if isinstance(y_pred, dict | list | tuple) or len(y_pred.shape) != 2 or y_pred.shape[1] == 1:
            raise ValueError(
                "`AdaptiveMagnitude` knows the accuracy of one output, (batch, classes). Received: outputs "
                f"{keras.tree.map_structure(lambda each: tuple(each.shape), y_pred)}. Compile the model with the "
                "accuracy that you mean among its `metrics`, or pass a function of the logs as `signal`."
            )
        is_one_hot = len(y_true.shape) == 2 and y_true.shape[1] == y_pred.shape[1]
        labels = ops.argmax(y_true, axis=-1) if is_one_hot else ops.reshape(y_true, (-1,))
        hits = ops.equal(ops.cast(labels, "int32"), ops.cast(ops.argmax(y_pred, axis=-1), "int32"))
        return super().update_state(ops.cast(hits, "float32"))


def _check_classifies(model) -> None:
    loss = keras.losses.get(model.loss) if isinstance(model.loss, str) else model.loss
    kind = loss if hasattr(loss, "__name__") else type(loss)
    if (kind.__module__ or "").startswith("keras.") and not any(
        each in kind.__name__.lower() for each in ("categorical", "kl")
    ):
        raise ValueError(
            "`AdaptiveMagnitude` measures an accuracy itself where the loss is one of classes, such as "
            f"SparseCategoricalCrossentropy. Received: a model with loss={model.loss!r} and no accuracy. Compile it "
            "with the accuracy that you mean among its `metrics`, or pass a function of the logs as `signal`."
        )


def _accuracies(model) -> list[str]:
    """The names of the accuracies that a model computes."""
    metrics = {
        metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", "")): metric
        for metric in graph.metrics(model)
    }
    kinds = (*CLASSES, _Accuracy)
    return [each for each, of in metrics.items() if each.lower().replace("_", "") in NAMES or isinstance(of, kinds)]


def _name_in_logs(model, logs) -> str:
    """The name of the one accuracy among the logs; of several outputs, each has that of the output in front."""
    trained, accuracies = [name for name in logs if not name.startswith("val_")], _accuracies(model)
    found = [each for each in trained if each in accuracies]
    output = getattr(model, "output", None)
    outputs = output if isinstance(output, dict) else getattr(model, "output_names", None) or ()
    found = found or [each for each in trained if each in {f"{one}_{name}" for one in outputs for name in accuracies}]
    found = found or [each for each in trained if each.endswith(tuple(f"_{name}" for name in accuracies))]
    if len(found) != 1:
        raise ValueError(
            f"`AdaptiveMagnitude` needs one accuracy of the training images. Received: {found} among the logs "
            f"{sorted(logs)}. Pass a function of the logs as `signal`, such as "
            'lambda logs: logs["accuracy"] - logs["val_accuracy"], with its `target`.'
        )
    return found[0]
