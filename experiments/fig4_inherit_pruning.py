"""Figure 4: a dense network learns strong augmentation, and the network that is pruned from it inherits that.

    python -m experiments.fig4_inherit_pruning --dataset=cifar100 --model=resnet20

The paper's panels are cifar10 and cifar100 with resnet20, mobilenet_v2 and shufflenet_v2.

Paper (Section IV-C1): the inheriting scheme has the highest accuracy on both data sets, with all three networks and at
every pruning ratio. Discussion (Section V): strong augmentation harms a pruned network that begins with random weights.

Measured: with a network that overfits (1,000 images of CIFAR-10 at 16x16, ResNet-8, 100 epochs a stage), "inherit"
beats Baseline-A at equal epochs at p = .6, .8 and .9 and the longer one at .6 and .8, which beats it at .97; it beats
Baseline-B at .6, and cannot be told apart from it elsewhere; strong augmentation harms random weights at .97. At p =
.6, mean ± std (n = 15): inherit 49.57 ± 0.79, Baseline-A 48.78 ± 0.64 (at equal epochs 48.24 ± 0.69), Baseline-B 48.97
± 0.90. The rows are in results/small_fig4.jsonl. On CIFAR-100 (2,000 images, n = 3) at p = .97 inherit 12.16 ± 0.27
beats Baseline-A 11.59 ± 0.30 (at equal epochs 10.94 ± 0.41) and Baseline-B 10.89 ± 0.26; at .6 and .9 strong and weak
are the same magnitude there. The rows are in results/small_fig4_cifar100.jsonl. With MobileNetV2 of width 0.5 (n = 3)
one threshold leaves whole layers without a weight, and every network at 10 %, at p = .9 and .97; at .6 strong and weak
are one magnitude. The rows are in results/small_fig4_mobilenet.jsonl. No lead of "inherit" with a network
that underfits (ResNet-8 of 8 filters, 1,500 images of CIFAR-10, 10 epochs a stage; 95 min on two busy cores). Test
accuracy at p = .8, mean ± std (n = 3): inherit 36.59 ± 1.67, Baseline-A 42.24 ± 0.98 (at equal epochs 38.26 ± 1.99),
Baseline-B 38.66 ± 1.60. The rows are in results/fig4_cifar10.jsonl.

Time: 38 stages for each seed in the paper's setting, 30 of 200 epochs and 8 of 100, which wants a GPU;
`--dataset=digits --seeds=0` takes some minutes on a CPU, `--smoke` less than one.

Every stage begins at the full learning rate. Baseline-A has one stage more than the others in the paper. It is here
twice: so, and with its last two stages half as long, which gives all arms the same number of epochs. The network that
is pruned is each arm's own: trained at the strong magnitude (inherit, scratch), without RandAugment (Baseline-A), or at
the weak magnitude of the ratio (Baseline-B). Pruning is one shot, by one L1 threshold for all kernels, and final.

Two arms are not in the paper and take part where they are named, `--arms=inherit-channels,baseline-b-channels`: whole
channels are removed, so many that about the fraction p of the weights is gone.
"""

import dataclasses

from absl import app
from absl import flags as absl_flags
from keras import ops

import kerascompress as kc
from experiments import flags, plot, training

STRONG = 14
WEAK = {0.2: 12, 0.4: 8, 0.6: 4, 0.8: 1}  # the paper's optima for ResNet-20 on CIFAR-100; 0.8 on the line through them


def baseline_a(dense, *, fit, **scheme):
    fit(dense, None)  # there has to be something to prune
    return kc.baseline_a(dense, fit=fit, **scheme)


