"""Pruning: masks held against tfmot and NumPy, training against exact sparsity, errors against their words."""

import keras
import numpy as np
import pytest
from keras import layers

import kerascompress as kc
from kerascompress import callbacks, pruning
from kerascompress.wrapper import wrappers_in

# Untrained or badly scaled kernels that one threshold may remove altogether, of which a warning tells.
collapses = pytest.mark.filterwarnings("ignore:Global pruning to a sparsity of .* leaves nothing of")


@pytest.fixture(scope="module")
def tfmot():
    """The real tfmot on Keras 2, imported as kerascompress imports it."""
    _ = kc.PolynomialDecay
    from tensorflow_model_optimization.python.core.sparsity.keras import prune, pruning_wrapper  # noqa: F401

    return pruning_wrapper


def small_net(**kwargs) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(6, 3, name="conv", **kwargs),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.Flatten(name="flatten"),
            layers.Dense(4, name="head"),
        ],
        name="small_net",
    )


def data(count=64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 6, 6, 2)).astype("float32"), rng.integers(0, 4, count)


def compile_(model, optimizer=None, **kwargs):
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs)
    return model


def fit(model, epochs=1, callbacks=(), batch_size=8, count=64):
    return model.fit(
        *data(count),
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[kc.UpdatePruningStep(), *callbacks],
    )


def effective(model) -> np.ndarray:
    return np.concatenate([each.ravel() for each in pruning.effective_kernels(model)])


# --- masks against tfmot ---


def tfmot_masks(tfmot, weights_by_step, schedule, **kwargs):
    """The mask that tfmot's own wrapper holds after each step, given the weights of that step."""
    import tensorflow as tf
    import tf_keras

    *size, channels, filters = weights_by_step[0].shape
    layer = tfmot.PruneLowMagnitude(tf_keras.layers.Conv2D(filters, size), pruning_schedule=schedule, **kwargs)
    layer.build((1, 9, 9, channels))
    masks = []
    for step, weights in enumerate(weights_by_step):
        layer.layer.kernel.assign(weights)
        layer.pruning_step.assign(step)
        layer.pruning_obj.conditional_mask_update()
        layer.pruning_obj.weight_mask_op()
        _, mask, threshold = layer.pruning_vars[0]
        masks.append((mask.numpy().astype(bool), float(threshold)))
        assert np.array_equal(layer.layer.kernel.numpy(), np.where(masks[-1][0], weights, 0))
    assert tf.executing_eagerly()
    return masks


def our_masks(weights_by_step, schedule, **kwargs):
    """The same, with our wrapper driven by our callback."""
    shape = weights_by_step[0].shape
    if len(shape) == 2:
        inner, inputs = layers.Dense(shape[-1]), (shape[0],)
    else:
        inner, inputs = layers.Conv2D(shape[-1], shape[:2]), (9, 9, shape[2])
    model = keras.Sequential([keras.Input(inputs), kc.PruneLowMagnitude(inner, schedule, **kwargs)])
    model.compile("sgd", "mse")
    (wrapper,) = model.layers
    callback = kc.UpdatePruningStep()
    callback.set_model(model)
    masks = []
    for step, weights in enumerate(weights_by_step):
        kernel, mask, threshold = (
            wrapper.pruning_vars[0] if step else (wrapper.layer.kernel, *wrapper.pruning_vars[0][1:])
        )
        kernel.assign(weights)
        if step == 0:
            callback.on_train_begin()
            callback.on_epoch_begin(0)
        else:
            callback.on_train_batch_end(step - 1)
        masks.append((keras.ops.convert_to_numpy(mask.value), float(threshold)))
    return masks


