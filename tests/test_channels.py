import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.applications.convnext import ConvNeXt  # of which the public ones are sizes
from keras.src.applications.densenet import DenseNet
from keras.src.applications.efficientnet_v2 import EfficientNetV2

import kerascompress as kc
from kerascompress import channels, models
from kerascompress.channels import prune_channels
from kerascompress.follow import Followed

EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "channels.json").read_text())
KERNELS = {"kernel", "depthwise_kernel", "pointwise_kernel"}


def outputs(model, x):
    if keras.backend.backend() == "jax":  # compiled as a whole, quicker than operation by operation
        return np.asarray(model.predict_on_batch(x), "float32")
    return ops.convert_to_numpy(model(x, training=False)).astype("float32")


def images(model, batch=2, seed=1):
    shape = (batch, *(size or 8 for size in model.input_shape[1:]))
    return np.random.default_rng(seed).normal(100, 50, shape).astype("float32")


def trainable(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def widths(model):
    """The channels that layers make, but for the last."""
    made = {layer.name: getattr(layer, "filters", None) or getattr(layer, "units", None) for layer in leaves(model)}
    return {name: width for name, width in made.items() if width and name != "logits"}


def leaves(model):
    return [layer for layer in model._flatten_layers() if not list(layer._flatten_layers(include_self=False))]


def without_odd_channels(model, last):
    """Zeros every second channel of all but the last layer: kernels, biases, scales, shifts; the rest is random."""
    random = np.random.default_rng(0)
    for layer in leaves(model):
        for variable in layer.variables:
            if variable.name in ("seed_generator_state",):
                continue
            values = random.uniform(0.5, 1.5, variable.shape) if variable.name in ("gamma", "moving_variance") else None
            if values is None:
                depthwise = variable.name == "depthwise_kernel" or isinstance(layer, layers.DepthwiseConv2D)
                fan_in = np.prod(variable.shape[:2] if depthwise else variable.shape[:-1])
                deviation = (4 / fan_in) ** 0.5 if variable.name in KERNELS else 0.1  # He et al., half of them zero
                values = random.normal(0, deviation, variable.shape)
            if layer.name not in last and variable.name != "moving_variance":
                axis = -1
                if variable.name == "depthwise_kernel" or isinstance(layer, layers.DepthwiseConv2D):
                    axis = -2 if len(variable.shape) > 1 else -1
                if isinstance(layer, layers.Conv2DTranspose) and variable.name == "kernel":
                    axis = -2
                np.moveaxis(values, axis, 0)[1::2] = 0
            variable.assign(values)
    return model


def check_exact(model, last=("logits", "predictions"), **settings):
    """What is left of the network without its zeros computes the same; returns it."""
    without_odd_channels(model, last)
    before = {variable.path: ops.convert_to_numpy(variable.value) for variable in model.variables}
    small = prune_channels(model, 0.5, **settings)
    assert (type(small), small.name, small.input_shape) == (type(model), model.name, model.input_shape)
    assert small.output_shape == model.output_shape
    assert {layer.name for layer in model.layers} <= {layer.name for layer in small.layers}
    x = images(model)
    expected = outputs(model, x)
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max() > 0  # the images make a difference
    np.testing.assert_allclose(outputs(small, x), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    for variable in model.variables:  # left as it was
        np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), before[variable.path])
    return small


