"""AdaptiveMagnitude: the steps of a scripted signal, the accuracies that it finds, what a killed training resumes."""

import keras
import numpy as np
import pytest
from keras import layers

import kerascompress as kc

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(count=32):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype("uint8"), rng.integers(0, 10, count)


def live(magnitude):
    """What compiles in no time; in no time at all outside of the model, where the signal is the same."""
    augment = kc.RandAugment(magnitude, num_ops=1, ops=["Solarize"], seed=0)
    augment(np.zeros((1, 8, 8, 3), "uint8"), training=True)  # as in `tf.data`
    return augment


def trainer(augment, network=None, **compiled):
    network = network or [layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *([augment] if augment else []), *network])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.001), "loss": LOSS, "metrics": ["accuracy"]} | compiled)
    return model


def fit(model, callbacks, epochs, **given):
    images, labels = data()
    given = {"x": images, "y": labels, "validation_data": (images[:8], labels[:8])} | given
    return model.fit(batch_size=8, shuffle=False, verbose=0, epochs=epochs, callbacks=callbacks, **given).history


def scripted(*values):
    values = iter(values)
    return lambda logs: next(values)


def magnitude(augment):
    return float(keras.ops.convert_to_numpy(augment.magnitude))


# --- the rule ---


@pytest.mark.quick
def test_a_step_up_above_the_set_point_down_below_it_and_none_on_it():
    augment = live(4)
    adaptive = kc.AdaptiveMagnitude(augment, scripted(0.7, 0.5, 0.61, 0.6, 0.2), 0.6, speed=1.5)
    history = fit(trainer(augment), [adaptive], 5)
    assert history["magnitude"] == [4, 5.5, 4, 5.5, 5.5]  # with which each epoch was trained
    assert magnitude(augment) == 4


@pytest.mark.once("jax")
def test_the_upper_limit_is_30_and_the_lower_one_is_one_step_below_0():
    augment = live(29)
    adaptive = kc.AdaptiveMagnitude(augment, scripted(1, 1, 0), 0.5, speed=0.75)
    assert fit(trainer(None), [adaptive], 3)["magnitude"] == [29, 29.75, 30]
    assert magnitude(augment) == 29.25
    augment.magnitude.assign(0.3)
    adaptive = kc.AdaptiveMagnitude(augment, scripted(0, 0, 0, 0, 0, 1), 0.5, speed=0.1)
    assert fit(trainer(None), [adaptive], 6)["magnitude"] == [0.3, 0.2, 0.1, 0, -0.1, -0.1]  # 0, not just below: off
    assert magnitude(augment) == 0


def test_between_the_epochs_of_its_frequency_it_stays():
    augment = live(0)
    history = fit(trainer(None), [kc.AdaptiveMagnitude(augment, scripted(1, 1), 0.5, frequency=2)], 5)
    assert history["magnitude"] == [0, 0, 0.5, 0.5, 1]


def test_the_gap_is_training_minus_held_out_accuracy_around_10_percent():
    augment = live(9)
    adaptive = kc.AdaptiveMagnitude(augment)
    history = fit(trainer(None), [adaptive], 5)
    gaps = np.array(history["accuracy"]) - history["val_accuracy"]
    np.testing.assert_array_equal(np.diff(history["magnitude"]), 0.5 * np.sign(gaps - 0.1)[:-1])
    augment.magnitude.assign(9)
    for training, moved in ((0.61, 9.5), (0.59, 9.0), (0.59, 8.5)):
        adaptive.on_epoch_end(0, {"accuracy": training, "val_accuracy": 0.5})
        assert magnitude(augment) == moved


def test_the_accuracy_is_that_of_the_augmented_training_images():
    augment = live(9)
    history = fit(trainer(augment), [kc.AdaptiveMagnitude(augment, "accuracy", 0.1)], 5, validation_data=None)
    np.testing.assert_array_equal(
        np.diff(history["magnitude"]), 0.5 * np.sign(np.array(history["accuracy"]) - 0.1)[:-1]
    )


