"""Schedules of sparsity and magnitude: arithmetic of the training step.

`PolynomialDecay`, `ConstantSparsity` and `PruningSchedule` are tfmot's own classes. tfmot is imported here alone, and
only when one of them is first asked for.
"""

import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

Schedule = Callable[[Any], tuple[Any, Any]]  # step -> (should_prune, sparsity), as in tfmot

_TFMOT_MODULE = "tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule"
_TFMOT_NAMES = ("ConstantSparsity", "PolynomialDecay", "PruningSchedule")


def __getattr__(name: str) -> Any:
    if name not in _TFMOT_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # tfmot sets TF_USE_LEGACY_KERAS while it is imported; where `tf.keras` has not been resolved by then, it becomes
    # Keras 2 for the whole process. So: resolve it first, import, put the environment back.
    tf = importlib.import_module("tensorflow")
    _ = tf.keras.layers
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tfmot's own use of distutils
            module = importlib.import_module(_TFMOT_MODULE)
    finally:
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        if before is not None:
            os.environ["TF_USE_LEGACY_KERAS"] = before
    globals().update({each: getattr(module, each) for each in _TFMOT_NAMES})
    return globals()[name]


def _formula(schedule: Schedule) -> Callable[[Any, Any], tuple[Any, Any]] | None:
    """How tfmot's own two schedules are computed here; `None` for any other."""
    own = getattr(sys.modules.get(_TFMOT_MODULE), type(schedule).__name__, None)
    return _FORMULAS.get(type(schedule).__name__) if type(schedule) is own else None


def evaluate(schedule: Schedule, step: Any) -> tuple[Any, Any]:
    """`(due, sparsity)` of a schedule: whether masks are recomputed at `step`, and to which sparsity.

    If the schedule has an `end_step`, it is due there too, even when its frequency misses it.

    Args:
        schedule: tfmot's, or any callable `step -> (should_prune, sparsity)`.
        step: Optimizer updates done: an integer, for which plain numbers come back, or a scalar tensor, inside a
            compiled step too. tfmot's own two schedules, which know TensorFlow alone, are computed here for that.

    Raises:
        TypeError: If the schedule cannot compute with a tensor.
        ValueError: If a sparsity that is a plain number is not in [0, 1).
    """
    traced = not isinstance(step, int)
    formula = _formula(schedule)
    try:
        should_prune, sparsity = formula(schedule, step) if formula else schedule(step)
        if traced:
            should_prune = ops.cast(should_prune, "bool")
    except Exception as error:
        if not traced:
            raise
        raise TypeError(
            "A schedule of `PruningOptimizer` is computed inside the compiled step: it gets the step as a tensor and "
            "must compute with `keras.ops`, without `if` or `in`. "
            f"Received: {schedule!r}, which raised {type(error).__name__}: {error}"
        ) from error
    end_step = getattr(schedule, "end_step", None)
    is_end = False if end_step is None else step == end_step
    is_number = isinstance(sparsity, (int, float)) or not traced
    if is_number and (traced or should_prune or is_end) and not 0 <= float(sparsity) < 1:
        raise ValueError(
            "A pruning schedule must return a sparsity in [0, 1), a fraction of zeros. "
            f"Received: {float(sparsity)} from {schedule!r}"
            + (". " if traced else f" at step {step}. ")
            + "If yours are percent, divide them by 100."
        )
    if traced:
        return ops.logical_or(should_prune, is_end), ops.cast(sparsity, "float32")
    return bool(should_prune) or bool(is_end), float(sparsity)


def last_due(schedule: Schedule, after: int, until: int) -> tuple[int, float] | None:
    """The last step in (after, until] at which a schedule is due, with its sparsity."""
    end_step = getattr(schedule, "end_step", -1)
    if _formula(schedule) and end_step >= 0:
        until = min(until, end_step)  # later, tfmot's are never due
    for step in range(until, after, -1):
        due, sparsity = evaluate(schedule, step)
        if due:
            return step, sparsity
    return None


def warn_if_not_begun(schedule: Any, steps: int) -> None:
    """Warns where training has ended after so many updates, before the schedule has pruned anything."""
    begin_step = getattr(schedule, "begin_step", 0)
    if steps < begin_step:
        warnings.warn(
            f"Nothing is pruned yet: training ended after {steps} updates, and the schedule begins at {begin_step}. A "
            "step is an update of the weights, that is a batch, not an epoch.",
            stacklevel=3,
        )


