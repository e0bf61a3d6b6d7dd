"""Images in a folder, ImageNet's layout, read while a network trains: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`.

Nothing is kept in memory but the names. Files are decoded by libjpeg's accurate transform, as Pillow does, so grey ones
and those of printers (CMYK) come as RGB; an ending says nothing, the content is looked at (ImageNet holds a PNG that is
called JPEG). The pipeline is `tf.data` on every backend; each image is read by a function of its file and a seed, so
that it does not matter who reads it, and when.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
from typing import NamedTuple

import keras
import numpy as np

from experiments import runs

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".gif")
CROP_AREA = 0.08  # Szegedy et al. 2015, and everybody since
LAYOUT = "DIR must hold train/<class>/ and val/<class>/ with images, as ImageNet is laid out"


class Listing(NamedTuple):
    """What lies in a folder. `files`: of each split, the paths below the folder, in the order of their classes."""

    root: pathlib.Path
    classes: tuple
    files: dict
    content: str  # tells these classes and files from others: by names and sizes
    state: str  # and by the times of their last change


@functools.lru_cache(maxsize=2)
def listing(data_dir):
    """Returns the `Listing` of a folder."""
    if data_dir is None:
        raise ValueError(f"--dataset=imagenet needs --data_dir=DIR. {LAYOUT}.")
    root = pathlib.Path(data_dir)
    found = {split: _files_of_classes(root / split) for split in ("train", "val")}
    classes = {split: {path.split("/")[1] for path in files} for split, files in found.items()}
    if classes["train"] != classes["val"]:
        only = sorted(classes["train"] ^ classes["val"])
        raise ValueError(
            f"{root} must hold images of the same classes in train/ and val/. Received: {len(only)} that are in one of "
            f"them, such as {only[0]}."
        )
    content, state = hashlib.sha256(), hashlib.sha256()
    for path, (size, time) in (found["train"] | found["val"]).items():
        content.update(f"{path} {size}\n".encode())
        state.update(f"{path} {size} {time}\n".encode())
    names = tuple(sorted(classes["train"]))
    files = {split: np.array([os.fsencode(path) for path in files]) for split, files in found.items()}
    return Listing(root, names, files, f"{len(names)} classes {content.hexdigest()[:8]}", state.hexdigest()[:16])


def _files_of_classes(split):
    """Returns {path from the root: (size, time of the last change)} of all images below a split's folders of classes.

    They may lie deeper, as in Tiny-ImageNet's own train/<class>/images/.
    """
    if not split.is_dir():
        raise FileNotFoundError(f"No folder {split}. {LAYOUT}.")
    found = {}
    for folder in sorted(path for path in split.iterdir() if path.is_dir()):
        before = len(found)
        for where, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(name for name in names if name.lower().endswith(ENDINGS)):
                path = os.path.join(where, name)
                status = os.stat(path)
                found[os.path.relpath(path, split.parent)] = status.st_size, status.st_mtime_ns
        if len(found) == before:
            raise FileNotFoundError(f"{folder} holds no image ({', '.join(ENDINGS)}). {LAYOUT}.")
    if not found:
        raise FileNotFoundError(f"{split} holds no folder. {LAYOUT}.")
    return found


def write_labels(found, results):
    """Writes which label is which class, and its words if a words.txt tells them, beside a file of rows."""
    words = found.root / "words.txt"
    lines = words.read_text().splitlines() if words.is_file() else []
    known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    text = "".join(
        f"{label}\t{name}\t{known.get(name, '')}".rstrip() + "\n" for label, name in enumerate(found.classes)
    )
    path = results.with_name(f"{results.stem}_{found.content.split()[-1]}_labels.txt")
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    return path


def splits(found, side, checked, skip_damaged):
    """Returns ((images, labels), (images, labels)) of train/ and val/, once every file has been decoded.

    Args:
        found: A `Listing`.
        side: Of the images, in pixels.
        checked: A folder in which is kept what decoding has found; done once for files with these names, sizes and
            times.
        skip_damaged: Whether damaged files are left out; else they are an error.
    """
    damaged = _damaged(found, pathlib.Path(checked))
    if damaged:
        named = "\n".join(f"- {found.root / path}: {reason}" for path, reason in damaged.items())
        if not skip_damaged:
            raise ValueError(
                f"{len(damaged)} files do not decode. Replace them, or leave them out with --skip_damaged.\n{named}"
            )
        print(f"{len(damaged)} files that do not decode are left out:\n{named}", file=sys.stderr)
    number = {name: label for label, name in enumerate(found.classes)}

    def split(files):
        whole = np.array([path for path in files if os.fsdecode(path) not in damaged])
        labels = np.array([number[os.fsdecode(path).split("/")[1]] for path in whole], "int32")
        return Files(found.root, whole, side), labels

    return split(found.files["train"]), split(found.files["val"])


def _damaged(found, folder):
    """Returns {path: what is wrong} of the files that do not decode: found out before a training, not in its midst."""
    known = folder / f"decoded_{found.state}.json"
    if known.exists():
        return json.loads(known.read_text())
    tf = _tensorflow()
    paths = [os.fsdecode(path) for split in found.files.values() for path in split]
    print(f"Decoding the {len(paths):,} files of {found.root} once, to see that all are whole.", file=sys.stderr)

    def problem(path):
        try:
            _decode(tf.io.read_file(str(found.root / path)))
        except tf.errors.OpError as error:
            return error.message.partition("}}")[2].partition("[Op:")[0].strip().partition("\n")[0] or error.message

    with concurrent.futures.ThreadPoolExecutor(runs.cores()) as pool:
        problems = pool.map(problem, paths)
        damaged = {path: what for path, what in zip(paths, problems, strict=True) if what}
    folder.mkdir(parents=True, exist_ok=True)
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(damaged))
    partial.replace(known)
    return damaged


class Files:
    """Images uint8 `(n, side, side, 3)` that lie in files. An index gives some of them; only `np.asarray` reads."""

    def __init__(self, root, paths, side):
        self.root, self.paths, self.side = root, paths, side
        self.shape = (len(paths), side, side, 3)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Files(self.root, self.paths[index], self.side)

    def __array__(self, dtype=None, copy=None):
        return np.stack([_center(path, self.side).numpy() for path in self._full(self.paths)])

    def _full(self, paths):
        prefix = os.path.join(os.fsencode(self.root), b"")
        return [prefix + path for path in paths.tolist()]

    def in_order(self, others, batch_size):
        """Returns a `tf.data` dataset of (images, *others) for evaluation: the center of each image."""
        tf = _tensorflow()
        dataset = tf.data.Dataset.from_tensor_slices((self._full(self.paths), *others))
        dataset = dataset.map(
            lambda path, *others: (_center(path, self.side), *others), num_parallel_calls=runs.cores()
        )
        return dataset.batch(batch_size).prefetch(1).with_options(_options())

    def epochs(self, labels, batch_size, seeds, augment=None, crop_area=None):
        """Returns a `tf.data` dataset of (images, labels) that passes through the images once for each of `seeds`.

        Args:
            labels: int32 `(n,)`.
            batch_size: Of whole batches; what is left of an epoch is dropped.
            seeds: Of NumPy, one an epoch, which decides its order, crops and flips.
            augment: A `kc.RandAugment`, which acts last, on batches (TensorFlow backend).
            crop_area: The least share of an image that a crop keeps, by default `CROP_AREA`.
        """
        tf = _tensorflow()

        def orders():
            for seed in seeds:
                random = np.random.default_rng(seed)
                order = random.permutation(len(labels))[: len(labels) // batch_size * batch_size]
                of_images = random.integers(0, 2**31, (len(order), 2), "int32")
                yield self._full(self.paths[order]), labels[order], of_images

        kinds = tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 2], tf.int32)
        dataset = tf.data.Dataset.from_generator(orders, output_signature=kinds)
        dataset = dataset.flat_map(lambda *epoch: tf.data.Dataset.from_tensor_slices(epoch))
        dataset = dataset.map(
            lambda path, label, seed: (_random_crop(path, self.side, seed, crop_area or CROP_AREA), label, seed),
            num_parallel_calls=runs.cores(),
        )
        dataset = dataset.batch(batch_size, drop_remainder=True)
        dataset = dataset.map(
            lambda images, labels, seeds: (_augmented(augment, images, seeds[0]) if augment else images, labels),
            num_parallel_calls=runs.cores(),
        )
        return dataset.prefetch(2).with_options(_options())


# What is made of a file


def _decode(content):
    tf = _tensorflow()
    return tf.cond(
        tf.io.is_jpeg(content),
        lambda: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(content, channels=3, expand_animations=False),
    )


def _center(path, side):
    """The field's way to evaluate: the shorter side resized to 256 where the network takes 224, and cut to that."""
    tf = _tensorflow()
    image = _decode(tf.io.read_file(path))
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    shorter = round(side * 256 / 224)
    size = tf.stack([height, width]) * shorter // tf.minimum(height, width)
    image = tf.image.resize(tf.cast(image, tf.float32), size, antialias=True)
    top, left = (size[0] - side + 1) // 2, (size[1] - side + 1) // 2
    return _to_bytes(image[top : top + side, left : left + side], side)


