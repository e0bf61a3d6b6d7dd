"""The search for a magnitude: recorded accuracies whose best is known, what a crash leaves, and one real training."""

import json
import math
import os

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kerascompress as kc
from kerascompress.search import _rungs

# Section IV-A for ResNet-20 on CIFAR-100, from 68.8 % without RandAugment: M = 1 gives +0.6 points, M = 14 +1.5, the
# highest -0.5, and beyond M = 22 it harms.
TABLE = {None: 0.688, 1: 0.694, 7: 0.699, 14: 0.703, 22: 0.688, 26: 0.685, 30: 0.683}


def search(table, magnitudes=None, **kwargs):
    train_and_score = table if callable(table) else lambda magnitude, **settings: table[magnitude]
    magnitudes = magnitudes or [each for each in table if each is not None]
    return kc.search_magnitude(train_and_score, magnitudes, **{"verbose": 0, **kwargs})


def peak(best, maximal=None):
    """A score with its best at `best`, and that of no RandAugment at `maximal`."""
    return lambda magnitude, **settings: -abs((maximal if magnitude is None else magnitude) - best)


# --- what is found ---


@pytest.mark.quick
def test_the_optimal_and_the_maximal_magnitude_of_the_paper_are_found():
    result = search(TABLE)
    assert (result.optimal, result.maximal) == (14, 22)
    assert result.scores == {magnitude: (score,) for magnitude, score in TABLE.items()}
    assert result.epochs_spent is result.epochs_exhaustive is None


@pytest.mark.parametrize(
    ("table", "optimal", "maximal"),
    [
        ({None: 0.5, 3: 0.7, 9: 0.7, 12: 0.6}, 3, 12),  # of equals, the weaker augmentation
        ({None: 0.5, 3: 0.5, 9: 0.4, 12: 0.5}, 3, 12),  # equal to none does not harm, whatever lies between
        ({None: 0.9, 3: 0.8, 9: 0.7}, 3, None),  # all of them harm
        ({None: 0.5, 2.5: 0.6}, 2.5, 2.5),
    ],
)
def test_ties_and_harm(table, optimal, maximal):
    result = search(table)
    assert (result.optimal, result.maximal) == (optimal, maximal)


def test_all_31_magnitudes_are_searched_by_default_and_none_besides():
    asked = []
    result = kc.search_magnitude(lambda magnitude: asked.append(magnitude) or (magnitude or 0), verbose=0)
    assert asked == [None, *range(31)]
    assert (result.optimal, result.maximal) == (30, 30)


def test_means_over_seeds_are_compared_and_single_scores_kept():
    scores = {None: (0.5, 0.5, 0.5), 4: (0.6, 0.6, 0.6), 8: (0.9, 0.4, 0.4), 12: (0.7, 0.4, 0.1)}
    result = search(lambda magnitude, seed: scores[magnitude][seed], [4, 8, 12], seeds=range(3))
    assert (result.optimal, result.maximal) == (4, 8)
    assert result.scores == scores
    assert "M =    8: 0.5667 ± 0.2887 (3)" in str(result)


def test_train_and_score_gets_what_the_search_was_given():
    asked = []
    search(lambda magnitude, **settings: asked.append((magnitude, settings)) or 0.5, [4], epochs=np.int64(9), seeds=[7])
    assert asked == [(None, {"epochs": 9, "seed": 7}), (4, {"epochs": 9, "seed": 7})]


def test_a_training_that_diverged_loses_with_a_warning():
    with pytest.warns(UserWarning, match="magnitude 9 diverged: its score is nan"):
        result = search({None: 0.5, 3: 0.6, 9: math.nan})
    assert (result.optimal, result.maximal) == (3, 3)
    with pytest.warns(UserWarning, match="magnitude None diverged"):
        result = search({None: math.nan, 3: 0.6, 9: 0.7})
    assert (result.optimal, result.maximal) == (9, 9)
    with pytest.warns(UserWarning, match="diverged"), pytest.raises(ValueError, match="at every magnitude"):
        search({None: 0.5, 3: math.nan, 9: math.inf})


