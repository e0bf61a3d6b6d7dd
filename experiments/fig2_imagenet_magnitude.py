"""Figure 2: the best magnitude, and the largest that does no harm, of a MobileNetV2 on ImageNet, dense and pruned.

    python -m experiments.fig2_imagenet_magnitude --data_dir=DIR

DIR holds train/<class>/*.JPEG and val/<class>/*.JPEG. The runs are those of Figure 1, with images that are read while
the network trains.

Paper (Section IV-A): on ImageNet too, a network in a larger size prefers augmentation at a higher magnitude; the curves
are in the figure only, and neither the ratios nor the recipe are named. Here MobileNetV2 is trained as it was published
(150 epochs, batch 256, SGD from 0.05 along one cosine, weight decay 4e-5, crops of 224x224).

Measured: 20 classes of Tiny-ImageNet at 24x24, ResNet-8, 100 epochs; test accuracy, mean ± std (n = 3): best M = 9 at
p = 0 (40.17 ± 0.58, none 36.58 ± 1.46) and 2 at .97 (33.50 ± 0.87, none 33.25 ± 0.87); undecided. The rows are in
results/small_fig2.jsonl.

Time: 14 trainings of 150 epochs for each seed, which wants many GPUs; what it takes on 20 classes of Tiny-ImageNet is
in README.md, `--smoke` half a minute.
"""

from absl import app
from absl import flags as absl_flags

from experiments import fig1_magnitude_search as fig1
from experiments import flags

SPARSITIES = (0.0, 0.6)
MAGNITUDES = (None, 2, 4, 6, 9, 14, 22)  # None is no RandAugment

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


def main(_):
    fig1.search("fig2", sparsities=SPARSITIES, magnitudes=MAGNITUDES)


if __name__ == "__main__":
    FLAGS.set_default("dataset", "imagenet")
    app.run(main)