def _random_crop(path, side, seed, crop_area):
    """A box of that share of the area at least, 3/4 to 4/3 as wide as high, resized, and mirrored or not."""
    tf = _tensorflow()
    content = tf.io.read_file(path)
    is_jpeg = tf.io.is_jpeg(content)
    whole = tf.cond(is_jpeg, lambda: tf.zeros([0, 0, 3], tf.uint8), lambda: _decode(content))
    size = tf.cond(is_jpeg, lambda: tf.image.extract_jpeg_shape(content)[:2], lambda: tf.shape(whole)[:2])
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([size, [3]], 0),
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(crop_area, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    box = tf.concat([begin[:2], extent[:2]], 0)
    image = tf.cond(
        is_jpeg,
        lambda: tf.image.decode_and_crop_jpeg(content, box, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.slice(whole, tf.concat([begin[:2], [0]], 0), tf.concat([extent[:2], [3]], 0)),
    )
    image = tf.cast(image, tf.float32)
    image = tf.cond(  # where it shrinks less, the four neighbours of a new pixel leave no old one out
        tf.reduce_min(extent[:2]) > 2 * side,
        lambda: tf.image.resize(image, (side, side), antialias=True),
        lambda: tf.image.resize(image, (side, side)),
    )
    mirrored = tf.random.stateless_uniform([], seed + 1) < 0.5
    return _to_bytes(tf.cond(mirrored, lambda: image[:, ::-1], lambda: image), side)


def _augmented(layer, images, seed):
    """With a seed in place of the layer's own state, which would be ahead by as many batches as are read already."""
    state = layer.seed_generator.state
    with keras.StatelessScope([(state, keras.ops.cast(seed, state.dtype))]):
        return layer(images, training=True)


def _to_bytes(image, side):
    tf = _tensorflow()
    return tf.ensure_shape(tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8), (side, side, 3))


def _options():
    options = _tensorflow().data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = runs.cores()  # a run computes with one thread, but reads with all
    return options


@functools.cache
def _tensorflow():
    """TensorFlow; where it does not train, it leaves the GPUs to who does."""
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        with contextlib.suppress(RuntimeError):  # something has used it already
            tf.config.set_visible_devices([], "GPU")
    return tf