@pytest.mark.parametrize("ops", [None, ["Solarize", "AutoContrast", "Equalize"]])
def test_off_is_the_identity_and_zero_is_not(ops):
    images = data()[0]
    augment = kc.RandAugment(0, ops=ops, seed=0)
    augment.magnitude.assign(-0.5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(augment(images, training=True)), images)
    augment.magnitude.assign(0.0)
    assert not np.array_equal(keras.ops.convert_to_numpy(augment(images, training=True)), images)
    per_image = keras.ops.convert_to_numpy(augment(images, magnitude=np.float32([-1, 30] * 16), training=True))
    np.testing.assert_array_equal(per_image[::2], images[::2])
    assert not np.array_equal(per_image[1::2], images[1::2])


@pytest.mark.tensorflow_only
def test_keras_cvs_layer_is_off_below_zero_too():
    from kerascompress import keras_cv

    augment = keras_cv.RandAugment((0, 255), augmentations_per_image=2, magnitude=0)
    images = data()[0].astype("float32")
    augment.magnitude.assign(-0.5)
    np.testing.assert_array_equal(augment(images, training=True), images)
    augment.magnitude.assign(20.0)
    assert not np.array_equal(augment(images, training=True), images)
    assert keras_cv.RandAugment.from_config(augment.get_config()).get_config() == augment.get_config()


# --- which accuracy ---


@pytest.mark.once("jax")
@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ([keras.metrics.SparseCategoricalAccuracy(name="top1"), "sparse_categorical_crossentropy"], "top1"),
        ([keras.metrics.SparseTopKCategoricalAccuracy(3, name="top_3_accuracy"), "acc"], "acc"),
        ([keras.metrics.sparse_categorical_accuracy], "sparse_categorical_accuracy"),
        (["SparseCategoricalAccuracy"], "SparseCategoricalAccuracy"),
    ],
)
def test_an_accuracy_of_any_name_is_found(metrics, name):
    augment = live(0)
    model = trainer(None, metrics=metrics)
    history = fit(model, [kc.AdaptiveMagnitude(augment, "accuracy", -0.5)], 2)
    assert history["magnitude"] == [0, 0.5]
    assert "accuracy" not in history
    assert f"val_{name}" in history


@pytest.mark.once("jax")
@pytest.mark.parametrize(
    ("labels", "metrics"), [("integers", None), ("a column", ["sparse_categorical_crossentropy"]), ("one-hot", None)]
)
def test_a_model_without_an_accuracy_gets_one(labels, metrics):
    images, integers = data()
    given = {"integers": integers, "a column": integers[:, None], "one-hot": np.eye(10)[integers]}[labels]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True) if labels == "one-hot" else LOSS
    augment = live(0)
    model = trainer(None, loss=loss, metrics=metrics, optimizer=keras.optimizers.SGD(0.0))
    fit(model, [], 1, y=given, validation_data=(images, given))  # what is compiled without it
    for _ in range(2):
        history = fit(model, [kc.AdaptiveMagnitude(augment)], 1, y=given, validation_data=(images, given))
    predicted = model.predict(images, verbose=0).argmax(axis=1)
    assert history["val_accuracy"] == pytest.approx([np.mean(predicted == integers)])
    assert 0 <= history["accuracy"][0] <= 1
    assert not [metric for metric in model.metrics if metric.name == "accuracy"]  # it is gone with the training


def test_a_look_at_a_model_with_the_callback_leaves_no_metric_in_it():
    augment = kc.RandAugment(4, seed=0)
    model = trainer(augment, metrics=[])
    model.evaluate(*data(), verbose=0, callbacks=[kc.AdaptiveMagnitude(augment)])
    model.predict(data()[0], verbose=0, callbacks=[kc.AdaptiveMagnitude(augment)])
    assert isinstance(model.evaluate(*data(), verbose=0), float)  # the loss alone


@pytest.mark.once("jax")
def test_weights_of_classes_are_not_taken_for_a_gap():
    images, labels = data()
    model = trainer(None, metrics=[], weighted_metrics=["accuracy"], optimizer=keras.optimizers.SGD(0.0))
    weights = {i: 1.0 + 9 * (i == model.predict(images, verbose=0).argmax(axis=1)[0]) for i in range(10)}
    history = fit(model, [kc.AdaptiveMagnitude(live(9))], 1, class_weight=weights, validation_data=(images, labels))
    assert history["unweighted_accuracy"] == pytest.approx(history["val_unweighted_accuracy"])
    assert history["accuracy"] != pytest.approx(history["val_accuracy"])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the step is TensorFlow's")
