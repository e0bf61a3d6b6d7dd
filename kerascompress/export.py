"""Inference-only artifacts of pruned networks, verified before they get their name, with a report of what they hold."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kerascompress import graph, latency, litert
from kerascompress.costs import Summary, facts
from kerascompress.pruning import check_countable, kernels_of, strip_pruning
from kerascompress.wrapper import wrappers_in

# Largest difference of an output as a fraction of its largest value, by quantisation. On a GPU, convolutions in float32
# round to 10 bits of mantissa.
HALF = ("float16", "bfloat16")
TOLERANCES = {None: 1e-2, "float16": 1e-2, "dynamic": 0.15, "int8": 0.25}


@dataclasses.dataclass(frozen=True)
class ExportReport(Summary):
    """What an exported network holds; `str(report)` is a table, the JSON file its fields.

    Attributes:
        model, sparsity, kernels, parameters, nonzeros, macs: See `summary`; parameters are those that the forward pass
            reads. In a LiteRT file each kernel has an `execution`, too: whether LiteRT will execute its zeros
            "sparse", keeps them out of the file only ("stored"), or neither ("dense"), and why.
        raw_bytes: Size of the artifact's files.
        gzip_bytes: Size of the LiteRT file after gzip, or of the SavedModel folder as a .tar.gz.
        max_error: Largest difference between an output of artifact and model, as a fraction of its largest value.
        agreement: Fraction of the images for which the largest logit is the same one; None if the first output is not
            of shape (batch, classes).
        latency: For "dense", the network as a plain float32 file, and "exported", the `min` and `median` milliseconds
            of a batch of one, or of the model's fixed size, on one thread; None where it was not measured.
    """

    raw_bytes: int
    gzip_bytes: int
    max_error: float
    agreement: float | None
    latency: dict[str, dict[str, float]] | None = None

    def __str__(self) -> str:
        lines = [super().__str__(), f"{self.raw_bytes:,} bytes, {self.gzip_bytes:,} after gzip"]
        lines += [f"{kernel['name']}: {kernel['execution']}" for kernel in self.kernels if "execution" in kernel]
        for name, times in (self.latency or {}).items():
            lines.append(f"{name}: {times['median']:.3f} ms (least {times['min']:.3f})")
        return "\n".join(lines)


def export_saved_model(
    model: keras.Model, path: str | os.PathLike, *, images: Any = None, overwrite: bool = False
) -> ExportReport:
    """Exports the network without its pruning wrappers, for inference, as a SavedModel that TensorFlow alone can run.

    The artifact is loaded again with `tf.saved_model.load` and must give the outputs of `model` before it gets the name
    `path`; if anything fails, `path` stays as it was. It holds the weights that inference reads, each once and named by
    its Keras path, and nothing of augmentation layers. The report is written into the folder as `report.json`.

    On Torch, another process with `KERAS_BACKEND=tensorflow` writes it; layers of your own must be such that it can
    load them: written with `keras.ops`, in a module that it can import.

    Args:
        model: A built Sequential or Functional model, pruned or not. It is left as it is. Inputs and outputs may be
            several, in a list or a dictionary: the artifact's `serve` takes and returns what the model does. In the
            signature `serving_default`, inputs have their names or the keys of the dictionary, a single one is
            `images`; outputs have the keys of the dictionary or are `output_0`, `output_1`, ….
            A fixed batch size stays fixed, but for that of a Sequential model, which Keras takes from its first call.
        path: Folder to make; missing parents are made too.
        images: Batch on which the outputs are compared, `(batch, height, width, channels)`, or what else the model
            takes; with a fixed batch size, any multiple of it. By default four images, or the batch size of the model,
            of random whole numbers from 0 to 255; give your own if the model expects another range.
        overwrite: Whether a SavedModel at `path` may be replaced. It is replaced only by a verified one.

    Returns:
        An `ExportReport`: sparsity of every kernel and of all, parameters, non-zeros, raw and gzip bytes.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, or is something else than a SavedModel.
        ValueError: If the model is not built or is subclassed, or `images` are not what it takes.
        RuntimeError: If the outputs of the artifact differ from the model's by more than 1 % of the largest; 5 % where
            a layer computes in half precision.

    Example:
        >>> import keras, tempfile, kerascompress as kc
        >>> net = kc.models.resnet(8, 10, input_shape=(8, 8, 1), width=4)
        >>> path = tempfile.mkdtemp() + "/net"
        >>> kc.export_saved_model(net, path).parameters
        5310

        In a process that has only TensorFlow:

        >>> import tensorflow as tf
        >>> loaded = tf.saved_model.load(path)
        >>> loaded.serve(tf.zeros((3, 8, 8, 1))).shape.as_list()
        [3, 10]
        >>> loaded.weights[0].name
        'stem/kernel:0'
    """
    path = Path(os.path.abspath(path))
    if overwrite and os.path.lexists(path) and not (path / "saved_model.pb").is_file():
        raise FileExistsError(f"`overwrite=True` replaces SavedModels only, and {path} is none. Choose another path.")
    small, batches, expected = _check_and_strip(model, images)
    with _staged(path, overwrite) as new:
        weights = _write_saved_model(small, batches, new)
        outputs = _run_saved_model(new, _structured(small, batches))
        report = _report(small, weights, new, _checked(model, outputs, expected))
        (new / "report.json").write_text(_json(report))
    return report


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    images: Any = None,
    quantize: str | None = None,
    latency_runs: int = 0,
    overwrite: bool = False,
) -> ExportReport:
    """Exports the network without its pruning wrappers, for inference, as a LiteRT (TensorFlow Lite) file.

    The file is run with the LiteRT interpreter and must give the outputs of `model`, within what its numbers can hold,
    before it gets the name `path`. The report is written to `path` + ".json"; it says which zeros LiteRT will skip.

    In float32 and float16, kernels with 30 % zeros or more are stored in LiteRT's sparse format, so the file itself
    shrinks. What runs faster, too: dense layers pruned in `block_size=(4, 1)`, from about .7 on and for batches of a
    few rows, not (1, 4) and not single weights; what `LatencyPolicy` prunes, on Arm; and channels that are gone
    (`prune_channels`), everywhere. With int8, and with float16 where a dense layer is in blocks or a transposed
    convolution has zeros, nothing is stored sparsely, because LiteRT computes garbage then.

    Args:
        model: As for `export_saved_model`. One of mixed precision is written in float32, in which its weights are.
        path: File to make, ending in ".tflite".
        images: As for `export_saved_model`. With "int8" they are needed, a hundred or more of what the network will
            see: they tell the range of each activation.
        quantize: `None`, float32. `"float16"` halves the file. `"dynamic"` stores int8 kernels and computes with int8
            where it pays. `"int8"` computes everything with int8; inputs and outputs stay float32.
        latency_runs: How often the file, and the network as a plain float32 file, are timed in turns: at least 50, or 0
            for not at all. Needs `pip install ai-edge-litert`.
        overwrite: Whether a file at `path`, and its report, may be replaced. It is replaced only by a verified one.

    Returns:
        An `ExportReport`: sparsity, MACs and execution of the kernels, sizes, error, agreement and latency.

    Raises:
        FileExistsError: If `path` or its report exists and `overwrite` is False, or `path` is a folder.
        ValueError: As for `export_saved_model`, if `path` does not end in ".tflite", or an argument is not allowed.
        RuntimeError: If the outputs of the file differ from the model's by more than 1 % of the largest; 5 % where a
            layer computes in half precision, with "dynamic" 15 % and with "int8" 25 %, where `agreement` tells more.

    Example:
        >>> import tempfile, kerascompress as kc
        >>> net = kc.models.resnet(8, 10, input_shape=(8, 8, 1), width=4)
        >>> kc.export_litert(net, tempfile.mkdtemp() + "/net.tflite").parameters
        5310
    """
    path = Path(os.path.abspath(path))
    if path.suffix != ".tflite":
        raise ValueError(f"A LiteRT file ends in '.tflite'. Received: path={str(path)!r}.")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder. Choose another path.")
    litert.check(quantize, images, latency_runs)
    quantized = [layer.name for layer in graph.walk(model) if getattr(layer, "quantization_mode", None)]
    if quantized:
        raise ValueError(
            "LiteRT's converter does not take the layers that Keras has quantized. "
            f"Received: {quantized} in {model.name!r}. Export the float model, with `quantize`."
        )
    small, batches, expected = _check_and_strip(model, images)
    loops = [layer.name for layer in graph.walk(small) if isinstance(layer, keras.layers.RNN) and not layer.unroll]
    if quantize == "int8" and loops:
        raise ValueError(
            "LiteRT's calibration breaks down, and the process with it, in recurrent layers that are loops. "
            f"Received: {loops} in {model.name!r}. Build them with `unroll=True`, or take quantize='dynamic'."
        )
    named = dict(zip(_input_names(small), batches, strict=True))
    new_files = [_staged(each, overwrite) for each in (path, path.with_name(path.name + ".json"))]
    with _in_float32(small, batches), new_files[0] as new, new_files[1] as new_report:
        saved_model = new.with_name("saved_model")
        weights = _write_saved_model(small, batches, saved_model)
        samples = functools.partial(litert.batches, named, _batch_size(small) or 1)
        kernels = [kernel for kernel in kernels_of(small) if any(kernel is weight for weight in weights)]
        sparse = latency.stores_sparsely(small, kernels, quantize)
        new.write_bytes(litert.convert(saved_model, quantize, samples, sparse=sparse))
        checked = _checked(model, litert.run(new, named), expected, quantize)
        report = _report(small, weights, new, checked)
        for row, verdict in zip(report.kernels, latency.execution(small, kernels, quantize), strict=True):
            row["execution"] = verdict
        if latency_runs:
            dense = new.with_name("dense.tflite")
            dense.write_bytes(litert.convert(saved_model, None, samples, sparse=False))
            times = litert.latency({"dense": dense, "exported": new}, next(samples()), latency_runs)
            report = dataclasses.replace(report, latency=times)
        new_report.write_text(_json(report))
    return report


@contextlib.contextmanager
def _staged(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path that becomes `path` if all goes well, and nothing otherwise."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another path, or pass `overwrite=True` to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        yield new
        if os.path.lexists(path):
            if not overwrite:  # somebody else made it in the meantime
                raise FileExistsError(f"{path} was made by somebody else during the export. Choose another path.")
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise


def _check_and_strip(model, images) -> tuple[keras.Model, list[np.ndarray], dict[str, np.ndarray]]:
    """The stripped model, a batch for each input, and the outputs that the artifact must give for them, by name."""
    if isinstance(model, keras.Model) and not model.built:
        raise ValueError(f"Build or call the model before exporting it. Received: {model.name!r}, which is not built.")
    if isinstance(model, keras.Model) and not graph.is_graph(model):
        raise ValueError(
            "A subclassed model does not tell what its inputs are. "
            f"Received: {model.name!r} of type {type(model).__name__}. Export one around it: "
            "`inputs = keras.Input(shape)`, then `keras.Model(inputs, model(inputs))`."
        )
    try:
        small = strip_pruning(model)
    except graph.CopyError:
        if any(wrappers_in(model)):
            raise
        small = model
    if getattr(model, "preprocessor", None) is not None:
        warnings.warn(
            f"The preprocessor of {model.name!r} is no part of the exported network, which takes what comes out of it.",
            stacklevel=3,
        )
    graph.check_calls(small)
    check_countable(small)
    batches = _batches(small, images)
    try:
        parts = [model(part, training=False) for part in _parts(small, batches)]
    except Exception as error:  # whatever a layer may raise
        if images is not None:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{model.name!r} does not take random whole numbers from 0 to 255: pass some inputs as `images`. "
            f"Received: images=None, and then {type(error).__name__}: {reason}"
        ) from error
    expected = litert.joined([_named(part) for part in parts])
    if not all(np.isfinite(output).all() for output in expected.values()):
        raise ValueError(
            f"The outputs of {model.name!r} are not all finite, so the artifact cannot be checked against them. If the "
            "weights are, then the model expects other inputs than pixels from 0 to 255: pass some as `images`."
        )
    return small, batches, expected


@contextlib.contextmanager
def _in_float32(model, batches) -> Iterator[None]:
    """Lets a model compute in float32; LiteRT's converter takes no network that computes with half of the bits."""
    half = [(layer, layer.dtype_policy) for layer in graph.walk(model) if layer.compute_dtype in HALF]
    try:
        for layer, _ in half:
            layer.dtype_policy = "float32"
        try:
            _ = half and model(_parts(model, batches)[0], training=False)
        except Exception as error:  # whatever a layer may raise that has weights in half precision
            raise ValueError(
                f"A LiteRT file computes in float32, and {model.name!r} does not without being built anew. Build it "
                'under keras.config.set_dtype_policy("float32"), and give it these weights with `set_weights`.'
            ) from error
        yield
    finally:
        for layer, policy in half:  # a copy shares layers without weights
            layer.dtype_policy = policy


