"""Callbacks: one clock for masks, magnitude and summaries; loops of all kinds; what is driven is in the model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kerascompress as kc
from kerascompress.callbacks import StepCallback
from kerascompress.pruning import pruning_vars

OPTIMA = {0.0: 14, 0.2: 12, 0.4: 8, 0.6: 4}


def net() -> keras.Model:
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(10, name="head")])


def data(count=32):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype("uint8"), rng.integers(0, 10, count)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Seen(StepCallback):
    """The step, the magnitude and the sparsity of the masks, when training begins and after every batch."""

    def __init__(self, augment):
        super().__init__()
        self.augment, self.seen = augment, []

    def on_step(self, step):
        masks = [keras.ops.convert_to_numpy(mask.value) for _, mask, _ in pruning_vars(self.model)]
        sparsity = 1 - np.mean([mask.mean() for mask in masks]) if masks else 0.0
        self.seen.append((step, float(keras.ops.convert_to_numpy(self.augment.magnitude)), round(float(sparsity), 3)))


def trainer(carrier, network, schedule, augment):
    """The model to fit, compiled anew, and the callbacks that prune it."""
    optimizer, callbacks = keras.optimizers.SGD(0.001, momentum=0.9), [kc.UpdatePruningStep()]
    if carrier == "optimizer":
        optimizer, callbacks = kc.PruningOptimizer(optimizer, schedule), []
    model = keras.Sequential([keras.Input((8, 8, 3)), augment, layers.Rescaling(1 / 255), network])
    model.compile(optimizer, LOSS)
    model.optimizer.build(model.trainable_variables)
    return model, callbacks


@pytest.mark.quick
@pytest.mark.parametrize("carrier", ["wrapper", "optimizer"])
def test_the_magnitude_is_that_of_the_sparsity_which_the_masks_have(carrier):
    schedule = kc.PolynomialDecay(0.2, 0.6, begin_step=2, end_step=6, frequency=3, power=1)
    augment, network = kc.RandAugment(14, seed=0), net()
    if carrier == "wrapper":
        network = kc.prune_low_magnitude(network, schedule)
    model, callbacks = trainer(carrier, network, schedule, augment)
    seen = Seen(augment)
    weaken = kc.MagnitudeScheduler(augment, kc.SparsityLinkedMagnitude(schedule, OPTIMA))
    model.fit(*data(), batch_size=4, shuffle=False, verbose=0, callbacks=[*callbacks, weaken, seen])
    # dense before step 2; updates at 2, 5 (0.2 + 0.4 * 3 / 4 = 0.5) and at the end, 6
    expected = [(14, 0.0)] * 2 + [(12, 0.2)] * 3 + [(6, 0.5)] + [(4, 0.6)] * 3
    assert [step for step, *_ in seen.seen] == list(range(9))
    for (_, magnitude, sparsity), (expected_magnitude, expected_sparsity) in zip(seen.seen, expected, strict=True):
        assert magnitude == pytest.approx(expected_magnitude, abs=1e-4)
        assert sparsity == pytest.approx(expected_sparsity, abs=0.001)


def test_a_constant_sparsity_that_has_not_begun_has_the_magnitude_of_a_dense_network():
    weaken = kc.SparsityLinkedMagnitude(kc.ConstantSparsity(0.6, begin_step=10, frequency=5), OPTIMA)
    assert [weaken(step) for step in (0, 9, 10, 12)] == [14, 14, 4, 4]
    assert weaken(3) == 14  # also when asked for an earlier step again


def test_after_a_second_compile_masks_and_magnitude_still_follow_one_step():
    schedule = kc.PolynomialDecay(0.0, 0.6, begin_step=0, end_step=8, frequency=1)
    augment = kc.RandAugment(14, seed=0)
    network = kc.prune_low_magnitude(net(), schedule)
    for step in (0, 8):
        model, callbacks = trainer("wrapper", network, schedule, augment)
        seen = Seen(augment)
        weaken = kc.MagnitudeScheduler(augment, kc.SparsityLinkedMagnitude(schedule, OPTIMA))
        model.fit(*data(), batch_size=4, shuffle=False, verbose=0, callbacks=[*callbacks, weaken, seen])
        assert seen.seen[0][0] == step
    assert all(each[1:] == pytest.approx((4, 0.6), abs=1e-4) for each in seen.seen)


@pytest.mark.once("jax")
def test_with_a_new_pruning_optimizer_masks_and_magnitude_both_begin_anew():
    network = net()
    for initial, final in ((0.0, 0.4), (0.4, 0.6)):
        schedule = kc.PolynomialDecay(initial, final, begin_step=0, end_step=4, frequency=1)
        augment = kc.RandAugment(14, seed=0)
        model, _ = trainer("optimizer", network, schedule, augment)
        seen = Seen(augment)
        weaken = kc.MagnitudeScheduler(augment, kc.SparsityLinkedMagnitude(schedule, OPTIMA))
        model.fit(*data(), batch_size=4, shuffle=False, verbose=0, callbacks=[weaken, seen])
        assert seen.seen[0] == pytest.approx((0, OPTIMA[initial], initial), abs=1e-4)
        assert seen.seen[-1] == pytest.approx((8, OPTIMA[final], final), abs=1e-4)


class Steps(StepCallback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_step(self, step):
        self.seen.append(step)


@pytest.mark.quick
@pytest.mark.parametrize("hooks", ["begin", "end", "both", "both, numbered"])
def test_a_loop_of_ones_own_is_counted_whichever_hooks_it_calls(hooks):
    steps = Steps()
    steps.set_model(net())
    steps.on_train_begin()
    for _ in range(2):
        steps.on_epoch_begin(epoch=-1)
        for batch in range(3):
            number = batch if "numbered" in hooks else -1
            if hooks != "end":
                steps.on_train_batch_begin(batch=number)
            if hooks != "begin":
                steps.on_train_batch_end(batch=number)
        steps.on_epoch_end(batch=-1)
    assert steps.seen == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.tensorflow_only
def test_tfmots_documented_training_loop_prunes():
    import tensorflow as tf

    model = kc.prune_low_magnitude(net(), kc.ConstantSparsity(0.5, 0, frequency=1))
    model.optimizer = keras.optimizers.SGD(0.01)
    step_callback = kc.UpdatePruningStep()
    step_callback.set_model(model)
    images, labels = data()
    unused_arg = -1
    step_callback.on_train_begin()
    for _ in range(2):
        for start in range(0, 32, 8):
            step_callback.on_train_batch_begin(batch=unused_arg)
            with tf.GradientTape() as tape:
                loss = LOSS(labels[start : start + 8], model(images[start : start + 8] / 255.0, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        step_callback.on_epoch_end(batch=unused_arg)
        assert np.mean(model.get_layer("prune_low_magnitude_head").layer.get_weights()[0] == 0) == 0.5
    assert int(model.get_layer("prune_low_magnitude_head").pruning_step) == 8


@pytest.mark.once("jax")
def test_an_augmentation_that_the_model_does_not_contain_is_refused_if_it_has_another():
    augment = kc.RandAugment(14)
    pruned = kc.prune_low_magnitude(keras.Sequential([keras.Input((8, 8, 3)), augment, net()]))
    pruned.compile("sgd", LOSS)
    stale = kc.MagnitudeScheduler(augment, lambda step: 4)
    with pytest.raises(ValueError, match=r"is not in the model .* has others: \['rand_augment'\].*Pass that"):
        pruned.fit(*data(), verbose=0, callbacks=[kc.UpdatePruningStep(), stale])
    copied = next(layer for layer in pruned.layers if isinstance(layer, kc.RandAugment))
    weaken = kc.MagnitudeScheduler(copied, lambda step: 4)
    pruned.fit(*data(), verbose=0, callbacks=[kc.UpdatePruningStep(), weaken])
    assert float(copied.magnitude) == 4


@pytest.mark.once("jax")
def test_an_augmentation_outside_of_any_model_may_be_driven_and_one_in_a_distiller():
    augment, model = kc.RandAugment(14), net()
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match=r"Nothing is augmented yet by 'rand_augment.*Put it into the model"):
        model.fit(*data(), verbose=0, callbacks=[kc.MagnitudeScheduler(augment, lambda step: 9)])
    augment(data()[0])
    with pytest.warns(UserWarning, match="pass `training=True` where you call it yourself"):
        model.fit(*data(), verbose=0, callbacks=[kc.MagnitudeScheduler(augment, lambda step: 9)])
    augment(data()[0], training=True)
    model.fit(*data(), verbose=0, callbacks=[kc.MagnitudeScheduler(augment, lambda step: 4)])
    assert float(augment.magnitude) == 4
    distiller = kc.Distiller(net(), net(), augment=keras.Sequential([augment]), num_candidates=1)
    distiller.compile("sgd")
    distiller.fit(*data(), verbose=0, callbacks=[kc.MagnitudeScheduler(augment, lambda step: 9)])
    assert float(augment.magnitude) == 9


@pytest.mark.filterwarnings("ignore")
def test_summaries_show_the_masks_of_an_optimizer_at_its_step(tmp_path):
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    network = net()
    magnitudes = np.abs(network.get_weights()[0])
    model, _ = trainer("optimizer", network, kc.ConstantSparsity(0.5, 0), kc.RandAugment(0))
    model.fit(*data(), batch_size=8, verbose=0, callbacks=[kc.PruningSummaries(tmp_path)])
    events = EventAccumulator(str(tmp_path / "metrics"))
    events.Reload()
    ((kernel, _, _),) = pruning_vars(model)
    threshold = np.sort(magnitudes, axis=None)[magnitudes.size // 2]  # the least that stays
    for name, expected in (
        ("sparsity", 0.5),
        (f"{kernel.path}/sparsity", 0.5),
        (f"{kernel.path}/threshold", threshold),
    ):
        (event,) = events.Tensors(name)
        assert event.step == 4
        assert float(tf.make_ndarray(event.tensor_proto)) == pytest.approx(expected)


@pytest.mark.once
def test_a_model_without_pruned_layers_that_is_to_be_driven_is_a_warning():
    model = net()
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="model 'sequential' has no pruned layer to drive"):
        model.fit(*data(), verbose=0, callbacks=[kc.UpdatePruningStep()])


@pytest.mark.tensorflow_only
def test_a_checkpoint_of_tensorflow_between_two_batches_is_sparse_and_restores_masks_and_step(tmp_path):
    import tensorflow as tf

    def pruned():
        model = kc.prune_low_magnitude(net(), kc.ConstantSparsity(0.5, 0, frequency=2))
        model.compile(keras.optimizers.SGD(0.001, momentum=0.9), LOSS)
        return model

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                tf.train.Checkpoint(model=self.model).write(str(tmp_path / "between"))
                self.kept = [v.numpy() for v in self.model.variables]

    save, model, restored = Save(), pruned(), pruned()
    model.fit(*data(), batch_size=8, verbose=0, callbacks=[kc.UpdatePruningStep(), save])
    tf.train.Checkpoint(model=restored).restore(str(tmp_path / "between"))
    for variable, kept in zip(restored.variables, save.kept, strict=True):
        np.testing.assert_array_equal(variable.numpy(), kept)
    assert int(restored.layers[1].pruning_step) == 2
    assert np.mean(restored.layers[1].layer.kernel.numpy() == 0) == 0.5


@pytest.mark.once("jax")
def test_layers_with_two_kernels_have_masks_of_two_paths(tmp_path):
    model = keras.Sequential([keras.Input((6, 3)), layers.Bidirectional(layers.LSTM(2)), layers.Dense(1)])
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    paths = [mask.path for _, mask, _ in pruning_vars(pruned)]
    assert len(set(paths)) == len(paths) == 5
    pruned.compile("sgd", "mse")
    pruned.fit(np.ones((8, 6, 3)), np.ones((8, 1)), verbose=0, callbacks=[kc.UpdatePruningStep()])
    pruned.get_state_tree()
    pruned.save_weights(tmp_path / "pruned.weights.h5")
    other = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, 0))
    other.load_weights(tmp_path / "pruned.weights.h5")
    for ours, theirs in zip(other.get_weights(), pruned.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_polynomial_decay_of_no_length_is_one_update_at_the_final_sparsity():
    schedule = kc.PolynomialDecay(0.0, 0.5, begin_step=3, end_step=3)
    seen = [kc.schedules.evaluate(schedule, step) for step in range(6)]
    assert [due for due, _ in seen] == [False, False, False, True, False, False]
    assert seen[3][1] == 0.5
    assert all(np.isfinite(sparsity) for _, sparsity in seen)


def test_weights_that_have_diverged_are_named_when_masks_are_due():
    model = kc.prune_low_magnitude(net(), kc.ConstantSparsity(0.5, 0, frequency=1))
    model.compile(keras.optimizers.SGD(1e38), LOSS)
    with pytest.raises(ValueError, match="head/kernel' holds NaN or infinite weights: training has diverged"):
        model.fit(*data(), batch_size=8, verbose=0, callbacks=[kc.UpdatePruningStep()])


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("size", ["known", "unknown"])
def test_an_execution_that_an_epoch_cuts_short_counts_the_steps_that_it_has(size):
    pruned = kc.prune_low_magnitude(net(), kc.ConstantSparsity(0.5, 0, frequency=5))
    pruned.compile("sgd", LOSS, steps_per_execution=1 if keras.backend.backend() == "torch" else 4)
    batches, steps = tf.data.Dataset.from_tensor_slices(data(24)).batch(4), Steps()
    if size == "unknown":
        batches = batches.filter(lambda *_: True)
    augment = kc.RandAugment(0, seed=0)
    augment(data()[0], training=True)
    weaken = kc.MagnitudeScheduler(augment, lambda step: 14 if step <= 18 else 4)
    pruned.fit(batches, epochs=3, verbose=0, shuffle=False, callbacks=[kc.UpdatePruningStep(), weaken, steps])
    assert float(keras.ops.convert_to_numpy(augment.magnitude)) == 14
    (wrapper,) = (layer for layer in pruned.layers if isinstance(layer, kc.PruneLowMagnitude))
    assert wrapper.stored_step() == int(keras.ops.convert_to_numpy(pruned.optimizer.iterations)) == 18
    if size == "known" and keras.backend.backend() != "torch":
        assert steps.seen == [0, 4, 6, 10, 12, 16, 18]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_magnitude_assigned_after_the_last_batch_of_data_of_unknown_size_stays():
    augment = kc.RandAugment(14, seed=0)
    model = keras.Sequential([keras.Input((8, 8, 3)), augment, net()])
    model.compile("sgd", LOSS)
    batches = tf.data.Dataset.from_tensor_slices(data(12)).batch(4).filter(lambda *_: True)
    weaken = kc.MagnitudeScheduler(augment, lambda step: 14 if step < 3 else 4)
    steps = Steps()
    model.fit(batches, verbose=0, shuffle=False, callbacks=[weaken, steps])
    assert float(keras.ops.convert_to_numpy(augment.magnitude)) == 4
    assert steps.seen == [0, 1, 2, 3]  # although Keras begins a fourth batch


def test_loaded_layers_that_stand_at_different_steps_go_on_from_their_own(tmp_path):
    schedule = kc.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=10, frequency=1, power=1)

    def fit(model, batches):
        model.compile("sgd", "mse")
        x, y = np.ones((4 * batches, 8)), np.ones((4 * batches, 2))
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[kc.UpdatePruningStep()])
        return [layer.stored_step() for layer in model.layers]

    back = kc.PruneLowMagnitude(layers.Dense(6, name="back"), schedule)
    fit(keras.Sequential([keras.Input((8,)), back, kc.PruneLowMagnitude(layers.Dense(2), schedule)]), 6)
    model = keras.Sequential([keras.Input((8,)), back, kc.PruneLowMagnitude(layers.Dense(2, name="head"), schedule)])
    assert fit(model, 2) == [8, 2]
    model.save(tmp_path / "net.keras")
    assert fit(keras.saving.load_model(tmp_path / "net.keras"), 1) == [9, 3]


class Restore(keras.callbacks.Callback):
    """Sets the updates done, as `BackupAndRestore` does."""

    def on_train_begin(self, logs=None):
        self.model.optimizer.iterations.assign(20)


def test_the_magnitude_is_that_of_a_restored_step_before_the_first_batch():
    augment, seen = kc.RandAugment(0, seed=0), []
    augment(data()[0], training=True)
    model = keras.Sequential([keras.Input((8, 8, 3)), net()])
    model.compile("sgd", LOSS)
    weaken = kc.MagnitudeScheduler(augment, lambda step: 14 if step < 20 else 4)
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(float(keras.ops.convert_to_numpy(augment.magnitude)))
    )
    model.fit(*data(16), batch_size=8, verbose=0, callbacks=[weaken, Restore(), look])
    assert seen == [4, 4]
