"""Copies of Keras models of every kind, and what pruning does with models that it has to copy."""

import dataclasses
import enum
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kerascompress as kc
from kerascompress import graph, pruning

WAY_OUT = r"Wrap its layers.*model\.compile\(kc\.PruningOptimizer\(keras\.optimizers\.AdamW\(1e-3\), schedule\), loss\)"


def data(count=4):
    return np.random.default_rng(0).uniform(0, 1, (count, 6, 6, 2)).astype("float32")


def outputs(model, *inputs):
    return ops.convert_to_numpy(model(*(inputs or [data()]), training=False))


def train(model, callbacks=()):
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "tensorflow")  # sooner than compiled
    model.fit(data(), np.ones(outputs(model).shape), verbose=0, callbacks=list(callbacks))


class Block(layers.Layer):
    """Made of layers that its call builds."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = layers.Dense(units), layers.Dense(2)

    def call(self, inputs):
        return self.second(self.first(inputs))


@keras.saving.register_keras_serializable("tests")
class Forgetful(layers.Layer):
    """Its config cannot rebuild it, as those of keras-hub's ViT and MiT cannot."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units, self.dense = units, layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)

    def get_config(self):
        return {**super().get_config(), "width": 2 * self.units}


class Unknown(Forgetful):
    """Not even its arguments can rebuild it: they are no plain values."""

    def __init__(self, dense, **kwargs):
        super().__init__(2, **kwargs)
        self.dense = dense


class Net(keras.Model):
    """Subclassed, without a config, made of a layer."""

    def __init__(self, inner):
        super().__init__()
        self.blocks = {"inner": (inner,), "rest": [layers.Dropout(0.5, seed=3), layers.Dense(3)]}
        self.scale = self.add_weight(shape=(3,), name="scale")
        self.activation = keras.activations.relu

    def call(self, inputs, training=None):
        for layer in (*self.blocks["inner"], *self.blocks["rest"]):
            inputs = layer(inputs)
        return self.activation(inputs * self.scale)


class WithConfig(keras.Model):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units, self.block = units, Block(units)

    def call(self, inputs):
        return self.block(inputs)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class OfInputs(keras.Model):
    """A Functional model with a step of its own."""

    def train_step(self, *args):
        return super().train_step(*args)


class Closure(keras.Model):
    def __init__(self):
        super().__init__()
        dense = layers.Dense(3)
        self.function = lambda inputs: dense(inputs)

    def call(self, inputs):
        return self.function(inputs)


def functional(kind=keras.Model):
    inputs, shared = keras.Input((6, 6, 2)), layers.Dense(2)
    adapted = layers.Normalization()
    adapted.adapt(data())
    x = layers.Lambda(lambda each: each * 2)(shared(shared(adapted(inputs)))) + 1
    return kind(inputs, layers.Dropout(0.5, seed=3)(layers.Flatten()(Block()(x))))


def deferred():
    model = keras.Sequential([layers.Dense(3), layers.Flatten()])
    model(data())
    return model


def called(model):
    model(data())
    return model


def relu(x):
    """Of the name of another."""
    return ops.leaky_relu(x, 0.5)


def own(x):
    return ops.tanh(x) / 2


def ones(shape, dtype=None):
    return ops.ones(shape, dtype)


class Own(keras.Regularizer):
    def __call__(self, weights):
        return ops.sum(weights)

    def get_config(self):
        return {}


def functions_of_ones_own():
    cell = layers.LSTMCell(2, activation=relu, recurrent_activation=own)
    activations = (relu, own, ops.gelu, lambda x: x / 2)
    dense = [
        layers.Dense(3, activation, kernel_initializer=ones, kernel_regularizer=Own()) for activation in activations
    ]
    return keras.Sequential([keras.Input((6, 6, 2)), *dense, layers.Reshape((36, 3)), layers.RNN(cell)])


