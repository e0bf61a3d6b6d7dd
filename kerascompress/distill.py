"""Distillation in which the teacher chooses, among several augmentations of an image, what the student learns from."""

import contextlib
import operator
import types
from collections.abc import Callable
from typing import Any

import keras
from keras import ops as kops

from kerascompress import graph, losses, rounds


@keras.saving.register_keras_serializable("kerascompress")
class Distiller(keras.Model):
    """Distils a teacher into a student, on the augmented views that the teacher chooses.

    For each image, `num_candidates` augmentations are drawn; teacher and student look at all of them in one batched
    inference pass, and the student learns from the one that `select_candidates` (Equation 6) picks, with the loss

    `alpha * CE(student, label) + (1 - alpha) * distillation_loss(teacher, student, temperature)`

    and the student's own penalties, such as weight decay. The teacher runs in inference mode, once for every candidate,
    and is not trained; its logits for the chosen candidate are reused in the loss. The student's BatchNorm statistics
    see the chosen images only. `evaluate` and `predict` run the student alone, without augmentation, and their `loss`
    is that with the labels and the penalties.

    Baselines are values: `num_candidates=1` is no selection, `RandAugment(magnitude=9)` a fixed magnitude,
    `kl_weight=0` the cross-entropy alone (it did at least as well in README's Figure 7), `ce_weight=0` the divergence
    alone.

    Args:
        student: A built classifier with one input and one output, logits `(batch, classes)`. Train, save and export it
            as `distiller.student`; it may hold pruned layers.
        teacher: Another one, with the same input and as many logits.
        augment: A layer that is called with `(images, training=True)` and returns images of the same shape, such as
            `RandAugment`, or a `keras.Sequential` of such layers. A function will do if it has no state: random numbers
            need a layer. Write it with `keras.ops`, and register it if the Distiller is to be saved.
        num_candidates: n of Equation 6, at least 1.
        ce_weight: α of Equation 6, at least 0.
        kl_weight: β of Equation 6, at least 0; one of the two is positive.
        temperature: τ of the distillation loss, positive.
        alpha: Share of the cross-entropy with the labels, in (0, 1].
        selection_temperature: The temperature of the divergence in Equation 6, positive.
        teacher_dtype: A dtype policy such as `"mixed_bfloat16"` under which a copy of the teacher runs, which takes the
            teacher's weights when training begins. By default the teacher itself runs as it is.
        save_teacher: Whether checkpoints and saved files hold the teacher. Without it, set `distiller.teacher` after
            loading a `.keras` file and before `fit`.

    Metrics in training, beside those of `compile`: `student_loss` (cross-entropy), `distillation_loss` (with its τ²),
    `chosen_magnitude` (mean over the chosen images, where `augment` is, or holds, a `RandAugment`) and `first_kept`
    (share of images whose first candidate was chosen: 1 / num_candidates if the choice were random).

    Raises:
        ValueError: If an argument is out of range, teacher and student differ in their number of logits or share
            trainable weights, either ends in a softmax or sigmoid, or `augment` changes the shape of the images.
        TypeError: If student or teacher is no model, or `augment` is not callable.

    Example:
        >>> import kerascompress as kc
        >>> student, teacher = kc.models.resnet(8, 10, width=8), kc.models.resnet20(10)
        >>> augment = kc.RandAugment(magnitude=(0, 30), seed=0)
        >>> distiller = Distiller(student, teacher, augment=augment, num_candidates=4, temperature=4.0, alpha=0.1)
        >>> distiller.compile("sgd", metrics=["accuracy"])
        >>> # distiller.fit(images, labels, epochs=200); then use distiller.student

    Reference:
        Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression", Section IV-D, Equation 6, Figure 7.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | None = None,
        *,
        augment: Callable[..., Any],
        num_candidates: int = 4,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 4.0,
        alpha: float = 0.1,
        selection_temperature: float = 1.0,
        teacher_dtype: str | None = None,
        save_teacher: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**{"autocast": False, "dtype": getattr(student, "dtype_policy", None), **kwargs})
        self._held = types.SimpleNamespace(teacher=None, runs=None)  # hides the teacher from Keras' tracking
        _check_numbers(num_candidates, alpha, temperature=temperature, selection_temperature=selection_temperature)
        losses.select_candidates([[0.0]], [[0.0]], ce_weight, kl_weight)
        if not callable(augment):
            raise TypeError(
                f"`augment` must be a layer or function of images, such as RandAugment. Received: augment={augment!r}."
            )
        self.num_candidates = operator.index(num_candidates)
        self.ce_weight, self.kl_weight = ce_weight, kl_weight
        self.temperature, self.selection_temperature, self.alpha = temperature, selection_temperature, alpha
        self.teacher_dtype = teacher_dtype
        self.save_teacher = save_teacher
        self.augment = augment
        self._image_shape, self._num_classes = _check_classifier("student", student)
        _check_augment(augment, self._image_shape)
        self.student = student
        self.teacher = teacher
        names = ["student_loss", "distillation_loss", "first_kept"]
        if any(hasattr(layer, "draw_magnitude") for layer in self._augmentations()):
            names.append("chosen_magnitude")
        self._means = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    @property
    def teacher(self) -> keras.Model | None:
        """The teacher, as it was given; `None` in a distiller that was loaded from a file without it."""
        return self._held.teacher

    @teacher.setter
    def teacher(self, teacher: keras.Model | None):
        if teacher is not None:
            received = _check_classifier("teacher", teacher)
            if received[1] != self._num_classes:
                raise ValueError(
                    "Teacher and student must have the same number of logits. "
                    f"Received: {received[1]} of the teacher, {self._num_classes} of the student."
                )
            sizes = zip(received[0], self._image_shape, strict=False)
            if len(received[0]) != len(self._image_shape) or any(a != b for a, b in sizes if None not in (a, b)):
                raise ValueError(
                    "Teacher and student must take the same images. "
                    f"Received: {received[0]} of the teacher, {self._image_shape} of the student."
                )
            if {id(v) for v in teacher.variables} & {id(v) for v in self.student.trainable_variables}:
                raise ValueError(
                    "The teacher must not share trainable weights with the student, which would change it. "
                    f"Received: teacher={teacher!r}, student={self.student!r}. Distil into a copy: clone_model."
                )
        self._held = types.SimpleNamespace(teacher=teacher, runs=None)
        self._update_teacher()
        self.train_function = None  # the compiled step holds the teacher that it was traced with

    def _update_teacher(self):
        """Lets what runs have the teacher's weights."""
        held = self._held
        if held.teacher is None or self.teacher_dtype is None:
            held.runs = held.teacher
        elif held.runs is None:
            held.runs = _copy_with_policy(held.teacher, self.teacher_dtype)
        else:
            held.runs.set_weights(held.teacher.get_weights())

    def __setattr__(self, name, value):
        if name == "teacher":
            object.__setattr__(self, name, value)  # past Keras, which would track it as a part of this model
        else:
            super().__setattr__(name, value)

    def __dir__(self):  # where Keras looks for what to save
        return [name for name in super().__dir__() if name != "teacher" or self.save_teacher]

    @property
    def non_trainable_variables(self):
        """Those of student and augmentation, and all of the teacher's: the JAX backend hands them to the train step."""
        teacher = self._held.runs
        return super().non_trainable_variables + ([] if teacher is None else teacher.variables)

    def compile(self, optimizer="rmsprop", loss=None, **kwargs):
        """As of `keras.Model`. `loss` is the student's loss with the labels: integers or one-hot, from logits.

        By default the cross-entropy. For label smoothing, take one-hot labels and
        `keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)`. A loss class of your own has to
        take logits. There are no `loss_weights`: `alpha` weighs.
        """
        loss = losses.CrossEntropy() if loss is None else keras.losses.get(loss)
        from_keras = type(loss).__module__.startswith("keras.")
        if not isinstance(loss, keras.losses.Loss) or not loss.get_config().get("from_logits", not from_keras):
            raise ValueError(
                "`loss` must be a Keras loss object that takes logits, such as "
                f"keras.losses.CategoricalCrossentropy(from_logits=True). Received: loss={loss!r}."
            )
        if kwargs.get("loss_weights") is not None:
            raise ValueError(
                "`loss_weights` has no meaning here: `alpha` of the Distiller weighs the losses. "
                f"Received: loss_weights={kwargs['loss_weights']}."
            )
        teacher_layers = [] if self.teacher is None else graph.walk(self.teacher)
        if kwargs.get("jit_compile", "auto") == "auto" and not all(layer.supports_jit for layer in teacher_layers):
            kwargs["jit_compile"] = False
        super().compile(optimizer, loss=loss, **kwargs)

    def make_train_function(self, force=False):
        if force or self.train_function is None:
            self._update_teacher()
        self._separate_buffers()
        return super().make_train_function(force)

    def make_test_function(self, force=False):
        self._separate_buffers()
        return super().make_test_function(force)

    def make_predict_function(self, force=False):
        self._separate_buffers()
        return super().make_predict_function(force)

    def _separate_buffers(self):
        """Gives the teacher buffers of its own where the student began with them: JAX takes each from us once."""
        if keras.backend.backend() == "jax" and self._held.runs is not None:
            others = {id(variable.value) for variable in self.student.variables}
            for variable in self._held.runs.variables:
                if id(variable.value) in others:
                    variable.assign(kops.copy(variable.value))

    def fit(self, *args, **kwargs):
        """As of `keras.Model`."""
        self._check_teacher()
        self._update_teacher()
        with self._keeping_teacher():
            return super().fit(*args, **kwargs)

    _evaluates = False
    _keeps = False

    def evaluate(self, *args, **kwargs):
        """As of `keras.Model`: the student alone."""
        self._evaluates = True
        try:
            with self._keeping_teacher():
                return super().evaluate(*args, **kwargs)
        finally:
            self._evaluates = False

    def predict(self, *args, **kwargs):
        """As of `keras.Model`: the student alone."""
        with self._keeping_teacher():
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _keeping_teacher(self):
        """Lets JAX have copies of the teacher's buffers: it gives them away, and after an error none comes back."""
        if keras.backend.backend() != "jax" or self._held.runs is None or self._keeps:
            yield
            return
        kept = [(variable, variable.value) for variable in self._held.runs.variables]
        for variable, value in kept:
            variable.assign(kops.copy(value))
        self._keeps = True
        try:
            yield
        except BaseException:
            for variable, value in kept:
                variable.assign(value)
            raise
        finally:
            self._keeps = False

    def get_metrics_result(self):
        logs = super().get_metrics_result()  # of all replicas, if the names are those that the last batch has returned
        return {name: value for name, value in logs.items() if not (self._evaluates and name in self._means)}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def call(self, inputs, training=None):
        return self.student(inputs["images"] if isinstance(inputs, dict) else inputs, training=training)

    def draw_candidates(self, images, labels):
        """Draws the candidates of a batch and chooses among them.

        Args:
            images: `(batch, ...)`.
            labels: int `(batch,)` or `(batch, 1)`, or one-hot `(batch, classes)`.

        Returns:
            A dictionary: `images` `(num_candidates, batch, ...)`; `teacher_logits` `(num_candidates, batch, classes)`;
            `teacher_loss` and `divergence`, of Equation 6, `(num_candidates, batch)`; `chosen`, int32 `(batch,)`; and
            `magnitude` `(num_candidates, batch)` if `augment` is a `RandAugment`, or a `keras.Sequential` with one.
            Where the divergence cannot change the choice, the student does not run and it is 0.
        """
        self._update_teacher()
        return self._draw(kops.convert_to_tensor(images), kops.convert_to_tensor(labels))

    def _check_teacher(self):
        if self.teacher is None:
            raise ValueError(
                "This distiller has no teacher, as when it is loaded from a file that was saved with "
                "save_teacher=False. Set `distiller.teacher` to the teacher, then call fit."
            )

    def _draw(self, images, labels):
        self._check_teacher()
        _check_labels(labels)
        n = self.num_candidates
        tiled = kops.tile(images, (n, *[1] * (len(images.shape) - 1)))
        views = {}
        candidates = tiled
        with rounds.views(n):
            for layer in self._augmentations():
                if hasattr(layer, "draw_magnitude"):
                    magnitude = layer.draw_magnitude(kops.shape(candidates)[0])
                    views["magnitude"] = kops.reshape(magnitude, (n, -1))
                    candidates = layer(candidates, magnitude=magnitude, training=True)
                else:
                    candidates = layer(candidates, training=True)

        def by_candidate(values):
            return kops.reshape(values, (n, -1, *kops.shape(values)[1:]))

        def logits(model):
            with _no_gradient():
                return by_candidate(kops.cast(model(candidates, training=False), "float32"))

        views["images"] = by_candidate(candidates)
        views["teacher_logits"] = logits(self._held.runs)
        views["teacher_loss"] = losses.cross_entropy(labels, views["teacher_logits"])
        if n > 1 and self.kl_weight > 0:
            views["divergence"] = losses.distillation_loss(
                views["teacher_logits"], logits(self.student), self.selection_temperature
            )
        else:
            views["divergence"] = kops.zeros_like(views["teacher_loss"])
        views["chosen"] = losses.select_candidates(
            views["teacher_loss"], views["divergence"], self.ce_weight, self.kl_weight
        )
        return views

    def train_step(self, *args):
        """Keras' own step, on the candidates that were chosen."""
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(args[-1])
        if not hasattr(images, "shape"):
            raise ValueError(f"The Distiller trains with one tensor of images. Received: a {type(images).__name__}.")
        if len(args) == 1:
            return super().train_step((self._choose(images, labels), labels, sample_weight))
        # on the JAX backend the state of the random seeds comes in and goes out
        trainable, non_trainable, *others = args[0]
        variables = [*self.trainable_variables, *self.non_trainable_variables]
        with keras.StatelessScope(list(zip(variables, [*trainable, *non_trainable], strict=True))) as scope:
            chosen = self._choose(images, labels)
        non_trainable = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
        return super().train_step((trainable, non_trainable, *others), (chosen, labels, sample_weight))

    def _choose(self, images, labels):
        views = self._draw(images, labels)
        chosen = views["chosen"]
        place = chosen * kops.shape(chosen)[0] + kops.arange(kops.shape(chosen)[0], dtype="int32")

        def pick(values):
            return kops.take(kops.reshape(values, (-1, *kops.shape(values)[2:])), place, axis=0)

        picked = {name: pick(views[name]) for name in ("images", "teacher_logits", "magnitude") if name in views}
        return {**picked, "chosen": chosen}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        _check_labels(y)
        if not training:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        per_image = {
            "student_loss": self.loss.call(y, y_pred),
            "distillation_loss": losses.distillation_loss(x["teacher_logits"], y_pred, self.temperature),
            "chosen_magnitude": x.get("magnitude"),
            "first_kept": x["chosen"] == 0,
        }
        for name, mean in self._means.items():
            mean.update_state(kops.cast(per_image[name], "float32"))
        distillation = losses.Distillation(self.temperature, self.loss)(x["teacher_logits"], y_pred, sample_weight)
        loss = self.alpha * self.loss(y, y_pred, sample_weight) + (1 - self.alpha) * distillation
        return loss + sum(self._aggregate_additional_loss(penalty) for penalty in self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        _check_labels(y)  # on JAX, this comes first
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return logs if isinstance(x, dict) else {name: v for name, v in logs.items() if name not in self._means}

    def _seeds(self):
        """The states of the random seeds of student and augmentation, of which Keras saves none."""
        others = {id(variable) for variable in (*self.weights, *self.metrics_variables)}
        return [variable for variable in self.variables if id(variable) not in others]

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for i, state in enumerate(self._seeds()):
            store[f"seed{i}"] = kops.convert_to_numpy(state)

    def load_own_variables(self, store):
        saved = [name for name in store.keys() if name.startswith("seed")]  # noqa: SIM118 (it is not a dictionary)
        if len(saved) == len(self._seeds()):  # else it was saved with another augmentation
            for i, state in enumerate(self._seeds()):
                state.assign(store[f"seed{i}"])
        super().load_own_variables({name: store[name] for name in store.keys() if name not in saved})  # noqa: SIM118

    def _augmentations(self):
        def parts(layer):
            plain = type(layer) is keras.Sequential  # a subclass may do more than its layers
            return [part for each in layer.layers for part in parts(each)] if plain else [layer]

        return parts(self.augment)

    def get_config(self) -> dict[str, Any]:
        names = (
            *("num_candidates", "ce_weight", "kl_weight", "temperature", "alpha", "selection_temperature"),
            *("teacher_dtype", "save_teacher"),
        )
        return {
            **keras.layers.Layer.get_config(self),
            **{name: getattr(self, name) for name in names},
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": keras.saving.serialize_keras_object(self.teacher) if self.save_teacher else None,
            "augment": keras.saving.serialize_keras_object(self.augment),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects=None) -> "Distiller":
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("student", "teacher", "augment")
        }
        return cls(**{**config, **parts})


