"""RandAugment against its peers: images per second and peak memory at 32x32 and 224x224, two operations, M = 14.

    python benchmarks/randaugment.py --data_dir DIR        # TensorFlow backend; DIR holds cifar-10-batches-py/
    KERAS_BACKEND=jax python benchmarks/randaugment.py --arms ours,pillow
    KERAS_BACKEND=torch .venv-torch/bin/python benchmarks/randaugment.py --arms ours,pillow,torchvision,kornia

torchvision and kornia are installed by `pip install --no-deps torchvision==0.28.0 kornia kornia-rs` beside torch 2.13.

Every arm is a process of its own; they take turns, one at a time, so that a busy minute hits all of them. A peer that
is not installed is skipped with a message. Prints a table of medians, writes the same as JSON and as a bar chart.
Without --data_dir the 32x32 images are cut from scikit-learn's photographs, as the 224x224 ones always are. About five
minutes on two cores.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

BATCH, NUM_OPS, MAGNITUDE = 128, 2, 14
CORES = os.cpu_count() or 1


def load_images(size, data_dir):
    """A batch of uint8 images (128, size, size, 3)."""
    if size == 32 and data_dir:
        with (pathlib.Path(data_dir) / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
            data = pickle.load(file, encoding="bytes")[b"data"]
        return np.ascontiguousarray(data[:BATCH].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    boxes = [(x, y, x + 187, y + 187) for x in range(0, 450, 58) for y in range(0, 240, 34)]
    crops = [photo.crop(box).resize((size, size)) for photo in photos for box in boxes]
    return np.stack([np.asarray(crop) for crop in crops[:BATCH]])


# --- arms: images -> a function that augments them once ---


def ours(images, mode):
    import keras

    from kerascompress import RandAugment

    augment = RandAugment(MAGNITUDE, NUM_OPS, seed=0)
    augment.build(images.shape)
    if keras.backend.backend() == "jax":
        import jax

        variables = [variable.value for variable in augment.non_trainable_variables]
        batch = jax.numpy.asarray(images, "float32")

        @jax.jit
        def step(variables, images):
            return augment.stateless_call([], variables, images, training=True)

        def run():
            nonlocal variables
            output, variables = step(variables, batch)
            output.block_until_ready()

        return run
    if keras.backend.backend() == "torch":
        import torch

        batch = torch.tensor(images) if mode == "uint8" else torch.tensor(images).float()
        return lambda: augment(batch, training=True)
    import tensorflow as tf

    batch = tf.constant(images, tf.float32)
    step = tf.function(lambda images: augment(images, training=True), jit_compile=mode == "xla")
    return lambda: step(batch).numpy()


def in_tf_data(images, make_layer):
    import tensorflow as tf

    layer = make_layer()
    dataset = tf.data.Dataset.from_tensors(tf.constant(images)).repeat()
    batches = iter(dataset.map(layer, num_parallel_calls=CORES).prefetch(1))
    return lambda: next(batches)


def ours_in_tf_data(images):
    from kerascompress import RandAugment

    return in_tf_data(images, lambda: RandAugment(MAGNITUDE, NUM_OPS, seed=0))


def keras_cv_in_tf_data(images):
    import keras_cv

    return in_tf_data(
        images,
        lambda: keras_cv.layers.RandAugment((0, 255), augmentations_per_image=NUM_OPS, magnitude=MAGNITUDE / 30),
    )


def keras_layers_in_tf_data(images):
    import keras

    layer = keras.layers.RandAugment((0, 255), num_ops=NUM_OPS, factor=MAGNITUDE / 30)
    return in_tf_data(images, lambda: lambda images: layer(images, training=True))


def pillow_loop(images, make_augment):
    """The images shared out among processes, one a core, that hand nothing back: Pillow at its best."""
    pool = multiprocessing.get_context("fork").Pool(CORES, _prepare, (images, make_augment))
    shares = np.array_split(np.arange(len(images)), CORES)
    return lambda: pool.map(_augment_share, shares, chunksize=1)


def _prepare(images, make_augment):
    from PIL import Image

    global _pil_images, _augment
    _pil_images, _augment = [Image.fromarray(image) for image in images], make_augment()


def _augment_share(share):
    for i in share:
        np.asarray(_augment(_pil_images[i]))


def torchvision(images):
    import torch

    transforms = import_torchvision()
    torch.set_num_threads(1)
    return pillow_loop(images, lambda: transforms.RandAugment(NUM_OPS, MAGNITUDE))


def torchvision_v2(images, dtype):
    import torch

    batch = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    batch = batch if dtype == "uint8" else batch.float() / 255
    augment = import_torchvision().v2.RandAugment(NUM_OPS, MAGNITUDE)
    return lambda: augment(batch)


def import_torchvision():
    """Its transforms, also beside a CPU build of torch, which lacks the operators that torchvision has compiled."""
    import torch

    try:
        import torchvision.transforms.v2
    except RuntimeError:  # "operator torchvision::nms does not exist"
        global _library
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.transforms.v2
    return torchvision.transforms


def timm(images):
    from timm.data.auto_augment import rand_augment_transform

    return pillow_loop(images, lambda: rand_augment_transform(f"rand-m{MAGNITUDE}-n{NUM_OPS}", {}))


def pillow(images):
    """The table of torchvision on Pillow alone, with Python's own random numbers."""
    return pillow_loop(images, lambda: _plain_pillow)


