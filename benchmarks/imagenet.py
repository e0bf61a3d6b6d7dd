"""Reading ImageNet: decoded and augmented images per second, ours against Keras with keras-cv and against torchvision.

    python -m benchmarks.imagenet --data_dir=DIR      # DIR holds train/<class>/*.JPEG and val/<class>/*.JPEG
    python -m benchmarks.imagenet                     # JPEGs of 500x375 made of scikit-learn's photographs
    KERAS_BACKEND=jax python -m benchmarks.imagenet --arms="ours: read,Pillow"

Batches of 128 at 224x224, uint8, RandAugment with two operations at M = 14. Ours is the pipeline of the experiments, to
which a random resized crop and a flip belong, with RandAugment in the pipeline and without. Keras is
`image_dataset_from_directory` and keras-cv's RandAugment: it does less, as it resizes whole images and mirrors none.
torchvision is an ImageFolder with RandomResizedCrop, flip and RandAugment on PIL images, and a DataLoader with two
workers; "Pillow, 2 processes" is the same by Pillow alone, in processes that hand nothing back: the most that any such
loader can reach. torchvision is installed by `pip install torch==2.13.* torchvision==0.28.*`; an arm that is not there
is skipped with a message.

Every arm is a process of its own; they take turns, one at a time. Files are read before they are timed, so that the
disk is not. Prints a table of medians and writes the same as JSON. About two minutes.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BATCH, NUM_OPS, MAGNITUDE, SIDE, WORKERS = 128, 2, 14, 224, 2


def make_folder(root, count):
    """Writes JPEGs of 500x375, cut from scikit-learn's two photographs and enlarged, in ImageNet's layout."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    draw = random.Random(0)
    for split, name, i in itertools.product(("train", "val"), range(2), range(count)):
        path = pathlib.Path(root) / split / str(name) / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = draw.randrange(200), draw.randrange(100)
        photos[name].crop((x, y, x + 400, y + 300)).resize((500, 375)).save(path, quality=90)


def batches_of(dataset):
    """A function that waits for the next batch of a data set, which begins again at its end."""
    endless = itertools.chain.from_iterable(itertools.repeat(dataset))
    return lambda: next(endless)


# --- arms: the folder -> a function that waits for a batch ---


def ours(root, augmented):
    from experiments import folder
    from kerascompress import RandAugment

    found = folder.listing(root)
    (files, labels), _ = folder.splits(found, SIDE, tempfile.mkdtemp(), skip_damaged=True)
    augment = RandAugment(MAGNITUDE, NUM_OPS, seed=0) if augmented else None
    return batches_of(files.epochs(labels, BATCH, itertools.count(), augment))


def keras_cv(root):
    import keras
    import keras_cv
    import tensorflow as tf

    settings = {"image_size": (SIDE, SIDE), "batch_size": BATCH, "verbose": False}
    dataset = keras.utils.image_dataset_from_directory(pathlib.Path(root) / "train", **settings)
    augment = keras_cv.layers.RandAugment((0, 255), augmentations_per_image=NUM_OPS, magnitude=MAGNITUDE / 30)
    dataset = dataset.map(lambda images, labels: (augment(images), labels), num_parallel_calls=tf.data.AUTOTUNE)
    return batches_of(dataset.prefetch(tf.data.AUTOTUNE))


def torchvision(root):
    import torch

    from benchmarks.randaugment import import_torchvision

    transforms = import_torchvision()
    import torchvision.datasets

    steps = [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()]
    steps += [transforms.RandAugment(NUM_OPS, MAGNITUDE), transforms.PILToTensor()]
    dataset = torchvision.datasets.ImageFolder(pathlib.Path(root) / "train", transforms.Compose(steps))
    settings = {"shuffle": True, "num_workers": WORKERS, "drop_last": True, "persistent_workers": True}
    settings["multiprocessing_context"] = "fork"  # with what `import_torchvision` has mended
    return batches_of(torch.utils.data.DataLoader(dataset, BATCH, **settings))