KINDS = {
    "functions of one's own": functions_of_ones_own,
    "functional": functional,
    "functional with its own step": lambda: functional(OfInputs),
    "sequential": lambda: keras.Sequential([keras.Input((6, 6, 2)), functional()]),
    "sequential without input": deferred,
    "subclassed": lambda: called(Net(layers.Dense(4))),
    "subclassed with config": lambda: called(WithConfig(5)),
    "subclassed inside": lambda: keras.Sequential([keras.Input((6, 6, 2)), called(Net(layers.Dense(4)))]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_with_variables_of_its_own(kind):
    model = KINDS[kind]()
    if kind == "subclassed":
        train(model)  # leaves more behind in it than compiling
    model.compile("sgd", "mse")
    model(data(), training=True)  # random numbers are drawn
    expected, state = outputs(model), [ops.convert_to_numpy(each.value) for each in model.variables]
    copy = graph.copy(model)
    assert type(copy) is type(model)
    assert copy.name == model.name
    assert (model.compiled, copy.compiled) == (True, False)
    for ours, theirs in zip(copy.variables, state, strict=True):  # also of random numbers
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.value), theirs)
    np.testing.assert_array_equal(outputs(copy), expected)
    shared = {id(each) for each in graph.walk(copy)} & {id(each) for each in graph.walk(model)}
    assert {type(each) for each in graph.walk(model) if id(each) in shared} <= {layers.Lambda}
    copy.trainable_variables[0].assign(copy.trainable_variables[0] + 1.0)
    assert not np.array_equal(outputs(copy), expected)
    np.testing.assert_array_equal(outputs(model), expected)


class WithArgument(keras.Model):
    def __init__(self, inputs, outputs, weight=0.1, **kwargs):
        super().__init__(inputs, outputs, **kwargs)
        self.weight = weight

    def compute_loss(self, *args, **kwargs):
        return self.weight * super().compute_loss(*args, **kwargs)


def test_a_model_that_is_made_of_more_than_inputs_and_outputs_does_not_lose_it_silently():
    inputs = keras.Input((6, 6, 2))
    with pytest.warns(UserWarning, match="is a plain Functional, no WithArgument"):
        copy = graph.copy(WithArgument(inputs, layers.Dense(2)(inputs), weight=7.0))
    assert copy.count_params() == 6


class Tied(layers.Layer):
    """Multiplies with the kernel of another layer."""

    def __init__(self, dense, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.dense.kernel))

    def get_config(self):
        return {**super().get_config(), "dense": keras.saving.serialize_keras_object(self.dense)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "dense": keras.saving.deserialize_keras_object(config["dense"])})


def test_weights_that_two_layers_share_are_not_untied():
    inputs, dense = keras.Input((6, 6, 2)), layers.Dense(3, name="dense")
    model = keras.Model(inputs, Tied(dense, name="tied")(dense(inputs)))
    for act in (lambda: kc.prune_now(model, 0.5), lambda: kc.prune_low_magnitude(model)):
        with pytest.raises(ValueError, match=r"'dense' and 'tied' of .* share the weight 'dense/kernel'"):
            act()
    model.compile(kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, 0)), "mse")  # needs no copy
    model.fit(data(), data(), verbose=0)
    assert kc.sparsity(model) == 0.5


def test_a_sequential_model_that_begins_with_a_dictionary_is_copied_and_what_needs_its_calls_is_refused(tmp_path):
    one, other = keras.Input((2,), name="one"), keras.Input((2,), name="other")
    first = keras.Model({"one": one, "other": other}, layers.add([one, other]))
    model = keras.Sequential([first, layers.Dense(4, name="dense")])
    model({"one": np.ones((3, 2)), "other": np.ones((3, 2))})
    assert kc.sparsity(kc.prune_now(model, 0.5)) == 0.5
    assert kc.summary(model).macs is None
    for act in (lambda: kc.prune_channels(model, 0.5), lambda: kc.export_saved_model(model, tmp_path / "net")):
        with pytest.raises(ValueError, match=r"does not begin with one tensor\. Make it with the Functional API"):
            act()


def test_a_wrapped_layer_computes_each_part_in_its_own_precision():
    class Mixed(layers.Layer):
        def __init__(self):
            super().__init__(dtype="mixed_bfloat16")
            self.rough, self.fine = layers.Dense(4, dtype="mixed_bfloat16"), layers.Dense(2, dtype="float32")

        def call(self, inputs):
            return self.fine(self.rough(inputs))

    dense = keras.Sequential([keras.Input((6, 6, 2)), Mixed()])
    np.testing.assert_array_equal(outputs(kc.prune_low_magnitude(dense)), outputs(dense))


class Depth(enum.Enum):
    ONE = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: Depth
    sizes: tuple[int, ...]
    head: Any = None


class WithSettings(keras.Model):
    """A subclassed model without a config, that keeps its settings as an object."""

    def __init__(self, settings, body):
        super().__init__()
        self.settings = settings
        self.body = body

    def call(self, inputs):
        return self.settings.head(self.body(inputs))


