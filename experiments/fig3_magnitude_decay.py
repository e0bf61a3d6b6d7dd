"""Figure 3: a network is pruned step by step while its augmentation stays as strong as it is, or weakens.

    python -m experiments.fig3_magnitude_decay --dataset=cifar100

Paper (Section IV-B): (A) weakening the magnitude with the pruning ratio, 14 -> 12 -> 8 -> 4, gives a higher accuracy at
every ratio than each of these magnitudes held constant; (B) a higher constant magnitude helps at low ratios and harms
at high ones.

Measured: with a network that overfits (1,000 images of CIFAR-10 at 16x16, ResNet-8, 100 epochs a stage), decayed beats
none, is beaten by M = 9 and 14, and cannot be told apart from M = 4: at p = .9, mean ± std, decayed 49.73 ± 0.89 and M
= 4 50.15 ± 0.84 (n = 15), none 45.88 ± 0.77, M = 9 52.62 ± 0.20, M = 14 52.45 ± 1.16 (n = 5); at .97 whole layers are
emptied and all arms are at 10 %. The dense network is best at M = 4. The rows are in results/small_fig3.jsonl. Neither
claim holds for a network that underfits (ResNet-8, 1,500 images of CIFAR-10, 16 epochs a stage; 3 h on two cores). Test
accuracy at p = .6, mean ± std (n = 3): decayed 54.32 ± 1.82, M = 14 52.55 ± 2.13, M = 4 56.42 ± 0.24, none 57.59 ±
0.73. The rows are in results/fig3_cifar10.jsonl.

Time: 23 stages of 200 epochs for each seed in the paper's setting (ResNet-20, CIFAR-100), which wants a GPU;
`--dataset=digits --seeds=0` takes a few minutes on a CPU, `--smoke` half a minute.

Each arm trains a dense network and then prunes it further in each stage: over the first half of the stage's epochs,
while the second half trains on at that ratio. A stage begins with the network of the stage before, at the full learning
rate. Arms are one network while their magnitudes are the same: at ratio 0, "decayed" is its first magnitude's arm.
"""

import functools

from absl import app
from absl import flags as absl_flags

import kerascompress as kc
from experiments import flags, plot, training

SPARSITIES = (0.0, 0.2, 0.4, 0.6)
CONSTANT = (None, 4, 8, 12, 14)  # None is no RandAugment
DECAYED = (14, 12, 8, 4)
ARMS = ("constant", "decayed", "adaptive")  # adaptive: by itself, from 0 on, and on from stage to stage
SMOKE = {"constant": (None,), "sparsities": (0.0, 0.6), "decayed": (14, 4)}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def network(run):
    """Returns the network of a run and its result; both are there already if another run has them."""
    if run.after and run.after.sparsity == run.sparsity:
        return network(run.after)  # another arm that is the same so far
    net = training.build_model(run)
    if not run.after:
        moves = training.adapts(run) if run.arm == "adaptive" else None
        return net, training.trained(run, net, moves=moves) | training.sizes(net)
    before, its_result = network(run.after)
    net.set_weights(before.get_weights())
    schedule, moves = training.ramp(run, run.after.sparsity), None
    if run.arm == "adaptive":
        moves = training.adapts(run, start=its_result["magnitudes"][-1])
    elif run.magnitude != run.after.magnitude:
        points = {before.sparsity: before.magnitude for before in (run.after, run)}
        moves = functools.partial(kc.MagnitudeScheduler, schedule=kc.SparsityLinkedMagnitude(schedule, points))
    return net, training.trained(run, net, schedule=schedule, moves=moves) | training.sizes(net)


def outcome(run):
    return network(run)[1]


def plan(study):
    """Returns the runs of all arms, each after the one that it begins with."""
    usual = SMOKE if FLAGS.smoke else {"constant": CONSTANT, "sparsities": SPARSITIES, "decayed": DECAYED}
    kinds, sparsities = flags.arms(ARMS, ARMS[:2]), flags.rising_sparsities(usual["sparsities"])
    for arm, flag in zip(ARMS, ("magnitudes", "decayed", "step"), strict=True):
        if arm not in kinds:
            flags.check_used(f"without the arm {arm}", flag)
    decayed = flags.decayed(usual["decayed"], len(sparsities)) if "decayed" in kinds else []
    constant = flags.magnitudes("magnitudes", usual["constant"])
    arms = {
        "constant": {flags.magnitude_name(m): [m] * len(sparsities) for m in constant},
        "decayed": {"decayed": decayed},
        "adaptive": {"adaptive": [0.0] * len(sparsities)},
    }
    arms = {name: arm for kind in kinds for name, arm in arms[kind].items()}
    is_papers = sparsities == list(usual["sparsities"])
    runs, first = [], {}
    for seed in study.seeds:
        for arm, magnitudes in arms.items():
            before, path = None, ""
            for i, (sparsity, magnitude) in enumerate(zip(sparsities, magnitudes, strict=True)):
                path += f" {sparsity:g}:{arm if arm == 'adaptive' else flags.magnitude_name(magnitude)}"
                usual_path = is_papers and (arm != "decayed" or decayed[: i + 1] == list(usual["decayed"])[: i + 1])
                run = study.run(
                    arm=arm,
                    sparsity=sparsity,
                    magnitude=magnitude,
                    seed=seed,
                    target=kc.adaptive.TARGETS["gap"] if arm == "adaptive" else None,
                    step=flags.step() if arm == "adaptive" else None,
                    path=None if usual_path or not i else path.strip(),
                    after=first.get((seed, path), before),
                    work=0 if (seed, path) in first else None,
                )
                before = first.setdefault((seed, path), run)
                runs.append(run)
    return runs


def main(_):
    study = flags.Study(
        "fig3", takes=("sparsities", "magnitudes", "decayed", "arms", "step", "export"), carrier="wrapper"
    )
    runs = plan(study)
    follow = [run for run in runs if run.arm in ("decayed", "adaptive") and run.seed == study.seeds[0]]
    if FLAGS.export and not follow:
        raise ValueError(f"--export needs the arm decayed or adaptive. Received: --arms={','.join(FLAGS.arms)}.")
    plot.show("fig3", study.carry_out(runs, outcome), study.out)
    study.export(lambda: network(follow[-1])[0])


if __name__ == "__main__":
    app.run(main)
