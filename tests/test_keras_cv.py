"""keras-cv's RandAugment with a live magnitude: held against keras-cv's own, built anew for each magnitude."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import kerascompress as kc

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture
def live():
    """The class under test, imported by the tests that need it and not on other backends."""
    from kerascompress.keras_cv import RandAugment

    return RandAugment


def frozen(magnitude, **kwargs):
    """keras-cv's own layer at M, the paper's scale."""
    import keras_cv

    return keras_cv.layers.RandAugment(**{"value_range": (0, 255), "seed": 1} | kwargs, magnitude=magnitude / 30)


def pictures(batch, high=255):
    return np.random.default_rng(0).uniform(0, high, (batch, 12, 10, 3)).astype("float32")


def augmented(layer, images):
    keras.utils.set_random_seed(3)
    return layer(images).numpy()


@pytest.mark.parametrize("magnitude", [0.01, 7.25, 30])
def test_any_magnitude_is_keras_cvs_own(live, magnitude):
    images = pictures(8)
    expected = augmented(frozen(magnitude), images)
    assert np.abs(expected - images).mean() > 1
    constructed = live((0, 255), magnitude=magnitude, seed=1)
    assigned = live((0, 255), magnitude=22, seed=1)
    assigned.magnitude.assign(magnitude)
    np.testing.assert_array_equal(augmented(constructed, images), expected)
    np.testing.assert_array_equal(augmented(assigned, images), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"augmentations_per_image": 1, "geometric": False},
        {"value_range": (0, 1), "magnitude_stddev": 0.4, "rate": 0.5},
    ],
)
def test_other_arguments_are_keras_cvs_own(live, kwargs):
    kwargs = {"value_range": (0, 255), "seed": 2} | kwargs
    images = pictures(8, high=kwargs["value_range"][1])
    expected = augmented(frozen(12, **kwargs), images)
    np.testing.assert_array_equal(augmented(live(**kwargs, magnitude=12), images), expected)


@pytest.mark.quick
def test_magnitude_zero_is_keras_cvs_own(live):
    images = pictures(8)
    kwargs = {"value_range": (0, 255), "magnitude_stddev": 0, "seed": 1}
    expected = augmented(frozen(0, **kwargs), images)
    # keras-cv draws no brightness at 0, so what comes after it differs: a contrast within a thousandth, three times
    np.testing.assert_allclose(augmented(live(**kwargs, magnitude=0), images), expected, atol=1)


def test_assign_acts_in_a_traced_function_without_a_retrace(live):
    import tensorflow as tf

    def seeded(layer):
        """Graphs differ in what keras-cv's samplers draw, unless each has a seed of its own."""
        for i, each in enumerate(layer.layers):
            for name, value in vars(each).items():
                if name.endswith("factor") and hasattr(value, "seed"):
                    value.seed = 2 * i + (name == "addition_factor")
        return tf.function(layer)

    def draw(function):  # images one by one, because keras-cv draws for those of a batch in any order
        return [function(image).numpy() for image in pictures(10)]

    tf.random.set_seed(3)
    layer = live((0, 255), 1, magnitude=30, seed=1)
    function = seeded(layer)
    strong = draw(function)
    layer.magnitude.assign(4)
    weak = draw(function)
    assert function.experimental_get_tracing_count() == 1
    expected = seeded(frozen(4, augmentations_per_image=1))
    assert not np.array_equal(strong, draw(expected))  # brings the generators to where those of `function` were
    np.testing.assert_array_equal(weak, draw(expected))


def test_scheduler_drives_it_in_a_fit_fed_by_dataset_map(live):
    import tensorflow as tf

    layer = live((0, 255), 1, magnitude=2, rate=1, seed=1)
    images = np.repeat(pictures(1), 64, axis=0)

    def with_change(augmented):  # the target is how much an image has changed
        return augmented, tf.reduce_mean(tf.abs(augmented - images), axis=(1, 2, 3))[:, None]

    dataset = tf.data.Dataset.from_tensors(images).repeat().map(layer).map(with_change)
    seen = []

    def loss(change, prediction):
        tf.py_function(lambda change: seen.append(float(tf.reduce_mean(change))), [change], [])
        return keras.ops.mean(prediction)

    network = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(1)])
    network.compile("sgd", loss)
    scheduler = kc.MagnitudeScheduler(layer, lambda step: 30 if 8 <= step < 16 else 2)
    network.fit(dataset, steps_per_epoch=24, shuffle=False, verbose=0, callbacks=[scheduler])
    assert len(seen) == 24
    assert float(layer.magnitude) == 2
    # what has been prefetched comes a few steps late
    assert min(seen[13:16]) > 1.3 * max(*seen[:8], *seen[21:])


