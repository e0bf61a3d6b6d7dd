"""Walks, copies and rebuilds Keras models; most of Keras' private doors are opened here.

Keras has no copy that works for every model: `clone_model` goes layer by layer and forgets weights and names of inputs,
`copy.deepcopy` saves and loads and so needs every class registered.
"""

import contextlib
import dataclasses
import enum
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from copy import copy as copy_object
from typing import Any

import keras
import numpy as np
from keras.src import backend
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.backend.common import global_state
from keras.src.models import Functional
from keras.src.saving.serialization_lib import SafeModeScope

ACTIVATIONS = {id(each) for each in vars(keras.activations).values()}  # which Keras knows by their names
CONVNEXT_LAYERS = (LayerScale, StochasticDepth)  # in no public module

# Between these two layers stands what `schemes.extend` adds and `discard` takes away. They change nothing themselves.
BEGIN, END = "extra_blocks_begin", "extra_blocks_end"

# What Keras sets on a model when it is built, compiled, trained and evaluated, and not when it is made.
TRAINING_ATTRIBUTES = frozenset(
    [
        "_build_shapes_dict",
        "_compile_config",
        "_compiled_trainable_state",
        "_eval_epoch_iterator",
        "_jax_state",
        "_saved_model_arg_spec",
        "_saved_model_inputs_spec",
        "_self_name_based_restores",
        "_self_saveable_object_factories",
        "_self_setattr_tracking",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_deferred_dependencies",
        "_self_unconditional_dependency_names",
        "_self_update_uid",
        "_torch_params",
        "_tracked",
        "history",
        "optimizer",
        "stop_evaluating",
        "stop_predicting",
        "stop_training",
    ]
)

# Values of attributes that hold no layers and may be shared.
PLAIN = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    np.ndarray,
    np.generic,
    enum.Enum,
    keras.DTypePolicy,
    keras.Initializer,
)


class CopyError(ValueError):
    """A layer or model of which Keras cannot make another one."""


# --- walking ---