ARMS = {  # scheme, and the length of each stage in units of --epochs
    "inherit": (kc.inherit, (1, 1)),
    "baseline-a": (baseline_a, (1, 1, 1)),
    "baseline-a, equal epochs": (baseline_a, (1, 1 / 2, 1 / 2)),
    "baseline-b": (kc.baseline_b, (1, 1)),
    "scratch, weak": (kc.inherit, (1, 1)),  # as "inherit", but the pruned network forgets its weights
    "scratch, strong": (kc.inherit, (1, 1)),
    "inherit-channels": (kc.inherit, (1, 1)),
    "baseline-b-channels": (kc.baseline_b, (1, 1)),
}
PAPERS = tuple(arm for arm in ARMS if not arm.endswith("channels"))
SMOKE = {"arms": ("inherit", "baseline-a, equal epochs"), "sparsities": (0.4,)}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def forget(pruned, fresh):
    """Returns `fresh`, a dense network, with the zeros of a pruned one."""
    for new, old in zip(fresh.trainable_variables, pruned.trainable_variables, strict=True):
        if len(new.shape) > 1:
            new.assign(ops.where(old.value == 0, 0.0, new.value))
    return fresh


def course(run):
    """Returns the course of a run, and `scheme(large, shrink=, fit=)`."""
    if run.arm not in ARMS:  # the dense network of several arms
        return training.Course(run, [run.epochs]), lambda dense, *, shrink, fit: fit(dense, run.magnitude) or dense
    scheme, parts = ARMS[run.arm]

    def at_magnitudes(dense, *, shrink, fit):
        return scheme(dense, shrink=shrink, fit=fit, strong=run.strong, weak=run.magnitude)

    return training.Course(run, [round(part * run.epochs) for part in parts]), at_magnitudes


def outcome(run):
    stages, scheme = course(run)

    def prune(dense):
        return kc.prune_now(dense, run.sparsity, scope="global")

    def prune_channels(dense):  # a kernel loses inputs and outputs alike
        return kc.prune_channels(dense, 1 - (1 - run.sparsity) ** 0.5)

    def to_scratch(dense):
        seed = training.layer_seeds(run, 4)[-1]  # other initial weights than any run has
        return forget(prune(dense), training.build_model(run, seed))

    if run.arm.startswith("scratch"):
        shrink = stages.then(f"scratch={run.sparsity}", to_scratch)
    elif run.arm.endswith("channels"):
        shrink = stages.then(f"channels={run.sparsity}", prune_channels)
    else:
        shrink = stages.then(f"prune={run.sparsity}", prune)
    return stages.outcome(scheme(training.build_model(run), shrink=shrink, fit=stages.fit))


def after_its_dense_network(run):
    """Returns a run after that of the dense network with which it begins, which other arms and ratios share."""
    stages, scheme = course(run)
    trained = []
    scheme(None, shrink=lambda net: net, fit=lambda net, magnitude: trained.append(magnitude))
    return dataclasses.replace(run, after=stages.stage(trained[0]), work=sum(stages.epochs[1:]))


def main(_):
    study = flags.Study("fig4", takes=("arms", "augment_in", "sparsities", "strong", "weak"))
    arms = flags.arms(ARMS, SMOKE["arms"] if FLAGS.smoke else PAPERS)
    halved = [arm for arm in arms if any(part % 1 for part in ARMS[arm][1])]
    if study.epochs % 2 and halved:
        raise ValueError(f"--epochs must be even: {halved} halve them. Received: --epochs={study.epochs}.")
    sparsities = flags.sparsities(SMOKE["sparsities"] if FLAGS.smoke else WEAK)
    weak = flags.magnitudes("weak", [WEAK[p] for p in sparsities if p in WEAK], len(sparsities))
    strong = STRONG if FLAGS.strong is None else FLAGS.strong
    runs = [
        study.run(arm=arm, sparsity=p, magnitude=strong if arm == "scratch, strong" else m, strong=strong, seed=seed)
        for seed in study.seeds
        for p, m in zip(sparsities, weak, strict=True)
        for arm in arms
    ]
    plot.show("fig4", study.carry_out([after_its_dense_network(run) for run in runs], outcome), study.out)


if __name__ == "__main__":
    app.run(main)
