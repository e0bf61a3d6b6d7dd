"""What pruning costs: a ResNet-20 training step with and without wrappers, beside tfmot's on the same network.

    python benchmarks/pruning.py

Six arms take turns in one process: Keras 3 dense, our wrappers with no mask update, our wrappers with a mask update at
every step, and the same three in Keras 2 (tf_keras) with tfmot's wrappers. The cost of an update is the difference of
the last two; a step at frequency f costs the step without update plus 1/f of that. About five minutes on two cores. On
the JAX backend tfmot is left out.
"""

import argparse
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import kerascompress as kc

NEVER = 10**6


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


def arms():
    """Yields name, compiled model, callbacks."""
    cases = {"dense": None, "wrapped, no update": NEVER, "wrapped, every step": 1}

    def compiled(keras, model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=False)
        return model

    for case, frequency in cases.items():
        model = resnet20(keras)
        if frequency:
            schedule = kc.ConstantSparsity(0.6, begin_step=0, frequency=frequency)
            model = kc.prune_low_magnitude(model, schedule, scope="global")
        yield f"kerascompress: {case}", compiled(keras, model), [kc.UpdatePruningStep()] if frequency else []
    if keras.backend.backend() != "tensorflow":
        return
    import tf_keras

    _ = kc.ConstantSparsity  # imports tfmot without its side effects
    from tensorflow_model_optimization.python.core.sparsity.keras import prune, pruning_callbacks

    for case, frequency in cases.items():
        model = resnet20(tf_keras)
        if frequency:
            model = prune.prune_low_magnitude(model, kc.ConstantSparsity(0.6, begin_step=0, frequency=frequency))
        yield f"tfmot: {case}", compiled(tf_keras, model), [pruning_callbacks.UpdatePruningStep()] if frequency else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="training steps of one window")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a busy machine",
    )
    parser.add_argument("--repetitions", type=int, default=9, help="windows of each arm, in turn with the others'")
    options = parser.parse_args()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(options.batch_size * options.steps, 32, 32, 3)).astype("float32")
    labels = rng.integers(0, 10, len(images))

    def window(model, callbacks):
        started = clock()
        model.fit(images, labels, batch_size=options.batch_size, verbose=0, shuffle=False, callbacks=callbacks)
        return 1000 * (clock() - started) / options.steps

    contestants = {name: (model, callbacks) for name, model, callbacks in arms()}
    for contestant in contestants.values():
        window(*contestant)  # compiles
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repetitions):
        for name, contestant in contestants.items():
            times[name].append(window(*contestant))

    print(f"ResNet-20, batch {options.batch_size}, {keras.backend.backend()}, {os.cpu_count()} cores;")
    print(
        f"{options.clock} ms a step, median of {options.repetitions} windows of {options.steps} steps (least, most)\n"
    )
    print("| arm | ms a step | over dense |\n|---|---|---|")
    for name, values in times.items():
        dense = times[name.split(":")[0] + ": dense"]
        ratio = statistics.median(a / b for a, b in zip(values, dense, strict=True))
        print(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f}, {max(values):.0f}) | {ratio:.3f} |")
    print()
    for package in dict.fromkeys(name.split(":")[0] for name in times):
        rows = zip(
            *(times[f"{package}: {case}"] for case in ("dense", "wrapped, no update", "wrapped, every step")),
            strict=True,
        )
        ratio = statistics.median((wrapped + (update - wrapped) / 100) / dense for dense, wrapped, update in rows)
        print(f"{package}: a step at frequency 100 costs {ratio:.3f} times a dense step")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