def _plain_pillow(image):
    for _ in range(NUM_OPS):
        image = _one_pillow_operation(image, MAGNITUDE / 30, random.choice((-1, 1)))
    return image


def _one_pillow_operation(image, u, sign):
    from PIL import Image, ImageEnhance, ImageOps

    width, height = image.size

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, Image.NEAREST, fillcolor=0)

    def enhance(enhancer):
        return enhancer(image).enhance(1 + sign * 0.9 * u)

    operations = (
        lambda: image,
        lambda: affine(1, sign * 0.3 * u, 0, 0, 1, 0),
        lambda: affine(1, 0, 0, sign * 0.3 * u, 1, 0),
        lambda: affine(1, 0, sign * int(150 / 331 * u * width), 0, 1, 0),
        lambda: affine(1, 0, 0, 0, 1, sign * int(150 / 331 * u * height)),
        lambda: image.rotate(sign * 30 * u, Image.NEAREST, fillcolor=0),
        lambda: enhance(ImageEnhance.Brightness),
        lambda: enhance(ImageEnhance.Color),
        lambda: enhance(ImageEnhance.Contrast),
        lambda: enhance(ImageEnhance.Sharpness),
        lambda: ImageOps.posterize(image, 8 - round(4 * u)),
        lambda: ImageOps.solarize(image, 255 * (1 - u)),
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
    )
    return random.choice(operations)()


def kornia(images):
    import kornia.augmentation
    import torch

    batch = torch.tensor(images).permute(0, 3, 1, 2).contiguous().float() / 255
    augment = kornia.augmentation.auto.RandAugment(NUM_OPS, MAGNITUDE)
    return lambda: augment(batch)