def check_masked(model, monkeypatch):
    """Removed or zero, channels chosen at random make no difference; the model is changed."""
    seen = []
    without = channels._without
    monkeypatch.setattr(channels, "_without", lambda *args: seen.append(args) or without(*args))
    random = np.random.default_rng(0)
    without_odd_channels(model, [layer.name for layer in leaves(model)])  # random weights, none of them zero
    small = prune_channels(model, 0.5, importance=lambda layer, _: random.random(layer.output.shape[-1]))
    _, followed, alive = seen[0]
    for layer, cut in followed.cuts.values():
        for name, axes in cut.axes.items():
            for axis, labels in (
                axes.items() if getattr(layer, name, None) is not None and name != "moving_variance" else ()
            ):
                values = np.array(getattr(layer, name))
                np.moveaxis(values, axis, 0)[~alive[labels]] = 0
                getattr(layer, name).assign(values)
    x = images(model)
    expected = outputs(model, x)
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max() > 0
    np.testing.assert_allclose(outputs(small, x), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    return small


# --- exactness ---


def normalised(*shape):
    inputs = keras.Input(shape)
    return inputs, layers.Rescaling(0.02, -2.0)(inputs)


def classifier(inputs, x):
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def convolutions():
    inputs, x = normalised(9, 8, 3)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x)
    x = layers.PReLU(shared_axes=(1, 2))(x)
    x = layers.SeparableConv2D(8, 3, padding="same", depth_multiplier=2)(x)
    x = layers.Conv2DTranspose(12, 2, strides=2)(x)
    x = layers.PReLU()(x)
    x = layers.SpatialDropout2D(0.2)(layers.UpSampling2D()(x))
    x = layers.Conv2D(6, 3, activation="relu")(layers.MaxPooling2D()(x))
    return classifier(inputs, layers.Dense(8, activation="gelu")(layers.Flatten()(layers.Cropping2D(1)(x))))


def grouped():
    inputs, x = normalised(8, 8, 3)
    x = layers.Conv2D(16, 3, activation="relu")(x)
    x = layers.Conv2D(8, 3, groups=4, activation="relu")(x)
    x = layers.Conv2D(8, 3, groups=8, activation="relu")(x)  # depthwise in all but its name
    x = layers.GroupNormalization(groups=-1)(x)
    return classifier(inputs, layers.GlobalMaxPooling2D()(x))


def gates():
    inputs, x = normalised(8, 8, 3)
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False)(x))
    gate = layers.GlobalAveragePooling2D()(x)
    gate = layers.Dense(8, activation="sigmoid")(layers.Dense(4, activation="relu")(layers.Reshape((1, 1, 8))(gate)))
    x = layers.Multiply()([x, gate])
    spatial = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x)
    x = x * spatial
    gate = ops.mean(x, axis=(1, 2), keepdims=True)
    x = x * ops.sigmoid(layers.Conv2D(8, 1)(gate))
    return classifier(inputs, ops.max(x, axis=[1, 2]))


def moved_channels():
    inputs, x = normalised(6, 6, 3)
    x = layers.Conv2D(16, 3, activation="relu")(x)
    x = layers.Reshape((4, 4, 4, 4))(x)
    x = layers.Reshape((4, 4, 16))(layers.Permute((1, 2, 4, 3))(x))
    one, two, three = ops.split(x, [4, 8], axis=-1)
    two = ops.flip(layers.Conv2D(8, 1, activation="relu")(two), axis=-1)
    x = layers.Concatenate()([three, one, two, x[..., 2:6]])
    x = layers.Concatenate(axis=1)([layers.Conv2D(8, 1, name="shared")(x), layers.Conv2D(8, 2, padding="same")(x)])
    x = ops.transpose(layers.ReLU()(x), (0, 3, 1, 2))
    return classifier(inputs, layers.Dense(6, activation="relu")(layers.Flatten()(x)))


def shared_and_nested():
    inputs, x = normalised(8, 8, 3)
    block = keras.Sequential([layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()])
    inner = keras.Input((8, 8, 8))
    body = keras.Model(inner, layers.Add()([inner, layers.Conv2D(8, 1)(block(inner))]), name="body")
    x = layers.Conv2D(8, 3, padding="same")(x)
    x = body(body(x))
    return classifier(inputs, layers.GlobalAveragePooling2D()(x))


def one_dimension():
    net = [
        layers.Rescaling(0.02, -2.0),
        layers.Conv1D(8, 3),
        layers.BatchNormalization(renorm=True),
        layers.ReLU(),
        layers.DepthwiseConv1D(3),
    ]
    return keras.Sequential([keras.Input((12, 2)), *net, layers.Flatten(), layers.Dense(3, name="logits")])


