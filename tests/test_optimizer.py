"""Masks carried by the optimizer: exactly sparse after every step, whatever the model and whatever trains it."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kerascompress as kc

DECAY = {"initial_sparsity": 0.2, "final_sparsity": 0.75, "begin_step": 0, "end_step": 10, "frequency": 2}


def net() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.DepthwiseConv2D(3, activation="relu", name="depthwise"),
            layers.Flatten(),
            layers.Dense(4, name="head"),
        ]
    )


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model whose layers nobody can replace, with a kernel of its own and a model inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.Sequential([layers.Flatten(), layers.Dense(8, activation="relu")])
        self.head = layers.Dense(4)

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(8, 8))
        self.inner.build(input_shape)
        self.head.build((None, 8))

    def call(self, inputs):
        return self.head(ops.matmul(self.inner(inputs), self.kernel))


def data(count=64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 6, 6, 2)).astype("float32"), rng.integers(0, 4, count)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def prune(model, optimizer=None, schedule=None, compile_kwargs=None, **kwargs):
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    schedule = kc.PolynomialDecay(**DECAY) if schedule is None else schedule
    model.compile(kc.PruningOptimizer(optimizer, schedule, **kwargs), LOSS, **(compile_kwargs or {}))
    return model


def fit(model, callbacks=(), epochs=1, count=64, **kwargs):
    return model.fit(*data(count), batch_size=8, shuffle=False, verbose=0, epochs=epochs, callbacks=[*callbacks])


def kernels(model):
    return {v.path: ops.convert_to_numpy(v) for v in model.trainable_variables if len(v.shape) > 1}


class Sparsities(keras.callbacks.Callback):
    """The share of zeros after every batch, by NumPy."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        weights = np.concatenate([kernel.ravel() for kernel in kernels(self.model).values()])
        self.seen.append(np.mean(weights == 0))


def expected(step):
    """PolynomialDecay's formula, at the last step at which it was due."""
    step = min(step - step % 2, 10)
    return 0.75 - 0.55 * (1 - step / 10) ** 3


@pytest.mark.parametrize(
    "case",
    [
        "momentum",
        pytest.param("adamw_clipped", marks=pytest.mark.once("jax")),
        pytest.param("jit", marks=pytest.mark.compiled),
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.once("jax")),
        "accumulation",
        pytest.param("ema", marks=pytest.mark.once("jax")),
    ],
)
def test_after_every_batch_the_kernels_are_as_sparse_as_the_schedule_says(case):
    optimizer = {
        "adamw_clipped": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.05, global_clipnorm=1.0),
        "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        "ema": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=3),
    }.get(case, lambda: keras.optimizers.SGD(0.1, momentum=0.9))()
    if case.startswith("mixed"):
        keras.config.set_dtype_policy(case)
    model = prune(net(), optimizer, scope="global", compile_kwargs={"jit_compile": case == "jit" or "auto"})
    sparsities = Sparsities()
    fit(model, [sparsities], count=96)
    updates = [step // 2 if case == "accumulation" else step for step in range(1, 13)]
    size = sum(kernel.size for kernel in kernels(model).values())
    np.testing.assert_allclose(sparsities.seen, [expected(step) for step in updates], atol=1 / size)
    assert kc.sparsity(model) == pytest.approx(expected(updates[-1]), abs=1 / size)


def test_the_moving_average_that_overwrites_the_weights_at_the_end_is_masked():
    model = prune(net(), keras.optimizers.SGD(0.1, use_ema=True), kc.ConstantSparsity(0.5, 0), scope="global")
    fit(model)
    assert kc.sparsity(model) == pytest.approx(0.5, abs=0.005)


@pytest.mark.compiled
@pytest.mark.parametrize("steps_per_execution", [3, 8])
def test_several_steps_in_one_execution_give_the_same_weights_as_one_by_one(steps_per_execution):
    one, several = net(), net()
    several.set_weights(one.get_weights())
    fit(prune(one, scope="global"), count=96)
    fit(prune(several, scope="global", compile_kwargs={"steps_per_execution": steps_per_execution}), count=96)
    for path, kernel in kernels(several).items():
        np.testing.assert_allclose(kernel, kernels(one)[path.replace(several.name, one.name)], atol=1e-6)
        np.testing.assert_array_equal(kernel == 0, kernels(one)[path.replace(several.name, one.name)] == 0)


def test_the_last_update_at_end_step_is_never_missed():
    schedule = kc.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=7, frequency=5)
    model = prune(net(), schedule=schedule)
    fit(model)
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.01)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras', where it did not know their number
def test_a_step_that_finds_no_more_data_is_not_counted_as_an_update():
    batches = tf.data.Dataset.from_tensor_slices(data(56)).batch(8).filter(lambda *_: True)
    model = prune(net(), schedule=kc.ConstantSparsity(0.75, 8, 8))  # an epoch has 7
    model.fit(batches, epochs=2, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 14
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.01)