def test_a_subclassed_model_that_keeps_its_settings_as_an_object_is_copied():
    model = WithSettings(Settings(Depth.ONE, (3,), layers.Dense(2)), layers.Dense(3))
    model.tail = model.settings.head  # tracked, which in the settings it is not
    model(data())
    small = kc.prune_now(model, 0.5)
    assert (small.settings.depth, small.settings.sizes) == (Depth.ONE, (3,))
    assert small.settings.head is small.tail is not model.tail
    assert (kc.sparsity(small), kc.sparsity(model)) == (pytest.approx(0.5, abs=0.05), 0)
    assert outputs(small).shape == outputs(model).shape


def test_what_keras_sets_on_a_model_that_trains_is_known():
    model = WithSettings(Settings(Depth.ONE, (), layers.Dense(2)), layers.Dense(3))
    made = {*vars(model), *vars(model).get("_modules", {})}
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(data(), np.ones((len(data()), 6, 6, 2)), validation_split=0.5, verbose=0)
    model.evaluate(data(), np.ones((len(data()), 6, 6, 2)), verbose=0)
    model.predict(data(), verbose=0)
    assert {*vars(model), *vars(model).get("_modules", {})} - made <= graph.TRAINING_ATTRIBUTES


def test_what_cannot_be_copied_is_named():
    with pytest.raises(ValueError, match=r"Closure cannot be copied.*'function' is a function.*`get_config`"):
        graph.copy(Closure())
    with pytest.raises(ValueError, match="'mine' of type Unknown cannot be copied"):
        graph.copy(Unknown(layers.Dense(2), name="mine"))


@pytest.mark.parametrize("how", ["argument", "closure"])
def test_a_weight_that_another_layer_computes_with_is_not_left_behind(how):
    encoder, inputs = layers.Dense(3, name="encoder"), keras.Input((5,))
    code = encoder(inputs)
    if how == "argument":
        outputs = ops.einsum("bi,oi->bo", code, encoder.kernel)
    else:
        outputs = layers.Lambda(lambda x: ops.matmul(x, ops.transpose(encoder.kernel)))(code)
    model = keras.Model(inputs, outputs)
    for change in (kc.prune_low_magnitude, lambda each: kc.prune_now(each, 0.5), kc.strip_pruning):
        with pytest.raises(ValueError, match="computes with the weight 'encoder/kernel' of another layer"):
            change(model)