def resnet20_step(images, augmented):
    import keras

    import kerascompress as kc

    layers = [kc.RandAugment(MAGNITUDE, NUM_OPS, seed=0)] if augmented else []
    model = keras.Sequential([keras.Input(images.shape[1:]), *layers, kc.models.resnet20(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    batch, labels = images.astype("float32"), np.arange(len(images)) % 10
    return lambda: model.train_on_batch(batch, labels)


ARMS = {
    "ours: model": lambda images: ours(images, "graph"),
    "ours: model, XLA": lambda images: ours(images, "xla"),
    "ours: model, uint8": lambda images: ours(images, "uint8"),
    "ours: tf.data": ours_in_tf_data,
    "Pillow, all cores": pillow,
    "torchvision (Pillow), all cores": torchvision,
    "timm (Pillow), all cores": timm,
    "torchvision v2, uint8 (one list of operations a batch)": lambda images: torchvision_v2(images, "uint8"),
    "torchvision v2, float (one list of operations a batch)": lambda images: torchvision_v2(images, "float32"),
    "kornia": kornia,
    "keras-cv: tf.data": keras_cv_in_tf_data,
    "keras.layers: tf.data": keras_layers_in_tf_data,
    "ResNet-20 step": lambda images: resnet20_step(images, False),
    "ResNet-20 step with ours": lambda images: resnet20_step(images, True),
}


# --- processes that take turns ---


def peak_memory(run):
    """By how many MiB a call raises the peak of resident memory; None where the system does not tell."""
    status, clear = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the peak
        lines = dict(line.split(":") for line in status.read_text().splitlines())
        before = int(lines["VmRSS"].split()[0])
        run()
        lines = dict(line.split(":") for line in status.read_text().splitlines())
        return (int(lines["VmHWM"].split()[0]) - before) / 1024
    except OSError:
        return None


def serve(pipe, name, size, data_dir):
    """Sets an arm up, then answers every request with the images per second of one turn."""
    warnings.simplefilter("ignore")
    try:
        images = load_images(size, data_dir)
        run = ARMS[name](images)
        for _ in range(2):
            run()
    except ImportError as error:
        pipe.send({"skipped": f"{error.name} is not installed"})
        return
    except Exception as error:  # a peer may fail on its own account; say so and go on
        pipe.send({"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
        return
    pipe.send({"memory_mib": None if "all cores" in name else peak_memory(run)})
    while seconds := pipe.recv():
        count, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds or count < 2:
            run()
            count += 1
        spent = time.perf_counter() - start
        pipe.send({"rate": count * BATCH / spent, "cpu_ms": (time.process_time() - cpu) / count * 1000})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds cifar-10-batches-py/, for real images at 32x32")
    parser.add_argument("--sizes", default="32,224", help="image sizes")
    parser.add_argument("--arms", default="", help="only arms whose name begins with one of these, comma-separated")
    parser.add_argument("--turns", type=int, default=7, help="how often every arm has its turn")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--out", default="benchmarks/randaugment", help="the JSON and PNG files, without suffix")
    args = parser.parse_args()
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    prefixes = tuple(prefix.lower() for prefix in args.arms.split(","))
    results = []
    for size in map(int, args.sizes.split(",")):
        arms = {}
        for name in ARMS:
            if not name.lower().startswith(prefixes) or ("ResNet" in name and size != 32):
                continue
            if backend == "jax" and ("tf.data" in name or name == "ours: model"):
                continue
            if (backend == "torch" and ("tf.data" in name or "XLA" in name)) or (
                backend != "torch" and "uint8" in name
            ):
                continue
            context = multiprocessing.get_context("spawn")
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, size, args.data_dir))
            process.start()
            answer = pipe.recv()
            if "skipped" in answer:
                print(f"skipped: {name} at {size}x{size}: {answer['skipped']}", flush=True)
                process.join()
                continue
            arms[name] = (process, pipe, answer["memory_mib"], [])
        for _ in range(args.turns):
            for _, pipe, _, turns in arms.values():
                pipe.send(args.seconds)
                turns.append(pipe.recv())
        for name, (process, pipe, memory, turns) in arms.items():
            pipe.send(0)
            process.join(5)
            process.terminate()
            rates = [turn["rate"] for turn in turns]
            results.append(
                {
                    "backend": backend,
                    "size": size,
                    "arm": name,
                    "images_per_second": statistics.median(rates),
                    "slowest": min(rates),
                    "fastest": max(rates),
                    "cpu_ms_per_batch": statistics.median(turn["cpu_ms"] for turn in turns),
                    "memory_in_float32_batches": None
                    if memory is None
                    else memory * 2**20 / (BATCH * size * size * 12),
                }
            )
        report(results, size)
    pathlib.Path(f"{args.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    chart(results, f"{args.out}.png")


def report(results, size):
    rows = [row for row in results if row["size"] == size]
    best = max((row["images_per_second"] for row in rows if row["arm"].startswith("ours")), default=None)
    print(f"\n{size}x{size}, batch {BATCH}, backend {rows[0]['backend']}, {CORES} cores")
    print(
        "| arm | images/s: median (min to max) | our best is … times as fast | CPU ms a batch | peak memory, batches |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        ratio = f"{best / row['images_per_second']:.1f}" if best and "ResNet" not in row["arm"] else ""
        memory = "" if row["memory_in_float32_batches"] is None else f"{row['memory_in_float32_batches']:.1f}"
        spread = f"{row['images_per_second']:,.0f} ({row['slowest']:,.0f} to {row['fastest']:,.0f})"
        cpu = "" if "all cores" in row["arm"] else f"{row['cpu_ms_per_batch']:.1f}"
        print(f"| {row['arm']} | {spread} | {ratio} | {cpu} | {memory} |", flush=True)


def chart(results, path):
    try:
        import matplotlib
    except ImportError:
        print("skipped: the chart: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [row for row in results if "ResNet" not in row["arm"]]
    if not results:
        return
    sizes = sorted({row["size"] for row in results})
    figure, axes = plt.subplots(1, len(sizes), figsize=(7 * len(sizes), 4), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in results if row["size"] == size][::-1]
        rates = [row["images_per_second"] for row in rows]
        colors = ["tab:blue" if row["arm"].startswith("ours") else "tab:gray" for row in rows]
        bars = axis.barh([row["arm"] for row in rows], rates, color=colors)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axis.set(xlabel="images per second", title=f"{size}x{size}")
        axis.margins(x=0.15)
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
