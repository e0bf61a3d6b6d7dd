"""The data sets: what is in them, how they are split, and what a damaged archive says."""

import importlib.util
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from experiments import data

pytestmark = pytest.mark.once

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
TRAIN, TEST = 40, 20  # images of a file in the small archives below


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder with both archives in the official layout, of few images."""
    random = np.random.default_rng(0)
    for name, layout in data.LAYOUTS.items():
        small = layout._replace(
            train=dict.fromkeys(layout.train, TRAIN), test=dict.fromkeys(layout.test, TEST), num_classes=10
        )
        monkeypatch.setitem(data.LAYOUTS, name, small)
        for file, n in (small.train | small.test).items():
            write(tmp_path / layout.folder / file, batch(random, n, layout.label_key))
    return tmp_path


def batch(random, n, label_key=b"labels"):
    return {b"data": random.integers(0, 256, (n, 3072), "uint8"), label_key: [i % 10 for i in range(n)]}


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_digits_are_the_1797_of_scikit_learn_on_the_scale_of_bytes():
    digits = data.load("digits")
    images, labels = (np.concatenate(parts) for parts in zip(*digits[:3], strict=True))
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.num_classes, digits.input_shape, digits.flip) == (10, (8, 8, 1), False)


@pytest.mark.parametrize(("dataset", "files"), [("cifar10", 5), ("cifar100", 1)])
def test_archive_is_read_as_channel_planes(archive, dataset, files):
    layout = data.LAYOUTS[dataset]
    first = pickle.loads((archive / layout.folder / next(iter(layout.test))).read_bytes())
    loaded = data.load(dataset, archive)
    assert len(loaded.train[1]) + len(loaded.validation[1]) == files * TRAIN
    images, labels = loaded.test
    assert images.shape == (TEST, 32, 32, 3)
    np.testing.assert_array_equal(labels, first[layout.label_key])
    for channel, (row, column) in enumerate([(0, 1), (5, 0), (31, 31)]):
        assert images[7, row, column, channel] == first[b"data"][7, 1024 * channel + 32 * row + column]


@pytest.mark.quick
def test_validation_split_is_stratified_and_the_same_at_every_number_of_training_images(archive):
    whole, part = data.load("cifar10", archive), data.load("cifar10", archive, train_images=50)
    np.testing.assert_array_equal(whole.validation[0], part.validation[0])
    few = data.load("cifar10", archive, train_images=10)
    np.testing.assert_array_equal(whole.validation[0][:10], few.validation[0])  # never more than training images
    assert np.bincount(whole.validation[1]).tolist() == [2] * 10
    assert np.bincount(part.train[1]).tolist() == [5] * 10
    seen = {image.tobytes() for split in whole[:3] for image in split[0]}
    assert len(seen) == 5 * TRAIN + TEST  # no image in two splits
    assert {image.tobytes() for image in part.train[0]} <= {image.tobytes() for image in whole.train[0]}


def test_reduced_pixel_is_the_rounded_mean_of_its_block():
    image = np.array([[0, 4, 10, 11], [0, 5, 10, 11], [255, 255, 1, 0], [255, 255, 0, 0]], "uint8")[None, ..., None]
    reduced = data.reduce(image, 2)
    assert reduced.dtype == np.uint8
    assert reduced[0, ..., 0].tolist() == [[2, 10], [255, 0]]  # of 2.25, 10.5 (to even), 255 and 0.25
    np.testing.assert_array_equal(data.reduce(image, 4), image)
    whole, small = data.load("digits"), data.load("digits", image_size=4)
    assert small.input_shape == (4, 4, 1)
    np.testing.assert_array_equal(small.test[1], whole.test[1])
    np.testing.assert_array_equal(small.test[0][7], data.reduce(whole.test[0][7:8], 4)[0])
    for side in (3, 16):
        with pytest.raises(ValueError, match=f"1, 2, 4, 8. Received: image_size={side}"):
            data.load("digits", image_size=side)


def test_every_prefix_of_a_stratified_order_is_in_proportion():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = data.stratified_order(labels)
    assert sorted(order) == list(range(100))
    for n in (10, 50, 90):
        assert np.abs(np.bincount(labels[order[:n]], minlength=3) - n * np.array([0.6, 0.3, 0.1])).max() <= 1


class RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-500])


def rewritten(**changes):
    def damage(path):
        content = pickle.loads(path.read_bytes())
        write(path, {key: changes.get(key.decode(), value) for key, value in content.items()})

    return damage


@pytest.mark.parametrize(
    ("damage", "received"),
    [
        (truncated, "UnpicklingError"),
        (lambda path: path.write_bytes(b""), "0 bytes that do not load"),
        (lambda path: path.write_bytes(b"<html>"), "6 bytes that do not load"),
        (lambda path: write(path, [1, 2]), "list"),
        (lambda path: write(path, {b"data": 0}), r"\[b'data'\]"),
        (lambda path: write(path, RunsCode()), "posix.system, which no batch file needs"),
        (rewritten(data=np.zeros((TRAIN, 3071), "uint8")), r"uint8 \(40, 3071\)"),
        (rewritten(data=np.zeros((TRAIN - 1, 3072), "uint8")), r"uint8 \(39, 3072\)"),
        (rewritten(data=np.zeros((TRAIN, 3072), "float32")), r"float32 \(40, 3072\)"),
        (rewritten(data=None), "NoneType"),
        (rewritten(labels=[0] * (TRAIN - 1)), r"int64 \(39,\)"),
        (rewritten(labels=[10] * TRAIN), "from 10 to 10"),
    ],
)
def test_damaged_batch_file_is_named_with_what_was_expected_and_what_came(archive, damage, received):
    path = archive / "cifar-10-batches-py" / "data_batch_3"
    damage(path)
    with pytest.raises(ValueError, match=f"(?s)data_batch_3 is not.*Expected.*Received: .*{received}.*again"):
        data.load("cifar10", archive)


def test_missing_batch_file_and_missing_folder_are_named(archive):
    (archive / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch is missing.*data_batch_1"):
        data.load("cifar10", archive)
    with pytest.raises(FileNotFoundError, match=r"must hold cifar-100-python/"):
        data.load("cifar100", archive / "elsewhere")


def test_arrays_pickled_by_python_2_load_without_a_warning(tmp_path):
    # The opcodes that the official archives hold: dtype('u1', 0, 1), state as bytes.
    stream = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x02\\xff'\ntb."
    )
    path = tmp_path / "array"
    path.write_bytes(stream)
    with path.open("rb") as file:
        array = data._Unpickler(file, encoding="bytes").load()
    assert array.dtype == np.uint8
    assert array.tolist() == [1, 2, 255]


def test_without_a_folder_the_archive_comes_through_keras(monkeypatch):
    def load_data():
        return tuple((np.zeros((n, 32, 32, 3), "uint8"), np.arange(n)[:, None] % 10) for n in (100, 20))

    monkeypatch.setattr(data.keras.datasets.cifar10, "load_data", load_data)
    assert [split[0].shape[0] for split in data.load("cifar10")[:3]] == [90, 10, 20]

    def fail():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(data.keras.datasets.cifar10, "load_data", fail)
    with pytest.raises(OSError, match=r"could not be downloaded \(URL fetch failure\).*--data_dir"):
        data.load("cifar10")


def test_unknown_data_set_and_impossible_number_of_images_are_errors():
    with pytest.raises(ValueError, match=r"digits, cifar10, cifar100, imagenet. Received: dataset='mnist'"):
        data.load("mnist")
    for n in (0, 5, 1214):
        with pytest.raises(ValueError, match=f"between 10 and 1213.*Received: train_images={n}"):
            data.load("digits", train_images=n)


@pytest.mark.skipif(
    not (SHARED / "unpack_cifar.py").exists() or importlib.util.find_spec("PIL") is None,
    reason="needs the real CIFAR-10 in ../shared/data, and Pillow to unpack it",
)
def test_real_cifar10_has_its_published_labels_and_channel_means(tmp_path):
    subprocess.run([sys.executable, SHARED / "unpack_cifar.py", tmp_path, "cifar10"], check=True, capture_output=True)
    cifar = data.load("cifar10", tmp_path)
    assert cifar.test[1][:5].tolist() == [3, 8, 8, 0, 6]
    assert [len(split[1]) for split in cifar[:3]] == [45_000, 5_000, 10_000]
    assert np.bincount(cifar.validation[1]).tolist() == [500] * 10
    pixels = np.concatenate([cifar.train[0], cifar.validation[0]])
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), (125.31, 122.95, 113.87), atol=0.01)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), (62.99, 62.09, 66.70), atol=0.01)