class Trained(keras.Model):
    """With what a step of one's own needs as attributes, as in Keras' guides."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.tracker = keras.metrics.Mean(name="loss")
        self.compare = keras.losses.MeanSquaredError()
        self.updates = keras.optimizers.Adam(0.01)

    def call(self, inputs):
        return self.dense(inputs)


def test_metrics_losses_and_optimizers_of_a_subclassed_model_are_made_anew():
    model = called(Trained())
    model.tracker.update_state(3.0)
    copy = graph.copy(model)
    np.testing.assert_array_equal(outputs(copy), outputs(model))
    assert float(copy.tracker.result()) == 0
    assert copy.updates is not model.updates
    assert float(ops.convert_to_numpy(copy.updates.learning_rate)) == pytest.approx(0.01)


class Gained(layers.Dense):
    """Has an argument that no config knows."""

    def __init__(self, *args, gain=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = gain

    def call(self, inputs):
        return super().call(inputs) * self.gain


class InBytes(keras.Model):
    """A Functional model with a `call` of its own."""

    def __init__(self, **kwargs):
        inputs = keras.Input((5,))
        super().__init__(inputs, layers.Dense(3)(inputs), **kwargs)

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs / 255.0, training=training)

    def get_config(self):
        return {"name": self.name}


@pytest.mark.parametrize("kind", ["setting", "call"])
def test_what_no_config_and_no_graph_tells_is_kept(kind):
    inputs = keras.Input((5,))
    inner = Gained(3, gain=3.0) if kind == "setting" else InBytes(name="inner")
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(3)(inner(layers.Dense(5)(inputs)))))
    x = np.ones((4, 5), "float32")
    copies = [kc.prune_now(model, 0.0), kc.strip_pruning(model)]
    if kind == "setting":
        copies.append(kc.prune_low_magnitude(model))
    else:
        with pytest.warns(UserWarning, match="cannot be followed through 'inner'"):
            copies.append(kc.prune_channels(model, 0.0))
        with pytest.raises(ValueError, match="'inner' of type InBytes"):
            kc.prune_low_magnitude(model)
    for copy in copies:
        np.testing.assert_allclose(ops.convert_to_numpy(copy(x)), ops.convert_to_numpy(model(x)), rtol=1e-5)


def test_a_layer_that_was_thawed_in_a_frozen_model_stays_thawed():
    inputs = keras.Input((4,))
    base = keras.Model(inputs, layers.Dense(3, name="last")(layers.Dense(5)(inputs)), name="base")
    base.trainable, base.get_layer("last").trainable = False, True
    outer = keras.Input((4,))
    model = keras.Model(outer, layers.Dense(2)(base(outer)))
    wrapped = kc.prune_low_magnitude(model)
    for copy in (kc.prune_now(model, 0.5), wrapped, kc.strip_pruning(wrapped), kc.prune_channels(model, 0.5)):
        assert len(copy.trainable_variables) == len(model.trainable_variables) == 4
        assert not copy.get_layer("base").trainable


def scaled(by):
    def activation(x):
        return by * ops.relu(x)

    return activation


def of_one_name(by):
    class Act(layers.Layer):
        def call(self, x):
            return by * x

    return Act()


def test_functions_of_one_name_are_told_apart_and_classes_of_one_name_refused():
    inputs = keras.Input((3, 4))
    net = keras.Sequential([layers.Dense(4, activation=scaled(1.0)), layers.Dense(4, activation=scaled(10.0))])
    model = keras.Model(inputs, layers.TimeDistributed(net)(inputs))
    x = np.ones((2, 3, 4), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(kc.prune_now(model, 0.0)(x)), ops.convert_to_numpy(model(x)))
    net = keras.Sequential([layers.Dense(4), of_one_name(1.0), of_one_name(10.0)])
    with pytest.raises(ValueError, match="two of the classes in it have one name"):
        graph.copy(keras.Model(inputs, layers.TimeDistributed(net)(inputs)))


def test_what_was_given_to_a_weight_itself_is_kept():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Dense(2, kernel_regularizer="l2")])
    first, second = (layer.kernel for layer in model.layers)
    first.regularizer, first.constraint, second.regularizer = (
        keras.regularizers.L2(0.1),
        keras.constraints.NonNeg(),
        None,
    )

    def penalty(net):
        return float(ops.convert_to_numpy(ops.sum(ops.stack(net.losses))))

    pruned = kc.prune_low_magnitude(model)  # its masks are ones as yet
    for each in (kc.prune_now(model, 0.0), pruned, kc.strip_pruning(pruned), graph.copy(pruned)):
        assert penalty(each) == pytest.approx(penalty(model))
    first, second = (layer.kernel for layer in kc.strip_pruning(pruned).layers)
    assert isinstance(first.regularizer, keras.regularizers.L2)
    assert isinstance(first.constraint, keras.constraints.NonNeg)
    assert second.regularizer is None


def test_a_method_that_is_called_as_a_setting_is_not_taken_for_one():
    lookup = layers.IntegerLookup(max_tokens=9)  # has a `vocabulary_size`, and a setting of that name
    assert graph.config_of(lookup) == lookup.get_config()


def test_a_copy_under_another_policy_computes_in_it():
    copy = graph.copy(functional(), dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(copy(data()).dtype) == "bfloat16"
    assert {each.dtype for each in copy.trainable_variables} == {"float32"}


@pytest.mark.quick
@pytest.mark.parametrize("name", [None, "pixels"])
def test_inputs_keep_their_names_through_pruning_and_stripping(name):
    inputs = keras.Input((6, 6, 2), name=name)
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    pruned = kc.prune_low_magnitude(model)
    assert [each.layers[0].name for each in (pruned, kc.strip_pruning(pruned))] == [name or "input_layer"] * 2
    named = {key: keras.Input((2,), name=key) for key in ("left", "right")}
    model = keras.Model(named, layers.Dense(2)(layers.Add()(list(named.values()))))
    small = kc.strip_pruning(kc.prune_low_magnitude(model))
    assert small.input.keys() == {"left", "right"}
    values = {key: np.ones((1, 2), "float32") for key in named}
    np.testing.assert_array_equal(outputs(small, values), outputs(model, values))


# --- pruning models that are hard to copy ---


def test_a_layer_made_of_layers_that_its_call_builds_is_pruned(tmp_path):
    keras.saving.register_keras_serializable("tests")(Block)
    model = keras.Sequential([keras.Input((6, 6, 2)), Block(name="mine")])
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    np.testing.assert_array_equal(outputs(pruned), outputs(model))
    train(pruned, [kc.UpdatePruningStep()])
    assert kc.sparsity(pruned) == 0.5  # 2 * 3 and 3 * 2 weights
    pruned.save(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(outputs(keras.models.load_model(tmp_path / "pruned.keras")), outputs(pruned))
    np.testing.assert_array_equal(outputs(kc.strip_pruning(pruned)), outputs(pruned))
    fresh = keras.Sequential([keras.Input((6, 6, 4)), kc.PruneLowMagnitude(Block(), sparsity_m_by_n=(1, 2))])
    assert [kernel.shape for kernel in pruning.prunable_weights(fresh)] == [(4, 3), (3, 2)]


def test_a_layer_whose_config_forgets_is_copied_by_its_arguments_and_its_files_load(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 2)), Forgetful(4, name="mine")])
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    train(pruned, [kc.UpdatePruningStep()])
    expected = outputs(pruned)
    for _ in range(2):  # a loaded one is saved and loaded again
        pruned.save(tmp_path / "pruned.keras")
        pruned = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(outputs(pruned), expected)
    kc.strip_pruning(pruned).save(tmp_path / "small.keras")
    np.testing.assert_array_equal(outputs(keras.models.load_model(tmp_path / "small.keras")), expected)


def test_where_a_model_cannot_be_copied_layer_by_layer_the_error_says_what_prunes_it():
    for model, name in (
        (called(Net(layers.Dense(2))), "'net' of type Net"),
        (keras.Sequential([keras.Input((6, 6, 2)), Unknown(layers.Dense(2), name="mine")]), "'mine' of type Unknown"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{WAY_OUT}"):
            kc.prune_low_magnitude(model)
    wrapped = called(Net(kc.PruneLowMagnitude(layers.Dense(2))))
    with pytest.raises(ValueError, match=r"'net\w*' of type Net.*PruningOptimizer"):
        kc.strip_pruning(wrapped)


@pytest.mark.quick
def test_stripping_a_subclassed_model_without_wrappers_copies_it():
    model = called(Net(layers.Dense(4)))
    small = kc.strip_pruning(model)
    assert type(small) is Net
    np.testing.assert_array_equal(outputs(small), outputs(model))


def test_a_wrapped_layer_may_be_called_with_keywords_alone():
    queries, values = np.ones((2, 3, 4), "float32"), np.ones((2, 5, 4), "float32")
    inputs = [keras.Input((3, 4)), keras.Input((5, 4))]
    call = {"query": inputs[0], "value": inputs[1], "use_causal_mask": False}
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(**call))
    pruned = kc.prune_low_magnitude(model)
    np.testing.assert_allclose(outputs(pruned, [queries, values]), outputs(model, [queries, values]), atol=1e-6)
    assert len(pruning.prunable_weights(pruned)) == 4


class Decoder(layers.Layer):
    """Takes a flag before its second tensor, as keras-hub's T5 does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, words, seen=None, causal=False, context=None):
        return self.attention(words, context, attention_mask=seen, use_causal_mask=causal)