@pytest.mark.quick
def test_without_a_schedule_what_is_zero_stays_zero_and_nothing_else():
    model = net()
    head = model.get_layer("head").kernel
    zeros = np.random.default_rng(0).random(head.shape) < 0.4
    head.assign(np.where(zeros, 0, 1))
    model.compile(kc.PruningOptimizer("adam"), LOSS)
    fit(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(head) == 0, zeros)
    assert np.all(kernels(model)[model.get_layer("conv").kernel.path] != 0)


def test_a_schedule_of_ones_own_computes_with_ops():
    def at_three(step):
        return ops.equal(step, 3), 0.1 * ops.cast(step, "float32")

    model = prune(net(), schedule=at_three)
    sparsities = Sparsities()
    fit(model, [sparsities])
    assert sparsities.seen[:2] == [0, 0]
    assert sparsities.seen[2:] == pytest.approx([0.3] * 6, abs=0.01)


@pytest.mark.quick
def test_a_subclassed_model_is_pruned_its_own_kernel_included():
    model = prune(Subclassed(), scope="global")
    fit(model, epochs=2)
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.002)
    assert len(kernels(model)) == 3
    assert all((kernel == 0).any() for kernel in kernels(model).values())


def test_a_distiller_prunes_its_student():
    teacher, student = net(), net()
    before = teacher.get_weights()
    distiller = kc.Distiller(student, teacher, augment=layers.Identity(), num_candidates=1)
    distiller.compile(kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, 0), scope="global"))
    distiller.fit(*data(16), batch_size=8, verbose=0)
    assert kc.sparsity(student) == pytest.approx(0.5, abs=0.005)
    for ours, theirs in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_allow_chooses_the_kernels():
    model = prune(net(), schedule=kc.ConstantSparsity(0.5, 0), allow=lambda variable: "head" in variable.path)
    fit(model)
    zeros = {path.split("/")[-2]: (kernel == 0).mean() for path, kernel in kernels(model).items()}
    assert zeros == {"conv": 0, "depthwise": 0, "head": 0.5}


@pytest.mark.parametrize("settings", [{"block_size": (2, 2)}, {"sparsity_m_by_n": (2, 4)}], ids=str)
def test_blocks_and_m_by_n_hold_while_it_trains(settings):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(4)])
    model.compile(kc.PruningOptimizer("adam", kc.ConstantSparsity(0.5, 0, frequency=2), **settings), "mse")
    model.fit(np.ones((64, 8)), np.ones((64, 4)), batch_size=8, verbose=0)
    kernel = ops.convert_to_numpy(model.layers[0].kernel) != 0
    if "block_size" in settings:
        assert {int(block.sum()) for block in kernel.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 4)} == {0, 4}
    else:
        assert set(kernel.reshape(2, 4, 8).sum(axis=1).ravel()) == {2}