def pillow(root):
    paths = sorted(str(path) for path in pathlib.Path(root, "train").rglob("*.JPEG"))
    pool = multiprocessing.get_context("fork").Pool(WORKERS)

    def run():
        pool.map(_read_by_pillow, random.choices(paths, k=BATCH), chunksize=BATCH // WORKERS)

    return run


def _read_by_pillow(path):
    import numpy as np
    from PIL import Image

    from benchmarks.randaugment import _plain_pillow

    image = Image.open(path).convert("RGB")
    width, height = image.size
    share, ratio = random.uniform(0.08, 1), random.uniform(3 / 4, 4 / 3)
    w = min(width, round((share * width * height * ratio) ** 0.5))
    h = min(height, round((share * width * height / ratio) ** 0.5))
    x, y = random.randint(0, width - w), random.randint(0, height - h)
    image = image.crop((x, y, x + w, y + h)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
    np.asarray(_plain_pillow(image))


ARMS = {
    "ours: read, crop, flip, RandAugment": lambda root: ours(root, True),
    "ours: read, crop, flip": lambda root: ours(root, False),
    "Keras and keras-cv: read, resize, RandAugment": keras_cv,
    "torchvision, 2 workers: read, crop, flip, RandAugment": torchvision,
    "Pillow, 2 processes: read, crop, flip, RandAugment": pillow,
}


def serve(pipe, name, root):
    """Sets an arm up, then answers every request with the images per second of one turn."""
    warnings.simplefilter("ignore")
    try:
        run = ARMS[name](root)
        for _ in range(3):
            run()
    except ImportError as error:
        pipe.send({"skipped": f"{error.name} is not installed: pip install {error.name}"})
        return
    except Exception as error:  # a peer may fail on its own account; say so and go on
        pipe.send({"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
        return
    pipe.send({})
    while seconds := pipe.recv():
        for _ in range(2):  # what was prefetched while others had their turn
            run()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or count < 2:
            run()
            count += 1
        pipe.send(count * BATCH / (time.perf_counter() - start))


def measure(root, prefixes, turns, seconds):
    """Returns {arm: images per second of each turn}."""
    arms, rates = {}, {}
    for name in ARMS:
        if not name.lower().startswith(prefixes):
            continue
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, root))
        process.start()
        answer = pipe.recv()
        if "skipped" in answer:
            print(f"skipped: {name}: {answer['skipped']}", flush=True)
            process.join()
            continue
        arms[name], rates[name] = (process, pipe), []
    for _ in range(turns):
        for name, (_, pipe) in arms.items():
            pipe.send(seconds)
            rates[name].append(pipe.recv())
    for process, pipe in arms.values():
        pipe.send(0)
        process.join(5)
        process.kill()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds train/<class>/*.JPEG and val/<class>/*.JPEG")
    parser.add_argument("--images", type=int, default=512, help="how many images to make without --data_dir")
    parser.add_argument("--arms", default="", help="only arms whose name begins with one of these, comma-separated")
    parser.add_argument("--turns", type=int, default=7, help="how often every arm has its turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--out", default="benchmarks/imagenet.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if args.data_dir is None:
            make_folder(made, args.images // 2)
        prefixes = tuple(prefix.lower() for prefix in args.arms.split(","))
        rates = measure(args.data_dir or made, prefixes, args.turns, args.seconds)
    first = next((name for name in rates if name.startswith("ours")), None)
    print(f"\n{SIDE}x{SIDE}, batch {BATCH}, {os.cpu_count()} cores, {os.environ.get('KERAS_BACKEND', 'tensorflow')}")
    print(f"| arm | images/s: median (min to max) | {first or 'ours'} is … times as fast |\n|---|---|---|")
    results = []
    for name, of_arm in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates[first], of_arm, strict=True)) if first else None
        results.append({"arm": name, "images_per_second": of_arm, "times": ratio})
        spread = f"{statistics.median(of_arm):,.0f} ({min(of_arm):,.0f} to {max(of_arm):,.0f})"
        print(f"| {name} | {spread} | {'' if ratio is None else f'{ratio:.2f}'} |")
    pathlib.Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
