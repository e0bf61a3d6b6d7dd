"""The data sets: digits (comes with scikit-learn), CIFAR-10, CIFAR-100 and folders of images such as ImageNet's, each
with a fixed validation split.
"""

import pathlib
import pickle
from typing import NamedTuple

import keras
import numpy as np

from experiments import folder
from kerascompress.models.layers import STEMS

DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
VALIDATION = 0.1  # of the training set, the same images whatever the seed of a run


class Data(NamedTuple):
    """Images uint8 `(n, height, width, channels)`, an array or `Files`, and labels int32 `(n,)` of each split."""

    train: tuple
    validation: tuple
    test: tuple
    num_classes: int
    flip: bool  # a mirrored digit is another sign, a mirrored cat is a cat
    fill_value: int  # of the pixels that a random crop brings in
    mean: tuple  # of a channel's pixels, over all training images
    std: tuple

    @property
    def input_shape(self):
        return self.train[0].shape[1:]

    @property
    def in_files(self):
        """Whether images are read while a network trains; then they come cropped and mirrored."""
        return isinstance(self.train[0], folder.Files)


class Layout(NamedTuple):
    """An official python archive, unpacked: file name -> number of images."""

    folder: str
    train: dict
    test: dict
    label_key: bytes
    num_classes: int
    mean: tuple
    std: tuple


LAYOUTS = {
    "cifar10": Layout(
        folder="cifar-10-batches-py",
        train={f"data_batch_{i}": 10_000 for i in range(1, 6)},
        test={"test_batch": 10_000},
        label_key=b"labels",
        num_classes=10,
        mean=(125.31, 122.95, 113.87),
        std=(62.99, 62.09, 66.70),
    ),
    "cifar100": Layout(
        folder="cifar-100-python",
        train={"train": 50_000},
        test={"test": 10_000},
        label_key=b"fine_labels",
        num_classes=100,
        mean=STEMS["cifar"][1],
        std=STEMS["cifar"][2],
    ),
}


def load(dataset, data_dir=None, *, train_images=None, eval_images=None, image_size=None, **of_files):
    """Returns the `Data` of one data set; `train_images` and `eval_images` keep a stratified part of them.

    `image_size` is the side to which images are reduced, by the mean of square blocks of pixels, or, where they lie in
    files, cropped and resized; `of_files` are the further arguments of `folder.splits`.
    """
    if dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}. Received: dataset={dataset!r}.")
    if dataset == "digits":
        train, test = _digits()
        facts = {"num_classes": 10, "flip": False, "fill_value": 0, "mean": (78,), "std": (96,)}
    elif dataset == "imagenet":
        found = folder.listing(data_dir)
        train, test = folder.splits(found, image_size or 224, **of_files)
        _, mean, std = STEMS["imagenet"]
        facts = {"num_classes": len(found.classes), "flip": True, "fill_value": 128, "mean": mean, "std": std}
    else:
        layout = LAYOUTS[dataset]
        train, test = _cifar_from_folder(layout, data_dir) if data_dir else _cifar_from_keras(dataset)
        facts = {
            "num_classes": layout.num_classes,
            "flip": True,
            "fill_value": 128,
            "mean": layout.mean,
            "std": layout.std,
        }
    if image_size is not None and dataset != "imagenet":
        train, test = ((reduce(images, image_size), labels) for images, labels in (train, test))
    order = stratified_order(train[1])
    held_out = round(VALIDATION * len(order))
    available = len(order) - held_out
    if train_images is not None and not facts["num_classes"] <= train_images <= available:
        raise ValueError(
            f"`train_images` must be between {facts['num_classes']} and {available}, the training images of {dataset} "
            f"without its validation split. Received: train_images={train_images}."
        )
    return Data(
        train=_take(train, order[held_out:][:train_images]),
        validation=_take(train, order[:held_out][: eval_images or train_images]),  # no larger than what it is held from
        test=_take(test, stratified_order(test[1])[:eval_images] if eval_images else slice(None)),
        **facts,
    )


def reduce(images, side):
    """Returns square images with that side, each pixel the mean of a block of pixels, rounded."""
    n, height, _, channels = images.shape
    if side < 1 or height % side:
        allowed = ", ".join(str(size) for size in range(1, height + 1) if height % size == 0)
        raise ValueError(
            f"`image_size` must divide the side of the data set's images: {allowed}. Received: image_size={side}."
        )
    blocks = images.reshape(n, side, height // side, side, height // side, channels)
    return np.rint(blocks.mean(axis=(2, 4), dtype="float32")).astype("uint8")


def stratified_order(labels):
    """Returns an order of the images in which every prefix holds each class in proportion."""
    rank = np.empty(len(labels))
    random = np.random.default_rng(0)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((labels, rank))


def _take(split, index):
    images, labels = split
    return images[index], labels[index]


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install scikit-learn.") from error
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype("uint8")[..., None]
    labels = digits.target.astype("int32")
    order = stratified_order(labels)
    quarter = len(order) // 4  # the bundled set has no test split of its own
    return _take((images, labels), order[quarter:]), _take((images, labels), order[:quarter])


def _cifar_from_keras(dataset):
    try:
        train, test = getattr(keras.datasets, dataset).load_data()
    except Exception as error:
        raise OSError(
            f"{dataset} could not be downloaded ({error}). Unpack the official python archive yourself and name the "
            f"folder that holds {LAYOUTS[dataset].folder}/ with --data_dir."
        ) from error
    return [(images, labels[:, 0].astype("int32")) for images, labels in (train, test)]


def _cifar_from_folder(layout, data_dir):
    folder = pathlib.Path(data_dir) / layout.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No folder {folder}. --data_dir must hold {layout.folder}/, the official python archive, unpacked; "
            "without --data_dir it is downloaded."
        )

    def read(files):
        batches = [_read_batch(folder / name, num_images, layout) for name, num_images in files.items()]
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    return read(layout.train), read(layout.test)


def _read_batch(path, num_images, layout):
    """Returns images `(n, 32, 32, 3)` and labels `(n,)` of one batch file, or an error that names it."""

    def refuse(received):
        return ValueError(
            f"{path} is not an official batch file of {num_images} images. Expected a pickled dictionary with b'data' "
            f"uint8 ({num_images}, 3072) and {layout.label_key!r}, {num_images} integers in "
            f"[0, {layout.num_classes}). Received: {received}. Download and unpack the archive again."
        )

    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. {layout.folder}/ must hold {', '.join([*layout.train, *layout.test])}."
        )
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise refuse(f"{path.stat().st_size} bytes that do not load: {type(error).__name__}: {error}") from error
    if not isinstance(batch, dict) or not {b"data", layout.label_key} <= batch.keys():
        raise refuse(sorted(batch, key=repr) if isinstance(batch, dict) else type(batch).__name__)
    data, labels = batch[b"data"], np.asarray(batch[layout.label_key])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (num_images, 3072):
        raise refuse(f"b'data' {getattr(data, 'dtype', type(data).__name__)} {np.shape(data)}")
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise refuse(f"{layout.label_key!r} {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= layout.num_classes:
        raise refuse(f"{layout.label_key!r} from {labels.min()} to {labels.max()}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype("int32")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ARRAYS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): lambda name, *_: np.dtype(name),  # the archives pass integers as flags, which NumPy deprecates
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),  # how Python 3 writes bytes at protocol 2
}


class _Unpickler(pickle.Unpickler):
    """Loads arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module, name):
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch file needs")
        return _ARRAYS[module, name]