@pytest.mark.parametrize("schedule", [None, kc.ConstantSparsity(0.5, 0, frequency=1), kc.ConstantSparsity(0.5, 99)])
def test_the_m_by_n_mask_is_set_once(schedule):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[1], [2], [3], [4]])])
    model.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.25), schedule, sparsity_m_by_n=(2, 4)), "mse")
    model.optimizer.build(model.trainable_variables)
    ((kernel, mask, _),) = model.optimizer.pruning_vars
    before = ops.convert_to_numpy(mask).ravel().tolist()
    model.fit(np.ones((1, 4)), np.zeros((1, 1)), verbose=0)
    assert ops.convert_to_numpy(mask).ravel().tolist() == before == [False, False, True, True]
    output = (
        7 if keras.backend.backend() == "tensorflow" else 10
    )  # elsewhere, the first gradient is the dense network's
    np.testing.assert_allclose(ops.convert_to_numpy(kernel).ravel(), [0, 0, 3 - output / 2, 4 - output / 2])


@pytest.mark.quick
def test_looking_at_a_model_does_not_prune_it():
    model = prune(net(), schedule=kc.ConstantSparsity(0.75, 0, 0))
    before = model.get_weights()
    model.evaluate(*data(8), verbose=0)
    model.test_on_batch(*data(8))
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    fit(model)
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.01)


@pytest.mark.quick
@pytest.mark.parametrize("schedule", [None, kc.ConstantSparsity(0.75, 0, 0)])
def test_masks_are_those_of_the_weights_at_the_first_update_also_after_a_look_at_others(schedule):
    dense, model = net(), net()
    given = (kc.prune_now(dense, 0.75) if schedule is None else dense).get_weights()
    model.compile(kc.PruningOptimizer(keras.optimizers.SGD(1e-5), schedule), LOSS)
    model.evaluate(*data(8), verbose=0)
    model.set_weights(given)
    fit(model)
    expected = kc.prune_now(dense, 0.75)
    for ours, theirs in zip(model.trainable_variables, expected.trainable_variables, strict=True):
        if len(ours.shape) > 1:
            np.testing.assert_array_equal(ops.convert_to_numpy(ours) != 0, ops.convert_to_numpy(theirs) != 0)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # Keras', of the moments
@pytest.mark.filterwarnings("ignore:The masks in this file are of other kernels")
@pytest.mark.parametrize("change", ["freeze", "quantize", "lora", "freeze one"])
def test_a_pruned_model_that_was_frozen_or_quantized_since_is_saved_and_loaded(tmp_path, change):
    base = keras.Sequential([keras.Input((8,)), *(layers.Dense(8) for _ in range(2)), layers.Dense(4)])
    prune(base, keras.optimizers.SGD(1e-3), schedule=kc.ConstantSparsity(0.5, 0, 0))
    base.fit(*points(), verbose=0)
    if change == "quantize":
        base.quantize("int8")
    elif change == "lora":
        for layer in base.layers:
            layer.enable_lora(1)
    else:
        (base.layers[0] if change == "freeze one" else base).trainable = False
    inputs, _ = points()
    for model in (base, keras.Sequential([keras.Input((8,)), base, layers.Dense(4)])):
        expected = model.predict(inputs, verbose=0)
        model.save(tmp_path / "net.keras")
        loaded = keras.saving.load_model(tmp_path / "net.keras")
        np.testing.assert_allclose(loaded.predict(inputs, verbose=0), expected, rtol=1e-5)


def test_masks_of_other_kernels_are_named_and_not_loaded(tmp_path):
    base = keras.Sequential([keras.Input((8,)), *(layers.Dense(8) for _ in range(2)), layers.Dense(4)])
    prune(base, keras.optimizers.SGD(1e-3), schedule=kc.ConstantSparsity(0.5, 0, 0))
    base.fit(*points(), verbose=0)
    base.layers[0].trainable = False
    base.save(tmp_path / "net.keras")
    with pytest.warns(UserWarning, match="The masks in this file are of other kernels"):
        keras.saving.load_model(tmp_path / "net.keras")


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # Keras', of the inner one
def test_weights_are_loaded_with_masks_and_step_by_an_optimizer_that_is_built(tmp_path):
    trained, late, resumed = (prune(net()) for _ in range(3))
    fit(trained)
    trained.save_weights(tmp_path / "net.weights.h5")
    with pytest.warns(UserWarning, match=r"Call `model.optimizer.build\(model.trainable_variables\)` before"):
        late.load_weights(tmp_path / "net.weights.h5")
    resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(tmp_path / "net.weights.h5")
    assert int(ops.convert_to_numpy(resumed.optimizer.iterations)) == 8
    for ours, theirs in zip(resumed.optimizer.pruning_vars, trained.optimizer.pruning_vars, strict=True):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(mask.value) for _, mask, _ in (ours, theirs)))


