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

from kerascompress import graph
from kerascompress.augment import check_driven, check_in_model
from kerascompress.masks import as_array, warn_of_zeros
from kerascompress.pruning import optimizers, pruning_vars, sparsity
from kerascompress.schedules import evaluate, last_due, warn_if_not_begun
from kerascompress.wrapper import PruneLowMagnitude, update_masks, wrappers_in


class StepCallback(keras.callbacks.Callback):
    """A callback with one hook, `on_step`, that is told the step of the model's clock: how many updates are done.

    There is one clock. It is the step that the masks follow: the `pruning_step` stored with pruned layers, or else the
    optimizer's `iterations`, which also move the masks of a `PruningOptimizer`. So pruned layers and what follows them
    stay in step through a second `compile` or a reload; a new optimizer without pruned layers begins at step 0.

    Batches are counted here instead of reading the clock after each of them, because on the JAX backend a look at the
    model inside an epoch brings its whole state back out of the training loop. For the same reason a subclass touches
    `self.model` only when it is about to read or assign a variable, and then must.

    In a training loop of one's own, call `set_model`, `on_train_begin`, for each epoch `on_epoch_begin`, then
    `on_train_batch_begin` or `on_train_batch_end` or both for each batch, and `on_epoch_end`; the number of the batch
    may be -1, as in tfmot. The hooks read and assign variables: a loop on JAX that keeps the state outside of them
    (`stateless_call`) has to bring it back before and to take it out again after; `PruningOptimizer` needs no hook.
    """

    _is_open = False  # between the begin and the end of a batch
    _hears_ends = False  # the loop tells the end of batches, not their begin alone

    def on_step(self, step: int) -> None:
        """Called with the updates done: when training begins, or another step was restored; after every train step."""

    def on_train_begin(self, logs=None):
        self._hears_ends = False
        self._rebase()
        self.on_step(self._base)

    def on_epoch_begin(self, epoch=-1, logs=None, *, batch=-1):
        self._batches_of_epoch = 0
        if _clock(self.model) != self._read:  # it moved; if not, the optimizer that trains is not the model's own
            counted = self._base + self._batches // self._accumulation
            self._rebase()
            if self._base != counted:  # a callback has restored another step
                self.on_step(self._base)

    def on_train_batch_begin(self, batch=-1, logs=None):
        if self._is_open:
            self._end(-1)
        self._is_open = True

    def on_train_batch_end(self, batch=-1, logs=None):
        self._hears_ends = True
        self._end(batch)

    def _end(self, batch):
        if steps := (self.params or {}).get("steps"):
            batch = min(batch, steps - 1)  # Keras counts the last execution of an epoch as a whole one
        done = max(batch + 1 - self._batches_of_epoch, 1)
        self._batches_of_epoch = batch + 1 if batch >= 0 else self._batches_of_epoch + 1
        self._is_open = False
        self._batches += done
        self.on_step(self._base + self._batches // self._accumulation)
        graph.keep_assigned(self._model)

    def on_epoch_end(self, epoch=-1, logs=None, *, batch=-1):
        if self._is_open and not self._hears_ends:  # else Keras began a batch and found that the data had run out
            self._end(-1)
        self._is_open = False

    def _rebase(self):
        self._base = self._read = _clock(self.model)
        self._batches_of_epoch, self._is_open = 0, False
        optimizer = optimizers(self.model)[-1]
        self._accumulation = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        self._begun = 0 if optimizer is None else int(as_array(optimizer._iterations))
        # batches of an update that is not complete; `iterations` counts updates, this batches
        self._batches = self._begun % self._accumulation

    def _recount(self) -> int:
        """Takes back what was counted and not done, and returns how many updates.

        The last execution of an epoch whose size Keras does not know may have been shorter; a loss scale leaves out
        updates.
        """
        optimizer, before = optimizers(self.model)[-1], self._batches // self._accumulation
        done = 0 if optimizer is None else int(as_array(optimizer._iterations)) - self._begun
        if done > 0:  # if not, the optimizer that trains is not the model's own
            self._batches = min(self._batches, self._begun % self._accumulation + done)
        return before - self._batches // self._accumulation


class UpdatePruningStep(StepCallback):
    """Drives the pruned layers of a model through its training: required in `fit`, as in tfmot.

    Counts the optimizer's updates and, whenever a step at which a schedule prunes lies between the last batch and this
    one, recomputes the masks; so `steps_per_execution` may be anything. If the schedule has an `end_step`, there is an
    update at that very step even when the frequency misses it. Step 0 lies before the first batch. A model that was
    saved and loaded goes on where it was. Every `fit` needs it: in one without, masks stay as they are, and only a
    model that was compiled anew says so. In a training loop of your own, see `callbacks.StepCallback`; tfmot's own
    works as it is.

    Put it first among the callbacks: on JAX, those in front of it see the masks and the step of an epoch too late, and
    `EarlyStopping(restore_best_weights=True)` would give back a step that is an epoch old.

    Raises:
        ValueError: If a kernel to prune holds NaN or infinite weights, or the schedule leaves [0, 1).

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
        self._wrappers = list(wrappers_in(self.model))
        # also where an interrupted training has no end: one that is compiled anew has another optimizer
        optimizer = getattr(self.model, "optimizer", None)
        for wrapper in self._wrappers:
            wrapper._is_driven = lambda: getattr(self._model, "optimizer", None) is optimizer
        if not self._wrappers:
            warnings.warn(f"`UpdatePruningStep`: model {self.model.name!r} has no pruned layer to drive.", stacklevel=2)
        self._execution = getattr(self.model, "steps_per_execution", 1)
        super().on_train_begin(logs)

    def _rebase(self):
        self._groups: dict[Any, list[PruneLowMagnitude]] = {}
        for wrapper in self._wrappers:
            if wrapper.built:
                wrapper.sync_step()  # weights were loaded, or restored by a callback after this one
            self._groups.setdefault(_group(wrapper), []).append(wrapper)
        super()._rebase()
        self._then = self._base
        self._apart = {id(wrapper): max(wrapper.step, 0) - self._base for wrapper in self._driven()}

    def on_step(self, step):
        updates, self._then = step - self._then, step
        for wrappers in self._groups.values():
            if not all(wrapper.built for wrapper in wrappers):
                continue  # a model without an input shape is built by its first batch; step 0 is then made up for
            last = wrappers[0].step
            now = max(last, 0) + updates
            for wrapper in wrappers:
                wrapper.step = now
            self._follow(wrappers, last, now)

    def on_epoch_end(self, epoch=-1, logs=None, *, batch=-1):
        super().on_epoch_end(epoch, logs)
        _ = self.model  # on JAX: brings the state back before it is changed
        counted, ahead = self._then, self._recount()
        self._then -= ahead
        for wrapper in self._driven():
            if wrapper.step == counted + self._apart.get(id(wrapper), 0):  # nobody has restored another step meanwhile
                wrapper.step -= ahead
            wrapper.settle()
        self._read = _clock(self.model)

    def on_train_end(self, logs=None):
        self.on_epoch_end()
        for wrapper in self._wrappers:
            wrapper._is_driven = bool
        for wrappers in self._groups.values():
            if not wrappers[0].rule.once:
                warn_if_not_begun(wrappers[0].pruning_schedule, wrappers[0].step)

    def _driven(self):
        return [wrapper for wrapper in self._wrappers if wrapper.built]

    def _follow(self, wrappers, last: int, now: int) -> None:
        """Updates the masks if a scheduled step lies in (last, now], and zeroes what is masked."""
        rule, schedule = wrappers[0].rule, wrappers[0].pruning_schedule
        if rule.once:
            due = (0, 0.0) if last < 0 else None
        else:
            due = last_due(schedule, last, now)
        if last < 0 and not rule.once:
            is_due, sparsity = evaluate(schedule, 0)
            kernels = [as_array(kernel) for wrapper in wrappers for kernel, _, _ in wrapper.pruning_vars]
            warn_of_zeros(kernels, sparsity if is_due else None)
        if due or keras.backend.backend() != "jax" or self._is_due_next(wrappers[0], now):
            _ = self.model  # on JAX: brings the state back before it is read and changed
            if due:
                update_masks(wrappers, due[1])
            for wrapper in wrappers:
                wrapper.settle()

    def _is_due_next(self, wrapper, now: int) -> bool:
        schedule = wrapper.pruning_schedule
        return not wrapper.rule.once and last_due(schedule, now, now + self._execution) is not None


class MagnitudeScheduler(StepCallback):
    """Assigns `schedule(step)` to the magnitude of an augmentation as a model trains.

    The step is the one that the masks of the model follow, or else the optimizer's, see `callbacks.StepCallback`.

    Args:
        augment: A layer with a scalar variable `magnitude`, such as `RandAugment`: one in the model, or, if there is no
            augmentation in the model, one outside of it, as in `tf.data`.
        schedule: `step -> magnitude` in [0, 30], such as `SparsityLinkedMagnitude`.

    Raises:
        TypeError: If `schedule` is not callable, or `augment` has no variable `magnitude`.
        ValueError: If the magnitude of `augment` is a `(low, high)` pair, the schedule leaves [0, 30], or training
            begins with a model that does not contain `augment`, but another augmentation.

    Example:
        >>> import kerascompress as kc
        >>> augment = kc.RandAugment(magnitude=14)
        >>> weaken = kc.MagnitudeScheduler(augment, lambda step: 14 if step < 1000 else 4)

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-B, Figure 3.
    """

    def __init__(self, augment: Any, schedule: Callable[[int], float]):
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                "`schedule` must be a function of the step that returns a magnitude. "
                f"Received: schedule={schedule!r}. For a constant, set `augment.magnitude` once."
            )
        check_driven(augment)
        self.augment = augment
        self.schedule = schedule
        self._assigned: float | None = None

    def on_train_begin(self, logs=None):
        check_in_model(self.augment, self.model)
        super().on_train_begin(logs)

    def _rebase(self):
        self._assigned = None  # somebody else may have assigned or restored one
        super()._rebase()

    def on_step(self, step: int) -> None:
        magnitude = float(self.schedule(step))
        if not 0 <= magnitude <= 30:
            raise ValueError(
                "`schedule` must return magnitudes in [0, 30], the paper's scale. "
                f"Received: {magnitude} at step {step}. If yours is a fraction, multiply it by 30."
            )
        if magnitude != self._assigned:
            _ = self.model  # on JAX: brings the state back, which would overwrite the magnitude
            self.augment.magnitude.assign(magnitude)
            self._assigned = magnitude

    def on_epoch_end(self, epoch=-1, logs=None, *, batch=-1):
        super().on_epoch_end(epoch, logs)
        if self._recount():
            self.on_step(self._base + self._batches // self._accumulation)


class PruningSummaries(keras.callbacks.TensorBoard):
    """TensorBoard with the sparsity and the threshold of every pruned kernel, and the sparsity of all, at each epoch.

    Behind `UpdatePruningStep` among the callbacks: in front of it, the step is not yet that of the epoch on JAX.

    Args:
        log_dir: Folder for the event files; the pruning scalars go to its subfolder `metrics`, by the step that the
            masks follow.
        update_freq: See `keras.callbacks.TensorBoard`.
        **kwargs: Passed to it.

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
        step = _clock(self.model)
        with self._pruning_writer.as_default():
            for kernel, mask, threshold in pruning_vars(self.model):
                tf.summary.scalar(f"{kernel.path}/sparsity", 1 - np.mean(as_array(mask)), step=step)
                tf.summary.scalar(f"{kernel.path}/threshold", float(as_array(threshold)), step=step)
            tf.summary.scalar("sparsity", sparsity(self.model), step=step)
        self._pruning_writer.flush()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self._pruning_writer is not None:
            self._pruning_writer.close()
            self._pruning_writer = None


# --- helpers ---


def _clock(model: keras.Model) -> int:
    """The updates done, as pruned layers have stored them, or else the optimizer."""
    steps = [wrapper.stored_step() for wrapper in wrappers_in(model) if wrapper.built]
    if steps:
        return max(0, *steps)
    optimizer = optimizers(model)[-1]
    return 0 if optimizer is None else int(as_array(optimizer.iterations))


def _group(wrapper: PruneLowMagnitude) -> Any:
    """Wrappers whose masks are updated together: same schedule, rule and step."""
    schedule: Any = wrapper.pruning_schedule
    config = repr(schedule.get_config()) if hasattr(schedule, "get_config") else id(schedule)
    return type(schedule), config, wrapper.rule, wrapper.step
