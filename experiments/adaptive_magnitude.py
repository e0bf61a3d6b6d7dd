"""Magnitudes that find themselves in one training, beside the best of several that are held constant.

    python -m experiments.adaptive_magnitude --dataset=cifar10 --image_size=16 --train_images=500 --model=resnet8

Every arm is one training as in Figure 1 (whose rows `--constants` takes): from scratch, pruned over the first half of
its steps. The regret of an arm is the test accuracy of the best constant magnitude, chosen on the validation images for
each ratio, minus its own, with the same seed. The protocol is in README.md.

Paper (Section IV-B): 14, 12, 8, 4 at p = 0, .2, .4, .6 (ResNet-20, CIFAR-100), found by 20 to 31 trainings each.

Time: 15 trainings for each ratio and seed, a minute each on one core at the scale of the protocol; `--smoke` a minute.

The arms, beside the constants:

- trivial: TrivialAugment: one operation, every image its own M between 0 and 30.
- line: M = 14.6 - 17 p, the line through the paper's optima; none where it is below 0.
- accuracy=r: M rises while the accuracy on augmented training images is above r, and falls else.
- gap=g: the same with that accuracy minus the one on the validation images.
- held-accuracy, held-gap: the same, held where a dense network has it that was trained at M = 9.
- entropy: EntAugment's signal for all at once: M = 30 times the mean over the training images of 1 - H / ln K, the
  entropy H of each one's softmax among K classes when it was last seen.
- entropy-image: EntAugment: that of each image by itself, one operation, after ten epochs of TrivialAugment.

With --teacher, every arm is a student of that teacher, as in Figure 7 without selection (not held-* and entropy*).
"""

import dataclasses
import re

import keras
import numpy as np
from absl import app
from absl import flags as absl_flags
from keras import ops

import kerascompress as kc
from experiments import claims, flags, plot, regrets, runs, training
from experiments import fig7_teacher_filter as fig7

SPARSITIES = (0.0, 0.6, 0.9, 0.97)
MAGNITUDES = (None, 2, 4, 6, 9, 14, 22)  # None is no RandAugment
ARMS = ("trivial", "line", "accuracy=0.6", "gap=0.1", "held-accuracy", "held-gap", "entropy", "entropy-image")
DENSE = 9  # the magnitude at which the operating point of held-* is measured
MOVED = ("accuracy", "gap", "held-accuracy", "held-gap")
WARMUP = 10  # epochs of TrivialAugment before EntAugment's own magnitudes
SMOKE = {"sparsities": (0.0, 0.6), "magnitudes": (None, 9), "arms": ("trivial", "gap=0.1", "entropy-image")}

FLAGS = absl_flags.FLAGS
absl_flags.adopt_module_key_flags(flags)


# The rules: what each arm gives to `training.trained`


def kind(arm):
    return re.split("[=,]", arm)[0]


def rule(run):
    """Returns what `training.trained` needs to know of an arm."""
    name = kind(run.arm)
    if name in MOVED:
        signal = name.removeprefix("held-")
        return {
            "moves": training.adapts(run, signal, target=operating_point(run, signal) if run.target is None else None)
        }
    return {
        "trivial": {"around": trivial},
        "entropy": {"around": entropic, "moves": Shown},
        "entropy-image": {"around": entropic, "moves": Shown},
    }.get(name, {})


def operating_point(run, signal):
    """Returns where a dense network ended, which was trained before at a constant magnitude."""
    dense = training.trained(run.after, training.build_model(run.after))
    return dense["train_last"] - (dense["validation_last"] if signal == "gap" else 0)


def trivial(run, net, stage):
    """TrivialAugment in place of RandAugment."""
    data = training.data_of(run)
    *base_seeds, seed = training.layer_seeds(run, 3, stage)
    augment = kc.RandAugment((0, 30), num_ops=1, seed=seed)
    layers = [*training.base_augmentation(data, *base_seeds), augment, net]
    return keras.Sequential([keras.Input(data.input_shape, dtype="uint8"), *layers]), augment


def entropic(run, net, stage):
    """EntAugment in place of RandAugment."""
    model = EntAugment(run, net, stage)
    return model, model