def test_weights_of_the_optimizer_are_set_with_those_of_the_inner_one():
    one, other = (prune(net(), keras.optimizers.Adam(0.01)) for _ in range(2))
    for model in (one, other):
        fit(model)
    fit(one)
    other.optimizer.set_weights([ops.convert_to_numpy(variable) for variable in one.optimizer.variables])
    assert int(other.optimizer.iterations) == int(one.optimizer.iterations) == 16
    for mine, its in zip(other.optimizer.variables, one.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(its))


def shares_of_zeros(model):
    kernels = {layer.name: next(v for v in layer.variables if v.name == "kernel") for layer in model.layers}
    return {name: np.mean(ops.convert_to_numpy(kernel) == 0) for name, kernel in kernels.items()}


@pytest.mark.parametrize("carrier", ["wrapper", "optimizer", "optimizer, with LoRA"])
def test_a_frozen_kernel_is_pruned_by_wrappers_and_passed_over_by_the_optimizer(carrier):
    frozen, schedule, drivers = layers.Dense(8, name="frozen"), kc.ConstantSparsity(0.5, 0, 0), []
    model = keras.Sequential([keras.Input((8,)), frozen, layers.Dense(64, name="head")])
    if carrier == "optimizer, with LoRA":
        frozen.enable_lora(1)
    else:
        frozen.trainable = False
    if carrier == "wrapper":
        model, optimizer, drivers = kc.prune_low_magnitude(model, schedule), "sgd", [kc.UpdatePruningStep()]
    else:
        optimizer = kc.PruningOptimizer("sgd", schedule)
    model.compile(optimizer, "mse")
    model.fit(np.ones((8, 8)), np.ones((8, 64)), verbose=0, callbacks=drivers)
    small = kc.strip_pruning(model) if carrier == "wrapper" else model
    assert shares_of_zeros(small) == {"frozen": 0.5 if carrier == "wrapper" else 0, "head": 0.5}


# --- saved and restored ---


def states(model):
    return [ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]]