def drifting(shape, steps, seed=0):
    """Weights that move at random, with exact zeros and exact ties among them."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=shape).astype("float32")
    for _ in range(steps):
        weights = weights + 0.3 * rng.normal(size=shape).astype("float32")
        flat = weights.ravel().copy()
        flat[rng.integers(0, flat.size, 3)] = 0.0
        flat[1] = -flat[0]
        yield flat.reshape(shape)


@pytest.mark.filterwarnings("ignore:1.7% of the weights to prune are zero already")
def test_layer_masks_equal_tfmots_element_for_element_at_every_step(tfmot):
    schedule = kc.PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.83, begin_step=2, end_step=22, frequency=2)
    weights = list(drifting((3, 3, 5, 4), 30))
    theirs, ours = tfmot_masks(tfmot, weights, schedule), our_masks(weights, schedule)
    assert len({mask.tobytes() for mask, _ in theirs}) > 4  # the oracle did prune, several times
    for step, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        np.testing.assert_array_equal(our[0], their[0], err_msg=f"mask at step {step}")
        assert our[1] == their[1], f"threshold at step {step}"


def test_m_by_n_masks_equal_tfmots(tfmot):
    (weights,) = drifting((3, 3, 8, 4), 1, seed=2)
    # tfmot sets this mask at its step 1, the first batch; ours is set before the first batch.
    (_, (theirs, _)) = tfmot_masks(tfmot, [weights, weights], kc.ConstantSparsity(0.5, 0), sparsity_m_by_n=(1, 4))
    ((ours, _),) = our_masks([weights], kc.ConstantSparsity(0.5, 0), sparsity_m_by_n=(1, 4))
    np.testing.assert_array_equal(ours, theirs)
    assert not ours.all()


def test_the_m_by_n_mask_is_set_once():
    weights = list(drifting((8, 4), 6))
    masks = our_masks(weights, kc.ConstantSparsity(0.5, 0, frequency=1), sparsity_m_by_n=(2, 4))
    assert len({mask.tobytes() for mask, _ in masks}) == 1


# --- global scope ---


@collapses
def test_global_masks_equal_numpy_partition_over_all_kernels():
    p, dense = 0.8, small_net()
    kernels = [dense.get_layer("conv").kernel, dense.get_layer("depthwise").kernel, dense.get_layer("head").kernel]
    raw = [keras.ops.convert_to_numpy(kernel.value) * scale for kernel, scale in zip(kernels, (1, 5, 0.3), strict=True)]
    for kernel, value in zip(kernels, raw, strict=True):
        kernel.assign(value)
    magnitudes = np.abs(np.concatenate([value.ravel() for value in raw]))
    cut = round(magnitudes.size * p)
    threshold = np.partition(magnitudes, cut)[cut]
    pruned = compile_(kc.prune_low_magnitude(dense, kc.ConstantSparsity(p, begin_step=0), scope="global"))
    callback = kc.UpdatePruningStep()
    callback.set_model(pruned)
    callback.on_train_begin()
    for kernel, value in zip(pruning.effective_kernels(pruned), raw, strict=True):
        np.testing.assert_array_equal(kernel, np.where(np.abs(value) >= threshold, value, 0))
    assert abs(kc.sparsity(pruned) - p) <= 1 / magnitudes.size


def test_global_pruning_says_once_which_kernel_it_has_removed_altogether():
    dense = small_net()
    head = dense.get_layer("head").kernel
    head.assign(1e-3 * head)
    pruned = compile_(kc.prune_low_magnitude(dense, kc.ConstantSparsity(0.8, 0, frequency=1), scope="global"))
    with pytest.warns(UserWarning, match=r"sparsity of 0.80 leaves nothing of \['head/kernel'\].*Train the dense"):
        fit(pruned)
    assert kc.sparsity(pruned.get_layer("prune_low_magnitude_head")) == 1
    fit(pruned)  # a second warning would be an error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_in_another_precision_computes_in_it(dtype):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, dtype=dtype), layers.Dense(2)])
    model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(8, 6)))
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    inputs, wrapper = keras.ops.ones((4, 8)), pruned.layers[0]
    kept = np.random.default_rng(1).integers(0, 2, (8, 6))
    wrapper.pruning_vars[0][1].assign(kept.astype(bool))
    model.layers[0].kernel.assign(model.layers[0].kernel * kept)
    ours, theirs = wrapper(inputs), model.layers[0](inputs)
    assert keras.backend.standardize_dtype(ours.dtype) == keras.backend.standardize_dtype(theirs.dtype)
    as_float = [keras.ops.convert_to_numpy(keras.ops.cast(each, "float32")) for each in (ours, theirs)]
    np.testing.assert_array_equal(*as_float)


def test_a_later_training_without_the_callback_is_an_error_too():
    pruned = kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0))
    compile_(pruned)
    fit(pruned)
    compile_(pruned)
    with pytest.raises(RuntimeError, match="UpdatePruningStep"):
        pruned.fit(*data(8), verbose=0)


def test_so_is_one_after_a_training_that_was_interrupted():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    pruned = compile_(kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0)))
    callbacks = [kc.UpdatePruningStep(), Interrupt()]  # which somebody may hold
    with pytest.raises(KeyboardInterrupt):
        pruned.fit(*data(8), verbose=0, callbacks=callbacks)
    compile_(pruned)
    with pytest.raises(RuntimeError, match="UpdatePruningStep"):
        pruned.fit(*data(8), verbose=0)


def test_two_scopes_in_one_model_do_not_mix():
    model = keras.Sequential(
        [
            keras.Input((10,)),
            kc.PruneLowMagnitude(layers.Dense(10), kc.ConstantSparsity(0.5, 0), scope="layer"),
            kc.PruneLowMagnitude(layers.Dense(10), kc.ConstantSparsity(0.2, 0), scope="global"),
            kc.PruneLowMagnitude(layers.Dense(10), kc.ConstantSparsity(0.2, 0), scope="global"),
        ]
    )
    model.layers[1].layer.kernel.assign(100 * np.ones((10, 10)))
    compile_(model)
    callback = kc.UpdatePruningStep()
    callback.set_model(model)
    callback.on_train_begin()
    assert [kc.sparsity(layer) for layer in model.layers] == pytest.approx([0.5, 0.0, 0.4])


# --- training ---


class RecordSparsity(keras.callbacks.Callback):
    """After each batch: the zeros of the masks, and the largest raw weight that hides under one.

    What the pruned model computes must be what plain layers compute whose masked weights are zeroed here, by NumPy.
    """

    def on_train_begin(self, logs=None):
        self.seen = []
        self.plain = small_net()

    def on_train_batch_end(self, batch, logs=None):
        to_numpy, model, images = keras.ops.convert_to_numpy, self.model, data(4)[0]
        outputs = to_numpy(keras.ops.cast(model(images, training=False), "float32"))
        zeros, hidden = 0, 0.0
        for layer in self.plain.layers:
            wrappers = [each for each in wrappers_in(model) if each.layer.name == layer.name]
            if not wrappers:
                layer.set_weights(model.get_layer(layer.name).get_weights())
                continue
            layer.set_weights(wrappers[0].layer.get_weights())
            raw, mask = layer.get_weights()[0], to_numpy(wrappers[0].pruning_vars[0][1].value)
            layer.set_weights([raw * mask, *layer.get_weights()[1:]])
            zeros, hidden = zeros + np.sum(~mask), max(hidden, np.abs(raw[~mask]).max(initial=0))
        expected = to_numpy(keras.ops.cast(self.plain(images, training=False), "float32"))
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
        self.seen.append((int(zeros), float(hidden)))


@pytest.mark.parametrize(
    "case",
    [
        "sgd_momentum",
        pytest.param("adamw", marks=pytest.mark.once("jax")),
        pytest.param("jit", marks=pytest.mark.compiled),
        pytest.param("mixed_bfloat16", marks=pytest.mark.once("jax")),
        "mixed_float16",
        pytest.param("steps_per_execution", marks=pytest.mark.compiled),
        "accumulation",
        pytest.param("ema", marks=pytest.mark.once("jax")),
    ],
)
def test_after_every_batch_the_effective_kernels_are_exactly_sparse(case):
    optimizer = {
        "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.05),
        "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        "ema": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=3),
    }.get(case, lambda: keras.optimizers.SGD(0.1, momentum=0.9))()
    if case.startswith("mixed"):
        keras.config.set_dtype_policy(case)
    is_compiled = case == "jit" or keras.backend.backend() == "jax"  # without, JAX runs operation by operation
    kwargs = {"steps_per_execution": 8} if case == "steps_per_execution" else {"jit_compile": is_compiled}
    schedule = kc.PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.75, begin_step=0, end_step=10, frequency=2)
    pruned = compile_(kc.prune_low_magnitude(small_net(), schedule, scope="global"), optimizer, **kwargs)
    record = RecordSparsity()
    fit(pruned, epochs=2 if case != "accumulation" else 4, callbacks=[record])
    size = effective(pruned).size
    # the schedule's first sparsity is in force from the first batch on
    assert record.seen[0][0] >= round(size * 0.2) - 1
    if keras.backend.backend() != "jax":
        assert max(hidden for _, hidden in record.seen) == 0  # raw kernels too, for checkpoints between batches
    elif case in ("sgd_momentum", "adamw", "jit"):
        assert max(hidden for _, hidden in record.seen) > 0  # there, masks have work to do
    assert kc.sparsity(pruned) == pytest.approx(0.75, abs=1 / size)
    raw = [keras.ops.convert_to_numpy(weight.value) for weight in pruning.prunable_weights(pruned)]
    assert sum(each.size - np.count_nonzero(each) for each in raw) == size - np.count_nonzero(effective(pruned))


@pytest.mark.parametrize("batches", [20, 25])
def test_the_last_update_at_end_step_is_never_missed(batches):
    # begin 0, end 20, frequency 8: tfmot's last update is at step 16, where 159 of 200 weights are zero, not 160.
    schedule = kc.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.8, begin_step=0, end_step=20, frequency=8)
    model = keras.Sequential([keras.Input((20,)), kc.PruneLowMagnitude(layers.Dense(10), schedule)])
    model.compile("sgd", "mse", steps_per_execution=1 if keras.backend.backend() == "torch" else 5)
    inputs, targets = np.ones((batches, 20), "float32"), np.ones((batches, 10), "float32")
    model.fit(inputs, targets, batch_size=1, verbose=0, callbacks=[kc.UpdatePruningStep()])
    assert kc.sparsity(model) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("steps_per_execution", [1, *(pytest.param(n, marks=pytest.mark.compiled) for n in (3, 8))])
def test_an_update_is_due_when_a_scheduled_step_lies_since_the_last_call(steps_per_execution):
    asked = []

    def schedule(step):
        asked.append(int(step))
        return step in (0, 7, 13), 0.1 + step / 20  # step 13 -> 0.75

    model = keras.Sequential([keras.Input((20,)), kc.PruneLowMagnitude(layers.Dense(10), schedule)])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    model.fit(np.ones((24, 20)), np.ones((24, 10)), batch_size=1, verbose=0, callbacks=[kc.UpdatePruningStep()])
    ahead = steps_per_execution if keras.backend.backend() == "jax" else 0  # to zero what is masked before it is due
    assert {0, 7, 13} <= set(asked) <= set(range(25 + ahead))
    assert kc.sparsity(model) == pytest.approx(0.75, abs=0.01)


@pytest.mark.quick
def test_one_shot_pruning_prunes_before_the_first_batch():
    pruned = compile_(kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.6, begin_step=0), scope="global"))
    record = RecordSparsity()
    fit(pruned, callbacks=[record])
    size = effective(pruned).size
    assert record.seen[0][0] == pytest.approx(0.6 * size, abs=1)


def test_a_missing_callback_is_an_error_at_the_first_batch_that_says_what_to_add():
    pruned = compile_(kc.prune_low_magnitude(small_net()))
    with pytest.raises(RuntimeError, match=r"callbacks=\[kerascompress.UpdatePruningStep\(\)\]"):
        pruned.fit(*data(), verbose=0)


def test_masks_change_at_an_update_alone_and_what_is_masked_is_zero_after_every_batch():
    pruned = compile_(
        kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0, end_step=0)), keras.optimizers.SGD(0.1)
    )
    seen = []

    class Masks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            wrapper = next(wrappers_in(self.model))
            kernel, mask, _ = wrapper.pruning_vars[0]
            raw, keep = keras.ops.convert_to_numpy(kernel.value), keras.ops.convert_to_numpy(mask.value)
            assert keras.backend.backend() == "jax" or not raw[~keep].any()  # there, at the end of the epoch
            seen.append(keep.tobytes())

    fit(pruned, epochs=2, callbacks=[Masks()])
    assert len(set(seen)) == 1
    assert sum(not kernel.all() for kernel in pruned.get_weights() if kernel.dtype != bool) >= 3  # at its end, anywhere


# --- saving and resuming ---


@pytest.mark.parametrize("scope", [pytest.param("layer", marks=pytest.mark.once("jax")), "global"])
def test_saved_files_are_sparse_and_training_goes_on_bit_identically(tmp_path, scope):
    def start():
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        schedule = kc.PolynomialDecay(initial_sparsity=0.3, final_sparsity=0.7, begin_step=0, end_step=22, frequency=5)
        return compile_(kc.prune_low_magnitude(small_net(), schedule, scope=scope), keras.optimizers.Adam(0.01))

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.save(tmp_path / "model.keras")
                self.model.save_weights(tmp_path / "model.weights.h5")

    whole = start()
    fit(whole, epochs=3, callbacks=[Save()])

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert kc.sparsity(loaded) > 0.5
    raw = np.concatenate([keras.ops.convert_to_numpy(w.value).ravel() for w in pruning.prunable_weights(loaded)])
    assert np.count_nonzero(raw) == np.count_nonzero(effective(loaded))
    restored = start()
    restored.optimizer.build(restored.trainable_variables)
    restored.load_weights(tmp_path / "model.weights.h5")
    for resumed in (loaded, restored):
        assert int(keras.ops.convert_to_numpy(next(wrappers_in(resumed)).pruning_step)) == 8
        fit(resumed, epochs=2)
        for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_checkpoint_in_the_middle_of_an_epoch_is_sparse(tmp_path):
    pruned = compile_(kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.6, 0)))
    path = tmp_path / "at_{batch}.keras"
    fit(pruned, callbacks=[keras.callbacks.ModelCheckpoint(path, save_freq=3)])
    files = sorted(tmp_path.iterdir())
    assert files
    for file in files:
        loaded = keras.models.load_model(file)
        raw = np.concatenate([keras.ops.convert_to_numpy(w.value).ravel() for w in pruning.prunable_weights(loaded)])
        assert 1 - np.count_nonzero(raw) / raw.size == pytest.approx(0.6, abs=0.02)


@keras.saving.register_keras_serializable("tests")
def every_second_step(step):
    return step % 2 == 0, 0.5


def test_a_registered_function_as_schedule_survives_saving(tmp_path):
    pruned = compile_(kc.prune_low_magnitude(small_net(), every_second_step))
    fit(pruned)
    pruned.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].pruning_schedule is every_second_step


def resumable():
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    schedule = kc.PolynomialDecay(initial_sparsity=0.3, final_sparsity=0.7, begin_step=0, end_step=22, frequency=5)
    return compile_(kc.prune_low_magnitude(small_net(), schedule, scope="global"))


def stored_step(model):
    return int(keras.ops.convert_to_numpy(next(wrappers_in(model)).pruning_step))


@pytest.mark.once("jax")
def test_restored_weights_bring_their_step_back(tmp_path):
    model = resumable()
    fit(model)
    model.save_weights(tmp_path / "8.weights.h5")
    fit(model, epochs=2)
    assert stored_step(model) == 24
    model.load_weights(tmp_path / "8.weights.h5")
    model.save(tmp_path / "8.keras")
    assert stored_step(keras.models.load_model(tmp_path / "8.keras")) == 8
    stop = keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=1, restore_best_weights=True)
    fit(model, epochs=3, callbacks=[stop])
    assert stored_step(model) == 8 * (1 + 1 + stop.best_epoch)


@pytest.mark.parametrize("backup_first", [pytest.param(False, marks=pytest.mark.once("jax")), True])
def test_backup_and_restore_resumes_bit_identically(tmp_path, backup_first):
    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = resumable()
        model.fit(*data(), batch_size=8, epochs=3, verbose=0, shuffle=False, callbacks=list(callbacks))
        return model

    def both():
        pair = [kc.UpdatePruningStep(), keras.callbacks.BackupAndRestore(tmp_path)]
        return pair[::-1] if backup_first else pair

    whole = run(kc.UpdatePruningStep())
    with pytest.raises(KeyboardInterrupt):
        run(*both(), Die())
    for ours, theirs in zip(run(*both()).get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_interrupted_fit_keeps_its_step():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 5:
                raise KeyboardInterrupt

    model = resumable()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[Interrupt()])
    fit(model)
    assert stored_step(model) == 6 + 8


def test_a_layer_frozen_after_pruning_is_saved_and_loaded(tmp_path):
    pruned = kc.prune_low_magnitude(small_net())
    pruned.layers[0].trainable = False
    pruned.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(effective(loaded), effective(pruned))


def test_a_pruned_model_has_each_kernel_once():
    dense, pruned = small_net(), kc.prune_low_magnitude(small_net())
    own = [weight for wrapper in wrappers_in(pruned) for weight in wrapper._trainable_variables]
    assert own == []
    assert len(pruned.weights) == len(dense.weights) + 3 * 3  # mask, threshold and step of three layers


@keras.saving.register_keras_serializable("tests")
class Steady:
    """A schedule of one's own, with a config."""

    def __init__(self, p):
        self.p = p

    def __call__(self, step):
        return step % 4 == 0, self.p

    def get_config(self):
        return {"p": self.p}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_a_schedule_object_of_ones_own_stays_global_after_loading(tmp_path):
    pruned = compile_(kc.prune_low_magnitude(small_net(), Steady(0.4), scope="global"))
    fit(pruned)
    pruned.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len({callbacks._group(wrapper) for wrapper in wrappers_in(loaded)}) == 1