@pytest.mark.parametrize("build", [convolutions, grouped, gates, shared_and_nested, one_dimension])
@pytest.mark.once
def test_without_channels_of_zeros_every_kind_of_layer_computes_the_same(build):
    model = build()
    small = check_exact(model)
    assert widths(small) == {name: -(-width // 2) for name, width in widths(model).items()}


def test_channels_that_are_only_moved_are_found_again(monkeypatch):
    model = moved_channels()
    small = check_masked(model, monkeypatch)
    assert widths(small) == {name: width // 2 for name, width in widths(model).items()}


def fraction_of_kernels(small, model):
    kernels = [[int(np.prod(v.shape)) for v in net.trainable_variables if len(v.shape) > 1] for net in (small, model)]
    return sum(kernels[0]) / sum(kernels[1])


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (models.resnet, {"scope": "global", "importance": "l1"}),
        pytest.param(models.mobilenet_v2, {"importance": "batch_norm"}, marks=pytest.mark.once),
    ],
)
def test_our_networks_without_channels_of_zeros_compute_the_same(build, settings):
    size = {"depth": 8, "width": 8} if build is models.resnet else {"width": 0.25}
    model = build(num_classes=10, input_shape=(8, 8, 3), **size)
    small = check_exact(model, **settings)
    assert fraction_of_kernels(small, model) == pytest.approx(0.25, abs=0.06)  # images and logits keep their channels


@pytest.mark.once
def test_half_of_shufflenet_computes_the_same_as_if_the_other_half_were_zero(monkeypatch):
    model = models.shufflenet_v2(10, width=0.125, input_shape=(8, 8, 3))
    small = check_masked(model, monkeypatch)
    assert fraction_of_kernels(small, model) == pytest.approx(0.25, abs=0.06)


CLASSIFIER = {"weights": None, "classes": 4, "classifier_activation": None, "input_shape": (32, 32, 3)}
APPLICATIONS = {  # with fewer and narrower blocks, of every kind, where a size can be given
    "MobileNetV3Small": keras.applications.MobileNetV3Small,
    "EfficientNetV2": lambda **settings: EfficientNetV2(0.25, 0.6, 32, name="efficientnetv2-b0", **settings),
    "DenseNet": lambda **settings: DenseNet([2, 2, 2, 2], **settings),
    "InceptionV3": lambda **settings: keras.applications.InceptionV3(**settings | {"input_shape": (75, 75, 3)}),
    "Xception": lambda **settings: keras.applications.Xception(**settings | {"input_shape": (71, 71, 3)}),
}


@pytest.mark.tensorflow_only  # to follow a graph has no backend, and these networks are slow to build on JAX
@pytest.mark.parametrize("name", APPLICATIONS)
def test_networks_of_keras_without_channels_of_zeros_compute_the_same(name):
    model = APPLICATIONS[name](**CLASSIFIER)
    small = check_exact(model)
    assert small.count_params() < 0.3 * model.count_params()


def test_convnext_is_pruned_though_its_normalisation_sees_all_channels():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("to follow a graph has no backend, and this network is slow to build on JAX")
    model = ConvNeXt([1, 1, 2, 1], [24, 48, 96, 192], **CLASSIFIER | {"classifier_activation": "softmax"})
    small = prune_channels(model, 0.5)
    assert small.count_params() < 0.27 * model.count_params()
    assert np.isfinite(outputs(small, images(small))).all()
    assert small.get_layer("convnext_stage_0_block_0_depthwise_conv").groups == 12


# --- Torch-Pruning ---


def network(name):
    size = EXPECTED[name]["size"]
    if name == "resnet20":
        return models.resnet20(10)
    if name == "resnet50":
        return keras.applications.ResNet50(weights=None, classes=10, input_shape=(size, size, 3))
    return models.mobilenet_v2(10, stem="imagenet", input_shape=(size, size, 3))


def groups(model):
    followed = Followed(model, [])
    roots = followed.labels.roots()
    makers = [(layer.name, set(roots[labels])) for layer, _, _, labels, makes in channels._makers(followed) if makes]
    found = [{name for name, own in makers if own & set(group)} for group in channels._groups(followed, roots)]
    return sorted(sorted(group) for group in found)


@pytest.mark.parametrize(
    "name",
    ["resnet20", *(pytest.param(each, marks=pytest.mark.tensorflow_only) for each in ("resnet50", "mobilenet_v2"))],
)
def test_groups_parameters_and_multiplications_are_those_of_torch_pruning(name):
    expected, model = EXPECTED[name], network(name)
    assert groups(model) == expected["groups"]
    assert (trainable(model), kc.summary(model).macs) == tuple(expected["dense"].values())
    for case in expected["pruned"][: 3 if name == "resnet20" else 1]:
        small = prune_channels(model, case["sparsity"], round_to=case["round_to"] or 1)
        assert (trainable(small), kc.summary(small).macs) == (case["parameters"], case["macs"])


# --- what is chosen ---


def two_layers():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(4, name="hidden"), layers.Dense(1, name="logits")])
    model.get_layer("hidden").set_weights([np.array([[3.0, 0, 1.5, 2], [0, 2.5, 2, 2]]), np.arange(4.0)])
    return model


