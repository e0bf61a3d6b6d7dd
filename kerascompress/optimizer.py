"""Pruning carried by the optimizer: any Keras 3 model, without a wrapper, a copy, a callback or anything to strip."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.distribution import TensorLayout
from keras.src.utils.tracking import no_automatic_dependency_tracking  # as Keras' own LossScaleOptimizer needs it

from kerascompress import schedules
from kerascompress.masks import (
    KERNEL_NAMES,
    Rule,
    as_array,
    check_allow,
    finite_weights,
    is_kernel,
    warn_of_collapse,
    warn_of_zeros,
)
from kerascompress.schedules import Schedule, check_schedule, evaluate


@keras.saving.register_keras_serializable("kerascompress")
class PruningOptimizer(keras.optimizers.Optimizer):
    """Prunes any Keras 3 model by magnitude while another optimizer trains it.

    The masks are variables of the optimizer. In each step the inner optimizer updates; where the schedule is due at
    this number of updates, masks are recomputed from the kernels that the update has left; then kernels are zero where
    their mask is. So the model is exactly sparse after every step, whoever looks at it: evaluation, a checkpoint in the
    middle of an epoch, a regularizer. A masked weight gets its gradient, and one that the network needs comes back when
    masks are recomputed. All of it happens inside the compiled step: any `steps_per_execution`, gradient accumulation
    (updates count, not batches), mixed precision, XLA, `keras.distribution`; under `tf.distribute` with one step in an
    execution.

    Step 0 of the schedule is the moment before the first update, step n the moment after n updates, as with
    `UpdatePruningStep`. tfmot counts from 1: its `begin_step=4` is 3 here. If the schedule has an `end_step`, masks are
    recomputed there even if its frequency misses it. A schedule of one update (`ConstantSparsity(p, 0, 0)`) gives
    permanent masks. What is due at step 0 happens with the first update: on TensorFlow before its gradient, unless the
    model gets its weights in its first batch (call it once before), on JAX and Torch after it.

    Whoever writes other weights into the model writes over the zeros until the next update: so
    `EarlyStopping(restore_best_weights=True)` may give back an epoch from before the pruning: let it
    `start_from_epoch` after `end_step`.

    Args:
        inner_optimizer: A new `keras.optimizers.Optimizer`, or its name. Weight decay, clipping, moving averages,
            gradient accumulation and learning-rate schedules are settings of it; `learning_rate` is passed through.
        pruning_schedule: `PolynomialDecay`, `ConstantSparsity` or any callable `step -> (should_prune, sparsity)` that
            computes with `keras.ops`, because the step is a tensor. Without one, weights that are zero when the
            optimizer is built stay zero: for the retraining of a pruned model.
        scope, block_size, block_pooling_type, sparsity_m_by_n: See `PruneLowMagnitude`.
        allow: `allow(variable) -> bool` chooses the kernels among the trainable variables. By default those that Keras
            names so (`kernel`, `embeddings`, `depthwise_kernel`, `pointwise_kernel`, `recurrent_kernel`), of rank 2 and
            more; a warning names others, where they are more than a tenth of all weights. An optimizer sees variables,
            not layers: `get_prunable_weights()` is not asked. Ask for names and the ends of paths: models around a
            layer may be missing from its path once the model is saved and loaded.
        name: Of the optimizer.

    Attributes:
        pruning_vars: List of `(kernel, mask, threshold)` variables, once built; in a mask, True keeps.

    Raises:
        ValueError: If a setting is out of range, there is nothing to prune, a kernel is not finite, or the inner
            optimizer has updated before, or been built for other variables.
        TypeError: If an argument has another type, or the schedule cannot compute with a tensor.

    Example:
        >>> import keras, numpy as np, kerascompress as kc
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> schedule = kc.PolynomialDecay(0.0, final_sparsity=0.75, begin_step=0, end_step=4, frequency=2)
        >>> model.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.1), schedule, scope="global"), "mse")
        >>> _ = model.fit(np.ones((16, 8)), np.ones((16, 4)), batch_size=4, verbose=0)
        >>> kc.sparsity(model)
        0.75

    Reference:
        Zhu, Gupta, "To prune, or not to prune", 2017; Lee et al., "JaxPruner", 2023, has masks in the optimizer's
        state; Equation 5 of Yu, Zhang, Ma, "Revisiting Data Augmentation in Model Compression".
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        pruning_schedule: Schedule | None = None,
        *,
        scope: str = "layer",
        block_size: tuple[int, int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: tuple[int, int] | None = None,
        allow: Callable[[keras.Variable], bool] | None = None,
        name: str | None = None,
    ):
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        around = (PruningOptimizer, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)
        if isinstance(inner_optimizer, around):
            raise ValueError(
                "`inner_optimizer` must be the optimizer that updates: a loss scale and a `MultiOptimizer` go around "
                "`PruningOptimizer`, and two schedules are one callable. "
                f"Received: inner_optimizer={inner_optimizer!r}."
            )
        if pruning_schedule is not None:
            check_schedule(pruning_schedule, "pruning_schedule")
        check_allow(allow)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.pruning_schedule = pruning_schedule
        self.rule = Rule(scope, block_size, block_pooling_type, sparsity_m_by_n)
        self.allow = allow
        self.use_ema = inner_optimizer.use_ema  # where `keras.callbacks.SwapEMAWeights` looks for it
        self._kernels: list[keras.Variable] = []
        self._is_late = False
        self._masks: list[keras.Variable] = []
        self._thresholds: list[keras.Variable] = []

    @no_automatic_dependency_tracking
    def build(self, variables):
        """Creates masks for the kernels among `variables`; on TensorFlow, prunes them if due at step 0."""
        if self.built:
            return
        kernels = [variable for variable in variables if (self.allow or is_kernel)(variable)]
        for kernel in kernels:
            self.rule.check(kernel, "Leave it out: `allow=lambda variable: ...`.")
        if self.inner_optimizer.built:
            self._check_inner(variables)
        if self.allow is None and kernels:
            _warn_of_dense_weights(variables, kernels)
        self.inner_optimizer.build(variables)
        self.use_ema = False  # the averages are the inner optimizer's
        super().build(variables)
        self.use_ema = self.inner_optimizer.use_ema
        self._model_variables_moving_average = getattr(self.inner_optimizer, "_model_variables_moving_average", [])
        self._kernels = kernels
        if not kernels:  # a file of what was frozen or quantized since loads; training it is an error, in `apply`
            return
        with _outside_of_graphs():
            self._is_late = not _have_values(kernels)
            if self._is_late:
                masks, thresholds = [np.ones(kernel.shape, bool) for kernel in kernels], [0.0] * len(kernels)
            else:
                weights = [finite_weights(kernel) for kernel in kernels]
                masks, thresholds = self._initial_masks(weights)
                self._warn_of_collapse(
                    [not mask.any() and each.any() for mask, each in zip(masks, weights, strict=True)]
                )
            for kernel, mask, threshold in zip(kernels, masks, thresholds, strict=True):
                # without a slash, by which saving would take it for a path
                name = kernel.path.replace("/", "_")
                layout = getattr(kernel, "_layout", None)  # over devices, a mask is where its kernel is
                everywhere = layout and TensorLayout([], keras.distribution.distribution().device_mesh).backend_layout
                self._masks.append(self._add(f"{name}_mask", mask, "bool", layout))
                self._thresholds.append(self._add(f"{name}_threshold", threshold, "float32", everywhere))
            if keras.backend.backend() != "tensorflow":  # `evaluate` builds optimizers, and other weights may follow
                due, sparsity = (True, 1.0) if self.pruning_schedule is None else evaluate(self.pruning_schedule, 0)
                self._is_late = self.rule.once or bool(due and sparsity > 0)
            elif not self._is_late:
                self._project(with_averages=False)  # they begin with the first update

    def _check_inner(self, variables):
        with _outside_of_graphs():
            updates = int(as_array(self.iterations))
        its_own = {id(each) for each in self.inner_optimizer._trainable_variables} == {id(each) for each in variables}
        if not its_own or (updates and self.pruning_schedule is not None):
            raise ValueError(
                "`inner_optimizer` must be a new one: this one has been built "
                + ("before, and its updates are the steps of the schedule" if its_own else "for other variables")
                + f". Received: inner_optimizer={self.inner_optimizer!r} after {updates} updates. Pass "
                "`type(inner_optimizer).from_config(inner_optimizer.get_config())`."
            )

    def _add(self, name, value, dtype, layout=None):
        value = np.asarray(value)
        return self.add_variable(
            shape=value.shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(value, dtype),
            dtype=dtype,
            aggregation="only_first_replica",
            layout=layout,
            name=name,
        )

    def _initial_masks(self, kernels):
        """The masks before the first update: of step 0, of the zeros that are there, or all ones."""
        schedule = self.pruning_schedule
        if schedule is None and not self.rule.once:
            return [kernel != 0 for kernel in kernels], [np.float32(0)] * len(kernels)
        due, sparsity = (False, 0.0) if schedule is None else evaluate(schedule, 0)
        if not self._is_late and not self.rule.once:
            warn_of_zeros(kernels, sparsity if due else None)
        if due or self.rule.once:
            return self.rule(kernels, sparsity)
        return [abs(kernel) >= 0 for kernel in kernels], [np.float32(0)] * len(kernels)

    def _warn_of_collapse(self, gone):
        paths = [kernel.path for kernel, is_gone in zip(self._kernels, gone, strict=True) if is_gone]
        if paths and self.pruning_schedule is not None:
            warn_of_collapse(evaluate(self.pruning_schedule, int(as_array(self.iterations)))[1], paths)

    def save_own_variables(self, store):
        for i, variable in enumerate(self._variables):  # the inner optimizer saves its own
            store[str(i)] = as_array(variable)

    def load_own_variables(self, store):
        saved = [tuple(store[str(i)].shape) for i in range(len(store.keys()))]
        own, twice = ([tuple(each.shape) for each in some] for some in (self._variables, self.variables))
        # A model that was saved before it was trained has no masks to load, and Keras builds them from the weights with
        # which it makes the model, before it loads those.
        self._is_late |= saved not in (own, twice)
        if saved in (own, twice):  # older files have the inner optimizer's, too
            for variable, name in zip(self.variables, sorted(store.keys(), key=int), strict=False):
                variable.assign(store[name])
        elif not any(saved):  # no masks
            super().load_own_variables(store)
        elif not self.built:
            warnings.warn(
                f"{self.name!r} is not built yet, so that the masks and the step in this file are not loaded, and it "
                "begins anew. Call `model.optimizer.build(model.trainable_variables)` before `load_weights`.",
                stacklevel=2,
            )
        else:
            warnings.warn(
                "The masks in this file are of other kernels than those that can be trained now: layers were frozen or "
                "thawed since, another optimizer has saved it, or `allow` asks for paths that are others in a loaded "
                f"model (their ends stay). They are not loaded, and {self.name!r} begins anew; to keep what is zero, "
                "compile with a `PruningOptimizer` without a schedule.",
                stacklevel=2,
            )

    def set_weights(self, weights):
        count = len(self._variables)
        super().set_weights(weights[:count])
        self.inner_optimizer.set_weights(weights[count:])

    @property
    def pruning_vars(self) -> list[tuple[keras.Variable, keras.Variable, keras.Variable]]:
        return list(zip(self._kernels, self._masks, self._thresholds, strict=True))

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, loss_scale_factor):
        if hasattr(self, "inner_optimizer"):  # not while Keras sets defaults
            self.inner_optimizer.loss_scale_factor = loss_scale_factor

    @property
    def iterations(self):
        """Updates done: the step of the schedule."""
        return self.inner_optimizer.iterations

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.inner_optimizer._iterations

    def apply(self, grads, trainable_variables=None):
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        if not self._kernels:
            raise ValueError(
                "There is nothing to prune: no trainable variable "
                + ("passes `allow`" if self.allow else f"of rank 2 or more is named {', '.join(sorted(KERNEL_NAMES))}")
                + f". Received: {[(each.path, tuple(each.shape)) for each in self._trainable_variables]}. "
                "Choose kernels yourself: `allow=lambda variable: ...`."
            )
        if self._is_late:
            _on_all_replicas(self._catch_up)
        grads = list(grads)
        with _after_data(grads):
            self.inner_optimizer.apply(grads, trainable_variables)
        _on_all_replicas(self._follow_schedule)

    def _catch_up(self):
        """Prunes at step 0 what had no weights yet, or others, when the optimizer was built."""
        is_first = ops.equal(ops.convert_to_tensor(self.inner_optimizer._iterations), 0)
        self._update(is_first, self._initial_masks)
        self._project()

    def _follow_schedule(self):
        if self.pruning_schedule is not None and not self.rule.once:
            due, sparsity = evaluate(self.pruning_schedule, ops.convert_to_tensor(self.iterations))
            batches = self.inner_optimizer.gradient_accumulation_steps
            if batches:
                due = ops.logical_and(due, ops.convert_to_tensor(self.inner_optimizer._iterations) % batches == 0)
            self._update(due, lambda kernels: self.rule(kernels, sparsity))
        self._project()

    def _update(self, is_due, make_masks):
        kernels = [kernel.value for kernel in self._kernels]
        before = [mask.value for mask in self._masks], [threshold.value for threshold in self._thresholds]
        masks, thresholds = ops.cond(is_due, lambda: make_masks(kernels), lambda: before)
        for variables, values in ((self._masks, masks), (self._thresholds, thresholds)):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def _project(self, *, with_averages=True):
        has_averages = with_averages and self.use_ema
        for kernel, mask in zip(self._kernels, self._masks, strict=True):
            keep = ops.cast(mask.value, kernel.dtype)
            kernel.assign(kernel.value * keep)  # times, so that NaN stays NaN
            if has_averages:
                average = self._model_variables_moving_average[self._get_variable_index(kernel)]
                average.assign(average.value * keep)

    def finalize_variable_values(self, var_list):
        # after an error, JAX leaves variables without values
        is_done = self.built and all(each._value is not None for each in self.variables)
        known = {id(each) for each in self._trainable_variables}
        others = [variable.path for variable in var_list or () if id(variable) not in known]
        if is_done and others:
            raise ValueError(  # on JAX, nothing tells before
                "This `PruningOptimizer` has the masks of another model, or of layers that were trainable before, with "
                f"which other variables have been trained. Make a new one. Received: {others}."
            )
        self.inner_optimizer.finalize_variable_values(var_list)
        if is_done:
            self._warn_of_collapse([not as_array(mask).any() for mask in self._masks])
            if not self.rule.once:
                schedules.warn_if_not_begun(self.pruning_schedule, int(as_array(self.iterations)))

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inner_optimizer": _serialized(self.inner_optimizer),
            "pruning_schedule": schedules.serialize(self.pruning_schedule, f"pruning_schedule of {self.name!r}"),
            "allow": schedules.serialize(self.allow, f"allow of {self.name!r}"),
            **dataclasses.asdict(self.rule),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        functions = {
            name: schedules.deserialize(config.pop(name), custom_objects) for name in ("pruning_schedule", "allow")
        }
        return cls(inner, **functions, **config)