def test_a_subclass_of_tfmots_schedule_survives_saving(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Mine(kc.schedules.PruningSchedule):
        def __init__(self, p):
            self.p = p

        def __call__(self, step):
            return step == 0, self.p

        def get_config(self):
            return {"class_name": "Mine", "config": {"p": self.p}}

    kc.prune_low_magnitude(small_net(), Mine(0.25)).save(tmp_path / "model.keras")
    assert next(wrappers_in(keras.models.load_model(tmp_path / "model.keras"))).pruning_schedule.p == 0.25


def test_a_lambda_as_schedule_is_refused_when_it_is_saved(tmp_path):
    pruned = kc.prune_low_magnitude(small_net(), lambda step: (True, 0.5))
    with pytest.raises(ValueError, match="register_keras_serializable"):
        pruned.save(tmp_path / "model.keras")


# --- models of many kinds ---


def zoo() -> keras.Model:
    """Every kind of prunable layer, nested and shared."""
    tokens = keras.Input((6,), dtype="int32")
    sequence = layers.Embedding(20, 8)(tokens)
    sequence = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(sequence)
    sequence = layers.MultiHeadAttention(2, 4)(sequence, sequence)
    shared = layers.TimeDistributed(layers.Dense(8))
    sequence = shared(shared(sequence))
    sequence = layers.Conv1D(6, 2, activity_regularizer="l2", kernel_regularizer="l2")(sequence)
    sequence = layers.SeparableConv1D(6, 2)(sequence)
    sequence = layers.Conv1DTranspose(4, 2)(sequence)
    head = keras.Sequential([layers.GRU(5), layers.Dropout(0.1), layers.Dense(3)], name="head")
    return keras.Model(tokens, head(sequence) * 2.0)


@collapses
def test_every_kind_of_layer_prunes_trains_saves_and_strips_in_a_nested_model(tmp_path):
    model = zoo()
    tokens, targets = np.random.default_rng(0).integers(0, 20, (32, 6)), np.zeros((32, 3), "float32")
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0), scope="global")
    to_numpy = keras.ops.convert_to_numpy
    np.testing.assert_allclose(to_numpy(pruned(tokens)), to_numpy(model(tokens)), atol=1e-6)
    assert to_numpy(sum(pruned.losses)) == pytest.approx(to_numpy(sum(model.losses)))  # regularisers still count, once
    assert sum(kernel.size for kernel in pruning.effective_kernels(pruned)) == sum(
        np.prod(weight.shape)
        for weight in model.trainable_weights
        if len(weight.shape) > 1 and "bias" not in weight.name
    )
    pruned.compile("adam", "mse")
    pruned.fit(tokens, targets, batch_size=4, verbose=0, callbacks=[kc.UpdatePruningStep()])
    assert kc.sparsity(pruned) == pytest.approx(0.5, abs=0.005)
    pruned.save(tmp_path / "zoo.keras")
    small = kc.strip_pruning(keras.models.load_model(tmp_path / "zoo.keras"))
    np.testing.assert_allclose(small.predict(tokens, verbose=0), pruned.predict(tokens, verbose=0), atol=1e-6)
    assert [layer.name for layer in small.layers[1:]] == [layer.name for layer in model.layers[1:]]
    assert kc.sparsity(small) == pytest.approx(0.5, abs=0.005)


