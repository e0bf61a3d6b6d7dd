"""What is made of logits: Hinton's loss of every image, and Equation 6, which chooses among candidates."""

import keras
from keras import ops as kops


def distillation_loss(teacher_logits, student_logits, temperature: float = 1.0):
    """Hinton's loss of every image, `τ² · KL(softmax(teacher / τ), softmax(student / τ))`.

    Args:
        teacher_logits: float `(..., classes)`.
        student_logits: float `(..., classes)`.
        temperature: τ, positive; what both logits are divided by. The square keeps the gradient's size.

    Returns:
        float32 `(...)`, at least 0 up to rounding.

    Raises:
        ValueError: If `temperature` is not positive.

    Example:
        >>> import numpy as np
        >>> loss = distillation_loss(np.array([[0.0, 2.0]]), np.array([[1.0, 1.0]]), temperature=2.0)
        >>> print(f"{float(loss[0]):.4f}")
        0.4438

    Reference:
        Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015; Yu, Zhang, Ma, "Revisiting Data
        Augmentation in Model Compression", Equation 4, which prints the cross-entropy: the same gradient, but not the
        same value, which matters where losses are compared (Equation 6).
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: temperature={temperature}.")
    log_teacher = kops.log_softmax(kops.cast(teacher_logits, "float32") / temperature, axis=-1)
    log_student = kops.log_softmax(kops.cast(student_logits, "float32") / temperature, axis=-1)
    teacher = kops.exp(log_teacher)
    return temperature**2 * kops.sum(kops.where(teacher > 0, teacher * (log_teacher - log_student), 0.0), axis=-1)


def select_candidates(teacher_loss, divergence, ce_weight: float = 1.0, kl_weight: float = 1.0):
    """Equation 6: the candidate that the teacher gets right and the student has yet to learn.

    `argmin over candidates of ce_weight * CE(teacher, label) - kl_weight * KL(teacher, student)`

    Args:
        teacher_loss: The teacher's cross-entropy, float `(num_candidates, batch)`.
        divergence: KL of teacher and student, float `(num_candidates, batch)`.
        ce_weight: α of Equation 6, at least 0.
        kl_weight: β of Equation 6, at least 0.

    Returns:
        int32 `(batch,)`: the index of the candidate; of equal ones the first.

    Raises:
        ValueError: If a weight is negative, or both are 0.

    Example:
        >>> import numpy as np
        >>> teacher_loss, divergence = np.array([[0.1], [0.2], [3.0]]), np.array([[0.5], [1.5], [2.0]])
        >>> print(int(select_candidates(teacher_loss, divergence)[0]))
        1

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Equation 6.
    """
    if not (ce_weight >= 0 and kl_weight >= 0 and ce_weight + kl_weight > 0):
        raise ValueError(
            "`ce_weight` and `kl_weight` must be at least 0, and one of them positive. "
            f"Received: ce_weight={ce_weight}, kl_weight={kl_weight}. For no selection, set num_candidates=1."
        )
    criterion = ce_weight * kops.cast(teacher_loss, "float32") - kl_weight * kops.cast(divergence, "float32")
    return kops.cast(kops.argmin(criterion, axis=0), "int32")


def cross_entropy(labels, logits):
    """Of logits `(..., batch, classes)` and labels, int `(batch,)` or `(batch, 1)` or one-hot: `(..., batch)`."""
    classes = logits.shape[-1]
    if len(labels.shape) > 2 or (len(labels.shape) == 2 and labels.shape[1] not in (1, classes)):
        raise ValueError(
            f"Labels must be integers, (batch,) or (batch, 1), or one-hot, (batch, {classes}). "
            f"Received: labels of shape {tuple(labels.shape)}."
        )
    log_probabilities = kops.log_softmax(kops.cast(logits, "float32"), axis=-1)
    if len(labels.shape) == 1 or labels.shape[1] == 1:
        labels = kops.cast(kops.reshape(labels, (-1,)), "int32")
        a_class = (labels >= 0) & (labels < classes)
        of_class = kops.one_hot(kops.where(a_class, labels, 0), classes, dtype="float32")
        loss = -kops.sum(of_class * log_probabilities, axis=-1)
        return kops.where(a_class, loss, float("nan"))  # no class: nothing to learn quietly
    return -kops.sum(kops.cast(labels, "float32") * log_probabilities, axis=-1)


@keras.saving.register_keras_serializable("kerascompress")
class CrossEntropy(keras.losses.Loss):
    def __init__(self, name="cross_entropy", **kwargs):
        super().__init__(name=name, **kwargs)

    def call(self, y_true, y_pred):
        return cross_entropy(y_true, y_pred)


class Distillation(keras.losses.Loss):
    """`distillation_loss` averaged as Keras averages losses: weighted, and over the replicas of a strategy."""

    def __init__(self, temperature, like):
        super().__init__(name="distillation", reduction=like.reduction, dtype=like.dtype)
        self.temperature = temperature

    def call(self, teacher_logits, student_logits):
        return kops.cast(distillation_loss(teacher_logits, student_logits, self.temperature), self.dtype)


def check_logits(name: str, model: keras.Model) -> None:
    """Raises a ValueError that names the argument if a model ends in probabilities, as far as can be told."""
    activation = _last_activation(model) if hasattr(model, "operations") or isinstance(model, keras.Sequential) else ""
    if activation in ("softmax", "sigmoid", "log_softmax"):
        raise ValueError(
            f"`{name}` must give logits. Received: a model that ends in {activation}. Build it without it, with "
            "activation=None in the last layer (classifier_activation=None in keras.applications); "
            "for probabilities, add a softmax to the model that you export."
        )


def _last_activation(model):
    """The name of the activation in which a model ends, as far as can be told: of a subclassed model, it cannot."""
    for layer in reversed(getattr(model, "operations", None) or getattr(model, "layers", [])):
        if hasattr(layer, "operations") or isinstance(layer, keras.Sequential):
            return _last_activation(layer)
        layer = getattr(layer, "layer", layer)  # of a wrapper
        name = getattr(getattr(layer, "activation", None), "__name__", None) or type(layer).__name__
        if getattr(layer, "variables", None) or name not in ("linear", "Identity", "Flatten", "Reshape", "Dropout"):
            return {"LogSoftmax": "log_softmax"}.get(name, name.lower())
    return ""
