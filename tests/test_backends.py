"""What one backend has trained and saved, the others load; and what Torch needs that the others do not."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import kerascompress as kc

BACKEND = keras.backend.backend()
on_torch = pytest.mark.skipif(BACKEND != "torch", reason=f"is about Torch; this is {BACKEND}")


def images(count=8):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype("float32")


def trained(optimizer, pruned=False):
    """A small ResNet with augmentation in front, three updates old."""
    network = kc.models.resnet(8, 4, input_shape=(8, 8, 3), width=4, seed=0)
    if pruned:
        network = kc.prune_low_magnitude(network, kc.ConstantSparsity(0.5, 0))
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), kc.RandomCrop(1, seed=0), kc.RandAugment(ops=["Solarize"], seed=0), network]
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images(12), np.arange(12) % 4, batch_size=4, verbose=0, callbacks=[kc.UpdatePruningStep()] * pruned)
    return model


LOAD = """
import sys, keras, numpy as np
import kerascompress as kc
for name in ("optimizer", "wrappers"):
    model = keras.saving.load_model(name + ".keras")
    np.save(keras.backend.backend() + name, model.predict(np.load("images.npy"), verbose=0))
    print(kc.sparsity(model), int(keras.ops.convert_to_numpy(model.optimizer.iterations)))
    if name == "optimizer":
        model.jit_compile = keras.backend.backend() == "jax"
        model.fit(np.load("images.npy"), np.arange(8) % 4, batch_size=8, verbose=0)
        print(round(kc.sparsity(model), 2), int(keras.ops.convert_to_numpy(model.optimizer.iterations)))
"""


@pytest.mark.skipif(BACKEND == "tensorflow", reason="the others load what they save on TensorFlow")
def test_what_is_trained_gives_the_same_outputs_on_another_backend(tmp_path):
    models = {
        "optimizer": trained(kc.PruningOptimizer("adamw", kc.ConstantSparsity(0.5, 0))),
        "wrappers": trained("adam", True),
    }
    np.save(tmp_path / "images.npy", images())
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
    for backend in ("tensorflow", "jax") if BACKEND == "torch" else ("tensorflow",):
        environment = {"KERAS_BACKEND": backend, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", LOAD]
        done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, second = (f"{kc.sparsity(model)} 3" for model in models.values())
        assert done.stdout.splitlines() == [first, "0.5 4", second]
        for name, model in models.items():
            expected = model.predict(images(), verbose=0)
            np.testing.assert_allclose(np.load(tmp_path / f"{backend}{name}.npy"), expected, rtol=1e-4, atol=1e-4)


@on_torch
def test_what_tensorflow_has_saved_goes_on_training_on_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import kerascompress as kc; from test_backends import trained; "
        "trained(kc.PruningOptimizer('adam', kc.ConstantSparsity(0.5, 0))).save(sys.argv[1])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.keras"]
    done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "tensorflow"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = keras.saving.load_model(tmp_path / "model.keras")
    masks = [ops.convert_to_numpy(mask.value) for _, mask, _ in model.optimizer.pruning_vars]
    model.fit(images(8), np.arange(8) % 4, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 5
    assert kc.sparsity(model) == pytest.approx(0.5, abs=0.01)
    for before, (_, mask, _) in zip(masks, model.optimizer.pruning_vars, strict=True):
        assert not before.all()
        assert ops.convert_to_numpy(mask.value).shape == before.shape


@on_torch
@pytest.mark.filterwarnings("ignore:(?s).*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize("how", ["SavedModel", "LiteRT"])
def test_an_export_from_torch_computes_what_torch_does_as_sparse_as_reported(tmp_path, how):
    import tensorflow as tf

    model = kc.prune_now(kc.models.shufflenet_v2(4, width=0.25, input_shape=(8, 8, 3), seed=0), 0.5)
    expected = ops.convert_to_numpy(model(images(), training=False))
    if how == "SavedModel":
        report = kc.export_saved_model(model, tmp_path / "net", images=images())
        loaded = tf.saved_model.load(str(tmp_path / "net"))  # must outlive the call
        served = loaded.serve(images()).numpy()
    else:
        report = kc.export_litert(model, str(tmp_path / "net.tflite"), images=images())
        interpreter = tf.lite.Interpreter(str(tmp_path / "net.tflite"))
        served = interpreter.get_signature_runner("serving_default")(images=images())["output_0"]
    np.testing.assert_allclose(served, expected, rtol=1e-3, atol=1e-3)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert report.parameters == model.count_params()


@keras.saving.register_keras_serializable("test_backends")
class TorchAlone(layers.Layer):
    def call(self, x):
        import torch

        return torch.relu(x)


@on_torch
def test_an_export_of_a_layer_that_only_torch_can_run_says_what_to_do(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), TorchAlone(), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(RuntimeError, match=r"KERAS_BACKEND=tensorflow, which failed: .*written with `keras.ops`"):
        kc.export_saved_model(model, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@on_torch
def test_the_teacher_of_a_distiller_gets_no_gradient_and_the_choice_none_either():
    student, teacher = (kc.models.resnet(8, 4, input_shape=(8, 8, 3), width=width, seed=0) for width in (2, 4))
    distiller = kc.Distiller(student, teacher, augment=kc.RandAugment((0, 30), seed=0), num_candidates=2)
    distiller.compile("sgd")
    views = distiller.draw_candidates(images(), np.arange(8) % 4)
    assert not views["divergence"].requires_grad
    distiller.fit(images(), np.arange(8) % 4, batch_size=4, verbose=0)
    assert all(variable.value.grad is None for variable in teacher.trainable_variables)
    assert all(variable.value.grad is not None for variable in student.trainable_variables)