def children(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer or model holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def walk(layer: keras.Layer) -> list[keras.Layer]:
    """A layer or model and all layers in it, however deep, each once."""
    return list({id(each): each for each in layer._flatten_layers()}.values())


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Variables have the values, and the dtypes, that they hold, also while a layer computes with less precision."""
    scope = backend.get_autocast_scope()
    global_state.set_global_attribute("autocast_scope", None)  # in one of None, Keras takes all for `floatx`
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", scope)


@contextlib.contextmanager
def watched_calls(watch: Callable[[keras.Layer, Any, Any], None]) -> Iterator[None]:
    """Tells `watch(layer, args, outputs)` of every call of a layer."""
    call = keras.Layer.__call__

    @functools.wraps(call)
    def watched(layer, *args, **kwargs):
        outputs = call(layer, *args, **kwargs)
        watch(layer, args, outputs)
        return outputs

    keras.Layer.__call__ = watched
    try:
        yield
    finally:
        keras.Layer.__call__ = call


def forget_losses(layer: keras.Layer) -> None:
    """Takes back what a layer and those in it have added to the loss in their last call."""
    layer._clear_losses()


def keep_assigned(model: keras.Model) -> None:
    """Lets what a callback has assigned after a batch last, also if no batch follows.

    On JAX, Keras finds out that data of unknown size have run out when it has taken the state of the model away for one
    step more, and then goes back to what its last step returned.
    """
    if getattr(model, "_jax_state", None) and model._jax_state_synced:
        values = model._get_jax_state(**dict.fromkeys(model._jax_state, True))
        model._jax_state = dict(zip(model._jax_state, values, strict=True))


def metrics(model: keras.Model) -> list[Any]:
    """What a model measures: metrics, and those that it was compiled with as they were given, functions and names too.

    Those of `weighted_metrics` are not among them. A model on TensorFlow makes metrics of names only when its step is
    traced.
    """
    compiled = getattr(model, "_compile_metrics", None)
    given = [] if compiled is None else [compiled._user_metrics]
    return [*(each for each in keras.tree.flatten(given) if each is not None), *model.metrics]


def weighted_metrics(model: keras.Model) -> list[Any]:
    """The `weighted_metrics` that a model was compiled with, as they were given."""
    return keras.tree.flatten(getattr(getattr(model, "_compile_metrics", None), "_user_weighted_metrics", None) or [])


def add_metric(model: keras.Model, metric: keras.Metric) -> None:
    """Has a model measure one thing more, in training and in evaluation, until `remove_metric`.

    Its steps are compiled anew, before and after.
    """
    compute = model.compute_metrics

    def compute_metrics(x, y, y_pred, sample_weight=None):
        metric.update_state(y, y_pred)
        return compute(x, y, y_pred, sample_weight)

    compute_metrics.added = metric  # type: ignore[attr-defined]
    object.__setattr__(model, "compute_metrics", compute_metrics)
    model._metrics.append(metric)
    model.train_function = model.test_function = None


def remove_metric(model: keras.Model) -> None:
    """Takes away what `add_metric` has added, if there is anything."""
    metric = getattr(model.__dict__.get("compute_metrics"), "added", None)
    if metric is not None:
        object.__delattr__(model, "compute_metrics")
        model._metrics.remove(metric)
        model.train_function = model.test_function = None


def is_graph(layer: Any) -> bool:
    """Whether it is a Functional or Sequential model, of which the order of the layers is known.

    One of a class with a `call` of its own may do something else.
    """
    known = isinstance(layer, keras.Sequential) or (isinstance(layer, keras.Model) and hasattr(layer, "operations"))
    return known and type(layer).call in (Functional.call, keras.Sequential.call)


def has_calls(layer: Any) -> bool:
    """Whether the calls of its layers are known too: not of a Sequential model that begins with a dictionary."""
    return is_graph(layer) and _function(layer) is not None


def check_calls(model: keras.Model) -> None:
    """Raises a ValueError unless the calls of a Functional or Sequential model's layers are known."""
    if not has_calls(model):
        raise ValueError(
            f"The inputs of {model.name!r} are not known, as it is a Sequential model that does not begin with one "
            "tensor. Make it with the Functional API."
        )


def leaves(model: keras.Model) -> list[keras.Layer]:
    """The layers of a Functional or Sequential model that are no such models themselves, each once.

    Raises:
        CopyError: If the model, or a model in it, is subclassed.
    """
    if isinstance(model, keras.Model) and not is_graph(model):
        raise CopyError(
            "Subclassed models cannot be copied layer by layer. "
            f"Received: {model.name!r} of type {type(model).__name__}."
        )
    found = (leaves(layer) if isinstance(layer, keras.Model) else [layer] for layer in model.layers)
    return list({id(each): each for some in found for each in some}.values())


def compute(model: keras.Model, inputs: list, call: Callable[[Any, list, Any], Any]) -> list:
    """What becomes of values of any kind in a Functional or Sequential model, which is only looked at.

    Args:
        model: Models in it are calls as layers are.
        inputs: A value for each of `model.inputs`.
        call: `call(operation, values, node)` returns a value for each output of a call from those of its tensors. A
            node is the call itself, with `arguments`, symbolic `input_tensors` and `outputs`.

    Returns:
        A value for each of `model.outputs`.
    """
    known = {id(tensor): value for tensor, value in zip(model.inputs, inputs, strict=True)}
    by_depth = sorted(_function(model)._nodes_by_depth.items(), reverse=True)
    for node in (each for _, nodes in by_depth for each in nodes if not each.is_input):
        outputs = call(node.operation, [known[id(tensor)] for tensor in node.input_tensors], node)
        known.update(zip(map(id, node.outputs), outputs, strict=True))
    return [known[id(tensor)] for tensor in model.outputs]


def arguments(node: Any, values: list) -> tuple[tuple, dict]:
    """What an operation was called with, values in place of the tensors."""
    return node.arguments.fill_in(dict(zip(map(id, node.input_tensors), values, strict=True)))


def entering(model: keras.Model, values: list, node: Any) -> list:
    """The values that a model in a model is called with, in the order of its inputs: of a dictionary, by name."""
    given = node.arguments.args[0] if node.arguments.args else node.arguments.kwargs["inputs"]
    known = dict(zip(map(id, node.input_tensors), values, strict=True))  # with a mask, there are more
    if not isinstance(given, dict) or isinstance(_function(model).input, dict):
        return [known[id(tensor)] for tensor in keras.tree.flatten(given)]
    return [known[id(given[tensor.name])] for tensor in model.inputs]


def standardized(model: keras.Model, inputs: Any) -> list:
    """What a Functional or Sequential model makes of the tensors it is called with: one for each of `model.inputs`."""
    return _function(model)._standardize_inputs(inputs)


def _function(model: Any) -> Any:
    return model._functional if isinstance(model, keras.Sequential) else model


def producer(tensor: keras.KerasTensor) -> Any:
    """The layer or `keras.ops` node whose output a symbolic tensor is."""
    return tensor._keras_history.operation


def _is_plain(layer: Any) -> bool:
    """Whether it is a model whose class can be made of its layers, or of its inputs and outputs."""
    if not is_graph(layer) or isinstance(layer, keras.Sequential):
        return type(layer) is keras.Sequential
    made_of = inspect.getfullargspec(type(layer).__init__)
    names = [*made_of.args[1:], *made_of.kwonlyargs]
    known = names[:2] == ["inputs", "outputs"] and set(names[2:]) <= {"name", "trainable"}
    return known or (not names and None not in (made_of.varargs, made_of.varkw))


# --- building ---


def build(layer: keras.Layer, *args: Any, **kwargs: Any) -> None:
    """Builds a layer and all that it is made of, as a call with these tensors would, but computes nothing."""
    args, kwargs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype)) if hasattr(x, "shape") else x,
        (args, kwargs),
    )
    if not layer.built:
        layer(*args, **kwargs)
    if not all(each.built for each in walk(layer)):  # its `build`, or the shape that it tells, leaves that to its call

        def call(*args, **kwargs):  # of what it returns beside tensors, Torch would want a shape
            return [each for each in keras.tree.flatten(layer.call(*args, **kwargs)) if hasattr(each, "shape")]

        backend.compute_output_spec(call, *args, **kwargs)


