"""The idea in minutes: what strong augmentation costs a network grows as it is pruned, unless its strength follows.

    python -m experiments.demo --dataset=digits

Each arm trains a network from scratch while a polynomial schedule prunes it over the first half of the steps: without
RandAugment, at one strong magnitude, or at a magnitude that `kc.SparsityLinkedMagnitude` weakens with every weight that
goes. Digits come with scikit-learn; `--dataset=cifar10` takes 1,000 images of CIFAR-10 at 16x16 instead, downloaded by
Keras or from `--data_dir`. Unless flags say otherwise, a training is 60 epochs of 150 digits (`--batch_size=50
--model=resnet8w8`), or 100 of CIFAR-10's (`--batch_size=125 --model=resnet8`), with `--learning_rate=0.05
--schedule=cosine --evaluate_every=10`; what `--help` calls default below is that of the figures.

Time: 24 trainings on two cores, the digits in two minutes, CIFAR-10 in twelve. `--smoke` takes half a minute.
"""

import functools

from absl import app
from absl import flags as absl_flags

import kerascompress as kc
from experiments import flags, plot, training

SETTINGS = {"schedule": "cosine", "learning_rate": 0.05, "evaluate_every": 10}
SETTINGS_OF = {  # overfitted by a dense network, which is what augmentation is for
    "digits": {"train_images": 150, "model": "resnet8w8", "batch_size": 50, "epochs": 60},
    "cifar10": {"train_images": 1000, "model": "resnet8", "batch_size": 125, "epochs": 100, "image_size": 16},
}
SPARSITIES = (0.0, 0.6, 0.9)
LINKED = (14, 4, 0)  # better than (14, 6, 2) on the digits' validation images, seeds 100 to 105
SMOKE = {"sparsities": (0.0, 0.6), "decayed": (14, 4)}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def network(run):
    """Returns the network of a run, trained, and its result."""
    net = training.build_model(run)
    schedule, moves = training.ramp(run), None
    if run.path:
        points = {float(p): float(m) for p, m in (point.split(":M=") for point in run.path.split())}
        moves = functools.partial(kc.MagnitudeScheduler, schedule=kc.SparsityLinkedMagnitude(schedule, points))
    return net, training.trained(run, net, schedule=schedule, moves=moves) | training.sizes(net)


def outcome(run):
    return network(run)[1]


def plan(study):
    """Returns the runs: at each ratio, without RandAugment, strong, and linked to the sparsity."""
    usual = SMOKE if FLAGS.smoke else {"sparsities": SPARSITIES, "decayed": LINKED}
    sparsities = flags.rising_sparsities(usual["sparsities"])
    if len(sparsities) < 2:
        raise ValueError(f"--sparsities needs two ratios or more to compare. Received: {sparsities}.")
    linked = flags.decayed(usual["decayed"], len(sparsities))
    points = [f"{p:g}:M={m:g}" for p, m in zip(sparsities, linked, strict=True)]
    runs = []
    for seed in study.seeds:
        for i, p in enumerate(sparsities):
            arms = {"none": (None, None), f"M={linked[0]:g}": (linked[0], None)}
            if i:  # a dense network has nothing to follow
                arms["linked"] = linked[i], " ".join(points[: i + 1])
            runs += [study.run(arm=a, sparsity=p, magnitude=m, path=path, seed=seed) for a, (m, path) in arms.items()]
    return runs


def costs(rows):
    """Returns in one sentence what augmentation costs at the lowest and at the highest ratio, from the rows."""
    table = plot.statistics(rows, "test_last")
    none, strong, linked = table["none"], next(v for arm, v in table.items() if arm.startswith("M=")), table["linked"]
    low, high = min(none), max(none)
    gain = [strong[low][0] - none[low][0], strong[high][0] - none[high][0], linked[high][0] - none[high][0]]
    return (
        f"Against no augmentation, strong augmentation gives {gain[0]:+.1f} points to the dense network and "
        f"{gain[1]:+.1f} to the one that is {high:.0%} zeros; the magnitude that is linked to the sparsity "
        f"gives that one {gain[2]:+.1f}."
    )


def main(_):
    if not FLAGS.smoke:
        for name, value in (SETTINGS | SETTINGS_OF.get(FLAGS.dataset, {})).items():
            FLAGS.set_default(name, value)
    study = flags.Study("demo", takes=("sparsities", "decayed", "export"), carrier="wrapper")
    runs = plan(study)
    rows = study.carry_out(runs, outcome)
    plot.show("demo", rows, study.out)
    print(f"\n{costs(rows)}")
    if FLAGS.dataset == "digits":
        print("Digits show what strength costs a pruned network; a gain they cannot show: try DATASET=cifar10.")
    last = next(run for run in reversed(runs) if run.arm == "linked" and run.seed == study.seeds[0])
    study.export(lambda: network(last)[0])


if __name__ == "__main__":
    FLAGS.set_default("dataset", "digits")
    app.run(main)