@pytest.mark.parametrize(
    ("importance", "left"),
    [("l2", [0, 3]), ("l1", [2, 3]), (lambda layer, outputs: [4, 1, 2, 3], [0, 3]), (lambda *_: [0, 1, 1, 0], [1, 2])],
)
def test_the_least_important_channels_go(importance, left):
    model = two_layers()
    small = prune_channels(model, 0.5, importance=importance)
    np.testing.assert_array_equal(small.get_layer("hidden").kernel, np.array(model.layers[0].kernel)[:, left])
    np.testing.assert_array_equal(small.get_layer("hidden").bias, np.arange(4.0)[left])
    np.testing.assert_array_equal(small.get_layer("logits").kernel, np.array(model.layers[1].kernel)[left])


def test_a_function_sees_the_outputs_for_the_images():
    model, seen = two_layers(), {}

    def mean_activation(layer, outputs):
        seen[layer.name] = outputs
        return np.abs(outputs).mean(axis=0)

    x = np.array([[0.0, 1], [0, 3]], "float32")
    small = prune_channels(model, 0.5, importance=mean_activation, images=x)
    np.testing.assert_allclose(seen["hidden"], x @ np.array(model.layers[0].kernel) + np.arange(4.0))
    assert set(seen) == {"hidden"}
    np.testing.assert_array_equal(small.layers[0].bias, [1, 3])  # mean outputs are 0, 6, 6, 7


def two_inputs():
    inputs = [keras.Input((size,), name=name) for name, size in (("second", 3), ("first", 2))]
    x = [layers.Dense(4, name=f"of_{each.name}")(each) for each in inputs]
    return keras.Model(inputs, layers.Dense(2)(layers.Concatenate()(x)))


def grey(nested=False):
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2)])
    return keras.Sequential([keras.Input((4, 4, 1)), layers.Identity(), model]) if nested else model


@pytest.mark.parametrize(
    ("build", "given"),
    [
        (grey, np.ones((2, 4, 4, 1), "uint8")),
        (grey, np.ones((2, 4, 4))),
        (grey, np.ones((2, 4, 4, 1)).tolist()),
        (lambda: grey(nested=True), np.ones((2, 4, 4), "uint8")),
        (two_inputs, {"first": np.ones((2, 2)), "second": np.ones((2, 3))}),
        (two_inputs, [np.ones((2, 3)), np.ones((2, 2))]),
    ],
)
def test_a_function_sees_outputs_for_whatever_the_model_takes(build, given):
    shapes = []
    importance = lambda layer, outputs: shapes.append(outputs.shape) or np.arange(4)  # noqa: E731
    prune_channels(build(), 0.5, importance=importance, images=given)
    assert shapes == ([(2, 4), (2, 4)] if build is two_inputs else [(2, 2, 2, 4)])


def test_the_scale_of_batch_normalisation_is_an_importance():
    inputs = keras.Input((4, 4, 1))
    x = layers.Conv2D(4, 1, name="conv")(inputs)
    norm = layers.BatchNormalization()
    model = classifier(inputs, layers.GlobalAveragePooling2D()(norm(x)))
    norm.gamma.assign([-0.3, 0.1, 0.2, 0.0])
    small = prune_channels(model, 0.5, importance="batch_norm")
    np.testing.assert_array_equal(small.layers[2].gamma, np.array([-0.3, 0.2], "float32"))


# Fractions of the mean norm of a layer; averages over the two that are added are 1.6, 1.1, 0.7 and 0.6.
FRACTIONS = {"one": [2.0, 0.8, 0.4, 0.8], "other": [1.2, 1.4, 1.0, 0.4], "after": [1.5, 1.0, 0.9, 0.6]}