@contextlib.contextmanager
def unbuilt_parts() -> Iterator[None]:
    """Keeps Keras from warning of parts that are not built by a layer's `build`, where they are built next."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`build\(\)` was called on layer", UserWarning)
        yield


def _build_like(new: keras.Layer, old: keras.Layer) -> None:
    if not old.built:
        return
    if not new.built:
        with unbuilt_parts():
            new.build_from_config(old.get_build_config())
    for one, other in zip(children(new), children(old), strict=True):
        _build_like(one, other)


# --- copying ---


@functools.singledispatch
def copy(layer: Any, dtype: Any = None) -> Any:
    """A whole copy of a layer or of any model: its class, weights, state of random numbers; uncompiled, nothing shared.

    A Functional or Sequential model is rebuilt. A layer, or a model of another class, is made anew by its config, or
    else by the arguments that it was made with, and gets the state of the old one; a subclassed model without a config
    gets the attributes of the old one, copied. A layer with nothing to keep apart, whose config may not be all there is
    to it, such as a `Lambda`, is shared.

    Args:
        layer: A layer, a model or a `keras.ops` node.
        dtype: A dtype policy for the copy of a layer; by default the layer's own.

    Raises:
        CopyError: If no way leads to the same weights.
    """
    if not isinstance(layer, keras.Layer):
        return _copy_operation(layer)
    copy_part = functools.partial(copy, dtype=dtype)
    if _is_plain(layer):
        return rebuild(layer, copy_part, whole=True)
    is_adapted = hasattr(layer, "adapt")  # such as `TextVectorization`, whose vocabulary no config has
    of_keras = type(layer).__module__.startswith("keras.src.") and not is_adapted
    of_keras &= not isinstance(layer, keras.layers.Lambda)
    if layer.built and not layer.variables and not of_keras and (is_adapted or not children(layer)):
        return layer
    changes = {} if dtype is None else {"dtype": dtype}
    if not isinstance(layer, keras.Model):
        return _made_anew(layer, [functools.partial(config_of, layer), functools.partial(_arguments, layer)], changes)
    if type(layer).get_config not in (keras.Model.get_config, Functional.get_config):  # those know no arguments
        with contextlib.suppress(CopyError):
            return _made_anew(layer, [functools.partial(_config_of_model, layer)], changes)
    return rebuild(layer, copy_part, whole=True) if is_graph(layer) else _with_parts_copied(layer, copy_part)


def config_of(layer: keras.Layer) -> dict[str, Any]:
    """The config of a layer; of one of Keras', what is the user's in it, a function or an initializer, stands itself.

    By the name that a config has of it, Keras would find another of that name, or none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*includes a `lambda`")
        config = layer.get_config()
    if not type(layer).__module__.startswith("keras.src."):
        return config
    own = {name: value for name, value in ((name, getattr(layer, name, None)) for name in config) if _is_own(value)}
    return config | own


