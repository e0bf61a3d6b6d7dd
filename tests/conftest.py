"""What every test shares: the skips by marker, and one seed."""

import experiments  # noqa: F401, I001 (first: it sets the threads, and with them the last bits of every sum)
import gc
import os

import pytest
from absl import flags
from absl.testing import flagsaver

LONG = "adaptive adaptive_experiments augment channels devices distill docs experiments export image_ops keras_cv"
LONG += " keras_hub masks models optimizer pruning readme schemes teacher_filter trajectory"
IN_OTHERS = ("test_experiments", "test_inherit_experiments")  # processes, with the same last bits
QUICK_XLA = "xla_cpu_use_fusion_emitters"  # without them XLA compiles in two thirds of the time
IN_ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"  # and small programs as a whole sooner than in parts
EXACT = ("test_image_ops",)  # what it claims to the bit must hold as a user's program is compiled


def pytest_collection_modifyitems(items):
    import keras  # here as everywhere: the process that hands out tests would wait for it, and the others for that one

    on_tensorflow = keras.backend.backend() == "tensorflow"
    items.sort(key=lambda item: item.path.stem[5:] not in LONG.split())  # first, so that two processes end together
    for item in items:
        if item.get_closest_marker("tensorflow_only") and not on_tensorflow:
            item.add_marker(pytest.mark.skip(reason=f"needs the TensorFlow backend; this is {keras.backend.backend()}"))
        if once := item.get_closest_marker("once"):
            (where,) = once.args or ("tensorflow",)
            if keras.backend.backend() != where:
                item.add_marker(pytest.mark.skip(reason=f"says the same on every backend; run on {where}"))
        if item.get_closest_marker("compiled") and keras.backend.backend() == "torch":
            item.add_marker(
                pytest.mark.skip(reason="needs a compiled step, or several in one; Keras has none on Torch")
            )
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; this machine has none"))


def pytest_sessionstart(session):
    if session.config.getoption("numprocesses", None):
        return  # this process only hands out tests
    import keras

    gc.freeze()  # what the imports have made stays: collecting would look at it again and again
    gc.set_threshold(50_000, 20, 50)  # else collecting is a tenth of the time; a module's end collects
    if keras.backend.backend() == "jax":  # what one test has compiled serves the next, in other processes too
        import jax

        # before XLA reads it, and for the processes that tests start
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {IN_ONE_PART} --{QUICK_XLA}=false"
        folder = str(session.config.cache.mkdir("jax"))
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Compiling is most of the time, so it is done thoroughly only where the result must be a user's, to the bit.

    Elsewhere JAX optimises less, and TensorFlow neither rewrites its graphs nor takes XLA unless a test says so.
    """
    import keras

    name = request.module.__name__.split(".")[-1]
    is_exact = name in EXACT
    with pytest.MonkeyPatch.context() as patch:
        if keras.backend.backend() == "jax":
            import jax

            if jax.config.read("jax_disable_most_optimizations") is is_exact:
                jax.config.update("jax_disable_most_optimizations", not is_exact)
                jax.clear_caches()  # they do not tell the two kinds of programs apart
            if is_exact:
                from jax._src import compiler

                made, asked = compiler.get_compile_options, {"env_options_overrides": {QUICK_XLA: True}}
                patch.setattr(compiler, "get_compile_options", lambda *args, **kwargs: made(*args, **kwargs | asked))
        elif keras.backend.backend() == "tensorflow":
            import tensorflow as tf
            from tensorflow.python import pywrap_tfe

            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": name not in EXACT + IN_OTHERS})
            if name != "test_keras_cv":  # whose draws are seeded anew with the kernels; else these serve the next test
                patch.setattr(pywrap_tfe, "TFE_ContextClearCaches", lambda context: None)
            if not is_exact:
                patch.setattr(keras.Model, "_resolve_auto_jit_compile", lambda model: False)
        yield
    gc.collect()


@pytest.fixture(autouse=True)
def fresh():
    """A test starts from one seed, with no layer names taken and no policy set by another test."""
    import keras

    keras.utils.clear_session(free_memory=False)  # collecting after every test would take a third of the time
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture(autouse=True)
def traced_once(request, monkeypatch):
    """Keras makes the variables of optimizer and metrics before a step of TensorFlow is traced, as it does on JAX.

    By itself it makes them meanwhile, so that TensorFlow traces every step twice; what is marked `quick` leaves it at
    that.
    """
    import keras

    if keras.backend.backend() == "tensorflow" and not request.node.get_closest_marker("quick"):
        monkeypatch.setattr(keras.Model, "_maybe_symbolic_build", _build_if_there_are_weights)


@pytest.fixture(scope="session")
def smoke_run():
    """`smoke_run(figure, folder, **flags)` runs a figure's script on the digits with --smoke; returns its rows.

    Everything it writes lies below `folder`.
    """
    from experiments.runs import read_rows

    def run(figure, folder, **changes):
        given = {"dataset": "digits", "smoke": True, "checkpoints": folder / "checkpoints"}
        given |= {"results": folder / "rows.jsonl"} | changes
        with flagsaver.flagsaver():
            flags.FLAGS(["test", *(f"--{name}={value}" for name, value in given.items())])
            figure.main([])
        return read_rows(given["results"])

    return run


def _build_if_there_are_weights(model, **first_batch):
    if all(layer.built for layer in model._flatten_layers()):
        model._symbolic_build(**first_batch)


def _has_gpu() -> bool:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    return any("gpu" in device.lower() or "cuda" in device.lower() for device in keras.distribution.list_devices())
