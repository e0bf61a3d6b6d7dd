import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from kerascompress import export, litert, models
from kerascompress.augment import RandAugment
from kerascompress.export import export_litert, export_saved_model
from kerascompress.pruning import prune_low_magnitude, prune_now, strip_pruning
from kerascompress.wrapper import PruneLowMagnitude, update_masks

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="there, another process exports on TensorFlow, see test_backends.py"
)


def tiny(**kwargs):
    return models.resnet(8, 10, **{"input_shape": (8, 8, 1), "width": 4, "seed": 0} | kwargs)


def two_layers(seed=0):
    """Where what is asserted is about files and not about networks."""
    inputs = keras.Input((8, 8, 1), name="images")
    x = keras.layers.Conv2D(4, 3, activation="relu", kernel_initializer=keras.initializers.GlorotUniform(seed))(inputs)
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)), name="two_layers")


def pruned(model, sparsity):
    """A model with masks at `sparsity` and raw kernels that are not zero under them."""
    model = prune_low_magnitude(model, pruning_schedule=lambda step: (True, sparsity))
    for layer in model.layers:
        if isinstance(layer, PruneLowMagnitude):
            update_masks([layer], sparsity)
    return model


def images(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("float32")


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False)).astype("float32")


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def serve(path, x):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return loaded.serve(x).numpy()


TENSORFLOW_ALONE = """
import json, sys
import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
np.save(sys.argv[3], loaded.serve(np.load(sys.argv[2])).numpy())
weights = {weight.name.removesuffix(":0"): weight.numpy() for weight in loaded.weights}
print(json.dumps({
    "package": "kerascompress" in sys.modules,
    "size": {name: weight.size for name, weight in weights.items()},
    "nonzeros": {name: int(np.count_nonzero(weight)) for name, weight in weights.items()},
}))
"""


@pytest.mark.once
def test_resnet20_at_80_percent_runs_with_tensorflow_alone_as_sparse_as_reported(tmp_path):
    dense = models.resnet20(10, seed=0)
    model, x = pruned(dense, 0.8), images(4, 32, 32, 3)
    report = export_saved_model(model, tmp_path / "net")

    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", TENSORFLOW_ALONE, *(str(tmp_path / name) for name in ("net", "x.npy", "y.npy"))]
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)

    assert not found["package"]
    expected = outputs(model, x)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert sum(found["size"].values()) == report.parameters == 272_474 + 2 * 784  # with BatchNorm's moving statistics
    assert sum(found["nonzeros"].values()) == report.nonzeros
    kernels = [name for name in found["size"] if name.endswith("/kernel")]
    assert [kernel["name"] for kernel in report.kernels] == kernels
    for kernel in report.kernels:
        size, nonzeros = found["size"][kernel["name"]], found["nonzeros"][kernel["name"]]
        assert (kernel["weights"], kernel["nonzeros"]) == (size, nonzeros)
        assert kernel["sparsity"] == pytest.approx(1 - nonzeros / size)
        assert nonzeros == pytest.approx(0.2 * size, rel=0.01)  # ties at the threshold stay
    zeros = sum(found["size"][name] - found["nonzeros"][name] for name in kernels)
    assert report.sparsity == pytest.approx(zeros / sum(found["size"][name] for name in kernels))
    assert report.gzip_bytes < export_saved_model(dense, tmp_path / "dense").gzip_bytes / 2


@pytest.mark.once
@pytest.mark.quick
def test_report_is_written_into_the_folder_and_prints_as_a_table(tmp_path):
    report = export_saved_model(pruned(tiny(), 0.5), tmp_path / "net")
    assert json.loads((tmp_path / "net" / "report.json").read_text()) == dataclasses.asdict(report)
    files = [p for p in (tmp_path / "net").rglob("*") if p.is_file() and p.name != "report.json"]
    assert report.raw_bytes == sum(p.stat().st_size for p in files)
    assert 0 < report.gzip_bytes < report.raw_bytes
    assert 0 <= report.max_error < 1e-4
    assert "stage2_block0_conv1/kernel" in str(report)
    assert f"{report.nonzeros:,} of them not zero" in str(report)