def _config_of_model(model: keras.Model) -> dict[str, Any]:
    """The config of a model; keras-hub's have a preprocessor, whose vocabulary is in no config: it is shared."""
    config, preprocessor = model.get_config(), getattr(model, "preprocessor", None)
    is_shared = "preprocessor" in config and isinstance(preprocessor, keras.Layer) and not preprocessor.variables
    return {**config, "preprocessor": preprocessor} if is_shared else config


def _is_own(value: Any) -> bool:
    """Whether it is something callable, no layer, that Keras does not know by a name."""
    if not callable(value) or isinstance(value, (type, types.MethodType, keras.Layer)) or id(value) in ACTIVATIONS:
        return False
    return isinstance(value, types.FunctionType) or not type(value).__module__.startswith("keras.src.")


def _made_anew(layer: keras.Layer, configs: list[Callable[[], dict]], changes: dict[str, Any]) -> Any:
    failures = []
    for config in configs:
        try:
            with SafeModeScope(False), keras.saving.custom_object_scope(_classes(layer)):
                new = type(layer).from_config({**config(), **changes})
            new.name = layer.name  # which a constructor need not take
            _build_like(new, layer)
            _assign(new, layer)
        except Exception as error:  # whatever a constructor, a `build` or an `assign` may raise
            failures.append(error)
            continue
        if failures or "get_config" in vars(layer):
            keep_config(new)
        return new
    reason = str(failures[0]).rpartition("Exception encountered: ")[2].strip().partition("\n")[0]
    raise CopyError(
        f"{layer.name!r} of type {type(layer).__name__} cannot be copied: neither its config nor the arguments it was "
        f"made with give a layer of the same weights ({type(failures[0]).__name__}: {reason})."
    ) from failures[0]


def _assign(new: keras.Layer, old: keras.Layer) -> None:
    for one, other in zip(new.variables, old.variables, strict=True):
        one.assign(keras.ops.convert_to_numpy(other.value))
    for one, other in zip(walk(new), walk(old), strict=False):
        for name, value in vars(other).items():
            known = vars(one).get(name)
            if value is not known and _is_function(value) and _is_function(known) and known.__name__ == value.__name__:
                setattr(one, name, value)  # it may be the user's, where the config means Keras' own of that name
    parts = list(zip(walk(new), walk(old), strict=False))
    if all(type(one) is type(other) for one, other in parts):
        for one, other in parts:  # what no config says, or not this one: what is frozen in it, and settings
            if one.trainable != other.trainable:
                one.trainable = other.trainable
            for name in [] if type(other).__module__.startswith("keras.src.") else vars(other):
                value, known = vars(other)[name], vars(one).get(name)
                is_plain = isinstance(value, bool | int | float | str) and not name.startswith("_")
                if is_plain and type(value) is type(known) and value != known:
                    setattr(one, name, value)
        for variable, other in zip(new.variables, old.variables, strict=True):
            if variable.trainable != other.trainable:
                variable.trainable = other.trainable
            for name in ("regularizer", "constraint"):  # those that were given to the variable itself, or taken from it
                value = getattr(other, name)
                if (value is None) != (getattr(variable, name) is None):
                    setattr(variable, name, getattr(value, "unmasked", value))
    for each in walk(new):
        if isinstance(each, keras.Model):
            each.compiled = False
        if hasattr(each, "finalize_state"):
            each.finalize_state()  # adapted preprocessing computes with copies of its weights


def _is_function(value: Any) -> bool:
    """Whether it is a function that holds nothing but plain values, and may be shared."""
    if not isinstance(value, types.FunctionType):
        return False
    held = keras.tree.flatten([cell.cell_contents for cell in value.__closure__ or ()])
    # of functions only those that hold nothing: one that calls itself holds itself
    return all(isinstance(each, (*PLAIN, types.ModuleType)) or not getattr(each, "__closure__", each) for each in held)


