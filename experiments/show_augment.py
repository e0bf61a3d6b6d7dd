"""What RandAugment does to real images: every operation by magnitude, and random draws at growing magnitude.

    python -m experiments.show_augment                       # scikit-learn's photographs
    python -m experiments.show_augment --data_dir=DIR        # CIFAR-10 from DIR/cifar-10-batches-py

Writes augment_ops.png and augment_draws.png within a minute on a CPU.
"""

import pathlib

import keras
import matplotlib.figure
import numpy as np
from absl import app
from absl import flags as absl_flags

from experiments import data as datasets
from experiments import flags  # noqa: F401 (defines --data_dir)
from experiments.runs import HERE
from kerascompress.augment import OPS, RandAugment
from kerascompress.rounds import apply

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_string("folder", str(HERE / "results"), "Folder for the two pictures.")
absl_flags.DEFINE_integer("draws_seed", 0, "Seed of the random draws.")
absl_flags.declare_key_flag("data_dir")

SIGNED_MAGNITUDES = (-30, -22, -14, -8, -4, 0, 4, 8, 14, 22, 30)  # the sign that a signed operation draws
DRAWN_MAGNITUDES = (0, 4, 14, 30)
COLUMNS = 12


def real_images(data_dir):
    """Twelve uint8 images, the first of which is good to look at."""
    if data_dir:
        return datasets.load("cifar10", data_dir).train[0][7 : 7 + COLUMNS]
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    crops = [photo[y : y + 288, x : x + 288] for photo in (temple, flower) for y in (0, 139) for x in (0, 176, 352)]
    means = [crop.reshape(96, 3, 96, 3, 3).mean(axis=(1, 3)).astype("uint8") for crop in crops]
    return np.stack([means[1], *means[:1], *means[2:]])


def operations_by_magnitude(image):
    """A grid of images (operation, signed magnitude); None where an operation has no sign."""
    cases = [(i, m) for i, row in enumerate(OPS) for m in SIGNED_MAGNITUDES if row.signed or m >= 0]
    argument = np.array([[OPS[i].argument / 30 * m for i, m in cases]], "float32")
    op = np.array([[i for i, _ in cases]], "int32")
    images = keras.ops.convert_to_tensor(np.repeat(image[None], len(cases), axis=0))
    results = keras.ops.convert_to_numpy(apply(OPS, images, *map(keras.ops.convert_to_tensor, (op, argument))))
    shown = dict(zip(cases, results, strict=True))
    return [[shown.get((i, m)) for m in SIGNED_MAGNITUDES] for i in range(len(OPS))]


def random_draws(images, seed):
    """A grid of images (magnitude, image), with the draws of one seed."""
    images = keras.ops.convert_to_tensor(images)
    layers = [RandAugment(magnitude, seed=seed) for magnitude in DRAWN_MAGNITUDES]
    return [keras.ops.convert_to_numpy(layer(images, training=True)) for layer in layers]


def save_grid(path, grid, row_names, column_names):
    figure = matplotlib.figure.Figure(figsize=(len(grid[0]) + 1, len(grid)), layout="constrained")
    axes = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    for cells, images in zip(axes, grid, strict=True):
        for axis, image in zip(cells, images, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if image is not None:
                axis.imshow(image, interpolation="nearest")
    for axis, name in zip(axes[:, 0], row_names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0], column_names, strict=True):
        axis.set_title(name, fontsize=10)
    figure.savefig(path, dpi=100)
    print(path)


def main(_):
    images = real_images(FLAGS.data_dir)
    folder = pathlib.Path(FLAGS.folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{m:+d}" if m else "M = 0" for m in SIGNED_MAGNITUDES]
    save_grid(folder / "augment_ops.png", operations_by_magnitude(images[0]), [row.name for row in OPS], names)
    rows = [f"M = {magnitude}" for magnitude in DRAWN_MAGNITUDES]
    save_grid(folder / "augment_draws.png", random_draws(images, FLAGS.draws_seed), rows, [""] * len(images))


if __name__ == "__main__":
    app.run(main)