class EntAugment(keras.Model):
    """The network of a run behind its augmentation, at magnitudes which the entropies of its outputs decide.

    Reference:
        Yang et al., "EntAugment: Entropy-Driven Adaptive Data Augmentation Framework for Image Classification", 2024.
    """

    takes_places = True  # of the images among all, beside them

    def __init__(self, run, net, stage):
        super().__init__()
        data, steps = training.data_of(run), training.steps_per_epoch(run)
        *base_seeds, seed = training.layer_seeds(run, 3, stage)
        self.per_image = kind(run.arm) == "entropy-image"
        self.base = training.base_augmentation(data, *base_seeds)
        self.augment = kc.RandAugment((0, 30), num_ops=1 if self.per_image else 2, seed=seed)
        self.net, self.classes = net, data.num_classes
        self.warmup = min(WARMUP, run.epochs // 2) * steps if self.per_image else 0
        state = {"initializer": "zeros", "trainable": False, "dtype": "float32"}
        self.certainty = self.add_weight(shape=(len(data.train[1]),), name="certainty", **state)
        self.steps = self.add_weight(shape=(), name="steps", **state)
        self.built = True

    def magnitudes(self, certainty):
        return ops.minimum(ops.floor(30 * certainty) + 1, 30) if self.per_image else 30 * ops.mean(certainty)

    def call(self, inputs, training=None):
        images = inputs["images"] if isinstance(inputs, dict) else inputs
        if not training:
            return self.net(images, training=False)
        for layer in self.base:
            images = layer(images, training=True)
        drawn = self.augment.draw_magnitude(ops.shape(images)[0])
        certainty = ops.take(self.certainty, inputs["places"]) if self.per_image else self.certainty
        magnitude = ops.where(self.steps < self.warmup, drawn, self.magnitudes(certainty))
        logits = self.net(self.augment(images, magnitude=magnitude, training=True), training=True)
        share = ops.softmax(ops.stop_gradient(ops.cast(logits, "float32")))
        certainty = 1 + ops.sum(share * ops.log(share + 1e-8), axis=-1) / np.log(self.classes)
        places = ops.cast(inputs["places"], "int32")[:, None]
        self.certainty.assign(ops.scatter_update(self.certainty, places, certainty))
        self.steps.assign(self.steps + 1)
        return logits


class Shown(keras.callbacks.Callback):
    """Logs the mean magnitude to which an epoch has led, at which the next one is trained."""

    def __init__(self, augment):
        super().__init__()
        self.augment = augment

    def on_epoch_end(self, epoch, logs=None):
        _ = self.model  # on JAX: brings the state back before it is read
        magnitudes = self.augment.magnitudes(ops.convert_to_tensor(self.augment.certainty))
        is_warm = ops.convert_to_numpy(self.augment.steps) >= self.augment.warmup
        logs["magnitude"] = float(np.mean(ops.convert_to_numpy(magnitudes))) if is_warm else 15.0  # of 0 to 30


def distilled(around):
    """Returns an `around` that distils the network of a run, without selection, on the images of another `around`."""

    def student(run, net, stage):
        fitted, augment = around(run, net, stage)
        views = keras.Sequential(fitted.layers[:-1])
        teacher, _ = fig7.load_teacher(run)
        return kc.Distiller(net, teacher, augment=views, num_candidates=1, **fig7.LOSS), augment

    return student


def outcome(run):
    if is_none(run):
        return outcome(run.after)
    net = training.build_model(run)
    if run.arm == "teacher":
        return training.trained(run, net)
    rules = rule(run)
    if run.teacher:
        rules["around"] = distilled(rules.get("around", training.classifier))
    return training.trained(run, net, schedule=training.ramp(run), **rules) | training.sizes(net)


# The study


def is_none(run):
    """Whether the line has come below 0: the same training as without RandAugment, which the run comes after."""
    return run.arm == "line" and run.magnitude is None


def settings(arm, sparsity):
    """Returns what the key says of an arm."""
    name, equals, target = arm.partition("=")
    if bool(equals) != (name in ("accuracy", "gap")) or (equals and not re.fullmatch(r"-?0?\.\d+", target)):
        raise ValueError(f"--arms takes a set-point for accuracy and gap alone, such as gap=0.15. Received: {arm}.")
    if name not in MOVED:
        return {"arm": arm, "magnitude": regrets.line(sparsity) if name == "line" else None}
    step = flags.step()
    arm = f"{name}={float(target):g}" if target else name
    arm = arm if step == 0.5 else f"{arm},step={step:g}"
    return {"arm": arm, "magnitude": 0.0, "target": float(target) if target else None, "step": step}


def plan(study):
    """Returns the runs of all arms, for each seed and ratio."""
    usual = SMOKE if FLAGS.smoke else {"sparsities": SPARSITIES, "magnitudes": MAGNITUDES, "arms": ARMS}
    arms = flags.arms([kind(arm) for arm in ARMS], usual["arms"], name=lambda arm: arm.partition("=")[0])
    if not FLAGS.teacher:
        flags.check_used("without --teacher", "teacher_epochs", "teacher_magnitude")
    if not any(kind(arm) in MOVED for arm in arms):
        flags.check_used("without an arm of which M moves", "step")
    teacher, key = fig7.plan_teacher(study, FLAGS.teacher) if FLAGS.teacher else (None, None)
    if key and (cannot := [arm for arm in arms if arm.startswith(("held", "entropy"))]):
        raise ValueError(f"With --teacher there is no arm {', '.join(cannot)}. Received: --arms={','.join(arms)}.")
    constant = {flags.magnitude_name(m): m for m in flags.magnitudes("magnitudes", usual["magnitudes"])}
    planned = []
    for seed in study.seeds:
        common = {"seed": seed, "teacher": key}
        dense = study.run(arm=flags.magnitude_name(DENSE), sparsity=0.0, magnitude=DENSE, **common)
        for p in flags.sparsities(usual["sparsities"]):
            none = study.run(sparsity=p, arm="none", magnitude=None, after=teacher, **common)
            keys = [{"arm": name, "magnitude": m} for name, m in constant.items()] + [settings(arm, p) for arm in arms]
            for run in (study.run(sparsity=p, after=teacher, **each, **common) for each in keys):
                changes = {"after": dense} if run.arm.startswith("held") else {}
                changes |= {"after": none, "work": 0} if is_none(run) else {}
                planned.append(dataclasses.replace(run, **changes))
    return planned


def of_figure_1(rows, run):
    """Returns the row of the same training among those of Figure 1, or None; looking more often changes no training."""
    same = run.after if is_none(run) else run
    key = {name: value for name, value in same.key.items() if name not in ("figure", "evaluate_every")}
    row = next((row for row in rows if key.items() <= (runs.BEFORE | row).items()), None)
    return row and row | {name: run.key[name] for name in ("figure", "evaluate_every", "arm")}


def main(_):
    if FLAGS.augmenter != "kerascompress":
        raise ValueError("TrivialAugment and EntAugment draw magnitudes, which keras-cv's does not. Leave --augmenter.")
    study = flags.Study(
        "adaptive",
        ("sparsities", "magnitudes", "arms", "step", "constants", "teacher", "teacher_epochs", "teacher_magnitude"),
    )
    earlier = runs.read_rows(FLAGS.constants) if FLAGS.constants else []
    planned = {run: of_figure_1(earlier, run) for run in plan(study)}
    rows = [row for row in planned.values() if row]
    if FLAGS.constants:
        constant = sum(run.arm in ("line", "none") or claims.constant(run.arm) < np.inf for run in planned)
        print(f"{len(rows)} of {constant} runs at constant magnitudes are taken from {FLAGS.constants}.")
        if not rows:
            raise ValueError(f"--constants must have runs of this setting. Received: {FLAGS.constants}, of others.")
    rows += study.carry_out([run for run, row in planned.items() if not row], outcome)
    plot.show("adaptive", rows, study.out)
    print(f"\nAgainst the best constant, named at the top:\n\n{claims.markdown(regrets.lines(rows))}\n")


if __name__ == "__main__":
    app.run(main)