@pytest.mark.once
@pytest.mark.parametrize(
    ("importance", "left"), [("l2", [0, 1]), ("batch_norm", [1, 3]), (lambda layer, _: FRACTIONS[layer.name], [0, 1])]
)
def test_layers_of_other_scales_are_compared_by_means_over_the_layers_of_a_group(importance, left):
    inputs = keras.Input((1,))
    dense = {name: layers.Dense(4, name=name) for name in FRACTIONS}
    norms = [layers.BatchNormalization(name=f"{name}_norm") for name in ("one", "other")]
    x = layers.Add()([norm(layer(inputs)) for norm, layer in zip(norms, dense.values(), strict=False)])
    model = keras.Model(inputs, layers.Dense(2)(dense["after"](x)))
    dense["one"].set_weights([100 * np.array([FRACTIONS["one"]]), np.arange(4)])
    dense["other"].set_weights([0.01 * np.array([FRACTIONS["other"]]), np.arange(4)])
    dense["after"].set_weights([5 * np.diag(FRACTIONS["after"]), np.arange(4)])  # without a scale to go by
    for norm, scale in zip(norms, ([0.1, 1.2, 0.4, -2.0], [0.3, 1.4, 0.8, 0.4]), strict=True):
        norm.gamma.assign(scale)  # average magnitudes are 0.2, 1.3, 0.6 and 1.2
    small = prune_channels(model, 0.5, importance=importance, scope="global")
    found = [small.get_layer(name).get_weights()[1].tolist() for name in dense]
    assert found == [left, left, [0, 1]]


@pytest.mark.once
def test_every_group_of_a_normalisation_loses_the_same_channels():
    made, norm = layers.Conv2D(16, 1, name="made"), layers.GroupNormalization(4, name="norm")
    model = keras.Sequential([keras.Input((4, 4, 1)), made, norm, layers.Flatten(), layers.Dense(2)])
    for variable in (made.bias, norm.gamma):
        variable.assign(np.arange(16))
    small = prune_channels(model, 0.5, importance=lambda layer, outputs: np.arange(16))
    left = [2, 3, 6, 7, 10, 11, 14, 15]
    np.testing.assert_array_equal(small.get_layer("made").bias, left)
    np.testing.assert_array_equal(small.get_layer("norm").gamma, left)
    assert small.get_layer("norm").groups == 4
    assert outputs(small, images(small)).shape == (2, 2)


@pytest.mark.once
def test_the_scale_of_a_normalisation_by_root_mean_squares_goes_with_its_channels():
    norm = layers.RMSNormalization(name="norm")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(8), norm, layers.Dense(2)])
    norm.scale.assign(np.arange(8))
    small = prune_channels(model, 0.5, importance=lambda layer, outputs: np.arange(8) % 4)
    np.testing.assert_array_equal(small.get_layer("norm").scale, [2, 3, 6, 7])
    assert outputs(small, np.ones((2, 3))).shape == (2, 2)


def test_global_scope_takes_channels_where_they_matter_least_but_leaves_one():
    one, two = layers.Dense(10, name="one"), layers.Dense(10, name="two")
    model = keras.Sequential([keras.Input((1,)), one, layers.ReLU(), two, layers.Dense(2)])
    scores = {"one": np.arange(10) / 100, "two": 1 + np.arange(10)}
    importance = lambda layer, outputs: scores[layer.name]  # noqa: E731
    small = prune_channels(model, 0.5, importance=importance, scope="global")
    assert [layer.units for layer in small.layers if isinstance(layer, layers.Dense)] == [1, 9, 2]
    small = prune_channels(model, 0.4, importance=importance, scope="global", round_to=4)
    assert [layer.units for layer in small.layers if isinstance(layer, layers.Dense)] == [4, 8, 2]


@pytest.mark.parametrize(
    ("sparsity", "round_to", "left"), [(0.95, 1, 1), (0.9, 1, 2), (0.3, 8, 8), (0.99, 8, 8), (0.99, 32, 20), (0, 1, 20)]
)
def test_a_whole_multiple_of_round_to_is_left(sparsity, round_to, left):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(20), layers.Dense(2)])
    assert prune_channels(model, sparsity, round_to=round_to).layers[0].units == left


