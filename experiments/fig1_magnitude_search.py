"""Figure 1: the best magnitude, and the largest that does no harm, of networks that are pruned more and more.

    python -m experiments.fig1_magnitude_search --dataset=cifar100

Equation 3: M* = argmax over M of the score of the network that is trained with RandAugment at M. A pruned network is
trained from scratch while a polynomial schedule prunes it, by one L1 threshold for all kernels, over the first half of
its steps. The figure marks what `kc.search_magnitude` finds in the accuracies that are drawn; `--accuracy=
validation_last` chooses on the validation images.

Paper (Section IV-A): the optimal and the maximal magnitude fall with the pruning ratio: 14, 12, 8, 4 at 0, .2, .4, .6.

Measured: 1,000 images of CIFAR-10 at 16x16, ResNet-8, 100 epochs, n = 15 at 0 and .97, else 5: at 0, .6, .8, .9, .97
the optimal magnitude is 4, 2, 4, 2, none and the maximal one 14, 9, 9, 4, none. From 0 to .97 both fall, the maximal
one by 11.6 ± 2.6 (n = 5), the optimal one by 4.0 ± 2.6 (n = 15). Test accuracy, mean ± std, at the optimum 48.44 ±
0.95, 47.03 ± 1.05, 46.30 ± 1.33, 45.52 ± 0.73, 41.36 ± 1.13, without RandAugment 45.69 ± 0.67, 45.24 ± 0.22, 44.92 ±
0.72, 45.01 ± 0.66, 41.36 ± 1.13. The rows are in results/small_fig1.jsonl. 2,000 images of CIFAR-100, n = 3: at 0, .6,
.9, .97 the optimal magnitude is 4, 4, 2, none and the maximal one 14, 9, 6, none; test accuracy at the optimum 18.25 ±
0.22, 16.57 ± 0.53, 14.94 ± 0.28, 11.90 ± 0.45, without RandAugment 16.54 ± 0.36, 15.42 ± 0.29, 14.34 ± 0.35, 11.90 ±
0.45. The rows are in results/small_fig1_cifar100.jsonl. MobileNetV2 of width 0.5, 1,000 images of CIFAR-10, n = 3: at
0, .6, .9 the optimal magnitude is 14, 9, none and the maximal one 14, 22, none; test accuracy at the optimum 40.46 ±
0.68, 40.37 ± 0.62, 33.85 ± 1.43, without RandAugment 37.08 ± 0.61, 36.53 ± 0.95, 33.85 ± 1.43; at .97 all are at
chance. The rows are in results/small_fig1_mobilenet.jsonl. 5,000 images of CIFAR-10 at 32x32, ResNet-8, 200 epochs,
n = 2, no verdict: at 0, .9 the optimal magnitude is 9, 4 and the maximal one 14, 14; test accuracy at the optimum
77.06 ± 0.41, 70.88 ± 0.67, without RandAugment 71.97 ± 1.21, 69.29 ± 0.16; M = 14 over none is worth 5.01 ± 1.29 and
0.56 ± 0.09. The rows are in results/nearer_fig1.jsonl.

Time: 28 trainings of 200 epochs for each seed in the paper's setting (ResNet-20, CIFAR-100), which wants a GPU;
`--smoke` half a minute.
"""

from absl import app
from absl import flags as absl_flags

from experiments import flags, plot, training

SPARSITIES = (0.0, 0.2, 0.4, 0.6)
MAGNITUDES = (None, 2, 4, 6, 9, 14, 22)  # None is no RandAugment
SMOKE = {"sparsities": (0.0, 0.6), "magnitudes": (None, 9)}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def outcome(run):
    net = training.build_model(run)
    return training.trained(run, net, schedule=training.ramp(run)) | training.sizes(net)


def search(figure, **usual):
    """Carries out a figure of magnitudes by pruning ratios, of which the usual ones are given, and draws it."""
    study = flags.Study(figure, takes=("augment_in", "sparsities", "magnitudes"))
    usual = SMOKE if FLAGS.smoke else usual
    magnitudes = flags.magnitudes("magnitudes", usual["magnitudes"])
    runs = [
        study.run(arm=flags.magnitude_name(magnitude), sparsity=sparsity, magnitude=magnitude, seed=seed)
        for seed in study.seeds
        for sparsity in flags.sparsities(usual["sparsities"])
        for magnitude in magnitudes
    ]
    plot.show(figure, study.carry_out(runs, outcome), study.out)


def main(_):
    search("fig1", sparsities=SPARSITIES, magnitudes=MAGNITUDES)


if __name__ == "__main__":
    app.run(main)
