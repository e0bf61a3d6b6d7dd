"""What `AdaptiveMagnitude` costs, beside the same training at a constant magnitude, measured in one process.

    python -m benchmarks.adaptive                          # ResNet-8, 1,000 images of 16x16: the shortest epochs
    KERAS_BACKEND=jax python -m benchmarks.adaptive

Both arms train with RandAugment at the same magnitude (the step is too small to move it) and look at held-out images
after every epoch, as `fit` with `validation_data` does. The callback acts once an epoch, so its share is largest where
epochs are short. "itself" is the time within the callback, for which a difference of two arms is too coarse.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import experiments  # noqa: F401, I001 (first: it sets the threads)
import keras
import numpy as np

import kerascompress as kc
from experiments.runs import device


class Timed(kc.AdaptiveMagnitude):
    """Adds up the seconds in the callback."""

    seconds = 0.0

    def on_epoch_end(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.seconds += time.perf_counter() - start


def make(images):
    augment = kc.RandAugment(magnitude=9, seed=0)
    net = kc.models.resnet(8, 10, input_shape=images.shape[1:])
    trainer = keras.Sequential([keras.Input(images.shape[1:], dtype="uint8"), kc.RandomCrop(2, seed=1), augment, net])
    trainer.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",
        steps_per_execution=1 if keras.backend.backend() == "torch" else 8,
    )
    return trainer, augment


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of one window")
    parser.add_argument("--turns", type=int, default=7, help="windows of each arm, in turn with the other's")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (2000, 16, 16, 3)).astype("uint8"), np.arange(2000) % 10
    seconds, itself = {"constant": [], "adaptive": []}, []
    trainers = {arm: make(images) for arm in seconds}
    for turn in range(args.turns + 1):  # the first compiles
        for arm, (trainer, augment) in trainers.items():
            callbacks = [Timed(augment, speed=0.001)] if arm == "adaptive" else []
            start = time.perf_counter()
            trainer.fit(
                images[:1000],
                labels[:1000],
                batch_size=125,
                epochs=args.epochs,
                validation_data=(images[1000:], labels[1000:]),
                validation_batch_size=500,
                callbacks=callbacks,
                verbose=0,
            )
            if turn:
                seconds[arm].append((time.perf_counter() - start) / args.epochs)
                itself += [callback.seconds / args.epochs for callback in callbacks]
    print(f"\nResNet-8, 1,000 images of 16x16, batch 125, {keras.backend.backend()}, {device()}")
    print("| arm | ms an epoch: median (least, most) | over constant |\n|---|---|---|")
    constant = statistics.median(seconds["constant"])
    for arm, measured in (*seconds.items(), ("adaptive: the callback itself", itself)):
        median, least, most = (1000 * each(measured) for each in (statistics.median, min, max))
        print(f"| {arm} | {median:.2f} ({least:.2f}, {most:.2f}) | {median / 1000 / constant:.4f} |")


if __name__ == "__main__":
    main()