class SparsityLinkedMagnitude:
    """A magnitude that follows the sparsity which a pruning schedule has given the masks (Figure 3).

    Piecewise linear in that sparsity, constant beyond the first and last point. Masks have the sparsity of the last
    step at which the schedule was due; before the first, the network is dense: sparsity 0. The example has the paper's
    optima for ResNet-20 on CIFAR-100: strong augmentation fades as the weights disappear.

    Args:
        schedule: A tfmot schedule, or any callable `step -> (should_prune, sparsity)`.
        magnitudes: `{sparsity: magnitude}`, at least one point; sparsities in [0, 1), magnitudes in [0, 30].

    Raises:
        ValueError: If a sparsity or a magnitude is out of range, or there is no point.
        TypeError: If `schedule` is not callable.

    Example:
        >>> import kerascompress as kc
        >>> schedule = kc.PolynomialDecay(
        ...     initial_sparsity=0.0, final_sparsity=0.6, begin_step=0, end_step=1000, power=1
        ... )
        >>> weaken = kc.SparsityLinkedMagnitude(schedule, {0.0: 14, 0.2: 12, 0.4: 8, 0.6: 4})
        >>> [round(weaken(step), 2) for step in (0, 500, 1000, 2000)]
        [14.0, 10.0, 4.0, 4.0]

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-B, Figure 3.
    """

    def __init__(self, schedule: Schedule, magnitudes: Mapping[float, float]):
        check_schedule(schedule, "schedule")
        points = sorted(dict(magnitudes).items())
        if not points:
            raise ValueError("`magnitudes` needs at least one {sparsity: magnitude} point. Received: magnitudes={}.")
        for sparsity, magnitude in points:
            if not 0 <= sparsity < 1:
                raise ValueError(
                    "The keys of `magnitudes` are sparsities, fractions of zeros in [0, 1). "
                    f"Received: {sparsity} in magnitudes={magnitudes}. If yours are percent, divide them by 100."
                )
            if not 0 <= magnitude <= 30:
                raise ValueError(
                    "The values of `magnitudes` must be in [0, 30], the paper's scale. "
                    f"Received: {magnitude} in magnitudes={magnitudes}. If yours is a fraction, multiply it by 30."
                )
        self.schedule = schedule
        self.magnitudes = dict(points)
        self._known = (-1, 0.0)  # a step, and the sparsity of the masks there

    def __call__(self, step: int) -> float:
        known, sparsity = self._known if step >= self._known[0] else (-1, 0.0)
        due = last_due(self.schedule, known, step)
        self._known = (step, due[1] if due else sparsity)
        return float(np.interp(self._known[1], list(self.magnitudes), list(self.magnitudes.values())))


def serialize(function: Any, what: str) -> Any:
    """The config of a schedule or another function; a ValueError if it is one that could not be loaded."""
    kind = "lambda" if getattr(function, "__name__", "") == "<lambda>" else "method"
    if kind == "lambda" or isinstance(function, types.MethodType):
        raise ValueError(
            f"A {kind} cannot be saved. Received: a {kind} as {what}. "
            "Make a function of it with the decorator `keras.saving.register_keras_serializable()`."
        )
    config = keras.saving.serialize_keras_object(function)
    if isinstance(config, dict) and set(config["config"]) == {"class_name", "config"}:  # tfmot's wraps its own
        config["config"] = config["config"]["config"]
    return config


def deserialize(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """What `serialize` was given."""
    if config is None:
        return None
    own = {name: globals().get(name) or __getattr__(name) for name in ("ConstantSparsity", "PolynomialDecay")}
    return keras.saving.deserialize_keras_object(config, {**own, **(custom_objects or {})})


def check_schedule(schedule: Any, name: str) -> None:
    """Raises a TypeError that names the argument unless `schedule` can be called with a step."""
    if not callable(schedule):
        raise TypeError(
            f"`{name}` must be a schedule: `PolynomialDecay`, `ConstantSparsity` or any callable "
            f"`step -> (should_prune, sparsity)`. Received: {name}={schedule!r} of type {type(schedule).__name__}. "
            "For one constant sparsity, pass `ConstantSparsity(sparsity, begin_step=0)`."
        )


# --- tfmot's formulas, on integers and on tensors of any backend ---


def _is_turn(schedule, step):
    turn = (step >= schedule.begin_step) & ((step - schedule.begin_step) % schedule.frequency == 0)
    return turn if schedule.end_step < 0 else turn & (step <= schedule.end_step)


def _polynomial_decay(schedule, step):
    on_host = isinstance(step, int)
    xp = np if on_host else ops
    float32: Any = np.float32 if on_host else functools.partial(ops.cast, dtype="float32")
    length = max(schedule.end_step - schedule.begin_step, 1)
    left = 1 - xp.clip(float32(step - schedule.begin_step) / float32(length), 0, 1)
    if schedule.end_step == schedule.begin_step:
        left = left * 0  # one update, to the final sparsity
    fall = float32(schedule.initial_sparsity - schedule.final_sparsity) * xp.power(left, float32(schedule.power))
    return _is_turn(schedule, step), fall + float32(schedule.final_sparsity)


def _constant_sparsity(schedule, step):
    return _is_turn(schedule, step), schedule.target_sparsity


_FORMULAS = {"ConstantSparsity": _constant_sparsity, "PolynomialDecay": _polynomial_decay}
