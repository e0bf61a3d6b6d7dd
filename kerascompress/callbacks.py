"""Callbacks: they carry schedules through a training, and show what it does.

The schedules themselves are arithmetic of the step, see `schedules`.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from kerascompress.pruning import PruneLowMagnitude, _numpy, _wrappers, sparsity, update_global_masks
from kerascompress.schedules import evaluate


class StepCallback(keras.callbacks.Callback):
    """A callback with one hook, `on_step`, that is told how many updates the optimizer has done.

    Batches are counted here instead of reading `optimizer.iterations` after each of them, because on the JAX backend a
    look at the model inside an epoch brings its whole state back out of the training loop. For the same reason a
    subclass touches `self.model` only when it is about to read or assign a variable, and then must.
    """

    def on_step(self, step: int) -> None:
        """Called with the optimizer updates done: when training begins, then after every call of the train step."""

    def on_train_begin(self, logs=None):
        self._uncounted = self._batches_of_epoch = 0
        self._counted = self._read_batches()
        self._batches = self._counted
        self.on_step(self._batches // self._accumulation)

    def on_epoch_begin(self, epoch, logs=None):
        counted = self._read_batches()
        if counted == self._counted:  # the model is trained by another optimizer than its own, or in a loop without one
            self._uncounted += self._batches_of_epoch
        self._counted, self._batches_of_epoch = counted, 0
        self._batches = counted + self._uncounted

    def on_train_batch_end(self, batch, logs=None):
        self._batches_of_epoch = batch + 1
        self.on_step((self._batches + self._batches_of_epoch) // self._accumulation)

    def _read_batches(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # under a loss scale
        self._accumulation = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        # `iterations` counts updates; this, the batches that were accumulated into them.
        return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer._iterations))


class UpdatePruningStep(StepCallback):
    """Drives the pruned layers of a model through its training: required in `fit`, as in tfmot.

    Counts the optimizer's updates and, whenever a step at which a schedule prunes lies between the last batch and this
    one, recomputes the masks; so `steps_per_execution` may be anything. If the schedule has an `end_step`, there is an
    update at that very step even when the frequency misses it. Step 0 lies before the first batch. A model that was
    saved and loaded goes on where it was.

    Example:
        >>> import keras, numpy as np, kerascompress as kc
        >>> dense = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> pruned = kc.prune_low_magnitude(dense, pruning_schedule=kc.ConstantSparsity(0.75, begin_step=0))
        >>> pruned.compile("sgd", "mse")
        >>> images, targets = np.ones((16, 8), "float32"), np.ones((16, 4), "float32")
        >>> _ = pruned.fit(images, targets, verbose=0, callbacks=[kc.UpdatePruningStep()])
        >>> kc.sparsity(pruned)
        0.75
    """

    def on_train_begin(self, logs=None):
        self._groups: dict[Any, list[PruneLowMagnitude]] = {}
        for wrapper in _wrappers(self.model):
            wrapper._is_driven = True
            if wrapper.built:
                wrapper.sync_step()
            self._groups.setdefault(_group(wrapper), []).append(wrapper)
        if not self._groups:
            warnings.warn(f"`UpdatePruningStep`: model {self.model.name!r} has no pruned layer to drive.", stacklevel=2)
        self._optimizer_step: int | None = None
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._optimizer_step = self._batches // self._accumulation
        for wrappers in self._groups.values():
            for wrapper in wrappers:
                if wrapper.built:
                    wrapper.sync_step()  # a callback after this one may have restored weights

    def on_step(self, step):
        updates = 0 if self._optimizer_step is None else step - self._optimizer_step
        self._optimizer_step = step
        for wrappers in self._groups.values():
            if not all(wrapper.built for wrapper in wrappers):
                continue  # a model without an input shape is built by its first batch; step 0 is then made up for
            last = wrappers[0].step
            now = max(last, 0) + updates
            for wrapper in wrappers:
                wrapper.step = now
            self._maybe_update(wrappers, last, now)

    def on_epoch_end(self, epoch, logs=None):
        _ = self.model  # on JAX: brings the state back before it is changed
        for wrappers in self._groups.values():
            for wrapper in wrappers:
                wrapper.settle()

    def on_train_end(self, logs=None):
        self.on_epoch_end(None)

    def _maybe_update(self, wrappers, last: int, now: int) -> None:
        """Updates the masks if a scheduled step lies in (last, now]."""
        schedule = wrappers[0].pruning_schedule
        if wrappers[0].sparsity_m_by_n:
            due = (0, 0.0) if last < 0 else None
        else:
            due = _last_due(schedule, last, now)
        if due is None:
            return
        step, target = due
        if not 0 <= target < 1:
            raise ValueError(
                "A pruning schedule must return a sparsity in [0, 1), a fraction of zeros. "
                f"Received: {target} at step {step} from {schedule!r}. If yours are percent, divide them by 100."
            )
        _ = self.model  # on JAX: brings the state back before it is read and changed
        if wrappers[0].scope == "global":
            update_global_masks(wrappers, target)
        else:
            for wrapper in wrappers:
                wrapper.update_masks(target)
        for wrapper in wrappers:
            wrapper.settle()


class MagnitudeScheduler(StepCallback):
    """Assigns `schedule(step)` to the magnitude of an augmentation as a model trains; `step` counts optimizer updates.

    Args:
        augment: A layer with a scalar variable `magnitude`, such as `RandAugment`. It need not be a part of the model.
        schedule: `step -> magnitude` in [0, 30], such as `SparsityLinkedMagnitude`.

    Raises:
        TypeError: If `schedule` is not callable, or `augment` has no variable `magnitude`.
        ValueError: If the magnitude of `augment` is a `(low, high)` pair, or the schedule leaves [0, 30].

    Example:
        >>> augment = RandAugment(magnitude=14)
        >>> weaken = MagnitudeScheduler(augment, lambda step: 14 if step < 1000 else 4)
    """

    def __init__(self, augment: Any, schedule: Callable[[int], float]):
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                "`schedule` must be a function of the step that returns a magnitude. "
                f"Received: schedule={schedule!r}. For a constant, set `augment.magnitude` once."
            )
        if not hasattr(getattr(augment, "magnitude", None), "assign"):
            raise TypeError(
                "`augment` must have a variable `magnitude`, as `kerascompress.RandAugment` has. "
                f"Received: augment={augment!r}."
            )
        if tuple(augment.magnitude.shape) != ():
            raise ValueError(
                "`augment` draws its magnitude from a (low, high) pair, a schedule gives one number. Received: "
                f"augment={augment!r} with a magnitude of shape {tuple(augment.magnitude.shape)}. "
                "Construct it with one magnitude, or assign the pair in a callback of your own."
            )
        self.augment = augment
        self.schedule = schedule
        self._assigned: float | None = None

    def on_train_begin(self, logs=None):
        self._assigned = None  # somebody else may have assigned since the last fit
        super().on_train_begin(logs)

    def on_step(self, step: int) -> None:
        magnitude = float(self.schedule(step))
        if not 0 <= magnitude <= 30:
            raise ValueError(
                "`schedule` must return magnitudes in [0, 30], the paper's scale. "
                f"Received: {magnitude} at step {step}. If yours is a fraction, multiply it by 30."
            )
        if magnitude != self._assigned:
            _ = (
                self.model
            )  # brings the variables back from the train loop on the JAX backend, which would overwrite them
            self.augment.magnitude.assign(magnitude)
            self._assigned = magnitude


class PruningSummaries(keras.callbacks.TensorBoard):
    """TensorBoard with the sparsity and the threshold of every pruned kernel, and the sparsity of all, at each epoch.

    Args:
        log_dir: Folder for the event files; the pruning scalars go to its subfolder `metrics`, by the optimizer's step.
        update_freq, **kwargs: See `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: If `log_dir` is not a non-empty path.
        ImportError: If TensorBoard is not installed.

    Example:
        >>> import kerascompress as kc
        >>> callbacks = [kc.UpdatePruningStep(), kc.PruningSummaries(log_dir="logs")]
    """

    def __init__(self, log_dir: str, update_freq="epoch", **kwargs):
        if not isinstance(log_dir, (str, os.PathLike)) or not str(log_dir):
            raise ValueError(f"`log_dir` must be a non-empty path. Received: log_dir={log_dir!r}.")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError("`PruningSummaries` needs TensorBoard, which is not there: `pip install tensorboard`.")
        super().__init__(log_dir=str(log_dir), update_freq=update_freq, **kwargs)
        self._pruning_writer: Any = None

    def on_epoch_end(self, epoch, logs=None):
        import tensorflow as tf

        super().on_epoch_end(epoch, logs)
        if self._pruning_writer is None:
            self._pruning_writer = tf.summary.create_file_writer(os.path.join(self.log_dir, "metrics"))
        step = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        with self._pruning_writer.as_default():
            for wrapper in _wrappers(self.model):
                for kernel, mask, threshold in wrapper.pruning_vars:
                    tf.summary.scalar(f"{kernel.path}/sparsity", 1 - np.mean(_numpy(mask)), step=step)
                    tf.summary.scalar(f"{kernel.path}/threshold", float(_numpy(threshold)), step=step)
            tf.summary.scalar("sparsity", sparsity(self.model), step=step)
        self._pruning_writer.flush()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self._pruning_writer is not None:
            self._pruning_writer.close()
            self._pruning_writer = None


# --- helpers ---


def _last_due(schedule: Any, last: int, now: int) -> tuple[int, float] | None:
    """The last step in (last, now] at which the schedule prunes or ends, with its sparsity."""
    end_step = getattr(schedule, "end_step", -1)
    for step in range(now, last, -1):
        if type(schedule).__module__.startswith("tensorflow_model_optimization.") and step != end_step:
            # Asking tfmot costs a fraction of a millisecond each step; the same arithmetic on integers does not.
            past = step - schedule.begin_step
            if past < 0 or past % schedule.frequency or 0 <= end_step < step:
                continue
        should_prune, sparsity = evaluate(schedule, step)
        if should_prune or step == end_step:
            return step, sparsity
    return None


def _group(wrapper: PruneLowMagnitude) -> Any:
    """Wrappers whose masks are updated together: same schedule, scope, way of pruning, and step."""
    schedule: Any = wrapper.pruning_schedule
    config = repr(schedule.get_config()) if hasattr(schedule, "get_config") else id(schedule)
    return type(schedule), config, wrapper.scope, wrapper.sparsity_m_by_n is not None, wrapper.step