def test_a_padding_mask_passes_through_wrapped_layers():
    tokens = np.array([[3, 4, 0, 0], [5, 0, 0, 0]])

    def net(mask_zero):
        return keras.Sequential(
            [keras.Input((4,), dtype="int32"), layers.Embedding(9, 4, mask_zero=mask_zero), layers.LSTM(3)]
        )

    model, unmasked = net(True), net(False)
    unmasked.set_weights(model.get_weights())
    expected = model.predict(tokens, verbose=0)
    assert not np.allclose(unmasked.predict(tokens, verbose=0), expected)  # the mask does matter here
    np.testing.assert_allclose(kc.prune_low_magnitude(model).predict(tokens, verbose=0), expected, atol=1e-6)


def test_pruning_a_model_leaves_the_model_alone_and_the_copy_uncompiled():
    dense = compile_(small_net())
    before = dense.get_weights()
    pruned = kc.prune_low_magnitude(dense, kc.ConstantSparsity(0.9, 0))
    assert dense.compiled
    assert not pruned.compiled
    fit(compile_(pruned))
    for ours, theirs in zip(dense.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert kc.sparsity(dense) == 0


def test_stripping_a_trainer_that_contains_the_pruned_model_works_too():
    pruned = kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0))
    trainer = compile_(keras.Sequential([layers.GaussianNoise(0.1), pruned]))
    fit(trainer)
    assert kc.sparsity(trainer) == kc.sparsity(pruned) == pytest.approx(0.5, abs=0.01)
    assert not list(wrappers_in(kc.strip_pruning(trainer)))


