"""What a network gains on a device: size, multiplications, latency and accuracy of each way to compress it.

    python benchmarks/edge.py --data_dir DIR --stage train    # TensorFlow backend; DIR holds cifar-10-batches-py/
    python benchmarks/edge.py --data_dir DIR --stage time     # leave the machine alone meanwhile

Two networks, MobileNetV2 (width 0.5, 96x96) and one of dense layers (32x32 pixels), are trained for --epochs on real
CIFAR-10 images. Each arm goes on from there for as many epochs, compressed in its way, and is exported to LiteRT; so
all have seen the same number of epochs, and an int8 file has the weights of its float32 one. Accuracy is that of the
exported file. Latency: one thread, batch 1, all files of a network taking turns. Needs `pip install
ai-edge-litert`. Prints tables, writes the same as JSON and as a chart.

`train` takes some 20 minutes of processor time, on a busy machine too; networks and files are kept in the folder --out
and not made again. `time` takes half a minute. `--smoke` does both in one or two minutes.
"""

import argparse
import json
import os
import pathlib
import pickle

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import kerascompress as kc
from kerascompress import litert

BATCH = 64


def load(data_dir, part, count):
    files = ["test_batch"] if part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    images, labels = [], []
    for name in files:
        with (pathlib.Path(data_dir) / "cifar-10-batches-py" / name).open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        images.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += batch[b"labels"]
    return np.concatenate(images)[:count].astype("float32"), np.array(labels[:count])


