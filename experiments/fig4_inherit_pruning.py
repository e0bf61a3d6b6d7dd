"""Figure 4: a dense network learns strong augmentation, and the network that is pruned from it inherits that.

    python -m experiments.fig4_inherit_pruning --dataset=cifar100 --model=resnet20

The paper's panels are cifar10 and cifar100 with resnet20, mobilenet_v2 and shufflenet_v2.

Time: 38 stages for each seed in the paper's setting, 30 of 200 epochs and 8 of 100, which wants a GPU;
`--dataset=digits --seeds=0` takes some minutes on a CPU, `--smoke` less than one.

Paper (Section IV-C1): the inheriting scheme has the highest accuracy on both data sets, with all three networks and at
every pruning ratio. Expected: "inherit" leads Baseline-A (the pruned network cannot learn strong augmentation itself)
and Baseline-B (it is not the two stages that help). Discussion (Section V): strong augmentation harms a pruned network
that begins with random weights. Expected: "scratch, weak" leads "scratch, strong".

Every stage begins at the full learning rate. Baseline-A has one stage more than the others in the paper. It is here
twice: so, and with its last two stages half as long, which gives all arms the same number of epochs. The network that
is pruned is each arm's own: trained at the strong magnitude (inherit, scratch), without RandAugment (Baseline-A), or at
the weak magnitude of the ratio (Baseline-B). Pruning is one shot, by one L1 threshold for all kernels, and final.
"""

import re

from absl import app, flags
from keras import ops

import kerascompress as kc
from experiments import common, stages

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
}
SMOKE = {"arms": ("inherit", "baseline-a, equal epochs"), "sparsities": (0.4,)}

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(stages)
flags.DEFINE_list("sparsities", None, "Pruning ratios, separated by commas. Default: the paper's 0.2,0.4,0.6,0.8.")
flags.register_validator(
    "sparsities",
    lambda ratios: all(re.fullmatch(r"0?\.\d*[1-9]\d*", ratio) for ratio in ratios or []),
    "must be fractions, such as 0.4,0.8",
)


def prune(dense, sparsity):
    """Returns a copy whose smallest weights are zero from now on."""
    once = kc.ConstantSparsity(sparsity, begin_step=0, end_step=0, frequency=1)
    pruned = kc.prune_low_magnitude(dense, pruning_schedule=once, scope="global")
    now = kc.UpdatePruningStep()  # the masks of step 0, before there is a trainer
    now.set_model(pruned)
    now.on_train_begin()
    return pruned


def forget(pruned, fresh):
    """Returns `fresh`, a dense network, with the zeros of a pruned one."""
    for new, old in zip(fresh.trainable_variables, kc.strip_pruning(pruned).trainable_variables, strict=True):
        if len(new.shape) > 1:
            new.assign(ops.where(old.value == 0, 0.0, new.value))
    return fresh


def begin(course):
    study, run = course.study, course.run

    def to_scratch(dense):
        seed = common.layer_seeds(run, 4)[-1]  # other initial weights than any run has
        return prune(forget(prune(dense, run.sparsity), study.build_model(seed)), run.sparsity)

    if run.arm.startswith("scratch"):
        shrink = course.then(f"scratch={run.sparsity}", to_scratch)
    else:
        shrink = course.then(f"prune={run.sparsity}", lambda dense: prune(dense, run.sparsity))
    return study.build_model(run.seed), shrink


def main(_):
    study = common.Study("fig4")
    if study.settings["epochs"] % 2:
        raise ValueError(f"`epochs` must be even: one arm halves them. Received: epochs={study.settings['epochs']}.")
    chosen = FLAGS.sparsities or (SMOKE["sparsities"] if FLAGS.smoke else WEAK)
    sparsities = [float(sparsity) for sparsity in chosen]
    strong, weak = stages.magnitudes(STRONG, [WEAK.get(sparsity) for sparsity in sparsities])
    weak = dict(zip(sparsities, weak, strict=True))
    runs = [
        study.run(
            arm=arm,
            sparsity=sparsity,
            magnitude=strong if arm == "scratch, strong" else weak[sparsity],
            strong=strong,
            seed=seed,
        )
        for seed in study.seeds
        for sparsity in sparsities
        for arm in (SMOKE["arms"] if FLAGS.smoke else ARMS)
    ]
    stages.conduct(study, runs, ARMS, begin)


if __name__ == "__main__":
    app.run(main)
