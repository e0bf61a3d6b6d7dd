"""Neural networks that get small while their data augmentation follows.

`import kerascompress as kc`; everything public is named here. See the README for a tour.
"""

__version__ = "0.1.0"

from typing import Any

from kerascompress import models
from kerascompress.adaptive import AdaptiveMagnitude
from kerascompress.augment import Op, RandAugment, RandomCrop
from kerascompress.callbacks import MagnitudeScheduler, PruningSummaries, UpdatePruningStep
from kerascompress.channels import prune_channels
from kerascompress.costs import summary
from kerascompress.distill import Distiller
from kerascompress.export import export_litert, export_saved_model
from kerascompress.latency import LatencyPolicy
from kerascompress.losses import distillation_loss, select_candidates
from kerascompress.optimizer import PruningOptimizer
from kerascompress.pruning import prune_low_magnitude, prune_now, sparsity, strip_pruning
from kerascompress.schedules import SparsityLinkedMagnitude
from kerascompress.schemes import baseline_a, baseline_b, discard, extend, inherit
from kerascompress.search import search_magnitude, validation_score
from kerascompress.wrapper import PruneLowMagnitude

__all__ = [
    "AdaptiveMagnitude",
    "ConstantSparsity",
    "Distiller",
    "LatencyPolicy",
    "MagnitudeScheduler",
    "Op",
    "PolynomialDecay",
    "PruneLowMagnitude",
    "PruningOptimizer",
    "PruningSummaries",
    "RandAugment",
    "RandomCrop",
    "SparsityLinkedMagnitude",
    "UpdatePruningStep",
    "baseline_a",
    "baseline_b",
    "discard",
    "distillation_loss",
    "export_litert",
    "export_saved_model",
    "extend",
    "inherit",
    "models",
    "prune_channels",
    "prune_low_magnitude",
    "prune_now",
    "search_magnitude",
    "select_candidates",
    "sparsity",
    "strip_pruning",
    "summary",
    "validation_score",
]


def __getattr__(name: str) -> Any:
    if name in ("ConstantSparsity", "PolynomialDecay"):  # tfmot's own, imported when first asked for
        from kerascompress import schedules

        return getattr(schedules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