def test_adapted_and_unsaveable_layers_without_kernels_come_through():
    inputs = np.random.default_rng(0).normal(10, 5, (16, 8)).astype("float32")
    adapted = layers.Normalization()
    adapted.adapt(inputs)
    model = keras.Sequential([keras.Input((8,)), adapted, layers.Lambda(lambda x: 2 * x), layers.Dense(4)])
    expected = model.predict(inputs, verbose=0)
    pruned = kc.prune_low_magnitude(model)
    np.testing.assert_allclose(pruned.predict(inputs, verbose=0), expected, atol=1e-5)
    np.testing.assert_allclose(kc.strip_pruning(pruned).predict(inputs, verbose=0), expected, atol=1e-5)


def test_every_layer_of_the_copy_is_in_the_graph_of_the_copy_alone():
    x = keras.Input((6, 6, 2))
    features = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU()(layers.Conv2D(3, 3)(x)))
    dense = keras.Model(x, layers.Dense(2)(layers.Dropout(0.5)(features)))
    for _ in range(2):
        pruned = kc.prune_low_magnitude(dense, pruning_schedule=kc.ConstantSparsity(0.5, 0))
        assert not set(map(id, pruned.layers)) & set(map(id, dense.layers))
        extractor = keras.Model(pruned.input, pruned.get_layer("pool").output)
        assert extractor.predict(data(3)[0], verbose=0).shape == (3, 3)
    assert len(dense.get_layer("pool")._inbound_nodes) == 1