def test_layers_to_ignore_keep_their_channels():
    model = models.resnet(8, 10, width=8, input_shape=(8, 8, 3))
    small = prune_channels(model, 0.5, ignore=["stem", model.get_layer("stage2_block0_conv1")])
    filters = {layer.name: layer.filters for layer in small.layers if isinstance(layer, layers.Conv2D)}
    assert filters["stem"] == filters["stage1_block0_conv2"] == 8  # added to each other
    assert (filters["stage2_block0_conv1"], filters["stage1_block0_conv1"], filters["stage2_block0_conv2"]) == (
        16,
        4,
        8,
    )


def test_a_name_to_ignore_is_that_of_every_layer_that_has_it():
    def tower(name):
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(8, name="hidden")(inputs), name=name)

    inputs = keras.Input((4,))
    x = layers.Dense(6, name="halved")(layers.Concatenate()([tower("one")(inputs), tower("two")(inputs)]))
    small = prune_channels(keras.Model(inputs, layers.Dense(2)(x)), 0.5, ignore=["hidden"])
    assert [small.get_layer(name).output_shape[1] for name in ("one", "two")] == [8, 8]
    assert small.get_layer("halved").units == 3


# --- what cannot be followed ---


@keras.saving.register_keras_serializable("test_channels")
class Reversed(layers.Layer):
    def call(self, x):
        return keras.ops.flip(x, axis=-1)


def test_what_cannot_be_followed_is_left_whole_and_named():
    inputs, x = normalised(8, 8, 3)
    x = layers.Conv2D(8, 3, name="whole")(x)
    x = layers.Conv2D(8, 3, name="halved")(Reversed(name="backwards")(x))
    x = layers.Activation("softmax", name="attention")(layers.Conv2D(4, 1, name="scores")(layers.ReLU()(x)))
    model = classifier(inputs, layers.GlobalAveragePooling2D()(x))
    with pytest.warns(UserWarning, match="cannot be followed through 'backwards', 'attention'"):
        small = check_exact(model, last=("whole", "scores", "logits"))
    filters = {layer.name: layer.filters for layer in small.layers if isinstance(layer, layers.Conv2D)}
    assert filters == {"whole": 8, "halved": 4, "scores": 4}


def test_an_activation_that_is_a_layer_counts_as_that_layer():
    inputs = keras.Input((8,))
    x = layers.Dense(6, layers.LeakyReLU(), name="halved")(inputs)
    x = layers.Dense(6, layers.Softmax(), name="softmax")(x)
    x = layers.Dense(6, layers.PReLU(), name="prelu")(x)
    x = keras.ops.clip(layers.Dense(6, name="clipped")(x), np.zeros(6, "float32"), np.ones(6, "float32"))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    with pytest.warns(UserWarning, match="cannot be followed through 'softmax', 'prelu', 'clip"):
        small = prune_channels(model, 0.5)
    assert [each.units for each in small.layers if isinstance(each, layers.Dense)] == [3, 6, 6, 6, 2]
    small(np.ones((2, 8)))


def test_an_operation_that_moves_channels_of_two_tensors_leaves_both_whole():
    inputs, flatten = keras.Input((4, 4, 3)), layers.Flatten(name="flatten")
    x = [flatten(layers.Conv2D(width, 3, activation="relu")(inputs)) for width in (4, 8)]
    model = classifier(inputs, layers.Dense(6, "relu", name="after")(layers.Concatenate()(x)))
    with pytest.warns(UserWarning, match="cannot be followed through 'flatten'"):
        small = prune_channels(model, 0.5)
    assert [*widths(small).values()] == [4, 8, 3]
    outputs(small, images(small))


@pytest.mark.once
@pytest.mark.parametrize(("first", "second"), [((-1, 2, 8), (-1, 4, 8)), ((-1, 4, 4), (-1, 4, 16))])
def test_an_operation_that_makes_images_of_positions_or_channels_leaves_them_whole(first, second):
    inputs = keras.Input((4, 8))
    x = ops.reshape(layers.Dense(8, name="whole")(inputs), first)
    x = ops.reshape(layers.Dense(8, name="after")(x), second)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(layers.Dense(6, name="halved")(x)))
    with pytest.warns(UserWarning, match="cannot be followed through 'reshape"):
        small = prune_channels(model, 0.5)
    assert widths(small) == {"whole": 8, "after": 8, "halved": 3}
    assert small(np.ones((2, 4, 8))).shape == (2, 4, 3)