def _no_gradient():
    """Torch prepares, and takes, the gradient of every variable, the teacher's too, unless it is told not to."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _check_numbers(num_candidates, alpha, **temperatures):
    if not hasattr(num_candidates, "__index__") or num_candidates < 1:
        raise ValueError(
            f"`num_candidates` must be a whole number of at least 1. Received: num_candidates={num_candidates}."
        )
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value}.")
    if not 0 < alpha <= 1:
        raise ValueError(
            f"`alpha`, the share of the cross-entropy with the labels, must be in (0, 1]. Received: alpha={alpha}."
        )


def _check_labels(labels):
    if labels is None:
        raise ValueError("The Distiller needs labels. Received: images alone. Call fit(images, labels).")


def _check_classifier(name, model):
    """Returns the shape of an image and the number of logits of a model that can be distilled."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`{name}` must be a keras.Model. Received: {name}={model!r}.")
    if getattr(model, "preprocessor", None) is not None:
        raise ValueError(
            f"The Distiller calls `{name}` itself, and so not its preprocessor, which its own fit and predict put in "
            f"front of it. Received: {model.name!r} with preprocessor={model.preprocessor!r}. Set `preprocessor` to "
            "None, and do what it does in the model: `keras.Sequential([keras.layers.Rescaling(...), model])`."
        )
    shape = getattr(model, "input_shape", None) or (model.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, tuple | list) or not all(size is None or isinstance(size, int) for size in shape):
        raise ValueError(
            f"`{name}` must be a built model with one input. Received: {model!r} with input shape {shape}. "
            "Call it once on a batch of images before."
        )
    output = model.outputs if isinstance(model, keras.Sequential) else getattr(model, "output", None)
    output = model(keras.KerasTensor(tuple(shape))) if output is None else output
    if isinstance(output, dict):
        raise ValueError(
            f"`{name}` must give logits alone. Received: a dictionary of {', '.join(output)}. Take them out of it, as "
            'keras.Model(model.inputs, model.output["logits"]) does.'
        )
    outputs = tuple(tuple(each.shape) for each in keras.tree.flatten(output))
    outputs = outputs[0] if len(outputs) == 1 else outputs
    if len(outputs) != 2 or not isinstance(outputs[1], int) or outputs[1] < 2:
        raise ValueError(
            f"`{name}` must give logits of shape (batch, classes), at least 2 classes. Received: outputs of {outputs}."
        )
    losses.check_logits(name, model)
    return tuple(shape)[1:], outputs[1]