def test_strip_leaves_the_pruned_model_as_it_is():
    pruned = compile_(kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0)))
    fit(pruned)
    for weight in pruning.prunable_weights(pruned):
        weight.assign(np.ones(weight.shape))  # raw weights under the mask, as between two updates
    before = pruned.get_weights()
    assert kc.sparsity(kc.strip_pruning(pruned)) == pytest.approx(0.5, abs=0.01)
    kc.strip_pruning(pruned)
    for ours, theirs in zip(pruned.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_pruned_layer_works_inside_of_time_distributed():
    inner = kc.prune_low_magnitude(layers.Dense(3), kc.ConstantSparsity(0.5, 0))
    model = keras.Sequential([keras.Input((5, 4)), layers.TimeDistributed(inner)])
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 5, 4)), np.ones((8, 5, 3)), verbose=0, callbacks=[kc.UpdatePruningStep()])
    assert kc.sparsity(model) == 0.5


def test_pruning_what_is_pruned_keeps_its_schedule_with_a_warning():
    pruned = kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.3, 0))
    with pytest.warns(UserWarning, match="strip_pruning"):
        again = kc.prune_low_magnitude(pruned, kc.ConstantSparsity(0.9, 0))
    assert {wrapper.pruning_schedule.target_sparsity for wrapper in wrappers_in(again)} == {0.3}


def test_biases_and_normalisation_are_never_pruned():
    pruned = kc.prune_low_magnitude(small_net())
    assert {weight.name for weight in pruning.prunable_weights(pruned)} == {"kernel"}
    assert [layer.name for layer in pruned.layers] == [
        "prune_low_magnitude_conv",
        "bn",
        "relu",
        "prune_low_magnitude_depthwise",
        "flatten",
        "prune_low_magnitude_head",
    ]


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Layer):
    def build(self, input_shape):
        self.matrix = self.add_weight(name="matrix", shape=(input_shape[-1], 3))
        self.other = self.add_weight(name="other", shape=(3, 3))

    def call(self, inputs):
        return keras.ops.matmul(keras.ops.matmul(inputs, self.matrix), self.other)


@keras.saving.register_keras_serializable("tests")
class Prunable(Scaled):
    def get_prunable_weights(self):
        return [self.matrix]


@pytest.mark.quick
def test_get_prunable_weights_decides_for_a_custom_layer():
    model = keras.Sequential([keras.Input((4,)), Prunable()])
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    pruned.compile("sgd", "mse")
    pruned.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[kc.UpdatePruningStep()])
    assert kc.sparsity(pruned) == 0.5
    assert np.count_nonzero(keras.ops.convert_to_numpy(pruned.layers[0].layer.other)) == 9
    with pytest.warns(UserWarning, match=r"matrix'\] are pruned.*`PruningOptimizer\(optimizer, allow="):
        kc.prune_now(model, 0.5)


def test_a_custom_layer_that_does_not_say_what_to_prune_stays_dense_with_a_warning():
    model = keras.Sequential([keras.Input((4,)), Scaled(name="mine"), layers.Dense(2)])
    with pytest.warns(UserWarning, match="'mine'.*get_prunable_weights"):
        pruned = kc.prune_low_magnitude(model)
    assert isinstance(pruned.layers[0], Scaled)


class OnlyDense:
    """A pruning policy."""

    def allow_pruning(self, layer):
        return isinstance(layer, layers.Dense)

    def ensure_model_supports_pruning(self, model):
        if len(model.layers) < 3:
            raise ValueError("too small")


def test_a_pruning_policy_chooses_the_layers():
    pruned = kc.prune_low_magnitude(small_net(), pruning_policy=OnlyDense())
    assert [wrapper.name for wrapper in wrappers_in(pruned)] == ["prune_low_magnitude_head"]
    with pytest.raises(ValueError, match="too small"):
        kc.prune_low_magnitude(keras.Sequential([keras.Input((2,)), layers.Dense(2)]), pruning_policy=OnlyDense())
    with pytest.raises(TypeError, match=r"among the layers of a model\. Received: list"):
        kc.prune_low_magnitude([layers.Dense(2)], pruning_policy=OnlyDense())


def test_layers_and_lists_of_layers_are_wrapped():
    wrapped = kc.prune_low_magnitude(layers.Dense(2, name="one"), kc.ConstantSparsity(0.5, 0))
    assert wrapped.name == "prune_low_magnitude_one"
    assert [type(each).__name__ for each in kc.prune_low_magnitude([layers.Dense(2), layers.ReLU()])] == [
        "PruneLowMagnitude",
        "ReLU",
    ]


def test_a_subclassed_model_is_pruned_by_wrapping_its_layers():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = kc.prune_low_magnitude(layers.Dense(4), kc.ConstantSparsity(0.5, 0))

        def call(self, inputs, training=None):
            return self.head(keras.ops.reshape(inputs, (-1, 72)), training=training)

    net = compile_(Net())
    fit(net)
    assert kc.sparsity(net) == 0.5


# --- summaries ---