@pytest.mark.once
def test_every_weight_is_stored_once(tmp_path):
    import tensorflow as tf

    model = tiny()
    export_saved_model(model, tmp_path / "net")
    shapes = tf.train.load_checkpoint(str(tmp_path / "net/variables/variables")).get_variable_to_shape_map()
    shapes = [shape for name, shape in shapes.items() if name.endswith("VARIABLE_VALUE")]
    assert sum(math.prod(shape) for shape in shapes) == model.count_params()


@pytest.mark.once
def test_the_model_stays_as_it_is(tmp_path):
    model = pruned(tiny(), 0.5)
    wrappers = [layer for layer in model.layers if isinstance(layer, PruneLowMagnitude)]
    expected = outputs(model, images(4, 8, 8, 1))
    export_saved_model(model, tmp_path / "net")
    assert [layer for layer in model.layers if isinstance(layer, PruneLowMagnitude)] == wrappers != []
    np.testing.assert_array_equal(outputs(model, images(4, 8, 8, 1)), expected)


@pytest.mark.once
def test_any_batch_height_and_width(tmp_path):
    model = tiny(input_shape=(None, None, 1))
    export_saved_model(model, tmp_path / "net")
    for shape in ((4, 8, 8, 1), (2, 9, 12, 1)):
        expected = outputs(model, images(*shape))
        np.testing.assert_allclose(serve(tmp_path / "net", images(*shape)), expected, rtol=1e-3, atol=1e-4)