def test_an_accuracy_that_a_step_of_ones_own_does_not_measure_is_an_error():
    import tensorflow as tf

    class Own(keras.Model):
        def train_step(self, batch):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=batch[1], y_pred=self(batch[0], training=True))
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
            )
            return self.get_metrics_result()

    layer = trainer(None)
    model = Own(layer.inputs, layer.outputs)
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"Received: nan .*compute_metrics"):
        fit(model, [kc.AdaptiveMagnitude(live(9))], 2)


@pytest.mark.once("jax")
def test_a_list_of_callbacks_that_has_served_is_refused():
    model = trainer(None, metrics=[])
    callbacks = keras.callbacks.CallbackList([kc.AdaptiveMagnitude(live(9))], add_history=True, model=model)
    fit(model, callbacks, 1)
    with pytest.raises(ValueError, match="Pass `callbacks` as a list"):
        fit(model, callbacks, 1)


def test_what_an_interrupted_training_has_left_is_gone_with_the_next():
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    augment = live(0)
    model = trainer(augment, metrics=None)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [kc.AdaptiveMagnitude(augment), Interrupt()], 1)
    history = fit(model, [kc.AdaptiveMagnitude(augment)], 1)
    assert "accuracy" in history
    assert isinstance(model.evaluate(*data(), verbose=0), float)  # the loss alone


@pytest.mark.once("jax")
def test_the_accuracy_that_one_has_added_serves_another_too():
    first, second = live(0), live(0)
    model = trainer(first, [second, layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10)], metrics=None)
    by_logs = kc.AdaptiveMagnitude(second, lambda logs: logs["accuracy"], -1.0)
    fit(model, [kc.AdaptiveMagnitude(first, "accuracy", -0.5), by_logs], 1)
    assert [float(keras.ops.convert_to_numpy(each.magnitude)) for each in (first, second)] == [0.5, 0.5]


@pytest.mark.once("jax")
def test_a_loss_that_is_none_of_classes_has_no_accuracy():
    model = trainer(None, loss="mse", metrics=None)
    with pytest.raises(ValueError, match="loss='mse' and no accuracy"):
        fit(model, [kc.AdaptiveMagnitude(live(0))], 1, y=np.ones((32, 10)), validation_data=None)


def test_a_subclassed_model_can_be_copied_after_an_accuracy_was_added():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.head = layers.Flatten(), layers.Dense(10)

        def call(self, images):
            return self.head(self.flatten(images))

    model = trainer(None, [layers.Rescaling(1 / 255), Plain()], metrics=None).layers[-1]
    model.compile("sgd", LOSS)
    fit(model, [kc.AdaptiveMagnitude(live(9))], 1)
    assert kc.sparsity(kc.prune_now(model, 0.5)) == 0.5


def test_a_model_that_hides_an_added_metric_is_refused_in_its_own_words():
    class Own(keras.Model):
        @property
        def metrics(self):
            return []

    layer = trainer(None)
    model = Own(layer.inputs, layer.outputs)
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="whose class has `metrics` of its own"):
        fit(model, [kc.AdaptiveMagnitude(live(9))], 1)


def two_outputs():
    image = keras.Input((8, 8, 3))
    flat = layers.Flatten()(layers.Rescaling(1 / 255)(image))
    model = keras.Model(image, {"kind": layers.Dense(10)(flat), "size": layers.Dense(1)(flat)})
    _, labels = data()
    return model, {"kind": labels, "size": np.ones((32, 1))}


@pytest.mark.once("jax")
def test_of_several_outputs_the_one_with_an_accuracy_counts():
    augment = live(0)
    model, labels = two_outputs()
    model.compile(
        "sgd", {"kind": LOSS, "size": "mse"}, metrics={"kind": ["accuracy", "sparse_top_k_categorical_accuracy"]}
    )
    history = fit(model, [kc.AdaptiveMagnitude(augment, "accuracy", -0.5)], 2, y=labels, validation_data=None)
    assert history["magnitude"] == [0, 0.5]
    assert "kind_accuracy" in history