def _serialized(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    config = keras.saving.serialize_keras_object(optimizer)
    if config["module"].startswith("keras.src.backend."):  # a class of Torch's, which is none on other backends
        config["module"] = "keras.optimizers"
    return config


def _warn_of_dense_weights(variables, kernels) -> None:
    known = {id(kernel) for kernel in kernels}
    dense = [each for each in variables if len(each.shape) > 1 and id(each) not in known and each.name != "bias"]
    share = sum(math.prod(each.shape) for each in dense) / sum(math.prod(each.shape) for each in variables)
    if share > 0.1:
        warnings.warn(
            f"{share:.1%} of the weights stay dense, as they are not named as kernels are: "
            f"{[(each.path, tuple(each.shape)) for each in dense]}. Choose yourself: `allow=lambda variable: ...`.",
            stacklevel=2,
        )


def _have_values(kernels) -> bool:
    """False where TensorFlow is tracing the first batch of a model that is built by it."""
    return keras.backend.backend() != "tensorflow" or all(bool(kernel.value.is_initialized()) for kernel in kernels)


def _outside_of_graphs():
    """Where TensorFlow is tracing, an eager context around it, in which variables have values."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def _after_data(grads):
    """Where TensorFlow runs a step to find that there are no more data, a context in which no update is counted."""
    known = [each for each in grads if each is not None]
    if keras.backend.backend() != "tensorflow" or not known:
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies(tf.nest.flatten(known[-1], expand_composites=True))


def _on_all_replicas(function):
    """Calls `function` once for all replicas of a `tf.distribute` strategy, where variables may be assigned."""
    if keras.backend.backend() != "tensorflow":
        return function()
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy():
        return function()
    return tf.distribute.get_replica_context().merge_call(lambda strategy: function())