def test_in_a_model_it_follows_the_scheduler_and_leaves_inference_alone(live):
    layer = live((0, 255), 1, magnitude=15, rate=1, seed=1)
    network = keras.Sequential([keras.Input((12, 10, 3), dtype="uint8"), layer, keras.layers.Flatten()])
    network.add(keras.layers.Dense(1))
    images = pictures(8).astype("uint8")
    network.compile("sgd", "mse")
    assert not network.jit_compile  # keras-cv shears with an operation that XLA lacks
    scheduler = kc.MagnitudeScheduler(layer, lambda step: 15 - step)
    network.fit(images, np.zeros((8, 1)), batch_size=2, epochs=1, verbose=0, callbacks=[scheduler])
    assert float(layer.magnitude) == 11  # after 4 updates
    np.testing.assert_array_equal(keras.Sequential(network.layers[:1]).predict(images, verbose=0), images)
    assert np.any(layer(images, training=True) != images)


def test_single_images_and_dictionaries_go_through_dataset_map(live):
    import tensorflow as tf

    layer = live((0, 255), 1, magnitude=20, geometric=False, seed=1)
    images, labels = pictures(4), np.eye(4, dtype="float32")
    dataset = tf.data.Dataset.from_tensor_slices({"images": images, "labels": labels})
    assert [single["images"].shape for single in dataset.map(layer)] == 4 * [(12, 10, 3)]
    (batch,) = dataset.batch(4).map(layer)
    assert batch["images"].shape == images.shape
    np.testing.assert_array_equal(batch["labels"], labels)


def test_config_and_saved_model_bring_it_back(live, tmp_path):
    layer = live((0, 1), 2, magnitude=14, magnitude_stddev=0.1, rate=0.5, geometric=False, seed=3)
    config = layer.get_config()
    asked = {"value_range": (0, 1), "augmentations_per_image": 2, "magnitude": 14, "magnitude_stddev": 0.1}
    assert (asked | {"rate": 0.5, "geometric": False, "seed": 3}).items() <= config.items()
    assert live.from_config(config).get_config() == config
    layer.magnitude.assign(6)
    network = keras.Sequential([keras.Input((12, 10, 3)), layer, keras.layers.Flatten()])
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras").layers[0]
    assert type(loaded) is live
    assert float(loaded.magnitude) == 6
    assert not loaded.trainable_variables


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"magnitude": 30.5}, r"`magnitude` must be a number in \[0, 30\].* Received: magnitude=30.5"),
        ({"magnitude": -1}, "Received: magnitude=-1"),
        ({"magnitude": float("nan")}, "Received: magnitude=nan"),
        ({"magnitude_stddev": 4.5}, "Received: magnitude_stddev=4.5"),
        ({"rate": 1.1}, "Received: rate=1.1"),
        ({"augmentations_per_image": 0}, "Received: augmentations_per_image=0"),
        ({"value_range": (1, 0)}, r"Received: value_range=\(1, 0\)"),
    ],
)
def test_bad_arguments_are_named(live, kwargs, message):
    with pytest.raises(ValueError, match=message):
        live(**{"value_range": (0, 255)} | kwargs)


def test_greyscale_images_are_referred_to_the_layer_that_takes_them(live):
    with pytest.raises(
        ValueError, match=r"Received: images of shape \(2, 8, 8, 1\). `kerascompress.RandAugment` takes"
    ):
        live((0, 255))(np.zeros((2, 8, 8, 1)))


def test_images_on_another_scale_are_refused(live):
    import tensorflow as tf

    images, refused = pictures(2, high=1), r"RandAugment needs images with values in value_range=\(0, 255\)"
    with pytest.raises(ValueError, match=refused):
        live((0, 255))(images)
    with pytest.raises(tf.errors.InvalidArgumentError, match=refused):
        next(iter(tf.data.Dataset.from_tensor_slices(images).map(live((0, 255)))))


def test_on_another_backend_it_names_the_layer_that_works(live, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"Received: the jax backend. Use `kerascompress.RandAugment`."):
        live((0, 255))


def test_a_keras_2_in_the_way_is_named():
    command = [sys.executable, "-c", "import kerascompress.keras_cv"]
    done = subprocess.run(command, env=os.environ | {"TF_USE_LEGACY_KERAS": "1"}, capture_output=True, text=True)
    assert "ImportError: keras-cv needs a `tf.keras` that is Keras 3. Received: Keras 2" in done.stderr