def enlarged(images, size):
    if size == images.shape[1]:
        return images
    parts = [keras.ops.image.resize(part, (size, size)) for part in np.array_split(images, max(len(images) // 256, 1))]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


# --- networks ---


def mobilenet(size):
    return kc.models.mobilenet_v2(10, width=0.5, stem="imagenet", input_shape=(size, size, 3), seed=0)


def dense_network(size):
    """Three layers of 1024, as wide as their input."""
    hidden = [keras.layers.Dense(1024, activation="relu") for _ in range(3)]
    pixels = [keras.Input((size, size, 3)), keras.layers.Rescaling(1 / 64, -2), keras.layers.AveragePooling2D(2)]
    return keras.Sequential([*pixels, keras.layers.Flatten(), *hidden, keras.layers.Dense(10)], name="dense_network")


NETWORKS = ((mobilenet, 96), (dense_network, 32))

# --- arms: the trained network -> a network to train on, the settings of its pruning, its exported files ---


def arms(network):
    """Yields name, network, sparsity and rule of `PruningOptimizer` or None, and files: {name: quantisation}."""
    half, quarter = (kc.prune_channels(network, sparsity, round_to=8) for sparsity in (0.5, 0.75))
    kernels = [kc.summary(each) for each in (half, network)]
    left, whole = (sum(kernel["weights"] for kernel in each.kernels) for each in kernels)
    same = 1 - left / whole  # as few weights that are not zero
    yield "dense", network, None, {"dense": None, "int8": "int8"}
    for sparsity in (0.8, same):
        name = f"unstructured {sparsity:.3g}".replace("0.", ".")
        yield name, network, (sparsity, {"scope": "global"}), {name: None}
    if all(len(kernel["shape"]) == 2 for kernel in kernels[0].kernels):
        yield "blocks", network, (0.9, {"block_size": (4, 1)}), {"(4, 1) blocks .9": None}
    yield "channels .5", half, None, {"channels .5": None, "channels .5, int8": "int8"}
    yield "channels .75", quarter, None, {"channels .75": None}


def train(network, images, labels, epochs, pruning=None):
    keras.utils.set_random_seed(0)
    steps = epochs * -(-len(images) // BATCH)
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.02, steps), momentum=0.9, nesterov=True)
    if pruning:
        sparsity, rule = pruning
        schedule = kc.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=steps // 2, frequency=10)
        optimizer = kc.PruningOptimizer(optimizer, schedule, **rule)
    network.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    flips = np.random.default_rng(0)
    for _ in range(epochs):
        flip = flips.random(len(images)) < 0.5
        batch = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
        network.fit(batch, labels, batch_size=BATCH, verbose=0)


def accuracy(file, images, labels):
    runner = litert.interpreter(file).get_signature_runner("serving_default")
    right = [
        np.argmax(runner(images=images[i : i + BATCH])["output_0"], -1) == labels[i : i + BATCH]
        for i in range(0, len(images), BATCH)
    ]
    return float(np.mean(np.concatenate(right)))


def kept(file, make):
    """The network in a file; where there is none yet, it is made first."""
    if not file.exists():
        partial = file.with_name("partial.keras")
        make().save(partial)
        partial.replace(file)
    return keras.models.load_model(file, compile=False)


def train_arms(build, size, options, folder):
    """Leaves the files of a network and their rows, `<network>.json`, in a folder, but for those that are there."""
    images, labels = load(options.data_dir, "train", options.images)
    test, answers = load(options.data_dir, "test", options.test_images)
    images, test = enlarged(images, size), enlarged(test, size)
    listed = folder / f"{build.__name__}.json"
    rows = json.loads(listed.read_text()) if listed.exists() else []

    def after_training(network, pruning=None):
        train(network, images, labels, options.epochs, pruning)
        return network

    dense = kept(folder / f"{build.__name__}.keras", lambda: after_training(build(size)))
    for name, start, pruning, files in arms(dense):
        file = folder / f"{build.__name__} {name}.keras"
        small = kept(file, lambda start=start, pruning=pruning: after_training(kc.strip_pruning(start), pruning))
        for arm, quantize in files.items():
            if any(row["arm"] == arm for row in rows):
                continue
            exported = folder / f"{build.__name__} {arm}.tflite"
            report = kc.export_litert(small, exported, images=images[:200], quantize=quantize)
            row = {"network": build.__name__, "arm": arm, "accuracy": accuracy(exported, test, answers)}
            row |= {key: getattr(report, key) for key in ("parameters", "nonzeros", "macs", "raw_bytes", "gzip_bytes")}
            rows.append(row | {"agreement": report.agreement})
            listed.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{build.__name__}, {arm}: {row['accuracy']:.1%}", flush=True)


def timed(build, size, options, folder):
    """The rows of a network with the latency of their files."""
    listed = folder / f"{build.__name__}.json"
    if not listed.exists():
        raise FileNotFoundError(f"There is no {listed}. Run with --stage train and the same settings first.")
    rows = json.loads(listed.read_text())
    image = enlarged(load(options.data_dir, "test", 1)[0], size)
    files = {row["arm"]: folder / f"{build.__name__} {row['arm']}.tflite" for row in rows}
    times = litert.latency(files, {"images": image}, options.runs)
    return [row | times[row["arm"]] for row in rows]


# --- what is shown ---


def table(rows):
    lines = [
        "| arm | accuracy | non-zeros | MACs, millions | file, kB | gzip, kB | ms, median (least) | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['arm']} | {row['accuracy']:.1%} | {row['nonzeros']:,} | {row['macs'] / 1e6:.1f} "
        f"| {row['raw_bytes'] / 1e3:,.0f} | {row['gzip_bytes'] / 1e3:,.0f} "
        f"| {row['median']:.3f} ({row['min']:.3f}) | {rows[0]['median'] / row['median']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def is_near(one, other, rows):
    """Whether the labels of two points would lie upon each other."""
    spans = ((name, np.ptp([row[name] for row in rows])) for name in ("median", "accuracy"))
    return one is not other and all(abs(one[name] - other[name]) < 0.15 * span for name, span in spans)


def chart(by_network, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(by_network), figsize=(7 * len(by_network), 4.5), layout="constrained")
    for axes, (name, rows) in zip(np.atleast_1d(panels), by_network.items(), strict=True):
        for row in rows:
            at, area = (row["median"], 100 * row["accuracy"]), 400 * row["gzip_bytes"] / rows[0]["gzip_bytes"]
            axes.scatter(*at, area, alpha=0.7)
            below = any((other["median"], 100 * other["accuracy"]) < at and is_near(other, row, rows) for other in rows)
            axes.annotate(
                row["arm"], at, (0, -24 if below else 18), textcoords="offset points", ha="center", fontsize=8
            )
        axes.margins(0.15)
        name = name.replace("_", " ")
        axes.set(title=f"{name}: area is the size after gzip", xlabel="ms, one thread, batch 1", ylabel="accuracy, %")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="holds cifar-10-batches-py/")
    parser.add_argument("--images", type=int, default=5000, help="training images")
    parser.add_argument("--test_images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8, help="before compressing, and again after it")
    parser.add_argument("--runs", type=int, default=200, help="timed runs of each file")
    parser.add_argument("--stage", choices=["train", "time", "all"], default="all")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).with_suffix("")), help="path without its ending")
    parser.add_argument("--smoke", action="store_true", help="a minute or two, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.images, options.test_images, options.epochs, options.runs = 256, 128, 1, 50
    folder = (
        pathlib.Path(options.out) / f"{options.images} images, {options.test_images} tested, {options.epochs} epochs"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if options.stage != "time":
        for build, size in NETWORKS:
            train_arms(build, size, options, folder)
    if options.stage == "train":
        return
    by_network = {build.__name__: timed(build, size, options, folder) for build, size in NETWORKS}
    for name, rows in by_network.items():
        print(f"\n{name}\n\n{table(rows)}\n", flush=True)
    names = ("images", "test_images", "epochs", "runs", "smoke")  # not where files lie
    settings = {name: getattr(options, name) for name in names}
    results = {"options": settings, "keras": keras.__version__, "cores": os.cpu_count(), "networks": by_network}
    pathlib.Path(f"{options.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    chart(by_network, f"{options.out}.png")


if __name__ == "__main__":
    main()
