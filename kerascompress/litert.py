"""LiteRT (TensorFlow Lite) files: converted, run and timed."""

import importlib.util
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

QUANTIZATIONS = (None, "float16", "dynamic", "int8")
LEAST_RUNS = 50
AT_ONCE = 16  # so many images of a network of any batch: with all of a calibration, memory would run out


def check(quantize: Any, images: Any, latency_runs: int) -> None:
    """Raises a ValueError that names the argument of `export_litert` that is not allowed."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"`quantize` must be one of {QUANTIZATIONS}. Received: quantize={quantize!r}.")
    if quantize == "int8" and images is None:
        raise ValueError(
            "quantize='int8' needs `images` for calibration, a hundred or more of what the network will see: they tell "
            "the range of each activation. Received: images=None."
        )
    if latency_runs and latency_runs < LEAST_RUNS:
        raise ValueError(
            f"`latency_runs` must be at least {LEAST_RUNS}, for a minimum and a median that hold, or 0. "
            f"Received: latency_runs={latency_runs}."
        )
    if latency_runs and not _has_litert():
        raise ValueError("`latency_runs` needs LiteRT's own interpreter: `pip install ai-edge-litert`.")


def convert(saved_model: Path, quantize: str | None, samples: Callable[[], Any], *, sparse: bool) -> bytes:
    """The file of a SavedModel.

    Args:
        saved_model: Its folder.
        quantize: One of `QUANTIZATIONS`.
        samples: Returns an iterator over inputs by name, for the calibration of "int8".
        sparse: Whether kernels with many zeros are to be stored sparsely.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    chosen = {tf.lite.Optimize.DEFAULT: bool(quantize), tf.lite.Optimize.EXPERIMENTAL_SPARSITY: sparse}
    converter.optimizations = [each for each, wanted in chosen.items() if wanted]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = samples
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected", UserWarning)
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated", UserWarning)  # to calibrate
        try:
            return converter.convert()
        except Exception as error:  # the converter's own class is in no public module
            if "TensorList" in str(error):
                raise RuntimeError(
                    "LiteRT's converter takes recurrent layers with `unroll=True`, or, but for int8, in a Functional "
                    "model with a fixed batch: `keras.Input(shape, batch_size=1)`. Received: a loop over a batch of "
                    "any size."
                ) from error
            if keras.backend.backend() == "tensorflow":
                raise
            raise RuntimeError(
                f"LiteRT's converter does not know all that {keras.backend.backend()} makes of this network. Save the "
                "model, load it in a process with KERAS_BACKEND=tensorflow, and export it there."
            ) from error


def run(file: Path, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by name, for inputs by name, in batches that the file takes."""
    runner = interpreter(file).get_signature_runner("serving_default")
    size = max(each["shape_signature"][0] for each in runner.get_input_details().values())  # -1 if it is free
    return joined([runner(**part) for part in batches(named, size if size > 0 else None)])


def latency(files: dict[str, Path], named: dict[str, np.ndarray], runs: int) -> dict[str, dict[str, float]]:
    """Minimum and median milliseconds of each file for these inputs on one thread, the files taking turns."""
    runners = {name: interpreter(file, num_threads=1) for name, file in files.items()}
    for runner in runners.values():
        runner.get_signature_runner("serving_default")(**named)  # sets the inputs, and so the batch size
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(runs + 5):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.invoke()
            if turn >= 5:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: {"min": min(each), "median": statistics.median(each)} for name, each in times.items()}


def interpreter(file: Path, **settings: Any) -> Any:
    """LiteRT's own interpreter where it is installed, else TensorFlow's."""
    if _has_litert():
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter(str(file), **settings)
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated", UserWarning)
        return tf.lite.Interpreter(str(file), **settings)


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs of several batches as those of one."""
    first, *others = parts
    return {name: np.concatenate([part[name] for part in parts]) for name in first} if others else first


def _has_litert() -> bool:
    return importlib.util.find_spec("ai_edge_litert") is not None


def batches(images: Any, size: int | None) -> Iterator[Any]:
    """Arrays, in any structure, in batches of the size that the network takes, or if that is free, of `AT_ONCE`."""
    count = len(keras.tree.flatten(images)[0])
    end, size = (count - size + 1, size) if size else (count, AT_ONCE)
    for start in range(0, end, size):
        yield keras.tree.map_structure(operator.itemgetter(slice(start, start + size)), images)