@pytest.mark.parametrize("how", ["keras", "weights"])
def test_a_training_that_is_saved_and_loaded_goes_on_bit_for_bit(tmp_path, how):
    model = prune(net(), scope="global")
    fit(model, count=32)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = prune(net(), scope="global")
        loaded.build((None, 6, 6, 2))
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "model.weights.h5")
    for each in (model, loaded):
        fit(each, count=64)
    assert int(loaded.optimizer.iterations) == 12
    for ours, theirs in zip(states(loaded), states(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.once
def test_a_file_has_masks_and_moments_once(tmp_path):
    model = keras.Sequential([keras.Input((400,)), layers.Dense(500)])
    model.compile(kc.PruningOptimizer("adam", kc.ConstantSparsity(0.5, 0)), "mse")
    model.fit(np.ones((1, 400)), np.ones((1, 500)), verbose=0)
    model.save(tmp_path / "model.keras")
    weights = 400 * 500
    assert 13 * weights < (tmp_path / "model.keras").stat().st_size < 14 * weights  # two moments, and a byte of a mask


@pytest.mark.once
def test_a_file_that_has_the_inner_optimizers_variables_twice_is_read():
    model = prune(net(), scope="global")
    fit(model, count=32)
    again = prune(net(), scope="global").optimizer
    again.build(net().trainable_variables)
    again.load_own_variables({str(i): ops.convert_to_numpy(each) for i, each in enumerate(model.optimizer.variables)})
    for ours, theirs in zip(again.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_backup_of_a_training_killed_within_an_epoch_is_sparse_and_goes_on_bit_for_bit(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                raise Killed

    def start(folder):
        keras.utils.set_random_seed(1)
        model = prune(net(), scope="global")
        return model, keras.callbacks.BackupAndRestore(folder, save_freq=1)

    whole, backup = start(tmp_path / "whole")
    fit(whole, [backup])
    model, backup = start(tmp_path / "killed")
    with pytest.raises(Killed):
        fit(model, [backup, Kill()])
    model, backup = start(tmp_path / "killed")
    backup.set_model(model)
    inputs, labels = data()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "killed" / "latest.weights.h5")
    done = int(model.optimizer.iterations)
    assert done == 5
    assert kc.sparsity(model) == pytest.approx(expected(done), abs=0.01)
    model.fit(inputs[8 * done :], labels[8 * done :], batch_size=8, shuffle=False, verbose=0)
    for ours, theirs in zip(states(model), states(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_its_config_round_trips_and_a_lambda_is_refused():
    optimizer = kc.PruningOptimizer(
        keras.optimizers.AdamW(1e-3), kc.PolynomialDecay(**DECAY), block_size=(2, 1), block_pooling_type="MAX", name="p"
    )
    config = optimizer.get_config()
    again = kc.PruningOptimizer.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert again.rule == optimizer.rule
    assert isinstance(again.inner_optimizer, keras.optimizers.AdamW)
    assert again.pruning_schedule.get_config() == optimizer.pruning_schedule.get_config()
    with pytest.raises(ValueError, match="a lambda as allow of 'p'"):
        kc.PruningOptimizer("sgd", allow=lambda variable: True, name="p").get_config()


# --- loops, learning rates, devices ---


def test_learning_rates_of_callbacks_and_schedules_reach_the_inner_optimizer():
    model = prune(net())
    fit(model, [keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))], epochs=2)
    assert float(ops.convert_to_numpy(model.optimizer.inner_optimizer.learning_rate)) == pytest.approx(0.05)
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=8, decay_rate=0.5)
    model = prune(net(), keras.optimizers.SGD(decay))
    fit(model)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.05)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("is_built", [False, True])
def test_it_prunes_in_a_custom_loop_compiled_by_tensorflow(is_built):
    import tensorflow as tf

    model = net()
    optimizer = kc.PruningOptimizer(keras.optimizers.SGD(0.1), kc.ConstantSparsity(0.5, 0), scope="global")
    if is_built:
        optimizer.build(model.trainable_variables)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step(*data(8))
    step(*data(8))
    assert kc.sparsity(model) == pytest.approx(0.5, abs=0.005)
    assert int(optimizer.iterations) == 2


def test_stateless_apply_returns_sparse_kernels_on_jax():
    if keras.backend.backend() != "jax":
        pytest.skip("TensorFlow's optimizers have no stateless_apply")
    import jax

    model = net()
    optimizer = kc.PruningOptimizer(keras.optimizers.SGD(0.1), kc.PolynomialDecay(0.0, 0.5, 0, 2, frequency=1))
    optimizer.build(model.trainable_variables)
    variables = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    gradients = [ops.ones_like(v) for v in variables]
    apply = jax.jit(optimizer.stateless_apply)
    for share in (0.4375, 0.5):  # 0.5 - 0.5 * (1 - step / 2) ** 3
        variables, state = apply(state, gradients, variables)
        head = np.asarray(variables[-2])
        assert (head == 0).mean() == pytest.approx(share, abs=0.02)


# --- what is wrong is seen ---


def test_a_diverged_training_stays_visible_under_the_mask():
    model = prune(net(), keras.optimizers.SGD(1e30), kc.ConstantSparsity(0.5, 0, frequency=1), scope="global")
    fit(model)
    assert not all(np.isfinite(kernel).all() for kernel in kernels(model).values())
    model = net()
    model.get_layer("conv").kernel.assign(np.full((3, 3, 2, 4), np.nan))
    with pytest.raises(ValueError, match="conv/kernel' holds NaN or infinite"):
        kc.PruningOptimizer("sgd").build(model.trainable_variables)


def test_a_schedule_that_would_let_zeros_come_back_gets_a_warning():
    dense = net()
    fit(prune(dense, schedule=kc.ConstantSparsity(0.5, 0), scope="global"))
    with pytest.warns(UserWarning, match=r"50.\d% of the weights to prune are zero already.*sparsity of 0.2"):
        prune(dense, scope="global").optimizer.build(dense.trainable_variables)
    prune(dense, schedule=kc.PolynomialDecay(0.5, 0.8, 0, 10), scope="global").optimizer.build(
        dense.trainable_variables
    )


def build(optimizer, model=None):
    optimizer.build((model or net()).trainable_variables)


def no_kernel():
    variables = [keras.Variable(np.ones((2, 2)), name="matrix")]
    kc.PruningOptimizer("sgd").apply([ops.ones((2, 2))], variables)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kc.PruningOptimizer("sgd", 0.6), TypeError, "`pruning_schedule` must be a schedule"),
        (lambda: kc.PruningOptimizer("sgd", allow="kernel"), TypeError, "Received: allow='kernel'"),
        (lambda: kc.PruningOptimizer(kc.PruningOptimizer("sgd")), ValueError, "a `MultiOptimizer` go around"),
        (lambda: kc.PruningOptimizer(keras.optimizers.MultiOptimizer([])), ValueError, "`MultiOptimizer` go around"),
        (lambda: kc.PruningOptimizer("sgd", scope="model"), ValueError, "Received: scope='model'"),
        (lambda: build(kc.PruningOptimizer("sgd", block_size=(2, 2))), ValueError, "Leave it out: `allow="),
        (lambda: build(kc.PruningOptimizer("sgd", lambda step: (True, 60))), ValueError, "divide them by 100"),
        pytest.param(
            lambda: fit(prune(net(), schedule=lambda step: (step in (0, 7), 0.5))),
            TypeError,
            "with `keras.ops`",
            marks=pytest.mark.compiled,
        ),
        (no_kernel, ValueError, r"nothing to prune.*'matrix'.*allow=lambda"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


def trained_later(tmp_path, schedule):
    """A model that was compiled and saved before it was trained, loaded."""
    large = keras.Sequential([keras.Input((8,)), layers.Dense(16, activation="relu"), layers.Dense(4)])
    small = large if schedule else kc.prune_now(large, 0.75)
    small.compile(kc.PruningOptimizer(keras.optimizers.SGD(0.01 if schedule is None else 0.0), schedule), LOSS)
    small.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    loaded.fit(*points(), batch_size=8, verbose=0)
    return [ops.convert_to_numpy(each.kernel) for model in (small, loaded) for each in model.layers]


def points():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 8)).astype("float32"), rng.integers(0, 4, 16)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("schedule", [None, kc.ConstantSparsity(0.75, 0, 0)])
def test_a_model_that_was_saved_before_its_first_step_is_pruned_by_the_weights_that_it_was_saved_with(
    tmp_path, schedule
):
    *saved, first, second = trained_later(tmp_path, schedule)
    for before, after in zip(saved, (first, second), strict=True):
        largest = np.abs(before) >= np.sort(np.abs(before), axis=None)[-before.size // 4]
        np.testing.assert_array_equal(after != 0, largest)


@pytest.mark.quick
def test_an_optimizer_that_has_updated_is_refused_as_its_updates_would_count_as_steps():
    model = net()
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    fit(model)
    prune(model, model.optimizer)
    with pytest.raises(ValueError, match=r"must be a new one.*after 8 updates"):
        fit(model)
    prune(model, keras.optimizers.Adam.from_config(model.optimizer.inner_optimizer.get_config()))
    fit(model)
    assert kc.sparsity(model) == pytest.approx(DECAY["final_sparsity"], abs=0.01)


def test_an_optimizer_that_keeps_zeros_goes_on_with_the_moments_that_it_has():
    model = net()
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    fit(model)
    model.compile(kc.PruningOptimizer(model.optimizer), LOSS)
    fit(model)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 16
    small = net()
    small.compile(kc.PruningOptimizer(model.optimizer.inner_optimizer), LOSS)
    with pytest.raises(ValueError, match="built for other variables"):
        fit(small)


def test_all_kernels_may_be_frozen_after_the_optimizer_was_built():
    model = prune(net(), schedule=kc.ConstantSparsity(0.5, 0, 0))
    fit(model)
    optimizer = model.optimizer
    biases = [each for each in model.trainable_variables if len(each.shape) == 1]
    optimizer.finalize_variable_values(biases)
    optimizer.finalize_variable_values([])


def test_an_optimizer_with_the_masks_of_another_model_is_an_error():
    first, second = prune(net()), net()
    fit(first)
    second.compile(first.optimizer, LOSS)
    unknown = r"masks of another model|[Uu]nknown variable|not the ones"
    with pytest.raises((ValueError, KeyError), match=unknown):
        fit(second)
    swapped = keras.Sequential([keras.Input((4,)), *(layers.Dense(4, name=name) for name in "abc")])
    _, b, c = swapped.layers
    optimizer = kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, 0))
    c.trainable = False
    swapped.compile(optimizer, "mse")
    swapped.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)
    b.trainable, c.trainable = False, True
    swapped.compile(optimizer, "mse")
    with pytest.raises((ValueError, KeyError), match=unknown):
        swapped.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)