def _shapes(model) -> list[tuple[int | None, ...]]:
    """The shapes of the inputs; the batch of a Sequential model is free, unless layers keep a state for each image."""
    free = isinstance(model, keras.Sequential) and not any(getattr(x, "stateful", False) for x in graph.walk(model))
    return [(None if free else each.shape[0], *each.shape[1:]) for each in model.inputs]


def _batch_size(model) -> int | None:
    return next((shape[0] for shape in _shapes(model) if shape[0]), None)


def _parts(model, batches: list) -> list:
    """The batches as the model takes them, in parts: of its size, if that is fixed."""
    return list(litert.batches(_structured(model, batches), _batch_size(model)))


def _input_names(model) -> list[str]:
    """The names of the inputs in the signature, in the order of `model.inputs`."""
    sequential = isinstance(model, keras.Sequential)
    for part in () if sequential else (model.input, model.output):
        if any(len(path) > 1 for path, _ in keras.tree.flatten_with_path(part)):
            raise ValueError(
                "Inputs and outputs must be tensors, or a list or a dictionary of tensors. "
                f"Received: {model.name!r} with {part}. Flatten it in a keras.Model around it."
            )
    if not sequential and isinstance(model.input, dict):
        names = [path[0] for path, _ in keras.tree.flatten_with_path(model.input)]
    else:
        names = ["images"] if len(model.inputs) == 1 else [each.name for each in model.inputs]
    wrong = [name for name in names if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*", name)]
    if wrong:
        raise ValueError(
            "The name of an input must be of letters, digits and _ . - /, and begin with a letter or digit, for "
            f"TensorFlow to take it. Received: {wrong} of {model.name!r}."
        )
    return names


def _structured(model, values: list):
    """One value for each input, as the model takes them: alone, in a list or in a dictionary."""
    if not isinstance(model, keras.Sequential) and isinstance(model.input, dict):
        return dict(zip(_input_names(model), values, strict=True))
    return values if len(values) > 1 else values[0]


def _named(outputs) -> dict[str, np.ndarray]:
    """The outputs as float32, by their names in the signature."""
    if not isinstance(outputs, dict):
        outputs = {f"output_{i}": output for i, output in enumerate(keras.tree.flatten(outputs))}
    return {name: keras.ops.convert_to_numpy(output).astype("float32") for name, output in outputs.items()}


def _batches(model, images) -> list[np.ndarray]:
    """A batch for each input of the model: what was given, or random ones."""
    names, shapes = _input_names(model), _shapes(model)
    if strings := [name for name, each in zip(names, model.inputs, strict=True) if each.dtype == "string"]:
        raise ValueError(
            "An exported network takes numbers. "
            f"Received: {model.name!r}, whose inputs {strings} are strings. Export the network behind the layer that "
            "turns them into numbers, such as `TextVectorization`: with an `Input` of its own, the first call on it."
        )
    if images is None:
        random = np.random.default_rng(0)
        sizes = [[size or (32 if axis else 4) for axis, size in enumerate(shape)] for shape in shapes]
        given = [random.integers(0, 256, each) for each in sizes]
    elif not isinstance(images, dict | list | tuple) and not hasattr(images, "shape"):
        raise ValueError(
            "`images` must be one batch of arrays. "
            f"Received: images of type {type(images).__name__}. Of a data set, take `next(iter(dataset))[0]`."
        )
    elif isinstance(images, dict):
        given = [images[name] for name in names] if images.keys() == set(names) else []
    else:
        given = list(images) if len(names) > 1 else [images]
    batches = [np.asarray(batch).astype(each.dtype) for batch, each in zip(given, model.inputs, strict=False)]
    received = [batch.shape for batch in batches]
    if len(given) != len(names) or not all(
        len(shape) == len(wanted)
        and shape[0] > 0 == shape[0] % (wanted[0] or 1)
        and all(want in (None, size) for want, size in zip(wanted[1:], shape[1:], strict=True))
        for shape, wanted in zip(received, shapes, strict=True)
    ):
        takes = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(
            f"`images` must be what {model.name!r} takes, of a fixed batch size any multiple, not empty, several in a "
            f"list or a dictionary: {takes}. "
            f"Received: {', '.join(images) if isinstance(images, dict) else received}."
        )
    return batches


class _ReadVariables(keras.StatelessScope):
    """Collects the ids of the variables that are read in the scope."""

    def __init__(self):
        super().__init__()
        self.ids: set[int] = set()

    def get_current_value(self, variable):
        self.ids.add(id(variable))
        return super().get_current_value(variable)


def _write_saved_model(model, batches, folder) -> list[keras.Variable]:
    """Writes the forward pass and the variables it reads, which are returned.

    Not `model.export`: it stores every variable twice on TensorFlow, and on JAX keeps the state of augmentation layers
    and assigns to variables in every call.
    """
    import tensorflow as tf

    with _ReadVariables() as read:
        model(_parts(model, batches)[0], training=False)
    weights = [variable for variable in model.variables if id(variable) in read.ids]

    if keras.backend.backend() == "torch":
        _write_in_another_process(model, batches, folder)
        return weights

    def forward(values, images):
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            return model(images, training=False)

    if keras.backend.backend() == "jax":
        forward = _in_tensorflow(forward, model, weights)
    module = tf.Module()
    module.weights = [
        tf.Variable(keras.ops.convert_to_numpy(weight.value), trainable=False, name=weight.path) for weight in weights
    ]
    named = zip(_input_names(model), _shapes(model), model.inputs, strict=True)
    specs = [tf.TensorSpec(shape, each.dtype, name) for name, shape, each in named]
    module.serve = tf.function(
        lambda images: forward([weight.value() for weight in module.weights], images),
        input_signature=[_structured(model, specs)],
        autograph=False,
    )
    options = tf.saved_model.SaveOptions(experimental_debug_stripper=True)
    try:
        tf.saved_model.save(module, str(folder), signatures=module.serve, options=options)
    except AssertionError as error:  # of what the function captures and the module does not hold
        raise ValueError(
            f"{model.name!r} computes with something of TensorFlow's that is no weight of it, such as the table of a "
            "lookup layer or what a `tf.function` of a layer's own holds. Export the network behind such a layer, with "
            "an `Input` of its own; call layers without `tf.function`."
        ) from error
    return weights


def _in_tensorflow(forward, model, weights):
    """A function of weights and images in JAX as one of TensorFlow, for every size that the model leaves open."""
    import jax
    from jax.experimental import jax2tf

    def free(i, shape, name):  # the batch is one for all inputs
        sizes = ["batch" if axis == 0 else name.format(i=i, axis=axis) for axis in range(len(shape))]
        return f"({', '.join(str(size or name) for size, name in zip(shape, sizes, strict=True))})"

    def traces(symbols):
        scope = jax.export.SymbolicScope()
        shapes = [jax.export.symbolic_shape(each, scope=scope) for each in symbols]
        images = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, (x.dtype for x in model.inputs), strict=True)]
        values = [jax.ShapeDtypeStruct(tuple(each.shape), each.dtype) for each in weights]
        try:
            jax.eval_shape(forward, values, _structured(model, images))
        except Exception:  # whatever a layer may raise
            return False
        return True

    # sizes of its own for each input, unless the model puts inputs together, as TensorFlow finds out when it computes
    names = ("size{i}_{axis}", "size{axis}")
    symbols = [[free(i, shape, name) for i, shape in enumerate(_shapes(model))] for name in names]
    apart, alike = symbols
    return jax2tf.convert(
        forward,
        polymorphic_shapes=[None, _structured(model, apart if apart == alike or traces(apart) else alike)],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),  # wherever it was trained
    )


