"""What a run of the experiments costs, beside one bare `fit` of the same network, measured in the same process.

    python -m benchmarks.engine                             # ResNet-8, 1,000 images of 16x16, 100 epochs, one core
    KERAS_BACKEND=jax python -m benchmarks.engine --data_dir=DIR

Bare: network, augmentation and optimizer are built, compiled and fitted in one call with `steps_per_execution` of an
epoch, and nothing is kept, evaluated or repeatable. A run of the engine also chooses an order of its own for every
epoch, looks at the validation images every 10 epochs, keeps its state every 30 seconds, and ends with the 10,000 test
images. Without --data_dir the images are noise, which costs the same. Arms take turns; the first turn of each compiles,
and so does every bare one.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from experiments import data as datasets
from experiments import training  # first: it sets the threads
from experiments.runs import Run, device, on_gpu


def noise(dataset, data_dir=None, *, train_images=None, eval_images=None, image_size=None):
    """In place of `experiments.data.load`."""
    random = np.random.default_rng(0)

    def split(n):
        images = random.integers(0, 256, (n, image_size, image_size, 3)).astype("uint8")
        return images, (np.arange(n) % 10).astype("int32")

    train, validation, test = split(train_images), split(train_images), split(10_000)
    return datasets.Data(train, validation, test, 10, True, 128, (125,) * 3, (60,) * 3)


def bare(run):
    data, steps = training.data_of(run), training.steps_per_epoch(run)
    model, _ = training.classifier(run, training.build_model(run), 0)
    model.compile(
        keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, steps * run.epochs), momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile="auto" if keras.backend.backend() != "tensorflow" or on_gpu() else False,
        steps_per_execution=1 if keras.backend.backend() == "torch" else steps,
    )
    model.fit(*data.train, batch_size=run.batch_size, epochs=run.epochs, verbose=0)


def engine(run):
    training.trained(run, training.build_model(run))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with CIFAR-10's official archive, unpacked")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for busy machines")
    args = parser.parse_args()
    if args.data_dir is None:
        datasets.load = noise
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    seconds = {bare: [], engine: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            run = Run(
                figure="benchmark", dataset="cifar10", model="resnet8", arm="M=9", sparsity=0.0, magnitude=9,
                seed=turn, epochs=args.epochs, batch_size=125, learning_rate=0.05, train_images=1000, smoke=False,
                image_size=16, schedule="cosine", evaluate_every=10, data_dir=args.data_dir,
                checkpoints=str(pathlib.Path(folder)),
            )  # fmt: skip
            training.data_of(run)
            for arm, measured in seconds.items():
                start = clock()
                arm(run)
                measured.append(clock() - start)
    backend = keras.backend.backend()
    print(f"\nResNet-8, 1,000 images of 16x16, batch 125, {args.epochs} epochs, {backend}, {device()}, {args.clock}")
    print("| arm | first, s | later, s (least, most) | later / bare |\n|---|---|---|---|")
    floor = statistics.median(seconds[bare])
    for arm, (first, *later) in seconds.items():
        later = later or [first]
        median = statistics.median(later)
        spread = f"{median:.1f} ({min(later):.1f}, {max(later):.1f})"
        print(f"| {arm.__name__} | {first:.1f} | {spread} | {median / floor:.2f} |")


if __name__ == "__main__":
    main()
