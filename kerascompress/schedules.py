"""Schedules of sparsity and magnitude: arithmetic of the training step, and the callback that carries them.

`PolynomialDecay`, `ConstantSparsity` and `PruningSchedule` are tfmot's own classes. tfmot is imported here alone, and
only when one of them is first asked for.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Schedule = Callable[[int], tuple[Any, Any]]  # step -> (should_prune, sparsity), as in tfmot

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
            module = importlib.import_module(
                "tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule"
            )
    finally:
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        if before is not None:
            os.environ["TF_USE_LEGACY_KERAS"] = before
    globals().update({each: getattr(module, each) for each in _TFMOT_NAMES})
    return globals()[name]


def evaluate(schedule: Schedule, step: int) -> tuple[bool, float]:
    """Calls a schedule and returns plain numbers, whatever tensors it computes with."""
    should_prune, sparsity = schedule(step)
    return bool(should_prune), float(sparsity)


class SparsityLinkedMagnitude:
    """A magnitude that follows the sparsity of a pruning schedule (Figure 3).

    Piecewise linear in the sparsity that `schedule` prescribes at a step, constant beyond the first and last point. The
    example has the paper's optima for ResNet-20 on CIFAR-100: strong augmentation fades as the weights disappear.

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

    def __call__(self, step: int) -> float:
        _, sparsity = evaluate(self.schedule, step)
        return float(np.interp(sparsity, list(self.magnitudes), list(self.magnitudes.values())))


def check_schedule(schedule: Any, name: str) -> None:
    """Raises a TypeError that names the argument unless `schedule` can be called with a step."""
    if not callable(schedule):
        raise TypeError(
            f"`{name}` must be a schedule: `PolynomialDecay`, `ConstantSparsity` or any callable "
            f"`step -> (should_prune, sparsity)`. Received: {name}={schedule!r} of type {type(schedule).__name__}. "
            "For one constant sparsity, pass `ConstantSparsity(sparsity, begin_step=0)`."
        )
