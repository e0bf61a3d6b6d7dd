"""What pruning costs: training steps with each carrier of the masks, beside tfmot's; and one update of the masks.

    python benchmarks/pruning.py

Steps: a ResNet-20 (batch 128) and a small ViT of keras-hub (batch 32) take turns in one process: dense, our wrappers
with `UpdatePruningStep`, `PruningOptimizer` with layer and global scope, all at frequency 100 and with an update within
each window, and, on the TensorFlow backend, dense and wrapped networks of Keras 2 with tfmot. About ten minutes on two
cores.

Updates: the masks of 0.27, 2.2 and 25.5 million weights (ResNet-20, MobileNetV2, ResNet-50) inside a compiled step, by
our exact selection over bit patterns, beside `keras.ops.sort`, and `np.partition` on the host, which is what wrappers
use. All give the same threshold, to the bit. `--updates` measures these alone.
"""

import argparse
import functools
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import ops

import kerascompress as kc
from kerascompress.masks import Rule

FREQUENCY = 100
JIT = "auto" if keras.backend.backend() == "jax" else False
KERNELS = {  # kernels of the sizes that the networks have
    "ResNet-20": [(3, 3, 64, 64)] * 7 + [(3, 3, 32, 32)],
    "MobileNetV2": [(1, 1, 320, 1280)] * 5 + [(153, 1000)],
    "ResNet-50": [(2048, 1000)] * 12 + [(924, 1000)],
}


def resnet20(keras, classes=10):
    """ResNet-20 with 1x1 shortcuts in either Keras."""
    layers = keras.layers

    def convolution(x, filters, kernel_size, stride):
        x = layers.Conv2D(filters, kernel_size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(inputs, 16, 3, 1))
    for filters in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and filters > 16 else 1
            shortcut = convolution(x, filters, 1, stride) if stride == 2 else x
            x = layers.ReLU()(convolution(x, filters, 3, stride))
            x = layers.ReLU()(layers.Add()([shortcut, convolution(x, filters, 3, 1)]))
    return keras.Model(inputs, layers.Dense(classes)(layers.GlobalAveragePooling2D()(x)))


def vit(_):
    """keras-hub's ViT: 6 blocks of 192, patches of 4x4; its layers cannot be wrapped."""
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    backbone = ViTBackbone(
        image_shape=(32, 32, 3), patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    return ViTImageClassifier(backbone=backbone, num_classes=10, preprocessor=None)


def arms(network):
    """Yields name, compiled model, callbacks."""

    def compiled(keras, model, optimizer):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, jit_compile=JIT)
        return model

    def sgd(keras):
        return keras.optimizers.SGD(0.01, momentum=0.9)

    schedule = kc.ConstantSparsity(0.6, begin_step=0, frequency=FREQUENCY)
    yield "kerascompress: dense", compiled(keras, network(keras), sgd(keras)), []
    for scope in ("layer", "global"):
        optimizer = kc.PruningOptimizer(sgd(keras), schedule, scope=scope)
        yield f"kerascompress: PruningOptimizer, {scope}", compiled(keras, network(keras), optimizer), []
    if network is not resnet20:
        return
    pruned = kc.prune_low_magnitude(network(keras), schedule, scope="global")
    yield "kerascompress: wrappers, global", compiled(keras, pruned, sgd(keras)), [kc.UpdatePruningStep()]
    if keras.backend.backend() != "tensorflow":
        return
    import tf_keras
    from tensorflow_model_optimization.python.core.sparsity.keras import prune, pruning_callbacks

    yield "tfmot: dense", compiled(tf_keras, network(tf_keras), sgd(tf_keras)), []
    pruned = prune.prune_low_magnitude(network(tf_keras), schedule)
    yield "tfmot: wrappers, layer", compiled(tf_keras, pruned, sgd(tf_keras)), [pruning_callbacks.UpdatePruningStep()]