def _check_augment(augment, image_shape):
    if isinstance(augment, keras.layers.Layer):
        output = augment(keras.KerasTensor((None, *image_shape)), training=True).shape[1:]
    else:
        with keras.StatelessScope() as scope:
            output = augment(kops.zeros((2, *(size or 32 for size in image_shape))), training=True).shape[1:]
        if scope.state_mapping:
            raise ValueError(
                "`augment` is a function with a state, such as that of random numbers, which the Distiller can neither "
                f"save nor hand to the JAX backend. Received: augment={augment!r}. Make it a keras.layers.Layer, or a "
                "keras.Sequential of layers."
            )
    if len(output) != len(image_shape) or any(a != b for a, b in zip(output, image_shape, strict=True) if b):
        raise ValueError(
            "`augment` must not change the shape of the images. "
            f"Received: images of {tuple(output)} for images of {image_shape}."
        )


def _copy_with_policy(model, policy):
    """A copy of a model whose layers run under another dtype policy, with the same weights."""
    if not graph.is_graph(model):
        raise ValueError(
            "`teacher_dtype` needs a functional or Sequential teacher. "
            f"Received: {model!r}. Build it under keras.config.set_dtype_policy({policy!r}) instead."
        )
    return graph.rebuild(model, lambda layer: graph.copy(layer, dtype=policy))
