"""The Distiller: its losses, what it selects, what it leaves alone, and where it runs."""

import keras
import numpy as np
import pytest
from keras import ops

import kerascompress as kc
from kerascompress import Distiller, RandAugment, distillation_loss, select_candidates

CLASSES, SIZE, BATCH = 5, 8, 12


def classifier(width=3, seed=0, *, batch_norm=True, classes=CLASSES, activation=None, size=SIZE, name=None):
    """A small network with the parts that matter here: uint8 in, BatchNorm, weight decay, logits out."""
    layers = [keras.layers.Conv2D(width, 3, strides=2, kernel_initializer=keras.initializers.GlorotUniform(seed))]
    layers += [keras.layers.BatchNormalization(momentum=0.5)] if batch_norm else []
    dense = keras.layers.Dense(
        classes,
        activation=activation,
        kernel_initializer=keras.initializers.GlorotUniform(seed + 1),
        kernel_regularizer=keras.regularizers.L2(0.01),
    )
    layers += [keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D(), dense]
    return keras.Sequential([keras.Input((size, size, 3)), keras.layers.Rescaling(1 / 64, -2), *layers], name=name)


def data(count=BATCH, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, SIZE, SIZE, 3)).astype("uint8"), np.arange(count) % CLASSES


def light(magnitude=(0, 30), seed=0, **kwargs):
    """RandAugment with few operations, as compiling all of them takes long."""
    return RandAugment(magnitude, num_ops=1, ops=["Solarize", "TranslateX", "Brightness"], seed=seed, **kwargs)


def distiller(compiled=True, student=None, teacher=None, augment=None, optimizer=None, metrics=("accuracy",), loss=None,
              run=None, **kwargs):  # fmt: skip
    built = Distiller(
        student or classifier(), teacher or classifier(6, seed=9), augment=augment or light(),
        **{"num_candidates": 3, **kwargs},
    )  # fmt: skip
    if compiled:
        optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
        built.compile(optimizer, loss, metrics=list(metrics), **(run or {}))
    return built


def arrays(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def numpy_log_softmax(logits):
    shifted = np.asarray(logits, "float64") - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def numpy_kl(teacher, student, temperature=1.0):
    log_t, log_s = (
        numpy_log_softmax(np.asarray(teacher) / temperature),
        numpy_log_softmax(np.asarray(student) / temperature),
    )
    return temperature**2 * np.sum(np.exp(log_t) * (log_t - log_s), axis=-1)


# --- the losses ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_distillation_loss_is_the_kl_of_float64_numpy(temperature, scale):
    random = np.random.default_rng(0)
    teacher, student = scale * random.uniform(-1, 1, (2, 50, 7)).astype("float32")
    loss = ops.convert_to_numpy(distillation_loss(teacher, student, temperature))
    assert loss.shape == (50,)
    np.testing.assert_allclose(loss, numpy_kl(teacher, student, temperature), rtol=2e-5, atol=2e-6 * temperature**2)
    extreme = np.array([[100.0, -100.0], [-100.0, 100.0]])
    expected = numpy_kl(extreme, extreme[::-1], temperature)
    np.testing.assert_allclose(distillation_loss(extreme, extreme[::-1], temperature), expected, rtol=1e-6)
    np.testing.assert_array_equal(distillation_loss(extreme, extreme, temperature), [0, 0])


def test_distillation_loss_takes_any_leading_axes_and_half_precision():
    random = np.random.default_rng(1)
    teacher, student = random.normal(0, 2, (2, 3, 4, 5))
    np.testing.assert_allclose(distillation_loss(teacher, student), numpy_kl(teacher, student), rtol=1e-4, atol=1e-6)
    halves = [ops.cast(logits, "bfloat16") for logits in (teacher, student)]
    expected = numpy_kl(*[ops.convert_to_numpy(ops.cast(logits, "float32")) for logits in halves])
    loss = distillation_loss(*halves, temperature=1.0)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def gradient_of_step(build, images, labels, **kwargs):
    """The gradient that one SGD step at rate 1 has applied, in the order of the trainable variables."""
    model = build()
    model.compile(keras.optimizers.SGD(1.0))
    before = arrays(model.trainable_variables)
    model.train_on_batch(images, labels, **kwargs)
    return [b - a for b, a in zip(before, arrays(model.trainable_variables), strict=True)]


class Logits(keras.layers.Layer):
    """One trainable logit vector for each image of the batch, whatever the pixels."""

    def __init__(self, values, **kwargs):
        super().__init__(**kwargs)
        self.logits = self.add_weight(shape=values.shape, initializer=lambda *_, **__: ops.convert_to_tensor(values))

    def call(self, images):
        return self.logits + 0.0 * ops.sum(ops.cast(images, "float32"), axis=(1, 2, 3))[:, None]

    def compute_output_shape(self, shape):
        return (shape[0], self.logits.shape[1])


def constant_classifier(values):
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), Logits(np.asarray(values, "float32"))])


