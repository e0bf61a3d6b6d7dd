"""What Figures 4 and 6 share: schemes whose stages of training are kept, and shared by the arms that begin alike."""

import dataclasses

import keras
from absl import flags

import kerascompress as kc
from experiments import common, plot

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(common)
flags.DEFINE_float(
    "strong", None, "Magnitude of strong augmentation. Default: the figure's.", lower_bound=0, upper_bound=30
)
flags.DEFINE_list(
    "weak",
    None,
    "Magnitudes of weak augmentation, the optima of the small networks: one for each pruning ratio of Figure 4, or one "
    "for Figure 6. Default: the paper's, which are those of ResNet-20 on CIFAR-100.",
)


def magnitudes(strong, weak):
    """Returns the magnitudes that the flags choose in place of a figure's own: `strong`, and the list `weak`."""
    try:
        chosen = weak if FLAGS.weak is None else [float(magnitude) for magnitude in FLAGS.weak]
    except ValueError:
        chosen = []
    if len(chosen) != len(weak) or not all(magnitude is not None and 0 <= magnitude <= 30 for magnitude in chosen):
        raise ValueError(
            f"--weak must be {len(weak)} magnitude(s) in [0, 30], separated by commas. Received: {FLAGS.weak}."
        )
    return strong if FLAGS.strong is None else FLAGS.strong, chosen


def conduct(study, runs, arms, begin):
    """Carries out the runs that have no row yet, and shows all.

    Args:
        study, runs: See `common.Study`.
        arms: Arm -> its scheme, and the length of each of its stages in units of --epochs.
        begin: `begin(course)` returns the large network of a run, and the function that shrinks it.
    """
    todo = {run: [round(part * run.epochs) for part in arms[run.arm][1]] for run in runs if not study.row(run)}
    with common.progress_bar(sum(map(sum, todo.values()))) as progress:
        for run, epochs in todo.items():
            scheme, _ = arms[run.arm]
            course = Course(study, run, epochs, progress)
            large, shrink = begin(course)
            small = scheme(large, shrink=shrink, fit=course.fit, strong=run.strong, weak=run.magnitude)
            study.record(run, course.outcome(small))
            keras.utils.clear_session()
    plot.show(study.settings["figure"], [study.row(run) for run in runs], study.out)


class Course:
    """The stages of one run, one after the other.

    A stage is decided by all that led to it, and its folder is named for that: the `path` so far, such as
    ["M=14x200", "prune=0.4", "M=8x200"]. A run that comes to a stage of another run takes the weights it has left.
    """

    def __init__(self, study, run, epochs, progress):
        self.study, self.run, self.epochs, self.progress = study, run, epochs, progress
        self.path, self.results = [], []

    def then(self, name, change):
        """Returns `change`, a function from a network to another, so that it also writes its name into the path."""

        def named(net):
            self.path.append(name)
            return change(net)

        return named

    def fit(self, net, magnitude):
        """Trains `net` for the next stage, from the full learning rate on; or gives it the weights this stage left."""
        stage = len(self.results)
        epochs = self.epochs[stage]
        sparsity = kc.sparsity(net)
        self.path.append(f"M={'none' if magnitude is None else format(magnitude, 'g')}x{epochs}")
        run = dataclasses.replace(
            self.run,
            arm="+".join(self.path),
            sparsity=round(sparsity, 2),
            magnitude=magnitude,
            epochs=epochs,
            strong=None,
        )
        done = self.study.folder(run) / "done.npz"
        if done.exists():
            result, weights = common.load_arrays(done, "weights")
            net.set_weights(weights)
            self.progress.update(epochs)
        else:
            *base_seeds, seed = common.layer_seeds(run, 3, stage)
            layers = common.base_augmentation(self.study.data, *base_seeds)
            layers += [] if magnitude is None else [common.rand_augment(run, seed)]
            result = common.train(
                run,
                [*layers, net],
                self.study.data,
                done.parent,
                progress=self.progress,
                callbacks=[kc.UpdatePruningStep()] if sparsity else [],
                stage=stage,
            )
            common.save_arrays(done, result, weights=net.get_weights())
            (done.parent / common.STATE).unlink()
        self.results.append(result)

    def outcome(self, small):
        """Returns what the row says of the network that the last stage has left."""
        return (
            self.results[-1]
            | {"seconds": round(sum(result["seconds"] for result in self.results), 1)}
            | common.sizes(small)
            | {"total_epochs": sum(self.epochs), "stages": self.path}
        )