def test_augmentation_layers_leave_nothing(tmp_path):
    import tensorflow as tf

    net = tiny()
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), RandAugment(magnitude=14, seed=0), keras.layers.RandomFlip(seed=1), net]
    )
    report = export_saved_model(model, tmp_path / "net")
    loaded = tf.saved_model.load(str(tmp_path / "net"))
    assert [weight.name for weight in loaded.weights] == [f"{weight.path}:0" for weight in net.weights]
    assert report.parameters == net.count_params()
    graph = loaded.signatures["serving_default"].graph.as_graph_def()
    kinds = {node.op for function in graph.library.function for node in function.node_def}
    assert not [kind for kind in kinds if "random" in kind.lower() or "assign" in kind.lower()]
    x = images(4, 8, 8, 1)
    np.testing.assert_allclose(loaded.serve(x), outputs(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_reduced_precision(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert export_saved_model(pruned(tiny(), 0.5), tmp_path / "net").max_error < 5e-2


def test_an_existing_path_is_refused_and_left_intact(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("precious")
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match=r"exists already\. Choose another path, or pass `overwrite=True`"):
        export_saved_model(two_layers(), tmp_path / "net")
    with pytest.raises(FileExistsError, match="replaces SavedModels only"):
        export_saved_model(two_layers(), tmp_path / "net", overwrite=True)
    assert everything_in(tmp_path) == before


@pytest.mark.once
def test_overwrite_replaces_a_saved_model(tmp_path):
    export_saved_model(two_layers(), tmp_path / "net")
    model = two_layers(seed=5)
    export_saved_model(model, tmp_path / "net", overwrite=True)
    x = images(4, 8, 8, 1)
    np.testing.assert_allclose(serve(tmp_path / "net", x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["crash", "wrong", "nan", "interrupt"])
def test_a_failed_export_leaves_everything_as_it_was(tmp_path, monkeypatch, kind):
    def run(folder, x):
        assert (folder / "saved_model.pb").exists()
        if kind in ("crash", "interrupt"):
            raise OSError("disk full") if kind == "crash" else KeyboardInterrupt
        return np.full((len(x), 10), np.nan if kind == "nan" else 1e6)

    error = {"crash": OSError, "interrupt": KeyboardInterrupt}.get(kind, RuntimeError)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "saved_model.pb").write_bytes(b"an older one")
    before = everything_in(tmp_path)
    monkeypatch.setattr(export, "_run_saved_model", run)
    with pytest.raises(error, match={RuntimeError: "does not compute what 'two_layers' computes"}.get(error)):
        export_saved_model(two_layers(), tmp_path / "net")
    with pytest.raises(error):
        export_saved_model(two_layers(), tmp_path / "old", overwrite=True)
    assert everything_in(tmp_path) == before


@pytest.mark.once
@pytest.mark.parametrize(
    ("quantize", "policy", "limit"),
    [
        (None, "float32", 0.01),
        ("float16", "float32", 0.01),
        ("dynamic", "float32", 0.15),
        ("int8", "float32", 0.25),
        (None, "mixed_bfloat16", 0.05),
        ("dynamic", "mixed_bfloat16", 0.15),
    ],
)
def test_outputs_that_differ_by_more_than_rounding_explains_are_refused(quantize, policy, limit):
    keras.config.set_dtype_policy(policy)
    model, expected = two_layers(), {"output_0": np.array([[50.0, -100.0]])}
    just_below, just_above = ({"output_0": np.array([[50.0, -100.0 - share * limit]])} for share in (99, 101))
    checked = export._checked(model, just_below, expected, quantize)
    assert checked == {"max_error": pytest.approx(0.99 * limit, rel=1e-3), "agreement": 1}
    with pytest.raises(RuntimeError, match=rf"where rounding explains {limit:g}\."):
        export._checked(model, just_above, expected, quantize)


def test_litert_file_computes_the_same_and_shrinks_by_itself(tmp_path):
    import tensorflow as tf

    dense = tiny(width=16)
    model, x = pruned(dense, 0.8), images(4, 8, 8, 1)
    report = export_litert(model, tmp_path / "net.tflite")
    with pytest.warns(UserWarning, match="tf.lite.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(str(tmp_path / "net.tflite"))
    found = interpreter.get_signature_runner("serving_default")(images=x)["output_0"]
    np.testing.assert_allclose(found, outputs(model, x), rtol=1e-3, atol=1e-4)
    assert report.raw_bytes == (tmp_path / "net.tflite").stat().st_size
    assert report.gzip_bytes == len(gzip.compress((tmp_path / "net.tflite").read_bytes(), mtime=0))
    assert json.loads((tmp_path / "net.tflite.json").read_text()) == dataclasses.asdict(report)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert report.raw_bytes < export_litert(dense, tmp_path / "dense.tflite").raw_bytes / 2
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        export_litert(model, tmp_path / "net.tflite")
    with pytest.raises(ValueError, match=r"ends in '\.tflite'"):
        export_litert(model, tmp_path / "net")
    assert everything_in(tmp_path) == before
    assert export_litert(model, tmp_path / "dense.tflite", overwrite=True) == report
    assert (tmp_path / "dense.tflite").read_bytes() == before["net.tflite"]


def dense_network(block_size=(1, 1), sparsity=0.8):
    hidden = [keras.layers.Dense(64, activation="relu", name=f"hidden{i}") for i in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, name="logits")])
    model = prune_low_magnitude(model, lambda step: (True, sparsity), block_size=block_size)
    for layer in model.layers:
        update_masks([layer], sparsity)
    return strip_pruning(model)


def executions(report):
    return {kernel["name"].split("/")[-2]: kernel["execution"] for kernel in report.kernels}


def sparse_tensors(path):
    """The block shapes of the tensors that the file stores sparsely, by the number of their outputs."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    tensors = [model.Subgraphs(0).Tensors(i) for i in range(model.Subgraphs(0).TensorsLength())]
    return {t.Shape(0): t.Sparsity().BlockMapLength() for t in tensors if t.Sparsity() is not None}


@pytest.mark.once
@pytest.mark.parametrize(
    ("block_size", "stored", "reason"),
    [
        ((4, 1), {64: 1, 10: 1}, "sparse: in blocks of (4, 1)"),
        ((1, 4), {64: 0, 10: 0}, "stored: the zeros are not in blocks of (4, 1)"),
        ((1, 1), {64: 0, 10: 0}, "stored: the zeros are not in blocks of (4, 1)"),
    ],
)
def test_the_report_tells_which_zeros_litert_skips(tmp_path, block_size, stored, reason):
    report = export_litert(dense_network(block_size), tmp_path / "net.tflite")
    assert all(each.startswith(reason) for each in executions(report).values())
    assert sparse_tensors(tmp_path / "net.tflite") == stored
    assert f"hidden0/kernel: {reason}" in str(report)


@pytest.mark.tensorflow_only  # says the same on every backend
def test_few_zeros_are_stored_as_they_are(tmp_path):
    report = export_litert(dense_network(sparsity=0.2), tmp_path / "net.tflite")
    assert set(executions(report).values()) == {"dense: fewer than 30% zeros"}
    assert sparse_tensors(tmp_path / "net.tflite") == {}


@pytest.mark.once
@pytest.mark.parametrize(
    ("quantize", "bytes_per_weight", "error"),
    [(None, 4, 1e-5), ("float16", 2, 2e-3), ("dynamic", 1, 0.05), ("int8", 1, 0.05)],
)
def test_quantised_files_are_as_small_and_as_exact_as_their_numbers(tmp_path, quantize, bytes_per_weight, error):
    wide = keras.Sequential(
        [keras.Input((64,)), *(keras.layers.Dense(256, "relu") for _ in range(2)), keras.layers.Dense(10)]
    )
    x = images(100, 64) / 128 - 1
    report = export_litert(wide, tmp_path / "net.tflite", images=x, quantize=quantize)
    assert 1 < report.raw_bytes / (bytes_per_weight * 84_736) < 1.2  # weights and biases
    assert report.max_error < error
    expected = outputs(wide, x)
    found = litert.run(tmp_path / "net.tflite", {"images": x})["output_0"]
    assert found.dtype == "float32"
    assert report.agreement == np.mean(found.argmax(-1) == expected.argmax(-1)) > 0.9
    assert report.max_error == pytest.approx(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.tensorflow_only  # says the same on every backend
@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        ("float16", "dense: LiteRT cannot run float16 and zeros in blocks or in transposed convolutions"),
        ("dynamic", "dense: LiteRT cannot run int8 and sparse storage"),
        ("int8", "dense: LiteRT cannot run int8 and sparse storage"),
    ],
)
def test_sparse_storage_that_litert_cannot_run_is_never_written(tmp_path, quantize, reason):
    x = images(20, 64) / 128 - 1
    report = export_litert(dense_network((4, 1), 0.9), tmp_path / "net.tflite", images=x, quantize=quantize)
    assert set(executions(report).values()) == {reason}
    assert sparse_tensors(tmp_path / "net.tflite") == {}


def one_kind(layer, *shape):
    inputs = keras.Input(shape)
    x = layer(inputs, inputs) if isinstance(layer, keras.layers.MultiHeadAttention) else layer(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))


@pytest.mark.tensorflow_only  # says the same on every backend
@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize(
    ("layer", "shape", "sparsity"),
    [
        (keras.layers.Conv1D(64, 3), (16, 32), 0.8),
        (keras.layers.EinsumDense("abc,cde->abde", (16, 4, 32)), (16, 64), 0.8),
        (keras.layers.MultiHeadAttention(4, 16), (8, 64), 0.8),
        (keras.layers.MultiHeadAttention(4, 16), (8, 64), 0.98),  # few enough to look like blocks
        (keras.layers.Conv2DTranspose(32, 3, strides=2), (8, 8, 16), 0.8),
        (keras.layers.Conv3D(32, 3), (4, 4, 4, 16), 0.8),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, keras.Layer) else str(each),
)
def test_what_is_stored_sparsely_is_what_the_report_says(tmp_path, layer, shape, sparsity, quantize):
    model = prune_now(one_kind(layer, *shape), sparsity, allow=lambda variable: "kernel" in variable.name)
    x = images(4, *shape) / 128 - 1
    report = export_litert(model, tmp_path / "net.tflite", images=x, quantize=quantize)
    *ours, _ = executions(report).values()
    (of_layer,) = {verdict.partition(":")[0] for verdict in ours}
    stored = sum(kernel["weights"] for kernel in report.kernels) * (2 if quantize else 4)
    assert (report.raw_bytes < 0.85 * stored) == (of_layer == "stored")


@pytest.mark.tensorflow_only  # says the same on every backend
def test_half_precision_and_single_zeros_go_together(tmp_path):
    report = export_litert(dense_network(), tmp_path / "net.tflite", quantize="float16")
    assert sparse_tensors(tmp_path / "net.tflite") == {64: 0, 10: 0}
    assert report.max_error < 2e-3


@pytest.mark.tensorflow_only  # says the same on every backend
def test_a_convolutional_network_in_int8_keeps_its_batch_norm_and_answers(tmp_path):
    model = tiny(width=8)
    x = images(20, 8, 8, 1)
    report = export_litert(model, tmp_path / "net.tflite", images=x, quantize="int8")
    assert report.max_error < 0.1
    assert report.raw_bytes < export_litert(model, tmp_path / "dense.tflite").raw_bytes / 2


@pytest.mark.once
def test_an_int8_file_that_lost_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "run", lambda file, named: {"output_0": 1.3 * outputs(model, named["images"])})
    model = dense_network()
    for before in ({}, {"net.tflite": b"old", "net.tflite.json": b"older"}):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError, match=r"differ by 0\.3 .*rounding explains 0\.25\. Pass more `images`"):
            export_litert(model, tmp_path / "net.tflite", images=images(8, 64), quantize="int8", overwrite=True)
        assert everything_in(tmp_path) == before


@pytest.mark.tensorflow_only  # says the same on every backend
def test_latency_is_told_beside_the_dense_network(tmp_path):
    pytest.importorskip("ai_edge_litert")
    report = export_litert(dense_network((4, 1)), tmp_path / "net.tflite", latency_runs=50)
    assert set(report.latency) == {"dense", "exported"}
    assert all(0 < times["min"] <= times["median"] for times in report.latency.values())
    assert "exported: " in str(report)
    assert json.loads((tmp_path / "net.tflite.json").read_text())["latency"] == report.latency


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int4"}, r"one of \(None, 'float16', 'dynamic', 'int8'\). Received: quantize='int4'"),
        ({"quantize": "int8"}, "needs `images` for calibration"),
        ({"latency_runs": 3}, "at least 50.*or 0. Received: latency_runs=3"),
    ],
)
def test_arguments_of_litert_that_are_not_allowed(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export_litert(dense_network(), tmp_path / "net.tflite", **settings)


@pytest.mark.tensorflow_only  # says the same on every backend
def test_without_litert_of_its_own_tensorflow_runs_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "_has_litert", lambda: False)
    assert export_litert(dense_network(), tmp_path / "net.tflite").max_error < 1e-5
    with pytest.raises(ValueError, match="pip install ai-edge-litert"):
        export_litert(dense_network(), tmp_path / "other.tflite", latency_runs=50)


def several(kind):
    """A model with several or named inputs and outputs, and the names that they have in its signature."""
    batch = 2 if kind == "a fixed batch" else None
    a, b = (keras.Input((size,), batch, name=name) for size, name in ((3, "left"), (5, "right")))
    box = keras.layers.Dense(4, name="box")(b)
    label = keras.layers.Dense(2, name="label")(keras.layers.Concatenate()([a, box]))
    return {
        "a fixed batch": (lambda: keras.Model(b, box), ["images"], ["output_0"]),
        "lists": (lambda: keras.Model([a, b], [label, box]), ["left", "right"], ["output_0", "output_1"]),
        "dictionaries": (
            lambda: keras.Model({"right": b, "left": a}, {"class": label, "box": box}),
            ["left", "right"],
            ["box", "class"],
        ),
        "dictionaries of one": (lambda: keras.Model({"right": b}, {"where": box}), ["right"], ["where"]),
    }[kind]


@pytest.mark.parametrize("kind", ["a fixed batch", "lists", "dictionaries", "dictionaries of one"])
@pytest.mark.parametrize("file_format", ["SavedModel", "LiteRT"])
def test_several_inputs_and_outputs_keep_their_names_and_a_batch_size_stays(tmp_path, kind, file_format):
    import tensorflow as tf

    build, input_names, output_names = several(kind)
    model = pruned(build(), 0.5)
    named = {each: images(2, 3 if each == "left" else 5) for each in input_names}
    given = named if kind.startswith("dict") else list(named.values())
    given = given if len(given) > 1 or isinstance(given, dict) else given[0]
    expected = keras.tree.map_structure(keras.ops.convert_to_numpy, model(given, training=False))
    flat = keras.tree.flatten(expected)  # sorted by key, as the names above
    if file_format == "SavedModel":
        report = export_saved_model(model, tmp_path / "net")
        export_saved_model(model, tmp_path / "again", images=given)
        loaded = tf.saved_model.load(str(tmp_path / "net"))
        found = loaded.signatures["serving_default"](**{name: tf.constant(x) for name, x in named.items()})
        served = loaded.serve(given)
        keras.tree.assert_same_structure(keras.tree.map_structure(np.asarray, served), expected)
        for output, values in zip(keras.tree.flatten(served), flat, strict=True):
            np.testing.assert_allclose(output, values, rtol=1e-4, atol=1e-3)
    else:
        report = export_litert(model, tmp_path / "net.tflite")
        with pytest.warns(UserWarning, match="tf.lite.Interpreter is deprecated"):
            interpreter = tf.lite.Interpreter(str(tmp_path / "net.tflite"))
        found = interpreter.get_signature_runner("serving_default")(**named)
    assert sorted(found) == output_names
    for name, values in zip(output_names, flat, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-3)
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_an_output_that_differs_is_found_among_several(tmp_path, monkeypatch):
    def run(folder, x):
        return {"box": np.zeros((4, 4)), "class": np.zeros((4, 2))}

    monkeypatch.setattr(export, "_run_saved_model", run)
    with pytest.raises(RuntimeError, match="outputs differ by 1 of the largest one"):
        export_saved_model(several("dictionaries")[0](), tmp_path / "net")
    assert not everything_in(tmp_path)


@pytest.mark.parametrize(
    ("kind", "given", "received"),
    [
        ("a fixed batch", np.zeros((3, 5)), r"images \(2, 5\). Received: \[\(3, 5\)\]"),
        ("a fixed batch", np.zeros((0, 5)), r"not empty.*images \(2, 5\). Received: \[\(0, 5\)\]"),
        ("lists", [np.zeros((4, 3))], r"left \(None, 3\), right \(None, 5\). Received: \[\(4, 3\)\]"),
        ("lists", np.zeros((2, 4, 3)), r"right \(None, 5\). Received: \[\(4, 3\), \(4, 3\)\]"),
        ("dictionaries", {"left": np.zeros((4, 3)), "write": np.zeros((4, 5))}, "Received: left, write"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(tmp_path, kind, given, received):
    with pytest.raises(ValueError, match=rf"`images` must be what .* takes.*{received}"):
        export_saved_model(several(kind)[0](), tmp_path / "net", images=given)
    assert not everything_in(tmp_path)


def test_a_data_set_is_no_batch_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"one batch of arrays\. Received: images of type generator"):
        export_saved_model(two_layers(), tmp_path / "net", images=(each for each in [images(4, 8, 8, 1)]))


@pytest.mark.once
def test_a_model_that_takes_no_pixels_asks_for_images(tmp_path):
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(3, 2), keras.layers.Flatten()])
    with pytest.raises(ValueError, match=r"does not take random whole numbers.*pass some inputs as `images`"):
        export_saved_model(model, tmp_path / "net")
    assert not everything_in(tmp_path)


def test_the_first_batch_of_a_sequential_model_does_not_fix_its_size(tmp_path):
    model = keras.Sequential([keras.layers.Conv2D(2, 3), keras.layers.Flatten(), keras.layers.Dense(3)])
    model(images(2, 8, 8, 1))
    export_saved_model(model, tmp_path / "net")
    np.testing.assert_allclose(
        serve(tmp_path / "net", images(5, 8, 8, 1)), outputs(model, images(5, 8, 8, 1)), rtol=1e-4
    )
    report = export_litert(model, tmp_path / "net.tflite", images=images(3, 8, 8, 1))
    assert report.max_error < 1e-5


@pytest.mark.once
def test_all_batches_of_a_fixed_size_calibrate_int8(tmp_path, monkeypatch):
    sizes, convert = [], litert.convert
    monkeypatch.setattr(
        litert, "convert", lambda *args, **settings: sizes.extend(map(shape, args[2]())) or convert(*args, **settings)
    )
    shape = lambda sample: sample["images"].shape  # noqa: E731
    inputs = keras.Input((64,), 2, name="images")
    model = keras.Model(inputs, keras.layers.Dense(10)(inputs))
    report = export_litert(model, tmp_path / "net.tflite", quantize="int8", images=images(8, 64) / 128 - 1)
    assert sizes == [(2, 64)] * 4
    assert report.max_error < 0.05


@pytest.mark.once
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_litert_file_of_reduced_precision_is_one_of_float32(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6, 3))
    x = keras.layers.Bidirectional(keras.layers.GRU(4, unroll=True))(keras.layers.Dense(3, activation="relu")(inputs))
    x = keras.layers.Lambda(lambda x: x * 0.5)(keras.layers.BatchNormalization()(x))  # copies share it
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    report = export_litert(model, tmp_path / "net.tflite", images=images(4, 6, 3) / 256)
    assert report.max_error < 5e-2
    assert {layer.compute_dtype for layer in model._flatten_layers()} == {policy.removeprefix("mixed_")}


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
def test_what_keras_has_quantized_is_no_litert_file(tmp_path):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"has quantized. Received: \['head'\].*Export the float model"):
        export_litert(model, tmp_path / "net.tflite", images=np.ones((2, 8), "float32"))


@pytest.mark.once
def test_weights_of_reduced_precision_that_float32_cannot_take_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.GRU(4, unroll=True, dtype="float16")])
    with pytest.raises(ValueError, match=r"computes in float32.*set_dtype_policy\("):
        export_litert(model, tmp_path / "net.tflite", images=images(4, 6, 3) / 256)


@pytest.mark.once
def test_the_file_beside_a_litert_file_is_replaced_only_on_request(tmp_path):
    (tmp_path / "net.tflite.json").write_text("precious")
    with pytest.raises(FileExistsError, match=r"net\.tflite\.json exists already"):
        export_litert(two_layers(), tmp_path / "net.tflite")
    assert everything_in(tmp_path) == {"net.tflite.json": b"precious"}


class Subclassed(keras.Model):
    def call(self, x):
        return x


def bad_models():
    first, second, text = keras.Input((3,)), keras.Input((3,)), keras.Input((), dtype="string")
    nan = keras.Sequential([keras.Input((3,)), keras.layers.Rescaling(math.nan)])
    subclassed = Subclassed()
    subclassed.build((None, 3))
    return [
        (keras.Sequential([keras.layers.Dense(2)]), "not built"),
        (subclassed, "[Ss]ubclassed"),
        (keras.Model([first, [second]], keras.layers.Add()([first, second])), "must be tensors, or a list or"),
        (keras.Model([first, keras.Input((3,), name="a b")], first), r"name of an input.*Received: \['a b'\]"),
        (nan, "not all finite.*as `images`"),
        (keras.Model(text, keras.layers.Identity()(text)), r"takes numbers.*\['images'\] are strings"),
        ("resnet20", "Keras 3 model"),
    ]


@pytest.mark.tensorflow_only
def test_what_holds_something_of_tensorflows_is_refused(tmp_path):
    inputs = keras.Input((3,), dtype="int64")
    model = keras.Model(inputs, keras.layers.IntegerLookup(vocabulary=[1, 2])(inputs))
    with pytest.raises(ValueError, match=r"no weight of it, such as the table of a lookup layer"):
        export_saved_model(model, tmp_path / "net")
    assert not everything_in(tmp_path)


def relu(x):
    """Of the name of another."""
    return keras.ops.leaky_relu(x, 0.5)


def test_the_artifact_is_held_against_the_model_itself(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation=relu)])
    export_saved_model(model, tmp_path / "net")
    x = images(5, 4)
    np.testing.assert_allclose(serve(tmp_path / "net", x), outputs(model, x), rtol=1e-5)
    other = keras.models.clone_model(model)
    monkeypatch.setattr("kerascompress.export.strip_pruning", lambda model: other)  # a copy that is none
    with pytest.raises(RuntimeError, match="differ"):
        export_saved_model(model, tmp_path / "other")


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    for model, message in bad_models():
        with pytest.raises(ValueError, match=message):
            export_saved_model(model, tmp_path / "net")
    assert not everything_in(tmp_path)


@pytest.mark.once
def test_a_loop_is_not_calibrated(tmp_path):
    inputs = keras.Input((6, 4), batch_size=1)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.LSTM(4, name="loop")(inputs)))
    with pytest.raises(ValueError, match=r"Received: \['loop'\].*`unroll=True`"):
        export_litert(model, tmp_path / "net.tflite", images=images(8, 6, 4), quantize="int8")


@pytest.mark.parametrize("together", [True, False])
def test_several_inputs_of_free_size_go_together_or_apart(tmp_path, together):
    inputs = [keras.Input((None, None, 1), name=name) for name in "ab"]
    net = keras.layers.Conv2D(2, 3, padding="same")
    if together:
        x = keras.layers.GlobalAveragePooling2D()(net(keras.layers.Concatenate()(inputs)))
    else:
        x = keras.layers.Add()([keras.layers.GlobalAveragePooling2D()(net(each)) for each in inputs])
    model = keras.Model(inputs, x)
    sizes = (7, 7) if together else (7, 9)
    given = [images(3, size, size + 1, 1) for size in sizes]
    export_saved_model(model, tmp_path / "net", images=given)
    np.testing.assert_allclose(serve(tmp_path / "net", given), outputs(model, given), rtol=1e-4)


def test_a_model_that_needs_no_copy_is_exported_though_it_has_none(tmp_path):
    class Closed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, offset = keras.layers.Dense(2), 3
            self.function = lambda x: x + offset

        def call(self, x):
            return self.function(self.dense(x))

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Closed()(inputs))
    export_saved_model(model, tmp_path / "net")
    with pytest.raises(ValueError, match="does not tell what its inputs are"):
        export_saved_model(model.layers[-1], tmp_path / "other")


@pytest.mark.once
def test_images_of_ones_own(tmp_path):
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(3, 2), keras.layers.Flatten()])
    export_saved_model(model, tmp_path / "net", images=np.array([[0, 1, 2, 0]]))
    x = np.array([[2, 2, 1, 0], [0, 0, 0, 1]], "int32")
    np.testing.assert_array_equal(serve(tmp_path / "net", x), outputs(model, x))


@pytest.mark.tensorflow_only
def test_a_loop_over_a_batch_of_any_size_is_told_how_litert_takes_it(tmp_path):
    model = keras.Sequential([keras.Input((7, 5)), keras.layers.LSTM(4), keras.layers.Dense(3)])
    with pytest.raises(RuntimeError, match="unroll=True"):
        export_litert(model, tmp_path / "net.tflite", images=np.zeros((4, 7, 5), "float32"))
    assert not (tmp_path / "net.tflite").exists()


@pytest.mark.parametrize("write", [export_saved_model, export_litert])
def test_many_images_are_run_a_few_at_a_time(tmp_path, monkeypatch, write):
    monkeypatch.setattr(litert, "AT_ONCE", 3)
    seen, named = [], export._named
    monkeypatch.setattr(export, "_named", lambda outputs: seen.append(named(outputs)) or seen[-1])
    write(two_layers(), tmp_path / "net.tflite", images=images(7, 8, 8, 1))
    assert [len(each["output_0"]) for each in seen[:3]] == [3, 3, 1]
    assert [len(each) for each in litert.batches(np.zeros(7), None)] == [3, 3, 1]
    assert [len(each) for each in litert.batches(np.zeros(7), 2)] == [2, 2, 2]