def test_several_outputs_without_an_accuracy_are_refused():
    augment = live(0)
    model, labels = two_outputs()
    model.compile("sgd", {"kind": LOSS, "size": "mse"})
    with pytest.raises(ValueError, match="knows the accuracy of one output"):
        fit(model, [kc.AdaptiveMagnitude(augment)], 1, y=labels, validation_data=None)


# --- ways to train ---


@pytest.mark.compiled
def test_several_steps_in_one_and_accumulated_gradients_change_nothing():
    def run(steps_per_execution):
        keras.utils.set_random_seed(0)
        augment = live(0)
        optimizer = keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)
        model = trainer(augment, optimizer=optimizer, steps_per_execution=steps_per_execution)
        return fit(model, [kc.AdaptiveMagnitude(augment, "accuracy", 0.05)], 4)

    one_by_one, together = run(1), run(4)
    assert one_by_one["magnitude"] == together["magnitude"] != [0, 0, 0, 0]
    assert one_by_one["loss"] == pytest.approx(together["loss"], abs=1e-5)


@pytest.mark.parametrize("carrier", ["wrapper", "optimizer"])
def test_it_moves_beside_masks_of_either_carrier(carrier):
    schedule = kc.PolynomialDecay(0.0, 0.6, begin_step=0, end_step=8, frequency=2)
    augment, callbacks = live(0), []
    network = keras.Sequential([keras.Input((8, 8, 3)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10)])
    optimizer = keras.optimizers.SGD(0.001)
    if carrier == "wrapper":
        network, callbacks = kc.prune_low_magnitude(network, schedule), [kc.UpdatePruningStep()]
    else:
        optimizer = kc.PruningOptimizer(optimizer, schedule)
    model = trainer(augment, [network], optimizer=optimizer)
    history = fit(model, [*callbacks, kc.AdaptiveMagnitude(augment, scripted(1, 1, 0), 0.5)], 3)
    assert history["magnitude"] == [0, 0.5, 1]
    assert kc.sparsity(model) == pytest.approx(0.6, abs=0.01)


@pytest.mark.once("jax")
def test_it_moves_the_augmentation_of_a_distiller():
    augment = live(0)
    networks = [keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(10)]) for _ in range(2)]
    distiller = kc.Distiller(*networks, augment=augment, num_candidates=1)
    distiller.compile(keras.optimizers.SGD(1e-6))
    history = fit(distiller, [kc.AdaptiveMagnitude(augment, "accuracy", -0.5)], 3)
    assert history["magnitude"] == history["chosen_magnitude"] == [0, 0.5, 1]
    assert "val_accuracy" in history


@pytest.mark.tensorflow_only
def test_it_moves_an_augmentation_that_is_mapped_in_tf_data():
    import tensorflow as tf

    images, labels = data()
    augment = live(0)
    mapped = tf.data.Dataset.from_tensor_slices((np.full_like(images, 9), labels)).batch(8)
    mapped = mapped.map(lambda images, labels: (augment(images), labels))
    seen = []
    model = trainer(None)
    held_out = (images, labels)
    for _ in range(2):
        model.fit(
            mapped,
            shuffle=False,
            validation_data=held_out,
            verbose=0,
            callbacks=[kc.AdaptiveMagnitude(augment, lambda logs: 1, 0.5, speed=30)],
        )
        seen.append(next(int(each.numpy().max()) for each, _ in mapped))
    assert seen == [246, 246]  # at M = 30 all is inverted
    assert magnitude(augment) == 30


def test_validation_every_second_epoch_is_its_frequency_and_a_split_will_do():
    augment = live(9)
    adaptive = kc.AdaptiveMagnitude(augment, frequency=2)
    history = fit(trainer(None), [adaptive], 4, validation_data=None, validation_split=0.25, validation_freq=2)
    assert np.diff(history["magnitude"]).tolist() in ([0, 0.5, 0], [0, -0.5, 0])


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_behind_it_shows_the_magnitude(tmp_path):
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    augment = live(3)
    callbacks = [kc.AdaptiveMagnitude(augment), keras.callbacks.TensorBoard(str(tmp_path))]
    fit(trainer(None), callbacks, 1)
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    (event,) = events.Tensors("epoch_magnitude")
    assert float(tf.make_ndarray(event.tensor_proto)) == 3