def test_a_loss_scale_that_is_set_from_outside_is_the_inner_optimizers():
    optimizer = kc.PruningOptimizer(keras.optimizers.SGD(0.1, loss_scale_factor=1024.0))
    assert optimizer.loss_scale_factor == 1024
    keras.optimizers.LossScaleOptimizer(optimizer)  # which scales by itself
    assert optimizer.inner_optimizer.loss_scale_factor is None
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(optimizer), loss_scale_factor=128.0)
    assert optimizer.inner_optimizer.loss_scale_factor == 128
    assert several.scale_loss(1.0) == 128


def test_one_of_several_optimizers_prunes_what_is_its_own_and_is_counted():
    optimizer = kc.PruningOptimizer(keras.optimizers.SGD(0.1), kc.ConstantSparsity(0.5, 0, 0), allow=is_wide)
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(4)])
    rest = {".*bias": keras.optimizers.Adam()}
    model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(optimizer, rest)), LOSS)
    fit(model)
    assert [kernel.path for kernel, _, _ in kc.pruning.pruning_vars(model)] == [model.layers[1].kernel.path]
    assert kc.sparsity(model) == 0.5


def test_a_training_within_a_handler_of_errors_is_checked_at_its_end_as_any():
    model = net()
    model.compile(kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, begin_step=1000)), LOSS)
    try:
        raise MemoryError
    except MemoryError:
        with pytest.warns(UserWarning, match="Nothing is pruned yet"):
            fit(model)