@pytest.mark.parametrize("make", [lambda: layers.MultiHeadAttention(2, 4), Decoder], ids=["keras", "own"])
def test_a_wrapped_layer_may_be_called_with_tensors_and_flags_in_any_order(make, tmp_path):
    words, seen = keras.Input((3, 4)), keras.Input((3, 3), dtype="bool")
    if make is Decoder:
        attended = make()(words, context=words, causal=True, seen=seen)
    else:
        attended = make()(words, words, attention_mask=seen, return_attention_scores=True)
    model = keras.Model([words, seen], attended)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(2, 3, 4)).astype("float32"), rng.uniform(size=(2, 3, 3)) > 0.2]
    pruned = kc.prune_low_magnitude(model)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.saving.load_model(tmp_path / "pruned.keras", custom_objects={"Decoder": Decoder})
    for each in (pruned, loaded, kc.strip_pruning(loaded)):
        for ours, expected in zip(*(keras.tree.flatten(net(values)) for net in (each, model)), strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(expected))


class Late(layers.Layer):
    """Tells what it returns itself, and has a part that makes its kernels when it is called, as keras-hub's layers."""

    def build(self, shape):
        self.attention = layers.MultiHeadAttention(2, 4)

    def compute_output_spec(self, words):
        return keras.KerasTensor(words.shape, self.compute_dtype)

    def call(self, words):
        return self.attention(words, words), None