TEACHER = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0], [-1.5, 0.25, 4.0]]
STUDENT = [[0.1, 0.2, -0.3], [1.5, -0.5, 0.0], [2.0, -2.0, 0.0], [0.0, 0.0, 1.0]]
LABELS = np.array([0, 1, 2, 2])


def of_constants(temperature=4.0, alpha=0.1, **kwargs):
    return Distiller(
        constant_classifier(STUDENT), constant_classifier(TEACHER), augment=light(), num_candidates=1,
        temperature=temperature, alpha=alpha, **kwargs,
    )  # fmt: skip


def logs_of_step(labels, loss=None, **kwargs):
    model = of_constants()
    model.compile("sgd", loss)
    return {name: float(v) for name, v in model.train_on_batch(data(4)[0], labels, return_dict=True, **kwargs).items()}


@pytest.mark.quick
def test_total_loss_is_pytorchs():
    # torch 2.13, float64: a * F.cross_entropy(s, y) + (1 - a) * t**2 * F.kl_div(F.log_softmax(s / t, 1),
    # F.log_softmax(t / t, 1), reduction="batchmean", log_target=True), with t = 4, a = 0.1
    logs = logs_of_step(LABELS)
    assert logs["student_loss"] == pytest.approx(1.5053899275535894, rel=1e-5)
    assert logs["distillation_loss"] == pytest.approx(1.7623123663732891, rel=1e-5)
    assert logs["loss"] == pytest.approx(1.7366201224913191, rel=1e-5)


@pytest.mark.once("jax")
def test_an_alpha_of_1_is_the_cross_entropy_alone():
    model = of_constants(alpha=1)
    model.compile("sgd")
    assert model.train_on_batch(data(4)[0], LABELS, return_dict=True)["loss"] == pytest.approx(1.5053899275535894)


@pytest.mark.once("jax")
def test_integer_column_and_one_hot_labels_are_the_same_and_smoothing_is_pytorchs():
    one_hot = np.eye(3, dtype="float32")[LABELS]
    assert logs_of_step(one_hot)["loss"] == pytest.approx(1.7366201224913191, rel=1e-5)
    assert logs_of_step(LABELS[:, None])["loss"] == pytest.approx(1.7366201224913191, rel=1e-5)
    smooth = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    logs = logs_of_step(one_hot, loss=smooth)
    assert logs["student_loss"] == pytest.approx(1.5037232608869227, rel=1e-5)
    assert logs["loss"] == pytest.approx(1.7364534558246525, rel=1e-5)


def test_sample_weights_scale_both_losses_of_an_image():
    weights = np.array([1.0, 0.0, 2.0, 0.5])
    # torch: the mean over images of weight * (0.1 * cross-entropy + 0.9 * distillation)
    assert logs_of_step(LABELS, sample_weight=weights)["loss"] == pytest.approx(1.089531229557771, rel=1e-5)
    (gradient,) = gradient_of_step(of_constants, data(4)[0], LABELS, sample_weight=weights)
    np.testing.assert_array_equal(gradient[1], [0, 0, 0])
    assert np.all(np.abs(gradient[[0, 2, 3]]).sum(axis=1) > 0)