def test_the_clock_of_several_optimizers_is_that_of_the_one_that_prunes():
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer = kc.PruningOptimizer(inner, kc.ConstantSparsity(0.5, 0), allow=is_wide)
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(4)])
    rest = {".*bias": keras.optimizers.SGD(0.1)}
    model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(optimizer, rest)), LOSS)
    magnitudes, augment = [], kc.RandAugment(0)
    augment(np.zeros((1, 8, 8, 3), "uint8"), training=True)
    follow = kc.MagnitudeScheduler(augment, lambda step: magnitudes.append(step) or step)
    fit(model, callbacks=[follow])
    assert magnitudes[-1] == int(ops.convert_to_numpy(optimizer.iterations)) > 0


MODEL_PARALLEL = """
import keras, numpy as np, kerascompress as kc
devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*wide.*kernel.*"] = (None, "model")
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="wide"), keras.layers.Dense(4)])
model.compile(kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, 0)), "mse")
model.fit(np.ones((8, 6)), np.ones((8, 4)), batch_size=4, verbose=0)
kernel, mask, threshold = model.optimizer.pruning_vars[0]
print(kc.sparsity(model), mask.value.sharding == kernel.value.sharding, threshold.value.sharding.is_fully_replicated)
"""


@pytest.mark.once("jax")
def test_with_a_layout_of_its_kernel_a_mask_is_shared_out_and_a_threshold_everywhere():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", MODEL_PARALLEL]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.stdout.split() == ["0.5", "True", "True"], done.stderr


def is_wide(variable):
    return len(variable.shape) > 1