def measure_steps(name, network, batch_size, options):
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size * options.steps, 32, 32, 3)).astype("float32")
    labels = rng.integers(0, 10, len(images))

    def window(model, callbacks):
        started = clock()
        model.fit(images, labels, batch_size=batch_size, verbose=0, shuffle=False, callbacks=callbacks)
        return 1000 * (clock() - started) / options.steps

    contestants = {name: (model, callbacks) for name, model, callbacks in arms(network)}
    for contestant in contestants.values():
        window(*contestant)  # compiles
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repetitions):
        for arm, contestant in contestants.items():
            times[arm].append(window(*contestant))
    print(f"\n{name}, batch {batch_size}, {keras.backend.backend()}, {os.cpu_count()} cores, frequency {FREQUENCY};")
    print(
        f"{options.clock} ms a step, median of {options.repetitions} windows of {options.steps} steps (least, most)\n"
    )
    print("| arm | ms a step | over dense, median | over dense, least |\n|---|---|---|---|")
    for arm, values in times.items():
        dense = times[arm.split(":")[0] + ": dense"]
        ratio = statistics.median(a / b for a, b in zip(values, dense, strict=True))
        print(
            f"| {arm} | {statistics.median(values):.0f} ({min(values):.0f}, {max(values):.0f}) | {ratio:.3f} "
            f"| {min(values) / min(dense):.3f} |"
        )


def compile_function(function):
    """As a train step is compiled: by XLA on JAX, and on TensorFlow with and without."""
    if keras.backend.backend() == "jax":
        import jax

        return {"JAX": jax.jit(function)}
    import tensorflow as tf

    return {
        "TensorFlow": tf.function(function, autograph=False),
        "TensorFlow, XLA": tf.function(function, autograph=False, jit_compile=True),
    }


def by_sorting(kernels, sparsity):
    magnitudes = ops.sort(ops.concatenate([ops.reshape(ops.abs(kernel), (-1,)) for kernel in kernels]))
    keep = ops.cast(ops.round(float(magnitudes.shape[0]) * (1 - sparsity)), "int32")
    threshold = magnitudes[magnitudes.shape[0] - keep]
    return [ops.abs(kernel) >= threshold for kernel in kernels], [threshold]


def ways_to_update(kernels):
    """Yields name and function of every way to the masks."""
    tensors = [ops.convert_to_tensor(kernel) for kernel in kernels]
    sparsity = ops.convert_to_tensor(np.float32(0.8))
    for name, rule in {
        "bit by bit, layer": Rule("layer"),
        "bit by bit, global": Rule("global"),
        "`ops.sort`, global": by_sorting,
    }.items():
        for where, function in compile_function(rule).items():
            yield f"{name}, {where}", functools.partial(function, tensors, sparsity)
    yield "`np.partition`, global, host", functools.partial(Rule("global"), kernels, 0.8)


def measure_updates(repetitions):
    print(f"\nOne update of the masks to 80 % zeros, {keras.backend.backend()}, {os.cpu_count()} cores;")
    print(f"ms, median of {repetitions} (least)\n\n| weights of | how | ms |\n|---|---|---|")
    for network, shapes in KERNELS.items():
        rng = np.random.default_rng(0)
        kernels = [rng.normal(size=shape).astype("float32") for shape in shapes]
        millions = sum(kernel.size for kernel in kernels) / 1e6
        thresholds = set()
        for name, way in ways_to_update(kernels):
            times = []
            for _ in range(repetitions + 1):  # the first compiles
                started = time.perf_counter()
                _, (*_, threshold) = way()
                threshold = float(ops.convert_to_numpy(threshold))
                times.append(1000 * (time.perf_counter() - started))
            if "global" in name:
                thresholds.add(threshold)
            median, least = statistics.median(times[1:]), min(times[1:])
            print(f"| {network}, {millions:.2f} million | {name} | {median:.1f} ({least:.1f}) |", flush=True)
        assert len(thresholds) == 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="training steps of one window")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--repetitions", type=int, default=9, help="windows of each arm, in turn with the others'")
    parser.add_argument("--updates", action="store_true", help="measure the updates of masks alone")
    options = parser.parse_args()
    if not options.updates:
        measure_steps("ResNet-20", resnet20, 128, options)
        measure_steps("ViT", vit, 32, options)
    measure_updates(5)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