@pytest.mark.once("jax")
def test_weight_decay_of_the_student_is_in_the_loss_and_the_teachers_is_not():
    images, labels = data()
    model = distiller(num_candidates=1)
    penalty = 0.01 * np.sum(arrays(model.student.trainable_variables)[-2] ** 2)
    logs = model.train_on_batch(images, labels, return_dict=True)
    expected = 0.1 * logs["student_loss"] + 0.9 * logs["distillation_loss"] + penalty
    assert float(logs["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_that_of_finite_differences():
    def loss(student):
        ce = -numpy_log_softmax(student)[np.arange(4), LABELS].mean()
        return 0.3 * ce + 0.7 * numpy_kl(TEACHER, student, 2.0).mean()

    student, expected = np.array(STUDENT), np.zeros((4, 3))
    for index in np.ndindex(4, 3):
        nudge = np.zeros((4, 3))
        nudge[index] = 1e-5
        expected[index] = (loss(student + nudge) - loss(student - nudge)) / 2e-5
    (gradient,) = gradient_of_step(lambda: of_constants(temperature=2.0, alpha=0.3), data(4)[0], LABELS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


# --- the selection ---


@pytest.mark.quick
@pytest.mark.parametrize(("ce_weight", "kl_weight"), [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_selection_is_brute_force(ce_weight, kl_weight):
    random = np.random.default_rng(0)
    teacher_loss, divergence = random.exponential(size=(2, 6, 200)).astype("float32")
    chosen = ops.convert_to_numpy(select_candidates(teacher_loss, divergence, ce_weight, kl_weight))
    assert chosen.dtype == "int32"
    for image in range(200):
        values = [ce_weight * teacher_loss[i, image] - kl_weight * divergence[i, image] for i in range(6)]
        assert chosen[image] == values.index(min(values))


def test_of_equal_candidates_the_first_is_selected():
    teacher_loss = np.array([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 2.0, 1.0]], "float32")
    np.testing.assert_array_equal(select_candidates(teacher_loss, np.zeros((3, 3)), 1.0, 0.0), [1, 0, 0])


ARMS = {"both": (1.0, 1.0), "the filter alone": (1.0, 0.0), "the divergence alone": (0.0, 1.0)}


@pytest.mark.parametrize("arm", ["both", *(pytest.param(arm, marks=pytest.mark.once("jax")) for arm in list(ARMS)[1:])])
def test_candidates_are_chosen_by_what_teacher_and_student_make_of_them(arm):
    ce_weight, kl_weight = ARMS[arm]
    model = distiller(num_candidates=4, ce_weight=ce_weight, kl_weight=kl_weight, selection_temperature=2.0)
    images, labels = data()
    views = {name: ops.convert_to_numpy(v) for name, v in model.draw_candidates(images, labels).items()}
    assert views["images"].shape == (4, BATCH, SIZE, SIZE, 3)
    assert views["images"].dtype == "uint8"
    assert views["magnitude"].shape == (4, BATCH)
    assert len(np.unique(views["magnitude"])) == 4 * BATCH
    for i in range(4):
        teacher = model.teacher.predict(views["images"][i], verbose=0)
        student = model.student.predict(views["images"][i], verbose=0)
        np.testing.assert_allclose(views["teacher_logits"][i], teacher, rtol=1e-5, atol=1e-5)
        expected = -numpy_log_softmax(teacher)[np.arange(BATCH), labels]
        np.testing.assert_allclose(views["teacher_loss"][i], expected, rtol=1e-4, atol=1e-5)
        expected = numpy_kl(teacher, student, 2.0) if kl_weight else np.zeros(BATCH)
        np.testing.assert_allclose(views["divergence"][i], expected, rtol=1e-3, atol=1e-5)
    criterion = ce_weight * views["teacher_loss"] - kl_weight * views["divergence"]
    np.testing.assert_array_equal(views["chosen"], np.argmin(criterion, axis=0))
    assert len(np.unique(views["chosen"])) > 1
    if arm == "the filter alone":
        assert np.all(views["teacher_loss"].min(axis=0) == views["teacher_loss"][views["chosen"], np.arange(BATCH)])


@pytest.mark.quick
def test_a_step_trains_on_the_chosen_images_and_on_nothing_else():
    images, labels = data()
    model, twin = (distiller(num_candidates=4, augment=light(seed=5)) for _ in range(2))
    views = {name: ops.convert_to_numpy(v) for name, v in twin.draw_candidates(images, labels).items()}
    chosen = views["images"][views["chosen"], np.arange(BATCH)]
    logs = model.train_on_batch(images, labels, return_dict=True)

    alone = Distiller(twin.student, twin.teacher, augment=lambda images, training: images, num_candidates=1)
    alone.compile(keras.optimizers.SGD(0.05, momentum=0.9), metrics=["accuracy"])
    expected = alone.train_on_batch(chosen, labels, return_dict=True)
    for a, b in zip(arrays(model.student.variables), arrays(alone.student.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    means = next(variable for variable in model.student.variables if variable.name == "moving_mean")
    assert ops.convert_to_numpy(means).any()  # BatchNorm's statistics, which began at zero, are among them
    for name in ("loss", "student_loss", "distillation_loss", "accuracy"):
        assert float(logs[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    picked = views["magnitude"][views["chosen"], np.arange(BATCH)]
    assert float(logs["chosen_magnitude"]) == pytest.approx(picked.mean(), rel=1e-5)
    assert float(logs["first_kept"]) == pytest.approx(np.mean(views["chosen"] == 0), rel=1e-6)
    assert "chosen_magnitude" not in expected


@pytest.mark.once("jax")
@pytest.mark.parametrize("method", ["evaluate", "predict", "train_on_batch"])
def test_a_student_that_begins_with_the_teachers_weights_runs_outside_of_fit(method):
    student, teacher = classifier(seed=1), classifier(seed=2)
    model = distiller(student=student, teacher=teacher, num_candidates=1)
    for one, other in zip(student.variables, teacher.variables, strict=True):
        one.assign(other.value)  # on JAX one buffer
    expected = arrays(teacher.variables)
    images, labels = data()
    settings = {"verbose": 0} if method in ("evaluate", "predict") else {}
    getattr(model, method)(*([images] if method == "predict" else [images, labels]), **settings)
    assert_same(arrays(teacher.variables), expected)


@pytest.mark.once("jax")
def test_one_candidate_is_no_selection():
    model = distiller(num_candidates=1)
    logs = model.fit(*data(), batch_size=4, verbose=0).history
    assert logs["first_kept"] == [1.0]
    assert 5 < logs["chosen_magnitude"][0] < 25
    fixed = distiller(num_candidates=1, augment=light(14.0)).fit(*data(), batch_size=4, verbose=0).history
    assert fixed["chosen_magnitude"] == [14.0]


@pytest.mark.once("jax")
def test_augment_may_be_a_function_or_a_sequence_in_which_magnitudes_are_found():
    def invert(images, training):
        return 255 - ops.cast(images, "float32")

    model = distiller(augment=invert)
    assert "chosen_magnitude" not in model.fit(*data(), verbose=0).history
    views = model.draw_candidates(*data())
    np.testing.assert_array_equal(ops.convert_to_numpy(views["images"])[2], 255 - data()[0].astype("float32"))
    chain = keras.Sequential([kc.RandomCrop(padding=1, seed=1), light(7.0)])
    assert distiller(augment=chain).fit(*data(), verbose=0).history["chosen_magnitude"] == [7.0]


# --- what it leaves alone ---


@keras.saving.register_keras_serializable("tests")
class Counter(keras.layers.Layer):
    """Counts the images that pass."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False)

    def call(self, images):
        self.count.assign(self.count + ops.cast(ops.shape(images)[0], "float32"))
        return images


def counted(model):
    counter = Counter()
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), counter, model]), lambda: float(
        ops.convert_to_numpy(counter.count)
    )


def test_the_teacher_sees_each_candidate_once_and_nothing_in_evaluate_and_predict():
    teacher, seen = counted(classifier(6, seed=9))
    model = distiller(teacher=teacher, num_candidates=3)
    images, labels = data()
    model.evaluate(images, labels, verbose=0)
    model.predict(images, verbose=0)
    assert seen() == 0
    model.fit(images, labels, batch_size=4, epochs=2, verbose=0, validation_data=(images, labels))
    assert seen() == 3 * 2 * BATCH


def test_the_teacher_stays_bit_identical_and_trainable():
    teacher = classifier(6, seed=9)
    before = arrays(teacher.variables)
    distiller(teacher=teacher).fit(*data(), batch_size=4, epochs=2, verbose=0)
    assert_same(arrays(teacher.variables), before)
    assert teacher.trainable
    assert all(layer.trainable for layer in teacher.layers)


@pytest.mark.once("jax")
def test_evaluate_and_predict_are_the_students():
    images, labels = data()
    model = distiller()
    model.fit(images, labels, batch_size=4, verbose=0)
    np.testing.assert_array_equal(model.predict(images, verbose=0), model.student.predict(images, verbose=0))
    logs = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert logs.keys() == {"loss", "accuracy"}
    logits = model.student.predict(images, verbose=0)
    penalty = 0.01 * np.sum(arrays(model.student.trainable_variables)[-2] ** 2)
    expected = -numpy_log_softmax(logits)[np.arange(BATCH), labels].mean() + penalty
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)
    assert logs["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    history = model.fit(images, labels, batch_size=4, verbose=0, validation_data=(images, labels)).history
    trained = {"loss", "accuracy", "student_loss", "distillation_loss", "chosen_magnitude", "first_kept"}
    assert history.keys() == trained | {"val_loss", "val_accuracy"}


# --- seeds, saving, resuming ---


@pytest.mark.once("jax")
def test_a_seed_reproduces_the_choices_and_the_training():
    first, second = (distiller(augment=light(seed=3)) for _ in range(2))
    histories = [
        model.fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0).history for model in (first, second)
    ]
    assert histories[0] == histories[1]
    assert_same(arrays(first.variables), arrays(second.variables))
    other = distiller(augment=light(seed=4)).fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0).history
    assert other["first_kept"] != histories[0]["first_kept"]


@pytest.mark.parametrize("save_teacher", [pytest.param(False, marks=pytest.mark.once("jax")), True])
def test_saved_and_loaded_it_continues_bit_for_bit(tmp_path, save_teacher):
    images, labels = data()
    teacher = classifier(6, seed=9)
    model = distiller(teacher=teacher, save_teacher=save_teacher)
    model.fit(images, labels, batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "distiller.keras")
    model.fit(images, labels, batch_size=4, shuffle=False, verbose=0)

    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.evaluate(images, labels, verbose=0)
    if save_teacher:
        assert_same(arrays(loaded.teacher.variables), arrays(teacher.variables))
    else:
        with pytest.raises(ValueError, match=r"has no teacher.*Set `distiller.teacher`"):
            loaded.draw_candidates(images, labels)
        loaded.teacher = teacher
    loaded.fit(images, labels, batch_size=4, shuffle=False, verbose=0)
    assert_same(arrays(loaded.variables), arrays(model.variables))
    assert_same(arrays(loaded.optimizer.variables), arrays(model.optimizer.variables))


@pytest.mark.once("jax")
def test_weights_bring_back_the_random_state_of_augmentation_and_student(tmp_path):
    images, labels = data()

    def build():
        student = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
        student.add(keras.layers.Dropout(0.5, seed=2))  # Keras saves neither its random state nor a flip's
        student.add(keras.layers.Dense(CLASSES, kernel_initializer="ones"))
        chain = keras.Sequential(
            [keras.layers.RandomFlip(seed=5), RandAugment((0, 30), num_ops=1, ops=["Solarize"], seed=6)]
        )
        return distiller(student=student, augment=chain, num_candidates=1, compiled=False)

    def draw(model):
        logits = model.student(images.astype("float32"), training=True)
        return arrays([model.draw_candidates(images, labels)["images"], logits])

    model = build()
    draw(model)
    model.save_weights(tmp_path / "d.weights.h5")
    model.save(tmp_path / "d.keras")
    expected, restored = draw(model), build()
    restored.load_weights(tmp_path / "d.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    loaded.teacher = model.teacher
    for each in (restored, loaded):
        assert_same(draw(each), expected)
    assert not any(np.array_equal(*pair) for pair in zip(draw(model), expected, strict=True))


@pytest.mark.once("jax")
def test_checkpoints_hold_the_teacher_only_if_asked(tmp_path):
    sizes = {}
    for save_teacher in (False, True):
        model = distiller(teacher=classifier(300, seed=9), save_teacher=save_teacher, compiled=False)
        model.save_weights(tmp_path / "d.weights.h5")
        sizes[save_teacher] = (tmp_path / "d.weights.h5").stat().st_size
        assert len(model.variables) < 20
        assert sum(v.shape == (300, CLASSES) for v in model.variables) == 0
    assert sizes[True] > sizes[False] + 4 * 300 * CLASSES
    again = distiller(teacher=classifier(300, seed=9), student=classifier(seed=7), save_teacher=True, compiled=False)
    again.load_weights(tmp_path / "d.weights.h5")
    assert_same(arrays(again.student.variables), arrays(model.student.variables))


def by_candidate_loss(model):
    return ops.convert_to_numpy(model.draw_candidates(*data())["teacher_loss"])


@pytest.mark.once("jax")
def test_another_teacher_is_the_one_that_teaches_from_then_on():
    images, labels = data()
    model = distiller(augment=invert_the_second_candidate, num_candidates=1, optimizer=keras.optimizers.SGD(0.0))
    model.fit(images, labels, verbose=0)
    x = keras.Input((SIZE, SIZE, 3))
    model.teacher = keras.Model(x, 5.0 * keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x) / 255.0))
    logs = model.fit(images, labels, batch_size=BATCH, shuffle=False, verbose=0).history
    views = {
        name: ops.convert_to_numpy(v)[0]
        for name, v in model.draw_candidates(images, labels).items()
        if name != "chosen"
    }
    expected = model.teacher.predict(views["images"], verbose=0)
    np.testing.assert_allclose(views["teacher_logits"], expected, rtol=1e-4, atol=1e-4)
    twin = distiller(student=model.student, teacher=model.teacher, augment=model.augment, num_candidates=1,
                     optimizer=keras.optimizers.SGD(0.0))  # fmt: skip
    again = twin.fit(images, labels, batch_size=BATCH, shuffle=False, verbose=0).history
    assert logs["distillation_loss"] == pytest.approx(again["distillation_loss"], rel=1e-3)


def test_a_low_precision_copy_follows_the_weights_of_the_teacher(tmp_path):
    x = keras.Input((SIZE, SIZE, 3))
    hidden = keras.layers.Dense(8)(keras.layers.Flatten()(x) / 255.0)
    teacher = keras.Model(x, keras.layers.Dense(CLASSES)(ops.relu(hidden) + hidden))
    kwargs = {"augment": invert_the_second_candidate, "num_candidates": 2}
    model = distiller(teacher=teacher, teacher_dtype="mixed_bfloat16", save_teacher=True, **kwargs)
    model.save_weights(tmp_path / "all.weights.h5")
    exact = by_candidate_loss(distiller(teacher=teacher, **kwargs))
    np.testing.assert_allclose(by_candidate_loss(model), exact, rtol=0.05, atol=0.02)
    teacher.set_weights([-2 * weights for weights in teacher.get_weights()])
    changed = by_candidate_loss(distiller(teacher=teacher, **kwargs))
    assert np.abs(changed - exact).max() > 0.3
    np.testing.assert_allclose(by_candidate_loss(model), changed, rtol=0.05, atol=0.02)
    model.load_weights(tmp_path / "all.weights.h5")
    np.testing.assert_allclose(by_candidate_loss(model), exact, rtol=0.05, atol=0.02)


def test_a_failed_fit_leaves_the_teacher_as_it_was():
    def fail_in_training(images, training):
        if images.shape[0] != 2:  # where the Distiller looks at what it does
            raise RuntimeError("no such batch")
        return images

    teacher = classifier(6, seed=9)
    before = arrays(teacher.variables)
    with pytest.raises(RuntimeError, match="no such batch"):
        distiller(teacher=teacher, augment=fail_in_training).fit(*data(), verbose=0)
    assert_same(arrays(teacher.variables), before)
    teacher.predict(data()[0], verbose=0)


@pytest.mark.parametrize("look", ["evaluate", "predict"])
def test_a_failed_look_at_the_student_leaves_the_teacher_as_it_was(look):
    teacher = classifier(6, seed=9)
    before = arrays(teacher.variables)
    model = distiller(teacher=teacher)
    images, labels = data()
    model.fit(images, labels, verbose=0)
    wrong = np.concatenate([images, images], axis=-1)
    with pytest.raises(Exception):  # noqa: B017 (whatever a layer raises)
        model.evaluate(wrong, labels, verbose=0) if look == "evaluate" else model.predict(wrong, verbose=0)
    assert_same(arrays(teacher.variables), before)
    teacher.predict(images, verbose=0)


@pytest.mark.tensorflow_only
def test_images_of_a_size_that_no_step_knows_are_distilled():
    import tensorflow as tf

    def net():
        return keras.Sequential(
            [keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
        )

    images, labels = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3)).astype("float32"), np.arange(10) % 4
    dataset = tf.data.Dataset.from_generator(
        lambda: ((images[i, : 8 + i % 4], labels[i]) for i in range(10)),
        output_signature=(tf.TensorSpec((None, None, 3)), tf.TensorSpec((), tf.int64)),
    )
    model = kc.Distiller(net(), net(), augment=keras.Sequential([keras.Sequential([kc.RandAugment((0, 30))])]))
    model.compile("sgd")
    batches = dataset.padded_batch(4).apply(tf.data.experimental.assert_cardinality(3))
    logs = model.fit(batches, shuffle=False, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert 0 < logs["chosen_magnitude"][0] < 30  # of a RandAugment two levels down


@pytest.mark.once("jax")
def test_the_student_may_begin_with_the_weights_of_the_teacher():
    student, teacher = classifier(seed=1), classifier(seed=2)
    for mine, theirs in zip(student.variables, teacher.variables, strict=True):
        mine.assign(theirs)
    before = arrays(teacher.variables)
    distiller(student=student, teacher=teacher).fit(*data(), batch_size=4, epochs=2, verbose=0)
    assert_same(arrays(teacher.variables), before)
    assert not np.array_equal(arrays(student.variables)[0], before[0])


def test_labels_that_are_no_class_do_not_pass_for_learned():
    images, labels = data()
    loss = by_candidate_loss(distiller(num_candidates=1))
    assert np.all(np.isfinite(loss))
    labels[3] = CLASSES
    loss = ops.convert_to_numpy(distiller(num_candidates=1).draw_candidates(images, labels)["teacher_loss"])
    assert np.flatnonzero(np.isnan(loss[0])).tolist() == [3]


# --- where it runs ---


def invert_the_second_candidate(images, training):
    first = ops.arange(ops.shape(images)[0]) < ops.shape(images)[0] // 2
    return ops.where(first[:, None, None, None], images, 255 - images)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param({"jit_compile": True}, marks=pytest.mark.compiled),
        pytest.param({"steps_per_execution": 8, "jit_compile": False}, marks=pytest.mark.compiled),
        {"run_eagerly": True},
    ],
    ids=str,
)
def test_it_trains_the_same_however_the_step_is_run(run):
    images, labels = data(32)
    models = [
        distiller(augment=invert_the_second_candidate, num_candidates=2, run=each)
        for each in (run, {"jit_compile": False})
    ]
    first, expected = (m.fit(images, labels, batch_size=4, shuffle=False, verbose=0).history for m in models)
    assert first["first_kept"] == expected["first_kept"]
    assert 0 < expected["first_kept"][0] < 1
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for a, b in zip(*(arrays(model.student.variables) for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.once("jax")
def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = distiller(student=classifier(), teacher=classifier(6, seed=9))
    history = model.fit(*data(), batch_size=4, epochs=3, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert {str(variable.dtype) for variable in model.student.trainable_variables} == {"float32"}


@pytest.mark.once("jax")
def test_the_teacher_may_run_in_bfloat16():
    teacher = classifier(6, seed=9)
    model = distiller(teacher=teacher, teacher_dtype="mixed_bfloat16")
    images, labels = data()
    logits = ops.convert_to_numpy(model.draw_candidates(images, labels)["teacher_logits"])
    exact = ops.convert_to_numpy(distiller(teacher=teacher).draw_candidates(images, labels)["teacher_logits"])
    assert logits.dtype == "float32"
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    model.fit(images, labels, batch_size=4, verbose=0)
    assert model.teacher is teacher
    assert teacher.layers[-1].compute_dtype == "float32"


@pytest.mark.tensorflow_only
def test_tf_data_with_sample_weights_and_a_last_batch_that_is_smaller():
    import tensorflow as tf

    images, labels = data(10)
    weights = np.linspace(0, 2, 10, dtype="float32")
    dataset = tf.data.Dataset.from_tensor_slices((images, labels, weights)).batch(4)
    first, second = distiller(), distiller()
    first.fit(dataset, shuffle=False, verbose=0)
    second.fit(images, labels, sample_weight=weights, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(arrays(first.student.variables), arrays(second.student.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_student_may_be_pruned_while_the_magnitude_follows():
    images, labels = data(32)
    schedule = kc.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=8, frequency=1)
    student = kc.prune_low_magnitude(classifier(), pruning_schedule=schedule)
    augment = light(14.0)
    model = distiller(student=student, augment=augment)
    weaken = kc.SparsityLinkedMagnitude(schedule, {0.0: 14, 0.5: 4})
    callbacks = [kc.UpdatePruningStep(), kc.MagnitudeScheduler(augment, weaken)]
    history = model.fit(images, labels, batch_size=4, epochs=2, verbose=0, callbacks=callbacks).history
    assert history["chosen_magnitude"][0] > history["chosen_magnitude"][1] == pytest.approx(4, abs=0.5)
    assert kc.sparsity(kc.strip_pruning(model.student)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.once
@pytest.mark.parametrize("build", [kc.models.mobilenet_v2, kc.models.shufflenet_v2])
def test_the_mobile_networks_distil(build):
    student = build(CLASSES, width=0.1, input_shape=(SIZE, SIZE, 3))
    eagerly = keras.backend.backend() == "tensorflow"  # there, a trace takes longer than this one step
    model = distiller(student=student, num_candidates=1, run={"run_eagerly": eagerly})
    assert np.isfinite(model.fit(*data(), batch_size=12, verbose=0).history["loss"][0])


# --- what is refused, before anything trains ---


@pytest.mark.parametrize("metrics", [(), ("accuracy",)])
@pytest.mark.parametrize("compiled", [True, False])
def test_loaded_without_its_teacher_it_says_so(tmp_path, metrics, compiled):
    model = distiller(metrics=metrics)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras", compile=compiled)
    if not compiled:
        loaded.compile("sgd", metrics=list(metrics))
    for call in (loaded.fit, loaded.train_on_batch, loaded.draw_candidates):
        with pytest.raises(ValueError, match=r"has no teacher.*Set `distiller.teacher`"):
            call(*data())


@pytest.mark.parametrize("metrics", [(), ("accuracy",)])
def test_images_without_labels_are_refused(metrics):
    model = distiller(metrics=metrics)
    for call in (model.fit, model.train_on_batch, model.evaluate, model.test_on_batch):
        with pytest.raises(ValueError, match=r"needs labels. Received: images alone. Call fit\(images, labels\)"):
            call(data()[0])


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = classifier(classes=7)

    def call(self, images):
        return {"logits": self.inner(images)}


def named(functional):
    if functional:
        x = keras.Input((SIZE, SIZE, 3))
        return keras.Model(x, {"logits": classifier(classes=7)(x)})
    model = Named()
    model(data()[0].astype("float32"))
    return model


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = classifier()
        self.gate = keras.layers.Dense(1, activation="sigmoid")  # made last, but not the output

    def call(self, images):
        logits = self.inner(images)
        return logits * self.gate(logits)


@pytest.mark.once("jax")
def test_a_subclassed_student_must_be_built_and_then_works():
    student = Subclassed()
    with pytest.raises(ValueError, match=r"built model with one input.*Call it once on a batch"):
        distiller(student=student)
    student(data()[0].astype("float32"))
    assert np.isfinite(distiller(student=student).fit(*data(), verbose=0).history["loss"][0])


def hidden_softmax(logits):
    """As Keras' guide to mixed precision ends a network."""
    return keras.layers.Activation("linear", dtype="float32")(keras.layers.Flatten()(keras.layers.Softmax()(logits)))


def drawing_function():
    augment = light()
    return lambda images, training: augment(images, training=training)


def sharing():
    student = classifier()
    return {"student": student, "teacher": keras.Sequential([keras.Input((SIZE, SIZE, 3)), student])}


def probabilities(how):
    x = keras.Input((SIZE, SIZE, 3))
    logits = classifier()(x)
    return keras.Model(x, how(logits))


def preprocessed():
    model = classifier()
    model.preprocessor = keras.layers.Rescaling(1 / 255)  # as those of keras-hub, which its `fit` calls
    return model


@pytest.mark.once("jax")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: distiller(teacher=preprocessed()), "calls `teacher` itself, and so not its preprocessor.*to None"),
        (lambda: distiller(student=preprocessed()), "calls `student` itself, and so not its preprocessor.*to None"),
        (lambda: distiller().fit({"images": data()[0]}, data()[1]), "one tensor of images. Received: a dict"),
        (lambda: distiller(teacher=classifier(classes=7)), "same number of logits.*Received: 7 of the teacher, 5 of"),
        (lambda: distiller(teacher=classifier(size=16)), r"same images. Received: \(16, 16, 3\) of the teacher"),
        (lambda: distiller(teacher=classifier(activation="softmax")), "`teacher` must give logits.*ends in softmax"),
        (lambda: distiller(student=classifier(activation="softmax")), "`student` must give logits.*activation=None"),
        (lambda: distiller(teacher=probabilities(keras.layers.Softmax())), "ends in softmax"),
        (lambda: distiller(teacher=probabilities(keras.layers.Activation("softmax"))), "ends in softmax"),
        (lambda: distiller(teacher=probabilities(ops.softmax)), "ends in softmax"),
        (lambda: distiller(teacher=probabilities(hidden_softmax)), "ends in softmax"),
        (lambda: distiller(teacher=named(True)), "`teacher` must give logits alone. Received: a dictionary of logits"),
        (lambda: distiller(student=named(True)), "`student` must give logits alone. Received: a dictionary of logits"),
        (lambda: distiller(teacher=named(False)), "`teacher` must give logits alone. Received: a dictionary of logits"),
        (lambda: distiller(num_candidates=0), "at least 1. Received: num_candidates=0"),
        (lambda: distiller(num_candidates=2.0), "whole number.*Received: num_candidates=2.0"),
        (lambda: distiller(ce_weight=0, kl_weight=0), "one of them positive. Received: ce_weight=0, kl_weight=0"),
        (lambda: distiller(kl_weight=-1), "at least 0.*kl_weight=-1"),
        (lambda: distiller(temperature=0), "positive. Received: temperature=0"),
        (lambda: distiller(selection_temperature=-1), "Received: selection_temperature=-1"),
        (lambda: distiller(alpha=0), r"in \(0, 1\]. Received: alpha=0"),
        (lambda: distiller(alpha=1.5), "Received: alpha=1.5"),
        (lambda: distiller(augment=lambda images, training: images[:, 1:]), r"not change the shape.*\(7, 8, 3\)"),
        (lambda: distiller(augment=keras.layers.Resizing(4, 4)), r"not change the shape.*\(4, 4, 3\)"),
        (lambda: distiller(augment=drawing_function()), "function with a state.*Make it a keras.layers.Layer"),
        (lambda: distiller(loss=keras.losses.KLDivergence()), "takes logits.*Received"),
        (lambda: distiller(run={"loss_weights": [2.0]}), "`alpha` of the Distiller weighs"),
        (lambda: distiller(**sharing()), "must not share trainable weights"),
        (lambda: distiller(loss=keras.losses.SparseCategoricalCrossentropy()), "takes logits.*Received"),
        (lambda: distiller(loss="sparse_categorical_crossentropy"), "takes logits.*Received"),
        (lambda: distiller().draw_candidates(data()[0], np.zeros((BATCH, 3))), r"one-hot, \(batch, 5\).*\(12, 3\)"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_what_is_allowed_and_what_came(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_no_model_and_no_function_is_refused():
    with pytest.raises(TypeError, match=r"`student` must be a keras.Model. Received"):
        Distiller(keras.layers.Dense(3), classifier(), augment=light())
    with pytest.raises(TypeError, match="`augment` must be a layer or function"):
        Distiller(classifier(), classifier(), augment=14)