def test_one_seed_that_diverged_loses_for_its_magnitude():
    scores = {None: (0.1, 0.1), 4: (0.2, 0.2), 8: (0.9, math.nan)}
    with pytest.warns(UserWarning, match="magnitude 8 diverged"):
        result = search(lambda magnitude, seed: scores[magnitude][seed], [4, 8], seeds=[0, 1])
    assert result.optimal == 4
    assert "M =    8: nan ± nan (2)" in str(result)


# --- the cheaper search ---


def test_halving_asks_for_the_better_third_three_times_as_long_and_counts_epochs():
    asked = []

    def train_and_score(magnitude, epochs):
        asked.append((magnitude, epochs))
        return peak(14, maximal=22)(magnitude)

    result = search(train_and_score, range(31), epochs=27, halving=True)
    assert [(asked[0], len(asked)), *asked[1:4]] == [((None, 1), 32 + 12 + 5 + 3), (0, 1), (1, 1), (2, 1)]
    assert sorted((m for m, epochs in asked if epochs == 9 and m), key=abs) == [12, 13, 14, 15]
    assert [m for m, epochs in asked if epochs == 27] == [None, 14, 13]
    assert (result.optimal, result.maximal) == (14, 22)
    assert result.epochs_spent == 32 * 1 + 12 * 3 + 5 * 9 + 3 * 27 == 194
    assert result.epochs_exhaustive == 32 * 27 == 864
    assert len(result.scores) == 32
    assert str(result).startswith(
        "optimal magnitude 14, maximal magnitude 22; 194 epochs, an exhaustive search takes 864"
    )


def test_halving_ranks_by_the_longest_trainings_and_compares_with_none_after_as_many_epochs():
    scores = {
        1: {None: 0.5, 2: 0.4, 5: 0.7, 8: 0.55, 11: 0.45, 14: 0.8},
        3: {None: 0.6, 5: 0.65, 14: 0.55},
    }
    result = search(lambda magnitude, epochs: scores[epochs][magnitude], [2, 5, 8, 11, 14], epochs=3, halving=True)
    assert (result.optimal, result.maximal) == (5, 8)  # 14 was best, and harms in the end; 8 did not when it was tried
    assert result.scores == {None: (0.6,), 2: (0.4,), 5: (0.65,), 8: (0.55,), 11: (0.45,), 14: (0.55,)}