# --- resuming ---


@pytest.mark.quick
def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    def run(folder, *callbacks):
        keras.utils.set_random_seed(0)
        augment = live(14)
        model = trainer(augment, optimizer=keras.optimizers.SGD(0.01, momentum=0.9))
        backup = keras.callbacks.BackupAndRestore(str(folder))
        adaptive = kc.AdaptiveMagnitude(augment, "accuracy", 0.12)
        return fit(model, [adaptive, backup, *callbacks], 6), model.get_weights(), magnitude(augment)

    whole, weights, last = run(tmp_path / "whole")
    assert len(set(whole["magnitude"])) > 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Kill())
    history, resumed, resumed_last = run(tmp_path / "killed")
    assert history == {name: values[3:] for name, values in whole.items()}
    assert resumed_last == last
    for ours, theirs in zip(resumed, weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_saved_model_keeps_that_it_is_off(tmp_path):
    augment = live(0)
    model = trainer(augment, metrics=None)
    fit(model, [kc.AdaptiveMagnitude(augment, "accuracy", 0.99)], 1)
    assert magnitude(augment) == -0.5
    model.save(tmp_path / "model.keras")
    assert magnitude(keras.saving.load_model(tmp_path / "model.keras").layers[0]) == -0.5
    model.save_weights(tmp_path / "model.weights.h5")
    other = trainer(live(9))
    other.load_weights(tmp_path / "model.weights.h5")
    assert magnitude(other.layers[0]) == -0.5


# --- errors ---


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"augment": 14}, TypeError, "must have a variable `magnitude`"),
        ({"augment": kc.RandAugment((0, 30))}, ValueError, r"a \(low, high\) pair"),
        ({"signal": "loss"}, TypeError, "Received: signal='loss'"),
        ({"signal": 0.6}, TypeError, 'must be "gap", "accuracy" or a function'),
        ({"signal": "accuracy"}, ValueError, "only the gap has a default"),
        ({"signal": len}, ValueError, "only the gap has a default"),
        ({"target": 15}, ValueError, "in percent, divide it by 100"),
        ({"target": float("nan")}, ValueError, "must be a number"),
        ({"speed": 0}, ValueError, "Received: speed=0"),
        ({"frequency": 0.5}, ValueError, "whole number of epochs"),
    ],
)
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        kc.AdaptiveMagnitude(**{"augment": kc.RandAugment(0)} | given)


def test_a_layer_that_the_model_does_not_contain_is_refused_if_it_has_another():
    with pytest.raises(ValueError, match=r"not in the model .* others: \['rand_augment'\]"):
        fit(trainer(kc.RandAugment(0, name="rand_augment")), [kc.AdaptiveMagnitude(kc.RandAugment(0))], 1)


@pytest.mark.parametrize("metrics", [["accuracy"], None])
def test_a_gap_without_held_out_images_is_an_error_after_the_first_epoch(metrics):
    augment = live(0)
    with pytest.raises(ValueError, match=r"`val_accuracy`, every 1 epoch\(s\).*after epoch 1.*`validation_data`"):
        fit(trainer(None, metrics=metrics), [kc.AdaptiveMagnitude(augment)], 2, validation_data=None)


def test_a_signal_that_is_no_number_is_an_error():
    augment = live(0)
    with pytest.raises(ValueError, match=r"finite number\. Received: nan after epoch 1"):
        fit(trainer(None), [kc.AdaptiveMagnitude(augment, lambda logs: float("nan"), 0.5)], 1)


@pytest.mark.once("jax")
def test_several_accuracies_are_an_error_that_asks_for_one():
    augment = live(0)
    metrics = ["accuracy", keras.metrics.SparseCategoricalAccuracy(name="again")]
    with pytest.raises(ValueError, match=r"needs one accuracy .*'accuracy', 'again'"):
        fit(trainer(None, metrics=metrics), [kc.AdaptiveMagnitude(augment)], 1)