@pytest.mark.filterwarnings("ignore")
def test_summaries_write_sparsity_and_threshold_of_every_kernel(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pruned = compile_(kc.prune_low_magnitude(small_net(), kc.ConstantSparsity(0.5, 0)))
    fit(pruned, epochs=2, callbacks=[kc.PruningSummaries(tmp_path)])
    events = EventAccumulator(str(tmp_path / "metrics"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    paths = [weight.path for weight in pruning.prunable_weights(pruned)]
    assert tags == {"sparsity"} | {f"{path}/{what}" for path in paths for what in ("sparsity", "threshold")}
    import tensorflow as tf

    last = events.Tensors("sparsity")[-1]
    assert last.step == 16
    assert float(tf.make_ndarray(last.tensor_proto)) == pytest.approx(kc.sparsity(pruned))


# --- bad input ---


def with_nan():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False)])
    model.set_weights([np.full((2, 2), np.nan)])
    return model


def rank_of_3():
    return keras.Sequential([keras.Input((8, 4)), layers.Conv1D(2, 3)])


@keras.saving.register_keras_serializable("tests")
class Holder(layers.Layer):
    """A layer that wraps what it holds."""

    def build(self, input_shape):
        self.held = kc.PruneLowMagnitude(layers.Dense(2), kc.ConstantSparsity(0.5, 0), name="inner")
        self.held.build(input_shape)

    def call(self, inputs):
        return self.held(inputs)


