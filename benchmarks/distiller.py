"""What a step of the Distiller costs, beside the arithmetic that it cannot do without, measured in the same run.

    python benchmarks/distiller.py                         # ResNet-110 to ResNet-20, 32x32, batch 128, 4 candidates
    KERAS_BACKEND=jax python benchmarks/distiller.py       # or torch

The floor of a step with n candidates: n times the inference pass of teacher and student, and one training step of the
student. Augmenting, choosing and picking come on top in a Distiller's step. All parts take turns in one process,
medians. Memory is by how much a process that runs that part alone grows at its peak. About ten minutes on two cores.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import kerascompress as kc


def inference(model, images):
    """Returns a function that runs the model once on a batch, compiled, and waits."""
    if keras.backend.backend() == "jax":
        import jax

        run = jax.jit(lambda variables, images: model.stateless_call([], variables, images, training=False)[0])
        model.trainable = False
        variables, batch = [v.value for v in model.non_trainable_variables], jax.numpy.asarray(images)
        return lambda: run(variables, batch).block_until_ready()
    if keras.backend.backend() == "torch":
        import torch

        batch = keras.ops.convert_to_tensor(images)
        return torch.no_grad()(lambda: model(batch, training=False).cpu())
    import tensorflow as tf

    run, batch = tf.function(lambda images: model(images, training=False)), tf.constant(images)
    return lambda: run(batch).numpy()


def compiled(model, jit_compile):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"], jit_compile=jit_compile)
    return model


def arms(args, images, labels):
    """Returns {name: what makes the function that does it once}."""
    jit_compile, n = keras.backend.backend() == "jax" or args.jit_compile, args.candidates

    def student():
        return kc.models.resnet(args.student, 100, seed=0)

    def step(model):
        compiled(model, jit_compile)
        return lambda: model.train_on_batch(images, labels)

    def distiller(**kwargs):
        augment = kc.RandAugment(magnitude=(0, 30), seed=0)
        return step(kc.Distiller(student(), kc.models.resnet(args.teacher, 100, seed=1), augment=augment, **kwargs))

    return {
        "teacher, inference": lambda: inference(kc.models.resnet(args.teacher, 100, seed=1), images),
        "student, inference": lambda: inference(student(), images),
        "student, training step": lambda: step(student()),
        "Distiller, 1 candidate": lambda: distiller(num_candidates=1),
        f"Distiller, {n} candidates": lambda: distiller(num_candidates=n),
        f"Distiller, {n} candidates, filter alone": lambda: distiller(num_candidates=n, kl_weight=0.0),
    }


def make_batch(args):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (args.batch, 32, 32, 3)).astype("uint8"), random.integers(0, 100, args.batch)


def peak_memory(args, name):
    """By how many MiB this process grows when it runs a part."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    run = arms(args, *make_batch(args))[name]()
    before = peak()
    run()
    run()
    return peak() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=int, default=110, help="depth of the ResNet that teaches")
    parser.add_argument("--student", type=int, default=20, help="depth of the ResNet that learns")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for busy machines")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it, in processes of their own"
    )
    parser.add_argument("--jit_compile", action="store_true", help="XLA on the TensorFlow backend as well")
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    batch = make_batch(args)
    memory = {}
    if args.memory:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {name: pool.apply(peak_memory, (args, name)) for name in arms(args, *batch)}
    runs = {name: make() for name, make in arms(args, *batch).items()}
    for run in runs.values():
        run()
        run()
    seconds = {name: [] for name in runs}
    for _ in range(args.turns):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    teacher, student, training = list(median.values())[:3]
    n = args.candidates
    floors = [None] * 3 + [
        teacher + training,
        n * (teacher + student) + training,
        n * teacher + training,
    ]
    device = keras.ops.zeros(()).device
    print(f"\nResNet-{args.teacher} to ResNet-{args.student}, batch {args.batch}, {keras.backend.backend()}, {device}")
    print(f"| part | {args.clock} ms (least, most) | floor, ms | over the floor | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for (name, values), floor in zip(seconds.items(), floors, strict=True):
        ms = f"{1000 * median[name]:,.0f} ({1000 * min(values):,.0f}, {1000 * max(values):,.0f})"
        over = " | " if floor is None else f"{1000 * floor:,.0f} | {median[name] / floor:.2f}"
        print(f"| {name} | {ms} | {over} | {memory.get(name, float('nan')):,.0f} |")


if __name__ == "__main__":
    main()