def _with_parts_copied(model: keras.Model, copy_part: Callable[[Any], Any]) -> Any:
    """A subclassed model of whose constructor nothing is known: its attributes, the layers among them copied."""
    kind: Any = type(model)
    new = kind.__new__(kind)
    keras.Model.__init__(new, name=model.name, dtype=model.dtype_policy)
    copies: dict[int, Any] = {}

    def part(name, value):
        if isinstance(value, keras.Layer):
            if id(value) not in copies:
                copies[id(value)] = copy_part(value)
            return copies[id(value)]
        if isinstance(value, dict):
            return {key: part(name, each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return (tuple if isinstance(value, tuple) else list)(part(name, each) for each in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            new_value = copy_object(value)
            for field in dataclasses.fields(value):
                object.__setattr__(new_value, field.name, part(name, getattr(value, field.name)))
            return new_value
        if isinstance(value, keras.random.SeedGenerator | keras.Metric | keras.Loss | keras.Optimizer):
            return type(value).from_config(value.get_config())
        if isinstance(value, keras.Variable):
            variable = type(value)(keras.ops.convert_to_numpy(value.value), dtype=value.dtype, name=value.name)
            for setting in ("trainable", "regularizer", "constraint"):
                setattr(variable, setting, getattr(value, setting))
            return variable
        if isinstance(value, PLAIN) or _is_function(value):
            return value
        raise CopyError(
            f"{model.name!r} of type {kind.__name__} cannot be copied: it has no `get_config`, and its attribute "
            f"{name!r} is a {type(value).__name__}, which may hold its layers. Give the class a `get_config`."
        )

    turn = {id(layer): i for i, layer in enumerate(children(model))}

    def by_turn(value):  # the order of weights is that of attributes, and Torch keeps those that are layers apart
        if isinstance(value, dict | list | tuple):
            return min(map(by_turn, value.values() if isinstance(value, dict) else value), default=-1)
        return turn.get(id(value), -1)

    attributes = _attributes(model)
    own = [name for name in attributes if name not in _attributes(new) and name not in TRAINING_ATTRIBUTES]
    for name in sorted(own, key=lambda name: by_turn(attributes[name])):
        setattr(new, name, part(name, attributes[name]))
    new.built = model.built
    try:
        _assign(new, model)
    except ValueError as error:
        raise CopyError(
            f"{model.name!r} of type {kind.__name__} cannot be copied: it has no `get_config`, and holds weights "
            "where its attributes do not tell. Give the class a `get_config`."
        ) from error
    return new


def _attributes(model: keras.Model) -> dict[str, Any]:
    return {**vars(model), **vars(model).get("_modules", {})}


def keep_config(layer: keras.Layer) -> None:
    """Lets a layer whose config does not rebuild it give the arguments it was made with, so that its file loads."""
    if type(layer).__module__.startswith("keras.src.") or getattr(layer, "_auto_config", None) is None:
        return
    try:
        type(layer).from_config(layer.get_config())
    except Exception:  # whatever its constructor may raise
        config = _arguments(layer)
        layer.get_config = lambda: dict(config)


def _arguments(layer: keras.Layer) -> dict[str, Any]:
    """The arguments that a layer was made with, which Keras keeps where they are plain, as a config."""
    if getattr(layer, "_auto_config", None) is None:
        raise TypeError(f"{type(layer).__name__} was made with arguments that are layers or other objects")
    config = {"name": layer.name, "trainable": layer.trainable, "dtype": layer.dtype_policy.name}
    takes = inspect.getfullargspec(type(layer).__init__)
    if takes.varkw is None:
        config = {name: value for name, value in config.items() if name in takes.args + takes.kwonlyargs}
    return {**config, **layer._auto_config.config}


def _classes(layer: keras.Layer) -> dict[str, type]:
    """What a config may name that is not registered: classes of layers, and functions and the like in them."""
    kinds = {type(each) for each in walk(layer)}
    own = [value for each in walk(layer) for value in vars(each).values() if _is_own(value)]
    functions = {value.__name__: value for value in own if hasattr(value, "__name__")}
    kinds |= {type(value) for value in own if not hasattr(value, "__name__")}
    kinds = {kind for kind in kinds if not kind.__module__.startswith("keras.src.")}
    named = {kind.__name__: kind for kind in kinds}
    if len(named) < len(kinds):
        raise ValueError(f"two of the classes in it have one name: {sorted(map(str, kinds))}")
    return functions | named


def _copy_operation(operation: Any) -> Any:
    try:
        return type(operation).from_config(operation.get_config())
    except NotImplementedError:  # made with arguments that are not plain; it has no state
        return operation


def _variables_in(values: Any) -> list[keras.Variable]:
    """The variables among values, and those of the layers among them."""
    flat = keras.tree.flatten(values)
    found = [each.variables if isinstance(each, keras.Layer) else [each] for each in flat]
    return [each for some in found for each in some if isinstance(each, keras.Variable)]


# --- rebuilding ---


def rebuild(
    model: keras.Model,
    replace: Callable[[keras.Layer], keras.Layer],
    call: Callable[..., Any] | None = None,
    *,
    whole: bool = False,
    replace_input: Callable[[Any], Any] | None = None,
) -> keras.Model:
    """A copy of a Functional or Sequential model in which `replace(layer)` stands for each layer, once.

    Args:
        model: It is left as it is.
        replace: Is given each layer and each operation of `keras.ops`, also those of models in the model, and returns a
            new one with its weights, such as `copy(layer)`.
        call: `call(old, new, *args, **kwargs)` stands for each call of a layer or operation of the model itself, where
            the graph is to change. The copy of a Sequential model is a Functional one then.
        whole: Whether a model in the model whose class is not made of inputs and outputs is given to `replace`, too.
        replace_input: Is given each input layer, where the shape of inputs is to change.

    Returns:
        A new, uncompiled model with the names that the old one has. It is a plain one, with a warning, where the class
        of the old one is not made of inputs and outputs.
    """
    new_of: dict[int, Any] = {}
    owners: dict[int, Any] = {}  # of variables
    own = {id(variable): variable.path for variable in model.variables}
    copy_input = replace_input or _copy_operation

    def check_tied(old: Any, values: Any) -> None:
        if tied := [own[id(value)] for value in _variables_in(values) if id(value) in own]:
            raise CopyError(
                f"{old.name!r} of {model.name!r} computes with the weight {tied[0]!r} of another layer, and its copy "
                "would go on with that of the model that is copied. `PruningOptimizer` needs no copy."
            )

    def remake(old: Any) -> Any:
        if id(old) not in new_of:
            if isinstance(old, keras.layers.Lambda) and isinstance(old.function, types.FunctionType):
                names = inspect.getclosurevars(old.function)
                check_tied(old, [*names.nonlocals.values(), *names.globals.values()])
            if _is_plain(old) or (is_graph(old) and not whole):
                new_of[id(old)] = assemble(old)
            else:
                for variable in getattr(old, "variables", ()):
                    if owners.setdefault(id(variable), old) is not old:
                        raise CopyError(
                            f"Layers {owners[id(variable)].name!r} and {old.name!r} of {model.name!r} share the weight "
                            f"{variable.path!r}, which their copies, each made by itself, would not."
                        )
                new_of[id(old)] = replace(old)
        return new_of[id(old)]

    def assemble(old: Any, call: Callable[..., Any] | None = None) -> Any:
        if isinstance(old, keras.Sequential) and call is None:
            inputs = [copy_input(each) for each in old._layers[:1] if isinstance(each, keras.layers.InputLayer)]
            new = keras.Sequential([*inputs, *map(remake, old.layers)], name=old.name, trainable=old.trainable)
            if old.built and not new.built:
                new.build(old.input_shape)
            return new
        function = _function(old)

        def call_fn(operation, *args, **kwargs):
            check_tied(operation, (args, kwargs))
            new = remake(operation)
            return new(*args, **kwargs) if call is None else call(operation, new, *args, **kwargs)

        # with the names of the layers, where `clone_model` takes those of the tensors
        inputs = keras.tree.map_structure(lambda x: copy_input(producer(x)).output, function.input)
        outputs = function._run_through_graph(inputs, call_fn=call_fn)
        kind = type(old) if _is_plain(old) and function is old else keras.Model
        new = kind(inputs, outputs, name=old.name)
        if not old.trainable:
            new._trainable = False  # its layers have their own, and some may have been thawed
        return new

    copy = assemble(model, call)
    if type(copy) is not type(model) and type(model) is not keras.Sequential:
        warnings.warn(
            f"The copy of {model.name!r} is a plain {type(copy).__name__}, no {type(model).__name__}: methods of that "
            "class, such as a `train_step` of its own, are not there.",
            stacklevel=3,
        )
    return copy