def with_a_wrapper_inside():
    return keras.Sequential([keras.Input((4,)), Holder()])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kc.prune_low_magnitude(small_net(), 0.6), TypeError, "ConstantSparsity"),
        (lambda: kc.ConstantSparsity(60, 0), ValueError, "range"),
        (lambda: kc.prune_low_magnitude(small_net(), scope="model"), ValueError, "Received: scope='model'"),
        (lambda: kc.prune_low_magnitude(small_net(), block_size=(2, 2)), ValueError, "2-dimensional"),
        (lambda: kc.prune_low_magnitude(layers.Dense(2), block_size=2), ValueError, "two integers"),
        (lambda: kc.prune_low_magnitude(layers.Dense(2), block_size=(0, 1)), ValueError, "positive"),
        (
            lambda: kc.prune_low_magnitude(layers.Dense(2), block_size=(4, 1), sparsity_m_by_n=(2, 4)),
            ValueError,
            "Leave one out",
        ),
        (lambda: kc.prune_low_magnitude(layers.Dense(2), block_pooling_type="SUM"), ValueError, "AVG"),
        (lambda: kc.prune_low_magnitude(layers.Dense(2), sparsity_m_by_n=(4, 2)), ValueError, "0 < m < n"),
        (
            lambda: kc.prune_low_magnitude(layers.Dense(2), sparsity_m_by_n=(2, 4), scope="global"),
            ValueError,
            "scope='layer'",
        ),
        (
            lambda: kc.prune_low_magnitude(rank_of_3(), sparsity_m_by_n=(2, 4)),
            ValueError,
            r"needs 2- or 4-dimensional kernels.*of shape \(3, 4, 2\)",
        ),
        (lambda: kc.prune_low_magnitude(layers.ReLU()), ValueError, "get_prunable_weights"),
        (
            lambda: kc.prune_low_magnitude(keras.Sequential([keras.Input((2,)), layers.ReLU()])),
            ValueError,
            "no layer to prune",
        ),
        (lambda: kc.prune_low_magnitude("resnet"), ValueError, "Received: layer='resnet'"),
        (lambda: kc.strip_pruning(layers.Dense(2)), ValueError, "needs a Keras 3 model"),
        (lambda: kc.strip_pruning(with_a_wrapper_inside()), ValueError, r"hold wrappers of their own.*\['.*inner'\]"),
        (lambda: kc.prune_now(layers.Dense(2), 0.5), ValueError, "needs a Keras 3 model"),
        (lambda: kc.prune_now(small_net(), 60), ValueError, "Received: sparsity=60.*divide it by 100"),
        (lambda: kc.prune_now(small_net(), 0.5, scope="all"), ValueError, "Received: scope='all'"),
        (lambda: kc.prune_now(kc.prune_low_magnitude(small_net()), 0.5), ValueError, "Use `strip_pruning` first"),
        (lambda: kc.prune_now(keras.Sequential([keras.Input((2,))]), 0.5), ValueError, "no prunable kernel"),
        (lambda: kc.prune_now(with_nan(), 0.5), ValueError, "kernel' holds NaN or infinite weights"),
        (lambda: kc.prune_now(small_net(), 0.5, block_size=(2, 2)), ValueError, "Leave it out: `allow="),
        (lambda: kc.prune_now(small_net(), 0.5, allow=["head"]), TypeError, "`allow` must be a function"),
        (lambda: kc.prune_now(small_net(), 0.5, allow=lambda v: v.name == "no"), ValueError, "passes `allow`"),
        (lambda: kc.sparsity(layers.ReLU()), ValueError, "no prunable kernel"),
        (lambda: kc.PruningSummaries(""), ValueError, "non-empty"),
        (lambda: kc.prune_low_magnitude(small_net(), schedule=None), TypeError, "schedule"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_subclassed_model_gets_an_error_that_says_to_wrap_its_layers():
    class Net(keras.Model):
        pass

    for model in (Net(), keras.Sequential([keras.Input((6, 6, 2)), Net()])):
        with pytest.raises(ValueError, match="Wrap its layers"):
            kc.prune_low_magnitude(model)


def test_a_keras_2_layer_gets_an_error_that_names_the_way_out(tfmot):
    import tf_keras

    with pytest.raises(ValueError, match="Keras 2"):
        kc.prune_low_magnitude(tf_keras.layers.Dense(2))


def test_a_schedule_that_returns_percent_is_refused_when_it_is_due():
    pruned = compile_(kc.prune_low_magnitude(small_net(), lambda step: (True, 60)))
    with pytest.raises(ValueError, match="divide them by 100"):
        fit(pruned)


def test_pruning_at_once_takes_what_is_allowed_in_blocks():
    small = kc.prune_now(
        small_net(), 0.5, block_size=(2, 1), allow=lambda variable: variable.path.endswith("head/kernel")
    )
    zero = {
        layer.name: keras.ops.convert_to_numpy(layer.kernel) == 0 for layer in small.layers if hasattr(layer, "kernel")
    }
    assert {name: each.mean() for name, each in zero.items()} == {"conv": 0, "depthwise": 0, "head": 0.5}
    np.testing.assert_array_equal(zero["head"][::2], zero["head"][1::2])


class Nameless(layers.Layer):
    """Takes no name, so that Keras' config of it makes a layer of another one."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel)

    def get_prunable_weights(self):
        return [self.kernel]


def test_what_is_allowed_is_asked_of_the_model_itself_whose_layers_names_a_copy_keeps():
    head = keras.Sequential([Nameless(4), layers.Dense(4, name="logits")], name="head")
    model = keras.Sequential([layers.Dense(5, name="first"), head], name="net")
    model(np.ones((1, 3)))  # a model of which the inputs are not known puts its name in front of the paths of its parts
    asked = []
    small = kc.prune_now(model, 0.5, allow=lambda each: asked.append(each.path) or "head" not in each.path)
    assert asked == [each.path for each in model.weights]
    assert [layer.name for layer in small.layers[1].layers] == [layer.name for layer in head.layers]
    zeros = [np.mean(keras.ops.convert_to_numpy(each) == 0) for each in small.weights if len(each.shape) == 2]
    assert zeros == [pytest.approx(0.5, abs=0.1), 0, 0]


@pytest.mark.once("jax")
@pytest.mark.parametrize("begin", [0, 4])
def test_a_schedule_of_wrappers_that_would_let_zeros_come_back_gets_a_warning(begin):
    small = kc.prune_now(keras.Sequential([keras.Input((8,)), layers.Dense(4)]), 0.75)

    def fit(schedule):
        pruned = kc.prune_low_magnitude(small, schedule)
        pruned.compile("sgd", "mse")
        pruned.fit(np.ones((16, 8)), np.ones((16, 4)), batch_size=4, verbose=0, callbacks=[kc.UpdatePruningStep()])

    begins = "begins at a sparsity of 0.5" if begin == 0 else "is not due at step 0"
    with pytest.warns(UserWarning, match=rf"75.0% of the weights to prune are zero already.*{begins}"):
        fit(kc.ConstantSparsity(0.5, begin))
    fit(kc.ConstantSparsity(0.75, 0))


@pytest.mark.parametrize("make", [kc.prune_low_magnitude, lambda model: kc.prune_now(model, 0.5), kc.strip_pruning])
def test_a_frozen_backbone_stays_frozen_in_a_copy_and_thaws_there(make):
    backbone = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="sequential")
    inputs = keras.Input((4,))
    functional = keras.Model(inputs, layers.Dense(3)(inputs), name="functional")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(layers.add([backbone(inputs), functional(inputs)])))
    backbone.trainable = functional.trainable = False
    copy = make(model)
    assert len(copy.trainable_weights) == len(model.trainable_weights) == 2
    for name in ("sequential", "functional"):
        assert not copy.get_layer(name).trainable
        copy.get_layer(name).trainable = True
    assert len(copy.trainable_weights) == 6


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
def test_kernels_that_are_no_weights_of_their_own_are_refused():
    with_lora = keras.Sequential([keras.Input((8,)), layers.Dense(16)])
    with_lora.layers[0].enable_lora(2)
    for act in (lambda model: kc.prune_now(model, 0.5), kc.prune_low_magnitude, kc.sparsity):
        with pytest.raises(ValueError, match=r"LoRA.*Prune the model before"):
            act(with_lora)
    packed = kc.prune_now(keras.Sequential([keras.Input((8,)), layers.Dense(16)]), 0.5)
    packed.quantize("int4")
    for act in (lambda model: kc.prune_now(model, 0.5), kc.sparsity):
        with pytest.raises(ValueError, match=r"quantized to int4\. Prune first"):
            act(packed)
    stored = kc.prune_now(keras.Sequential([keras.Input((8,)), layers.Dense(16)]), 0.5)
    stored.quantize("int8")
    assert kc.sparsity(stored) == 0.5


def test_a_wrapped_layer_adds_its_losses_once():
    images, targets = np.ones((4, 8), "float32"), np.zeros((4, 4), "float32")
    dense = keras.Sequential([keras.Input((8,)), layers.Dense(4, activity_regularizer="l2", kernel_regularizer="l2")])
    pruned = kc.prune_low_magnitude(dense, kc.ConstantSparsity(0.0, 0))
    losses = []
    for model, drivers in ((dense, []), (pruned, [kc.UpdatePruningStep()])):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        losses.append(model.fit(images, targets, verbose=0, epochs=2, callbacks=drivers).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("carrier", ["wrapper", "optimizer"])
def test_a_training_that_ends_before_its_schedule_begins_is_a_warning(carrier):
    schedule, optimizer, drivers = kc.ConstantSparsity(0.5, 1000), "sgd", []
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    if carrier == "wrapper":
        model, drivers = kc.prune_low_magnitude(model, schedule), [kc.UpdatePruningStep()]
    else:
        optimizer = kc.PruningOptimizer("sgd", schedule)
    model.compile(optimizer, "mse")
    with pytest.warns(UserWarning, match="ended after 1 updates, and the schedule begins at 1000.*not an epoch"):
        model.fit(np.ones((4, 8)), np.ones((4, 4)), verbose=0, callbacks=drivers)