def test_a_wrapped_layer_returns_what_it_tells_and_is_loaded_with_parts_that_are_not_built(tmp_path):
    words = keras.Input((3, 4))
    model = keras.Model(words, Late()(words))
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    outputs(model, values)
    pruned = kc.prune_low_magnitude(model)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.saving.load_model(tmp_path / "pruned.keras", custom_objects={"Late": Late})
    for each in (pruned, loaded, kc.strip_pruning(loaded)):
        np.testing.assert_array_equal(outputs(each, values), outputs(model, values))
    bare = layers.TimeDistributed(layers.Dropout(0.1))
    bare.built, bare.layer.built = True, False
    with pytest.raises(ValueError, match="no kernel that can be pruned"):
        kc.PruneLowMagnitude(bare).build((None, 3, 4))


def test_a_wrapped_layer_of_two_inputs_is_built_by_its_call():
    class Two(Block):
        def call(self, left, right, scale=1.0):
            return self.second(self.first(left)) * scale + right

    left, right = keras.Input((4,)), keras.Input((2,))
    wrapped = kc.PruneLowMagnitude(Two())
    model = keras.Model([left, right], wrapped(right=right, left=left, scale=3.0))
    assert [kernel.shape for kernel in pruning.prunable_weights(model)] == [(4, 3), (3, 2)]
    values = [np.ones((1, 4), "float32"), np.ones((1, 2), "float32")]
    assert outputs(model, values) == pytest.approx(
        outputs(wrapped.layer.second, outputs(wrapped.layer.first, values[0])) * 3 + 1
    )


# --- what stays dense is told ---


class Cell(layers.Layer):
    state_size = output_size = 3

    def build(self, input_shape):
        self.matrix = self.add_weight(name="matrix", shape=(input_shape[-1], 3))

    def call(self, inputs, states):
        return ops.matmul(inputs, self.matrix), states


def test_a_cell_of_ones_own_beside_a_prunable_one_stays_dense_with_a_warning():
    cells = layers.RNN([layers.LSTMCell(4), Cell(name="mine")])
    with pytest.warns(UserWarning, match="'mine' of type Cell stays dense, .*matrix"):
        kc.prune_low_magnitude(keras.Sequential([keras.Input((5, 2)), cells]))


@pytest.mark.parametrize("dense", [Cell, layers.ConvLSTM2D, layers.SpectralNormalization])
def test_an_unbuilt_model_tells_what_stays_dense(dense):
    arguments = {layers.ConvLSTM2D: (3, 2), layers.SpectralNormalization: (layers.Dense(2),)}.get(dense, ())
    model = keras.Sequential([dense(*arguments, name="mine"), layers.Dense(2)])
    with pytest.warns(UserWarning, match=f"'mine' of type {dense.__name__} stays dense"):
        kc.prune_low_magnitude(model)


def test_an_unbuilt_model_of_prunable_and_weightless_layers_gives_no_warning():
    kc.prune_low_magnitude(keras.Sequential([layers.Rescaling(2.0), layers.BatchNormalization(), layers.Dense(2)]))


def test_a_policy_of_tfmots_gets_an_error_that_says_what_a_policy_needs():
    _ = kc.PolynomialDecay  # imports tfmot as kerascompress does
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_policy

    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    for policy in (pruning_policy.PruneForLatencyOnXNNPack(), object()):
        with pytest.raises(ValueError, match=r"`allow_pruning\(layer\) -> bool`.*ensure_model_supports_pruning"):
            kc.prune_low_magnitude(model, pruning_policy=policy)


@pytest.mark.tensorflow_only  # strings
def test_a_copy_keeps_an_adapted_vocabulary():
    words = layers.TextVectorization(20, output_sequence_length=5)
    words.adapt(["a b c d"])
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Embedding(20, 8)(words(inputs)))))
    text = tf.constant(["a b", "d"])
    np.testing.assert_array_equal(graph.copy(model)(text), model(text))


@pytest.mark.parametrize("copied", ["prune_now", "strip_pruning", "prune_low_magnitude", "prune_now of a subclassed"])
def test_what_is_frozen_inside_of_a_layer_stays_frozen_in_a_copy(copied):
    model = WithConfig(4) if "subclassed" in copied else keras.Sequential([Block(4), layers.Dense(4)])
    outputs(model, np.ones((2, 6), "float32"))
    next(each for each in graph.walk(model) if isinstance(each, Block)).first.trainable = False
    copy = {
        "strip_pruning": kc.strip_pruning,
        "prune_low_magnitude": kc.prune_low_magnitude,
    }.get(copied, lambda model: kc.prune_now(model, 0.5))(model)
    assert type(copy) is type(model)
    assert len(copy.trainable_variables) == len(model.trainable_variables) < len(model.variables)
