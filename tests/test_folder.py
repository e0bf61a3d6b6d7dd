"""Images in folders: how they are read, that a run goes on to the bit, and what damage says."""

import json
import pathlib
import tarfile

import keras
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from PIL import Image

import kerascompress as kc
from experiments import data as datasets
from experiments import fig1_magnitude_search as fig1
from experiments import folder, keeper, plot, training
from experiments.runs import Run

TAR = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tiny_imagenet20.tar"


def picture(seed, size=(40, 32), mode="RGB"):
    """A smooth picture, in which neighbours are alike."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), "uint8"))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, image, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three classes, 24 images each for training and 8 for testing."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 24), ("val", 8)):
        for label, name in enumerate(("n01", "n02", "n03")):
            for i in range(count):
                save(root / split / name / f"{name}_{i}.JPEG", picture(1000 * label + 100 * count + i))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn03\tstork\nn99\tunused\n")
    return root


def load(root, checked, **settings):
    return datasets.load("imagenet", str(root), checked=checked, **{"skip_damaged": False, "image_size": 16} | settings)


def run_of(root, checkpoints, **changes):
    settings = {"figure": "fig1", "dataset": "imagenet", "model": "resnet8w4", "arm": "M=9", "sparsity": 0.0}
    settings |= {"magnitude": 9, "seed": 0, "epochs": 2, "batch_size": 16, "learning_rate": 0.1, "train_images": 48}
    settings |= {"smoke": True, "image_size": 16, "content": folder.listing(str(root)).content, "work": 2}
    return Run(**settings | {"data_dir": str(root), "checkpoints": str(checkpoints)} | changes)


def one_layer(run):
    """A network that compiles in no time."""
    kernel = keras.initializers.RandomNormal(seed=run.seed)
    shape = training.data_of(run).input_shape
    return keras.Sequential(
        [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(3, kernel_initializer=kernel)]
    )


# --- what is read ---


@pytest.mark.once
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "PNG"])
def test_files_are_decoded_as_pillow_decodes_them_whatever_their_name_says(tmp_path, mode):
    image = picture(0, mode="RGB" if mode == "PNG" else mode)
    path = save(tmp_path / "image.JPEG", image, "PNG" if mode == "PNG" else "JPEG")
    decoded = folder._decode(path.read_bytes()).numpy()
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.once
@pytest.mark.parametrize("size", [(300, 260), (130, 170), (40, 64)])
def test_evaluation_sees_the_center_of_what_pillow_makes_of_the_image_at_256(tmp_path, size):
    path = save(tmp_path / "image.JPEG", picture(1, size))
    image, shorter = Image.open(path), min(size)
    image = image.resize([256 * n // shorter for n in size], Image.Resampling.BILINEAR)
    left, top = ((n - 224 + 1) // 2 for n in image.size)
    expected = np.asarray(image.crop((left, top, left + 224, top + 224))).astype(int)
    seen = np.asarray(folder.Files(tmp_path, np.array([b"image.JPEG"]), 224))[0]
    assert np.abs(seen - expected).max() <= 1  # both round, Pillow twice


@pytest.mark.once
def test_a_training_crop_is_a_box_of_the_image_of_all_sizes_and_mirrored_half_of_the_time(tmp_path):
    y, x = np.mgrid[0:200, 0:240]
    ramps = np.stack([x, y, np.zeros_like(x)], axis=-1).astype("uint8")  # a pixel tells where it lies
    save(tmp_path / "image.JPEG", Image.fromarray(ramps))
    files = folder.Files(tmp_path, np.array([b"image.JPEG"] * 200), 32)
    crops, _ = next(iter(files.epochs(np.zeros(200, "int32"), 200, [0])))
    crops = crops.numpy().astype(float)
    width, height = (np.abs(crops[:, 16, -1, 0] - crops[:, 16, 0, 0]), crops[:, -1, 16, 1] - crops[:, 0, 16, 1])
    width, height = width * 32 / 31, height * 32 / 31  # from the first center of a pixel to the last
    area, ratio = width * height / (200 * 240), width / height
    assert 0.06 < area.min() < 0.12
    assert 0.85 < area.max() < 1.05
    assert (0.7 < ratio.min() < 0.8, 1.25 < ratio.max() < 1.4) == (True, True)
    mirrored = crops[:, 16, -1, 0] < crops[:, 16, 0, 0]
    assert 70 < mirrored.sum() < 130
    assert np.abs(np.diff(crops[..., 1], axis=2)).max() <= 4  # upright


@pytest.mark.once
def test_order_crops_and_flips_of_an_epoch_depend_on_its_own_random_numbers_alone(images, tmp_path):
    data = load(images, tmp_path)
    files, labels = data.train

    def epochs(*seeds):
        dataset = files.epochs(labels, 20, seeds)
        first, again = ([(pixels.numpy(), of.numpy()) for pixels, of in dataset] for _ in range(2))
        assert all(np.array_equal(one[0], other[0]) for one, other in zip(first, again, strict=True))
        return first

    both, second = epochs(7, 8), epochs(8)
    assert [len(of) for _, of in both] == [20] * 6  # of 66 images, 6 are dropped in each epoch
    for (pixels, of), (pixels_alone, of_alone) in zip(both[3:], second, strict=True):
        np.testing.assert_array_equal(pixels, pixels_alone)
        np.testing.assert_array_equal(of, of_alone)
    assert not np.array_equal(both[0][0], both[3][0])


@pytest.mark.quick
@pytest.mark.once
def test_splits_are_stratified_and_no_image_is_in_two(images, tmp_path):
    whole, part = load(images, tmp_path), load(images, tmp_path, train_images=30)
    assert (whole.num_classes, whole.input_shape, whole.in_files) == (3, (16, 16, 3), True)
    assert [len(split[1]) for split in whole[:3]] == [65, 7, 24]
    assert np.bincount(part.train[1]).tolist() == [10] * 3
    names = [set(split[0].paths.tolist()) for split in whole[:3]]
    assert len(set.union(*names)) == sum(map(len, names)) == 96
    assert set(part.train[0].paths.tolist()) < names[0]
    for files, labels in whole[:3]:
        assert [f"n0{label + 1}" for label in labels] == [path.decode().split("/")[1] for path in files.paths]


@pytest.mark.tensorflow_only
def test_rand_augment_in_the_pipeline_is_that_of_the_model_with_the_same_seed(images, tmp_path):
    files, labels = load(images, tmp_path).train
    augment = kc.RandAugment(14, ops=["Rotate", "Solarize"], seed=0)
    plain, augmented = (next(iter(files.epochs(labels, 60, [3], layer)))[0].numpy() for layer in (None, augment))
    order = np.random.default_rng(3)
    order.permutation(len(labels))
    augment.seed_generator.state.assign(order.integers(0, 2**31, (60, 2), "int32")[0])
    np.testing.assert_array_equal(augmented, keras.ops.convert_to_numpy(augment(plain, training=True)))
    assert (augmented != plain).any(axis=(1, 2, 3)).mean() > 0.5


# --- runs ---


@pytest.mark.parametrize(
    ("augment_in", "magnitude"),
    [
        pytest.param("model", None, marks=pytest.mark.once("jax")),
        pytest.param("pipeline", 9, marks=pytest.mark.tensorflow_only),
    ],
)
def test_a_run_goes_on_after_an_epoch_to_the_same_weights_bit_for_bit(
    images, tmp_path, monkeypatch, augment_in, magnitude
):
    settings = {"augment_in": augment_in, "magnitude": magnitude}

    def weights(run):
        net = one_layer(run)
        result = training.trained(run, net)
        return result, net.get_weights()

    result, expected = weights(run_of(images, tmp_path / "a", **settings))
    assert result["images"] == {"train": 48, "validation": 7, "test": 24}

    class Killed(BaseException):
        pass

    def kill(epochs, note=""):
        raise Killed

    run = run_of(images, tmp_path / "b", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(keeper, "SAVE_EVERY", 0)
        patch.setattr(keeper, "report", kill)
        with pytest.raises(Killed):
            weights(run)
    assert (run.folder / keeper.STATE).exists()
    resumed, actual = weights(run)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)
    assert resumed | {"seconds": 0} == result | {"seconds": 0}


@pytest.mark.once
def test_a_script_leaves_rows_and_labels_and_names_the_folder_in_its_key(images, tmp_path, monkeypatch, smoke_run):
    monkeypatch.setattr(training, "build_model", one_layer)
    settings = {"dataset": "imagenet", "data_dir": images, "image_size": 16, "train_images": 60, "epochs": 1}
    rows = smoke_run(fig1, tmp_path, **settings, sparsities="0", magnitudes="none")
    (labels,) = tmp_path.glob("rows_*_labels.txt")
    assert labels.read_text() == "0\tn01\tgoldfish, Carassius auratus\n1\tn02\n2\tn03\tstork\n"
    assert rows[0]["content"] == folder.listing(str(images)).content
    assert rows[0]["content"].startswith("3 classes ")
    assert "imagenet (3 classes)" in plot.title(rows)
    other = run_of(images, tmp_path, content="1000 classes 0123abcd")
    with pytest.raises(ValueError, match=r"not those for which the run was planned, 1000 classes.*Received: 3 classes"):
        training.data_of(other)


@pytest.mark.parametrize("changes", [{"dataset": "digits"}, {"augmenter": "keras_cv"}])
def test_the_pipeline_augments_files_on_tensorflow_and_says_so(images, tmp_path, changes):
    run = run_of(images, tmp_path, augment_in="pipeline", image_size=None, train_images=60, **changes)
    with pytest.raises(ValueError, match=r"--augment_in=pipeline needs --dataset=imagenet.*Received"):
        training.check(run)


@pytest.mark.once
def test_figures_that_move_the_magnitude_do_not_take_the_pipeline(tmp_path, smoke_run):
    from experiments import fig3_magnitude_decay as fig3

    with pytest.raises(ValueError, match="--augment_in is no flag of fig3"):
        smoke_run(fig3, tmp_path, augment_in="pipeline")
    with pytest.raises(ValueError, match=r"--crop_area is a flag of --dataset=imagenet\. Received: --dataset=digits"):
        smoke_run(fig3, tmp_path, crop_area=0.5)


@pytest.mark.once
def test_imagenet_has_a_recipe_of_its_own_and_networks_with_its_stem(images, tmp_path):
    with flagsaver.flagsaver():
        given = ["--dataset=imagenet", f"--data_dir={images}", f"--results={tmp_path}/rows.jsonl"]
        absl_flags.FLAGS(["test", *given, f"--checkpoints={tmp_path}"])
        run = fig1.flags.Study("fig1").run(arm="none", sparsity=0.0, magnitude=None, seed=0)
    assert (run.model, run.epochs, run.batch_size, run.learning_rate) == ("mobilenet_v2", 150, 256, 0.05)
    assert (run.schedule, run.image_size, run.augment_in) == ("cosine", None, "model")
    net = training.build_model(run)
    assert net.input_shape == (None, 224, 224, 3)
    assert net.get_layer("stem").strides == (2, 2)
    assert net.get_layer("logits").kernel_regularizer.l2 == pytest.approx(2e-5)


# --- what is wrong is seen, and before any training ---


@pytest.fixture
def damaged(tmp_path):
    root = tmp_path / "damaged"
    for split in ("train", "val"):
        for name in ("a", "b"):
            for i in range(10):
                save(root / split / name / f"{i}.JPEG", picture(i))
    for name, damage in {
        "train/a/3.JPEG": lambda content: content[: len(content) // 2],
        "train/b/1.JPEG": lambda content: b"",
        "val/b/2.JPEG": lambda content: b"<html>not found</html>",
        "train/a/4.JPEG": lambda content: content[:-2],  # all but the end
    }.items():
        path = root / name
        path.write_bytes(damage(path.read_bytes()))
    return root


@pytest.mark.once
def test_damaged_files_are_named_before_training_or_left_out_if_asked(damaged, tmp_path, capfd, monkeypatch):
    with pytest.raises(ValueError, match=r"(?s)4 files do not decode.*--skip_damaged.*train/a/3.JPEG: \w+") as error:
        load(damaged, tmp_path)
    for name in ("train/b/1.JPEG", "val/b/2.JPEG", "train/a/4.JPEG"):
        assert f"{damaged / name}: " in str(error.value)
    monkeypatch.setattr(folder, "_decode", None)  # what was found out is kept
    data = load(damaged, tmp_path, skip_damaged=True)
    assert [len(split[1]) for split in data[:3]] == [15, 2, 19]
    assert "4 files that do not decode are left out" in capfd.readouterr().err
    assert len(json.loads(next(tmp_path.glob("decoded_*.json")).read_text())) == 4


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"No folder .*train. DIR must hold train/<class>/"),
        (lambda root: (root / "train").mkdir(), r"train holds no folder"),
        (lambda root: (root / "train" / "a").mkdir(parents=True), r"train/a holds no image \(.jpeg"),
        (lambda root: save(root / "train/a/1.JPEG", picture(0)), r"No folder .*val"),
        (
            lambda root: [save(root / name / "1.JPEG", picture(0)) for name in ("train/a", "train/b", "val/a")],
            r"same classes.*Received: 1 that are in one of them, such as b",
        ),
    ],
)
def test_a_folder_of_another_layout_is_refused_with_what_it_must_hold(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        folder.listing(str(tmp_path))


@pytest.mark.once
def test_a_folder_must_be_named():
    with pytest.raises(ValueError, match="--dataset=imagenet needs --data_dir=DIR"):
        folder.listing(None)


@pytest.mark.once
@pytest.mark.skipif(not TAR.exists(), reason="needs tiny_imagenet20.tar in ../shared/data")
def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path):
    with tarfile.open(TAR) as tar:
        tar.extractall(tmp_path, filter="data")
    data = load(tmp_path / "tiny_imagenet20", tmp_path, image_size=64)
    assert [len(split[1]) for split in data[:3]] == [1080, 120, 400]
    assert data.num_classes == 20
    assert np.asarray(data.test[0][:2]).std(axis=(1, 2)).min() > 5  # pictures