def _write_in_another_process(model, batches, folder) -> None:
    """Has the backend of TensorFlow write what another backend cannot: through a `.keras` file."""
    code = (
        "import json, sys, keras, numpy as np; from kerascompress.export import _write_saved_model; "
        "model = keras.saving.load_model(sys.argv[1], compile=False, safe_mode=False); "
        "shapes = zip(json.loads(sys.argv[2]), model.inputs); "
        "_write_saved_model(model, [np.zeros(shape, each.dtype) for shape, each in shapes], sys.argv[3])"
    )
    path = os.pathsep.join(sys.path)  # where the layers of the model may come from
    environment = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, "model.keras")
        model.save(file)
        shapes = json.dumps([batch.shape for batch in batches])
        command = [sys.executable, "-c", code, file, shapes, str(folder)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(
            f"{model.name!r} is exported by another process with KERAS_BACKEND=tensorflow, which failed: {reason}. "
            "Layers of your own must be written with `keras.ops`, and lie in a module that can be imported there."
        )


def _run_saved_model(folder, images):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))  # must outlive the call: its functions do not keep its variables
    specs = loaded.signatures["serving_default"].structured_input_signature[1].values()
    size = next((spec.shape[0] for spec in specs if spec.shape[0]), None)
    return litert.joined([_named(loaded.serve(part)) for part in litert.batches(images, size)])