@given(best=st.integers(0, 30), epochs=st.integers(1, 300), seeds=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_halving_finds_the_exhaustive_optimum_when_rankings_do_not_change_with_epochs(best, epochs, seeds):
    whole = search(peak(best, 30), range(31), epochs=epochs, seeds=range(seeds))
    halved = search(peak(best, 30), range(31), epochs=epochs, seeds=range(seeds), halving=True)
    assert (halved.optimal, halved.maximal) == (whole.optimal, whole.maximal)
    assert whole.epochs_spent == whole.epochs_exhaustive == halved.epochs_exhaustive == 32 * epochs * seeds
    assert halved.epochs_spent <= whole.epochs_spent


@given(count=st.integers(1, 40), epochs=st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_the_last_rung_is_a_whole_training_and_no_rung_is_empty(count, epochs):
    rungs = _rungs(count, epochs)
    assert rungs[0][0] == count
    assert rungs[-1][1] == epochs
    assert all(each >= 1 and length >= 1 for each, length in rungs)


@pytest.mark.parametrize(
    ("sparsity", "tried"),  # 14.6 - 17 p = 14.6, 7.8, and 0 where the line is below it
    [(0.0, range(9, 22)), (0.4, range(2, 15)), (0.95, range(13))],
)
def test_a_sparsity_begins_the_search_around_the_line_through_the_papers_optima(sparsity, tried):
    result = search(peak(min(tried) + 5, min(tried) + 8), range(31), epochs=9, halving=True, sparsity=sparsity)
    assert set(result.scores) == {None, *tried}
    assert (result.optimal, result.maximal) == (min(tried) + 5, min(tried) + 8)
    assert result.epochs_exhaustive == 32 * 9


def test_an_optimum_at_the_edge_of_what_was_tried_is_told():
    with pytest.warns(UserWarning, match="2 to 14: .*without `sparsity`"):
        assert search(peak(25, 30), range(31), epochs=9, halving=True, sparsity=0.4).optimal == 14
    with pytest.warns(UserWarning, match="9 to 21: .*without `sparsity`"):
        assert search(peak(0, 30), range(31), epochs=9, halving=True, sparsity=0.0).optimal == 9
    assert search(peak(0, 9), range(31), epochs=9, halving=True, sparsity=0.9).optimal == 0  # that is the very edge


def test_a_maximum_at_the_edge_of_what_was_tried_is_told():
    with pytest.warns(UserWarning, match="The maximal magnitude 21 is the largest that was tried"):
        result = search(peak(14, 30), range(31), epochs=9, halving=True, sparsity=0.0)
    assert (result.optimal, result.maximal) == (14, 21)


# --- the file ---


class Crash(Exception):  # noqa: N818
    pass


def test_a_crash_loses_no_finished_score(tmp_path):
    asked = []

    def train_and_score(magnitude, seed):
        if len(asked) == 5:
            raise Crash
        asked.append((magnitude, seed))
        return math.nan if (magnitude, seed) == (7, 0) else TABLE[magnitude] + seed / 100

    file = tmp_path / "new" / "scores.json"
    with pytest.warns(UserWarning, match="diverged"), pytest.raises(Crash):
        search(train_and_score, [1, 7, 14], seeds=[0, 1], file=file)
    assert len(json.loads(file.read_text())) == 5
    done, asked[:] = list(asked), []
    with pytest.warns(UserWarning, match="magnitude 7 diverged"):
        result = search(train_and_score, [1, 7, 14], seeds=[0, 1], file=file)
    assert asked == [(7, 1), (14, 0), (14, 1)]
    assert done == [(None, 0), (None, 1), (1, 0), (1, 1), (7, 0)]
    assert result.optimal == 14
    assert result.scores[14] == (0.703, 0.713)
    with pytest.warns(UserWarning, match="diverged"):
        again = search(lambda *_, **__: pytest.fail("was scored before"), [1, 7, 14], seeds=[0, 1], file=file)
    assert again.optimal == 14
    assert os.listdir(file.parent) == ["scores.json"]


def test_two_searches_may_write_to_one_file_at_a_time(tmp_path):
    file, asked = tmp_path / "scores.json", []

    def train_and_score(magnitude, seed):
        asked.append((magnitude, seed))
        if len(asked) == 1:  # while this one is trained, the other search finishes
            search(train_and_score, [7, 14], seeds=[1], file=file)
        return TABLE[magnitude]

    search(train_and_score, [7, 14], seeds=[0, 1], file=file)
    assert len(asked) == len(set(asked)) == len(json.loads(file.read_text())) == 6


def test_a_crash_while_the_file_is_written_leaves_the_scores_before(tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    search({None: 0.5, 3: 0.6}, file=file)
    before = file.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        search({None: 0.5, 3: 0.6, 4: 0.7}, file=file)
    assert file.read_text() == before


def test_scores_of_other_epochs_are_not_taken_for_these(tmp_path):
    file = tmp_path / "scores.json"
    search(TABLE, epochs=3, file=file)
    result = search({each: -score for each, score in TABLE.items()}, epochs=9, file=file)
    assert result.optimal == 30
    assert result.epochs_spent == 7 * 9


# --- the score ---


def test_a_network_that_has_diverged_has_no_accuracy():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.layers[0].kernel.assign(np.full((2, 3), np.nan))
    for metric in ("accuracy", "cross_entropy"):
        assert np.isnan(kc.validation_score(model, np.ones((4, 2)), np.zeros(4, int), metric=metric))


def test_the_score_is_minus_the_objective_of_equation_3_or_the_accuracy():
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 255, (50, 2, 2, 1)).astype("float32"), rng.integers(0, 3, 50)
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    logits = keras.ops.convert_to_numpy(model(images)).astype("float64")
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    expected = np.log(exponentials[np.arange(50), labels] / exponentials.sum(1)).mean()
    score = kc.validation_score(model, images, labels, metric="cross_entropy", batch_size=16)
    assert score == pytest.approx(expected, rel=1e-5)
    assert kc.validation_score(model, images, labels) == np.mean(logits.argmax(1) == labels)


@pytest.mark.once("jax")
@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (keras.layers.Dense(1, "sigmoid"), [0, 1, 1], r"two classes or more.*\(None, 1\)"),
        (keras.layers.Dense(4), [0, 1, 4], "from 0 to 3.*from 0 to 4"),
        (keras.layers.Dense(4), [0, 1, -1], "from 0 to 3.*from -1 to 1"),
        (keras.layers.Dense(4), [0.0, 1.0, 2.0], "must be integers.*float"),
        (keras.layers.Reshape((2, 2)), [0, 1, 1], r"\(None, 2, 2\)"),
    ],
)
def test_what_is_no_classifier_and_no_class_has_no_score(outputs, labels, message):
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), outputs])
    with pytest.raises(ValueError, match=message):
        kc.validation_score(model, np.zeros((3, 2, 2, 1), "uint8"), np.array(labels))
    both = keras.Model(model.inputs, [model.outputs[0], model.outputs[0]])
    with pytest.raises(ValueError, match="must have one output"):
        kc.validation_score(both, np.zeros((3, 2, 2, 1), "uint8"), np.array([0, 1, 1]))


