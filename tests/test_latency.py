import keras
import numpy as np
import pytest
from keras import layers

import kerascompress as kc
from kerascompress import latency, models

pytestmark = pytest.mark.tensorflow_only  # says the same on every backend


def mobile(**settings):
    return models.mobilenet_v2(10, **{"width": 0.25, "stem": "imagenet", "input_shape": (32, 32, 3)} | settings)


def net(*body, padding="explicit", end=layers.GlobalAveragePooling2D):
    """A network that begins and ends as XNNPACK's cluster does, or not."""
    pad = [layers.ZeroPadding2D(1, name="stem_pad")] if padding == "explicit" else []
    stem = layers.Conv2D(8, 3, strides=2, padding="valid" if pad else padding, name="stem")
    return keras.Sequential([keras.Input((16, 16, 3)), *pad, stem, *body, end(), layers.Dense(2)])


def test_just_the_pointwise_convolutions_of_mobilenet_are_pruned():
    model = mobile()
    pruned = kc.prune_low_magnitude(model, kc.ConstantSparsity(0.8, begin_step=0), pruning_policy=kc.LatencyPolicy())
    found = {each.layer.name for each in pruned.layers if isinstance(each, kc.PruneLowMagnitude)}
    expected = {layer.name for layer in model.layers if getattr(layer, "kernel_size", None) == (1, 1)}
    assert found == expected  # 16 expansions, 17 projections and the head
    assert len(found) == 34


def test_nested_and_pruned_networks_are_followed_too():
    outer = keras.Sequential([keras.Input((32, 32, 3)), mobile()])
    policy = kc.LatencyPolicy()
    policy.ensure_model_supports_pruning(kc.prune_low_magnitude(outer, pruning_policy=policy))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: models.resnet(8, 10), "no 3x3 convolution of stride 2 and 3 channels follows a ZeroPadding2D"),
        (lambda: models.mobilenet_v2(10, width=0.25), "no 3x3 convolution of stride 2"),
        (lambda: models.resnet(8, 10, stem="imagenet"), "no 3x3 convolution of stride 2"),
        (lambda: models.shufflenet_v2(10, width=0.25, stem="imagenet", input_shape=(64, 64, 3)), "is a MaxPooling2D"),
        (lambda: net(layers.Conv2D(8, 3)), "'.*' is no 1x1 convolution of stride 1"),
        (lambda: net(layers.DepthwiseConv2D(3, strides=2, padding="same")), "is padded unevenly"),
        (lambda: net(layers.ZeroPadding2D(1), layers.Conv2D(8, 1)), "takes what is padded"),
        (lambda: net(layers.LayerNormalization()), "is a LayerNormalization"),
        (lambda: net(layers.Conv2D(2, 1), end=layers.Flatten), "is a Flatten"),
        (lambda: net(padding="same"), "follows a ZeroPadding2D"),
        (lambda: net(layers.ReLU()), "there is no 1x1 convolution behind its stem"),
    ],
)
def test_networks_that_xnnpack_does_not_run_sparsely_are_told_why(build, reason):
    with pytest.raises(ValueError, match=f"executes no kernel of .*{reason}"):
        kc.prune_low_magnitude(build(), pruning_policy=kc.LatencyPolicy())


def test_depthwise_convolutions_that_are_padded_alike_are_allowed():
    body = [layers.DepthwiseConv2D(5, padding="same"), layers.ZeroPadding2D(2), layers.DepthwiseConv2D(5, strides=2)]
    model = net(*body, layers.UpSampling2D(interpolation="bilinear"), layers.Conv2D(4, 1, name="last"))
    assert [layer.name for layer in latency.find_cluster(model).layers] == ["last"]
    assert latency.find_cluster(model).obstacles == []


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        (0.8, "sparse: by XNNPACK on Arm"),
        (0.5, "stored: the 1x1 kernels have 50% zeros"),
        (0.2, "dense: fewer than 30%"),
    ],
)
def test_more_than_two_thirds_of_a_cluster_must_be_zero(sparsity, reason):
    model = kc.prune_now(mobile(), sparsity)
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    verdicts = dict(zip([each.path for each in kernels], latency.execution(model, kernels, None), strict=True))
    assert verdicts["head/kernel"].startswith(reason)
    if sparsity == 0.8:
        assert verdicts["stem/kernel"] == "stored: no 1x1 convolution that XNNPACK runs sparsely"
        assert verdicts["logits/kernel"] == "stored: the zeros are not in blocks of (4, 1)"


NONE = keras.Sequential([keras.Input((1,))])


def test_kernels_in_blocks_are_not_stored_sparsely_in_half_precision():
    kernel = np.zeros((8, 4), "float32")
    kernel[:4] = 1
    variable = keras.Variable(kernel, name="kernel")
    assert latency.stores_sparsely(NONE, [variable], None)
    assert not latency.stores_sparsely(NONE, [variable], "float16")
    variable.assign(np.eye(8, 4))  # one in every block
    assert latency.stores_sparsely(NONE, [variable], "float16")