def called_by_name():
    inputs = [keras.Input((4,), name=name) for name in ("b", "a")]
    inner = keras.Model(inputs, layers.Concatenate()([layers.Dense(5, name=f"of_{x.name}")(x) for x in inputs]))
    images, (a, b) = keras.Input((3,)), (layers.Dense(4, use_bias=False, name=name) for name in ("to_a", "to_b"))
    return keras.Model(images, layers.Dense(2)(inner({"a": a(images), "b": b(images)})))


def test_a_model_in_a_model_finds_its_inputs_by_name():
    model = called_by_name()
    for name, gone in (("to_a", [0, 1]), ("to_b", [2, 3])):
        kernel = np.array(model.get_layer(name).kernel)
        kernel[:, gone] = 0
        model.get_layer(name).kernel.assign(kernel)
    small = prune_channels(model, 0.5, ignore=["of_a", "of_b"])
    assert widths(small)["to_a"] == widths(small)["to_b"] == 2
    np.testing.assert_allclose(outputs(small, np.ones((1, 3))), outputs(model, np.ones((1, 3))), rtol=1e-5)


def test_initializers_of_the_old_shape_do_not_matter():
    constant = keras.initializers.Constant(np.arange(4.0).tolist())
    model = keras.Sequential([keras.Input((2,)), layers.Dense(4, bias_initializer=constant), layers.Dense(1)])
    small = prune_channels(model, 0.5)
    assert small.layers[0].bias_initializer.get_config() == constant.get_config()
    assert small.layers[0].kernel_initializer.get_config() == model.layers[0].kernel_initializer.get_config()


def test_what_is_set_on_weights_and_how_precisely_is_computed_stays():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="conv", dtype="mixed_bfloat16")(inputs)
    x = layers.ReLU(name="relu", dtype="mixed_bfloat16")(ops.take(x, np.arange(8)[::-1].copy(), axis=-1))
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D()(x)))
    conv = model.get_layer("conv")
    conv.bias.trainable, conv.kernel.constraint = False, keras.constraints.NonNeg()
    conv.kernel_regularizer = keras.regularizers.L2(0.1)  # of no effect, now that it is built
    small = kc.prune_channels(model, 0.5)
    left = small.get_layer("conv")
    assert left.filters == 4
    assert not left.bias.trainable
    assert isinstance(left.kernel.constraint, keras.constraints.NonNeg)
    assert small.losses == model.losses == []
    assert small.get_layer("relu").input.dtype == "bfloat16"


@pytest.mark.filterwarnings("ignore:.* was passed an input with a mask attached to it")
def test_a_model_in_a_model_that_is_called_with_a_mask_is_followed():
    steps, seen = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    inner = keras.Sequential([keras.Input((5, 4)), layers.Conv1D(6, 1, name="inner")])
    model = keras.Model([steps, seen], layers.Dense(2)(layers.Flatten()(inner(steps, mask=seen))))
    assert kc.summary(model).macs == 5 * 24 + 60
    assert kc.prune_channels(model, 0.5).layers[-3].layers[-1].filters == 3


def test_a_softmax_at_the_end_is_no_reason_to_warn():
    inputs = keras.Input((4,))
    x = layers.Activation("softmax")(layers.Dense(3)(layers.Dense(4, activation="relu")(inputs)))
    assert prune_channels(keras.Model(inputs, [x, layers.Softmax()(x)]), 0.5).layers[1].units == 2


class Subclassed(keras.Model):
    def call(self, x):
        return x


