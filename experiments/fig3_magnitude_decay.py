"""Figure 3: a network is pruned step by step while its augmentation stays as strong as it is, or weakens.

    python -m experiments.fig3_magnitude_decay --dataset=cifar100

Time: 23 stages of 200 epochs for each seed in the paper's setting (ResNet-20, CIFAR-100), which wants a GPU;
`--dataset=digits --seeds=0` takes a few minutes on a CPU, `--smoke` half a minute.

Paper (Section IV-B): (A) weakening the magnitude with the pruning ratio, 14 -> 12 -> 8 -> 4, gives a higher accuracy at
every ratio than each of these magnitudes held constant; (B) a higher constant magnitude helps at low ratios and harms
at high ones. Expected: "decayed" equals "M=14" at ratio 0, where both are the same network, and leads from there on.

Each arm trains a dense network and then prunes it further in each stage: over the first half of the stage's epochs,
while the second half trains on at that ratio. A stage begins with the network of the stage before, at the full learning
rate.
"""

import dataclasses
import pathlib

import keras
from absl import app, flags

import kerascompress as kc
from experiments import common, plot

SPARSITIES = (0.0, 0.2, 0.4, 0.6)
ARMS = {
    "none": dict.fromkeys(SPARSITIES),  # no RandAugment
    "M=4": dict.fromkeys(SPARSITIES, 4),
    "M=8": dict.fromkeys(SPARSITIES, 8),
    "M=12": dict.fromkeys(SPARSITIES, 12),
    "M=14": dict.fromkeys(SPARSITIES, 14),
    "decayed": {0.0: 14, 0.2: 12, 0.4: 8, 0.6: 4},
}
SMOKE = {"arms": ("none", "decayed"), "sparsities": SPARSITIES[::3]}

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(common)
flags.DEFINE_string(
    "export",
    None,
    "Folder for the most pruned network of the decayed arm (first seed), as a SavedModel. Default: none.",
)


def alike(arm, sparsity):
    """Returns the first arm with the same magnitudes up to this ratio: so far, the two are one network."""

    def so_far(name):
        return [magnitude for p, magnitude in ARMS[name].items() if p <= sparsity]

    return next(name for name in ARMS if so_far(name) == so_far(arm))


def stage(study, run, sparsities, progress):
    """Returns the network of a run and its result; if there is none yet, trains on from the ratio before."""
    run = dataclasses.replace(run, arm=alike(run.arm, run.sparsity))
    done = study.folder(run) / "done.npz"
    net = study.build_model(run.seed)
    if done.exists():
        result, weights = common.load_arrays(done, "weights")
        net.set_weights(weights)
        return net, result

    index = sparsities.index(run.sparsity)
    *base_seeds, seed = common.layer_seeds(run, 3)
    augment = common.rand_augment(run, seed) if run.magnitude is not None else None
    callbacks, ramp = [], 0
    if index:
        before = dataclasses.replace(
            run, sparsity=sparsities[index - 1], magnitude=ARMS[run.arm][sparsities[index - 1]]
        )
        net.set_weights(stage(study, before, sparsities, progress)[0].get_weights())
        ramp = run.epochs // 2
        steps = max(1, ramp * study.steps_per_epoch)
        schedule = kc.PolynomialDecay(before.sparsity, run.sparsity, 0, steps, frequency=max(1, min(100, steps // 10)))
        net = kc.prune_low_magnitude(net, pruning_schedule=schedule, scope="global")
        callbacks = [kc.UpdatePruningStep()]
        if augment:
            callbacks += [kc.MagnitudeScheduler(augment, kc.SparsityLinkedMagnitude(schedule, ARMS[run.arm]))]

    layers = [*common.base_augmentation(study.data, *base_seeds), *([augment] if augment else []), net]
    result = common.train(run, layers, study.data, done.parent, progress=progress, callbacks=callbacks, best_from=ramp)
    small = kc.strip_pruning(net)
    result |= common.sizes(small)
    common.save_arrays(done, result, weights=small.get_weights())
    (done.parent / common.STATE).unlink()
    return small, result


def main(_):
    study = common.Study("fig3")
    sparsities = SMOKE["sparsities"] if FLAGS.smoke else SPARSITIES
    runs = [
        study.run(arm=arm, sparsity=sparsity, magnitude=ARMS[arm][sparsity], seed=seed)
        for seed in study.seeds
        for arm in (SMOKE["arms"] if FLAGS.smoke else ARMS)
        for sparsity in sparsities
    ]
    todo = [run for run in runs if not study.row(run)]
    with common.progress_bar(sum(run.epochs for run in todo)) as progress:
        for number, run in enumerate(todo, 1):
            study.record(run, stage(study, run, sparsities, progress)[1])
            progress.update(number * run.epochs - progress.n)  # some other arm may have done it
            keras.utils.clear_session()
    plot.show("fig3", [study.row(run) for run in runs], study.out)
    if FLAGS.export and pathlib.Path(FLAGS.export).exists():
        print(f"SavedModel: {FLAGS.export} is there already and stays as it is.")
    elif FLAGS.export:
        last = next(run for run in runs if run.arm == "decayed" and run.sparsity == sparsities[-1])
        net, _ = stage(study, last, sparsities, progress)
        report = kc.export_saved_model(net, FLAGS.export)
        print(f"SavedModel: {FLAGS.export}\n{report}")


if __name__ == "__main__":
    app.run(main)