@pytest.mark.once("jax")
def test_the_score_is_on_augmented_images_if_asked_and_the_same_for_the_same_seed():
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), "uint8"), np.arange(40) % 5
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(5)])

    def score(magnitude, ops):
        augment = None if magnitude is None else kc.RandAugment(magnitude, ops=ops, seed=3)
        return kc.validation_score(model, images, labels, augment=augment, metric="cross_entropy")

    assert score(20, ["Identity"]) == pytest.approx(score(None, None))
    assert score(20, ["Solarize"]) != pytest.approx(score(None, None))
    assert score(20, ["Identity", "Solarize"]) == score(20, ["Identity", "Solarize"])


@pytest.mark.once("jax")
def test_a_search_on_real_digits_with_real_trainings_prefers_moderate_magnitudes_to_breaking_ones():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images, labels = (digits.images[..., None] * 255 / 16).astype("float32"), digits.target
    inputs = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()])
    net = keras.Sequential([inputs, keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
    augment = kc.RandAugment(0, num_ops=2, ops=["TranslateX"], seed=0)
    trainer = keras.Sequential([keras.Input((8, 8, 1)), augment, net])
    initial = net.get_weights()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_and_score(magnitude, epochs):
        net.set_weights(initial)
        augment.magnitude.assign(magnitude or 0)  # without RandAugment; at M = 0 a translation moves nothing
        trainer.compile(keras.optimizers.Adam(0.01), loss, jit_compile=keras.backend.backend() == "jax")
        trainer.fit(images[:800], labels[:800], batch_size=40, epochs=epochs, verbose=0)
        return kc.validation_score(net, images[1200:], labels[1200:])

    result = search(train_and_score, [2, 30], epochs=4)
    assert result.optimal == 2
    assert result.scores[2][0] > 0.7
    assert result.epochs_spent == 12


@pytest.mark.once
def test_labels_in_a_column_score_the_same_and_the_advice_for_one_hot_labels_is_for_those():
    inputs = keras.Input((4,))
    logits = keras.layers.Dense(3)(inputs)
    model, probabilities = keras.Model(inputs, logits), keras.Model(inputs, keras.layers.Softmax()(logits))
    images, labels = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 3
    for metric in ("accuracy", "cross_entropy"):
        expected = kc.validation_score(model, images, labels, metric=metric)
        assert kc.validation_score(model, images, labels[:, None], metric=metric) == expected
    assert kc.validation_score(probabilities, images, labels) == kc.validation_score(model, images, labels)
    with pytest.raises(ValueError, match=r"`model` must give logits. Received: a model that ends in softmax"):
        kc.validation_score(probabilities, images, labels, metric="cross_entropy")
    with pytest.raises(ValueError, match=r"labels of shape \(5, 1\) for 6 images\.$"):
        kc.validation_score(model, images, labels[1:, None])


class Batches(keras.utils.PyDataset):
    """Two batches; Keras takes what follows them from the first again."""

    def __init__(self, images, labels):
        super().__init__()
        self.images, self.labels = images, labels

    def __len__(self):
        return 2

    def __getitem__(self, step):
        return self.images[step % 2 :: 2], self.labels[step % 2 :: 2]


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "DataLoader"])
def test_a_dataset_scores_as_its_arrays_do(kind):
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(5)])
    images, labels = np.random.default_rng(0).integers(0, 256, (41, 4, 4, 1), "uint8"), np.arange(41) % 5
    if kind == "tf.data":
        dataset = pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices((images, labels[:, None])).batch(16)
    elif kind == "DataLoader":
        data = pytest.importorskip("torch").utils.data
        dataset = data.DataLoader(list(zip(images, labels, strict=True)), batch_size=16)
    else:
        dataset = Batches(images, labels)
    for metric in ("accuracy", "cross_entropy"):
        expected = kc.validation_score(model, images, labels, metric=metric)
        assert kc.validation_score(model, dataset, metric=metric) == pytest.approx(expected, rel=1e-6)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: search(TABLE, [31]), ValueError, r"\[0, 30\].*Received: magnitudes=\[31\]"),
        (lambda: search(TABLE, [-1]), ValueError, r"\[0, 30\]"),
        (lambda: search(TABLE, [None]), ValueError, "no RandAugment is always tried"),
        (lambda: search(TABLE, [math.nan]), ValueError, r"\[0, 30\]"),
        (lambda: kc.search_magnitude(TABLE.get, []), ValueError, "at least one"),
        (lambda: search(TABLE, epochs=0), ValueError, "Received: epochs=0"),
        (lambda: search(TABLE, halving=True), ValueError, "needs `epochs`"),
        (lambda: search(TABLE, sparsity=0.5), ValueError, "halving=True"),
        (lambda: search(TABLE, epochs=9, halving=True, sparsity=60), ValueError, "divide them by 100"),
        (lambda: search(TABLE, seeds=3), ValueError, r"range\(3\)"),
        (lambda: search(TABLE, seeds=[]), ValueError, "Received: seeds"),
        (lambda: search(TABLE, seeds=[1, 1]), ValueError, "different"),
        (lambda: search(lambda magnitude: {"accuracy": 0.5}, [3]), TypeError, "one number.*dict at magnitude None"),
        (lambda: search(lambda magnitude: None, [3]), TypeError, "one number"),
        (lambda: kc.validation_score(None, [1], [1], metric="loss"), ValueError, "Received: metric='loss'"),
        (lambda: kc.validation_score(None, np.ones((4, 2)), np.ones((4, 3))), ValueError, "argmax"),
        (lambda: kc.validation_score(None, np.ones((0, 2)), np.ones(0)), ValueError, "at least one image"),
        (lambda: kc.validation_score(None, np.ones((4, 2))), ValueError, "dataset of batches.*of type ndarray"),
        (lambda: kc.validation_score(None, [(np.ones((4, 2)), np.ones(4), np.ones(4))]), ValueError, "sample weights"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("text", ["", "[1]", '{"scores": 3}', '[{"magnitude": 3}]'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="that `search_magnitude` wrote"):
        search(TABLE, file=file)
    assert file.read_text() == text


def test_a_line_is_printed_for_every_training(capsys):
    search(TABLE, [1, 14], seeds=[5], verbose=1)
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] M = None, seed 5: 0.6880",
        "[2/3] M = 1, seed 5: 0.6940",
        "[3/3] M = 14, seed 5: 0.7030",
    ]