def test_a_loop_that_asks_for_the_updates_gets_their_number():
    optimizer, kernel = kc.PruningOptimizer(keras.optimizers.SGD(0.1)), keras.Variable(np.ones((2, 2)), name="kernel")
    for _ in range(3):
        updates = optimizer.apply_gradients([(ops.zeros((2, 2)), kernel)])
    assert int(ops.convert_to_numpy(updates)) == 3


def test_a_method_as_schedule_cannot_be_saved():
    class Mine:
        def schedule(self, step):
            return step >= 0, 0.5

    with pytest.raises(ValueError, match="a method as pruning_schedule"):
        kc.PruningOptimizer("sgd", Mine().schedule).get_config()


def test_whoever_counts_counts_what_allow_has_chosen():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(kc.PruningOptimizer("sgd", kc.ConstantSparsity(0.5, 0, 0), allow=lambda variable: True), "mse")
    model.optimizer.build(model.trainable_variables)  # 4 of 8 weights and 1 of 2 biases
    model.set_weights([np.array([[1, 0]] * 4), np.array([0, 0])])
    assert kc.sparsity(model) == pytest.approx(6 / 10)
    assert kc.summary(model).sparsity == pytest.approx(6 / 10)
    assert kc.summary(model).macs == 8  # biases multiply nothing


def test_sparsity_is_that_of_the_weights_not_of_the_masks_that_somebody_has_written_over():
    model = prune(net(), schedule=kc.ConstantSparsity(0.75, 0, 0))
    dense = model.get_weights()
    fit(model)
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.01)
    model.set_weights(dense)  # as EarlyStopping(restore_best_weights=True) does
    assert kc.sparsity(model) == 0


def test_what_the_inner_optimizer_shall_not_decay_stays():
    optimizer = kc.PruningOptimizer(keras.optimizers.AdamW(1e-4, weight_decay=100.0), kc.ConstantSparsity(0.5, 0, 0))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    kernel, bias = keras.Variable(np.ones((2, 2)), name="kernel"), keras.Variable(np.ones(2), name="bias")
    optimizer.apply([ops.zeros((2, 2)), ops.zeros(2)], [kernel, bias])
    np.testing.assert_array_equal(ops.convert_to_numpy(bias), 1)
    assert ops.convert_to_numpy(kernel).max() < 1


def test_moving_averages_that_are_swapped_in_are_as_sparse_as_the_weights():
    class Look(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            zeros.append(kc.sparsity(self.model))

    zeros, model = [], net()
    prune(model, keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), kc.ConstantSparsity(0.75, 2, 4))
    callbacks = [Look(), keras.callbacks.SwapEMAWeights()]
    model.fit(*data(), batch_size=8, verbose=0, epochs=2, validation_data=data(8), callbacks=callbacks)
    assert zeros == pytest.approx([0.75, 0.75], abs=0.01)


def test_a_layer_that_is_emptied_is_named_at_step_0_and_when_training_ends():
    model = net()
    head = model.get_layer("head").kernel
    head.assign(head.value * 1e-4)
    optimizer = kc.PruningOptimizer(keras.optimizers.SGD(0.0), kc.ConstantSparsity(0.9, 0, 0), scope="global")
    with pytest.warns(UserWarning, match="leaves nothing of .*head"):
        optimizer.build(model.trainable_variables)
    later = prune(net(), keras.optimizers.SGD(0.0), kc.ConstantSparsity(0.9, 2, 2), scope="global")
    later.get_layer("head").kernel.assign(head.value)
    with pytest.warns(UserWarning, match="leaves nothing of .*head"):
        fit(later)


def test_large_weights_that_are_not_named_as_kernels_are_a_warning():
    rows, token = keras.Variable(np.ones((8, 8)), name="w"), keras.Variable(np.ones((1, 2)), name="token")
    kernel = keras.Variable(np.ones((8, 8)), name="kernel")
    with pytest.warns(UserWarning, match=r"50.8% of the weights stay dense.*w.*allow="):
        kc.PruningOptimizer("sgd").build([kernel, rows, token])
    kc.PruningOptimizer("sgd").build([kernel, token])  # a few are not worth a warning
    kc.PruningOptimizer("sgd", allow=lambda variable: variable is rows).build([kernel, rows])  # chosen