def wrong():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2)])
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.5, begin_step=0))
    return [
        ((Subclassed(), 0.5), {}, "Functional or Sequential model.*PruningOptimizer"),
        ((keras.Sequential([layers.Dense(2)]), 0.5), {}, "not built"),
        ((pruned, 0.5), {}, "strip_pruning"),
        ((keras.Sequential([keras.Input((3,)), layers.Dense(2)]), 0.5), {}, "No channel of .* can be removed"),
        ((model, 50), {}, r"in \[0, 1\).*Received: sparsity=50"),
        ((model, 0.5), {"importance": "l3"}, "Received: importance='l3'"),
        ((model, 0.5), {"importance": lambda *_: [1.0]}, r"here \(4,\). Received: an array of shape \(1,\)"),
        ((model, 0.5), {"scope": "all"}, "'layer', 'global'"),
        ((model, 0.5), {"round_to": 0}, "at least 1"),
        ((model, 0.5), {"ignore": "dense_9"}, "Received: 'dense_9'"),
        ((model, 0.5), {"images": np.zeros((1, 3))}, "looks at weights alone"),
    ]


def test_what_is_not_allowed_is_refused():
    for args, settings, message in wrong():
        with pytest.raises(ValueError, match=message):
            prune_channels(*args, **settings)


def test_weights_that_are_not_finite_are_refused():
    model = two_layers()
    model.layers[0].kernel.assign(np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune_channels(model, 0.5)


# --- what comes after ---


def tiny():
    return models.resnet(8, 4, width=8, input_shape=(8, 8, 3), seed=0)


@pytest.mark.parametrize("build", [tiny, moved_channels])
@pytest.mark.once
def test_the_smaller_network_is_saved_pruned_further_and_exported(tmp_path, build):
    small = prune_channels(build(), 0.5)
    x = images(small)
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(outputs(loaded, x), outputs(small, x), rtol=1e-5)
    smaller = prune_channels(loaded, 0.5)
    report = kc.export_saved_model(smaller, tmp_path / "small")
    assert report.macs == kc.summary(smaller).macs < kc.summary(small).macs / 2
    assert report.parameters == smaller.count_params() < small.count_params() / 2
    if build is moved_channels and keras.backend.backend() == "jax":  # LiteRT does not know JAX' gather
        with pytest.raises(RuntimeError, match="KERAS_BACKEND=tensorflow, and export it there"):
            kc.export_litert(smaller, tmp_path / "small.tflite")
    else:
        assert kc.export_litert(kc.prune_now(smaller, 0.5), tmp_path / "small.tflite").macs == report.macs


@pytest.mark.once
def test_the_smaller_network_learns_from_the_larger():
    dense = tiny()
    distiller = kc.Distiller(prune_channels(dense, 0.5), dense, augment=layers.Identity(), num_candidates=1)
    distiller.compile(keras.optimizers.SGD(1e-3))
    history = distiller.fit(images(dense, 8), np.arange(8) % 4, batch_size=8, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


def test_step_by_step_magnitude_follows_the_fraction_of_the_parameters_that_is_gone():
    hidden = [layers.Dense(16, activation="relu"), layers.Dense(16, activation="relu"), layers.Dense(2)]
    dense, gone, trained = keras.Sequential([keras.Input((4,)), *hidden]), [0.0], []
    magnitude = kc.SparsityLinkedMagnitude(lambda step: (True, gone[step]), {0.0: 14, 0.5: 9, 0.75: 4})

    def shrink(model):
        small = prune_channels(model, 0.5)
        gone.append(1 - small.count_params() / dense.count_params())
        return small

    def fit(model, step):
        trained.append((model.layers[0].units, magnitude(step)))
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)

    half = kc.inherit(dense, shrink=shrink, fit=fit, strong=0, weak=1)
    kc.inherit(half, shrink=shrink, fit=fit, strong=1, weak=2)
    assert gone == [0, 1 - 130 / 386, 1 - 50 / 386]
    assert [units for units, _ in trained] == [16, 8, 8, 4]
    assert [each for _, each in trained] == pytest.approx([14, 5.7358, 5.7358, 4], abs=1e-4)


@pytest.mark.once("jax")
def test_where_every_tensor_has_a_channel_that_must_stay_those_that_nobody_reads_go():
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, layers.Conv2D(4, 1)(inputs)[..., :2])
    small = kc.prune_channels(model, 0.5)
    assert small.layers[1].kernel.shape == (1, 1, 3, 3)
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype("float32")
    np.testing.assert_allclose(small.predict(images, verbose=0), model.predict(images, verbose=0), rtol=1e-5)