def _checked(model, outputs, expected: dict[str, np.ndarray], quantize: str | None = None) -> dict[str, Any]:
    """Largest difference as a fraction of the largest expected value of an output; more than rounding is an error."""
    outputs = _named(outputs)
    differences = [
        float(np.max(np.abs(outputs[name] - values)) / max(np.max(np.abs(values)), 1e-30))
        for name, values in expected.items()
    ]
    error = float(np.max(differences))  # NaN, if there is one
    half = any(layer.compute_dtype in HALF for layer in graph.walk(model))
    tolerance = max(5e-2 if half else 0, TOLERANCES[quantize])
    if not error <= tolerance:  # so that NaN fails
        remedy = "Pass more `images`, of all kinds, or quantize='dynamic'. " if quantize == "int8" else ""
        raise RuntimeError(
            f"The exported network does not compute what {model.name!r} computes: outputs differ by {error:.2g} of the "
            f"largest one, where rounding explains {tolerance:g}. {remedy}Nothing was written."
        )
    name, first = next(iter(expected.items()))
    classes = first.ndim == 2 and first.shape[1] > 1
    same = np.argmax(outputs[name], axis=-1) == np.argmax(first, axis=-1)
    return {"max_error": error, "agreement": float(np.mean(same)) if classes else None}


def _report(model, weights, artifact: Path, checked: dict[str, Any]) -> ExportReport:
    raw_bytes, gzip_bytes = _file_sizes(artifact)
    return ExportReport(**facts(model, weights), raw_bytes=raw_bytes, gzip_bytes=gzip_bytes, **checked)


def _file_sizes(artifact: Path) -> tuple[int, int]:
    """Bytes of a file or of the files in a folder, plain and after gzip; names and times of files do not count."""
    if artifact.is_file():
        data = artifact.read_bytes()
        return len(data), len(gzip.compress(data, mtime=0))
    files = sorted(file for file in artifact.rglob("*") if file.is_file())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            entry = tarfile.TarInfo(file.relative_to(artifact).as_posix())  # no times, no owners
            entry.size = file.stat().st_size
            archive.addfile(entry, io.BytesIO(file.read_bytes()))
    return sum(file.stat().st_size for file in files), len(gzip.compress(packed.getvalue(), mtime=0))


def _json(report: ExportReport) -> str:
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"
