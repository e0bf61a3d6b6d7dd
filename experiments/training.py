"""The paper's recipe: networks, augmentation, and a training that goes on where a killed process left it.

Nothing here reads a flag; what is done depends on the run. `keeper` reads and writes the checkpoints.
"""

import dataclasses
import functools
import logging
import math
import re

import keras
import numpy as np

import kerascompress as kc
from experiments import data as datasets
from experiments import devices, folder, keeper
from experiments.runs import locked, on_gpu, provenance

logging.getLogger("tensorflow").setLevel("ERROR")  # it warns of every run that traces functions of its own

EVALUATE = 500  # images of a batch without gradients
LARGE = {"stem": "imagenet", "weight_decay": 4e-5}  # of images above 64x64, as MobileNetV2 was published


# What a run trains, and on what


def data_of(run):
    """Returns the images of a run."""
    eval_images = run.train_images if run.smoke else None
    of_files = (run.content, run.checkpoints, run.skip_damaged) if run.dataset == "imagenet" else ()
    return _load(run.dataset, run.data_dir, run.train_images, eval_images, run.image_size, *of_files)


@functools.lru_cache(maxsize=1)
def _load(dataset, data_dir, train_images, eval_images, image_size, content=None, checked=None, skip_damaged=False):
    of_files = {}
    if content is not None:
        of_files = {"checked": checked, "skip_damaged": skip_damaged}
        if folder.listing(data_dir).content != content:
            raise ValueError(
                f"The images in {data_dir} are not those for which the run was planned, {content}. "
                f"Received: {folder.listing(data_dir).content}."
            )
    sizes = {"train_images": train_images, "eval_images": eval_images, "image_size": image_size}
    return datasets.load(dataset, data_dir, **sizes, **of_files)


def check(run):
    """Raises an error if a run could not begin."""
    find_builder(run.model)
    images = len(data_of(run).train[1])
    if run.batch_size > images:
        raise ValueError(
            f"`batch_size` must be at most {images}, the number of training images. "
            f"Received: batch_size={run.batch_size}."
        )
    if run.batch_size % run.devices:
        raise ValueError(
            "`batch_size`, that of the whole training, must be a multiple of `devices`. "
            f"Received: batch_size={run.batch_size}, devices={run.devices}."
        )
    in_pipeline = run.augment_in == "pipeline"
    backend, augmenter = keras.backend.backend(), run.augmenter
    if in_pipeline and (run.dataset, backend, augmenter) != ("imagenet", "tensorflow", "kerascompress"):
        raise ValueError(
            "--augment_in=pipeline needs --dataset=imagenet, the TensorFlow backend and --augmenter=kerascompress. "
            f"Received: {run.dataset}, {backend}, {augmenter}. Leave it: RandAugment is then in the model."
        )


def steps_per_epoch(run):
    return len(data_of(run).train[1]) // run.batch_size  # whole batches only: another shape is compiled anew


def build_model(run, seed=None):
    """Returns the network of a run, new; its initial weights are made of the run's seed, or of another."""
    data = data_of(run)
    return find_builder(run.model)(
        data.num_classes,
        input_shape=data.input_shape,
        mean=data.mean,
        std=data.std,
        seed=run.seed if seed is None else seed,
        **(LARGE if data.input_shape[0] > 64 else {}),
    )


def find_builder(name):
    """Returns the builder of the network that a name stands for."""
    match = re.fullmatch(r"(?:resnet(\d+)(?:w(\d+))?|(mobilenet_v2|shufflenet_v2)(?:w(\d*\.?\d+))?)", name)
    if not match:
        raise ValueError(
            "`model` must be resnet<depth>, mobilenet_v2 or shufflenet_v2, with w<width> at the end for another width, "
            f"such as resnet8w8 or mobilenet_v2w0.25. Received: {name!r}."
        )
    depth, filters, mobile, multiplier = match.groups()
    if mobile:
        return functools.partial(getattr(kc.models, mobile), width=float(multiplier or 1))
    return functools.partial(kc.models.resnet, int(depth), width=int(filters or 16))


def layer_seeds(run, count, stage=0):
    """Returns independent seeds for the random layers of a stage of a run, the same ones for every arm."""
    seeds = np.random.SeedSequence((run.seed, round(100 * run.sparsity), stage)).generate_state(count)
    return (seeds % 2**31 if keras.backend.backend() == "torch" else seeds).tolist()  # Keras takes no more there


def base_augmentation(data, crop_seed, flip_seed):
    """The paper's random crop, by an eighth of the side (4 pixels of 32), and its horizontal flip; not of files."""
    if data.in_files:
        return []
    crop = kc.RandomCrop(padding=data.input_shape[0] // 8, fill_value=data.fill_value, seed=crop_seed)
    return [crop, devices.RandomFlip("horizontal", seed=flip_seed)] if data.flip else [crop]


def rand_augment(run, seed):
    """RandAugment with two operations at the magnitude of a run, which is live."""
    if run.augmenter == "kerascompress":
        return kc.RandAugment(magnitude=run.magnitude, num_ops=2, seed=seed)
    from kerascompress import keras_cv

    return keras_cv.RandAugment((0, 255), augmentations_per_image=2, magnitude=run.magnitude, seed=seed)


def adapts(run, signal="gap", target=None, start=None):
    """Returns the `moves` of a magnitude that finds itself by the set-point of a run, or another, from `start` on."""
    frequency = run.evaluate_every if signal == "gap" else 1

    def moves(augment):
        if start is not None:
            augment.magnitude.assign(start)
        setting = {"speed": run.step * frequency, "frequency": frequency}
        return kc.AdaptiveMagnitude(augment, signal, run.target if target is None else target, **setting)

    return moves


def ramp(run, start=0.0):
    """Returns the schedule that prunes from the sparsity `start` to the run's over the first half of its steps.

    None where there is nothing to prune.
    """
    if not run.sparsity:
        return None
    steps = max(1, run.epochs // 2 * steps_per_epoch(run))
    return kc.PolynomialDecay(start, run.sparsity, 0, steps, frequency=max(1, min(100, steps // 10)))


def learning_rate(epoch, epochs, initial):
    """A cosine over the stage down to 5e-6, and a tenth of it from 45 % and again from 90 % of the epochs.

    The paper authors' script: steps at epochs 90 and 180 of 200.
    """
    cosine = 5e-6 + (initial - 5e-6) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return cosine * 0.1 ** ((epoch >= 0.45 * epochs) + (epoch >= 0.9 * epochs))


class _PaperDecay(keras.optimizers.schedules.LearningRateSchedule):
    """`learning_rate`, as a table that the compiled step looks the epoch up in."""

    def __init__(self, initial, epochs, steps):
        self.table = np.array([learning_rate(epoch, epochs, initial) for epoch in range(epochs)], "float32")
        self.steps = steps

    def __call__(self, step):
        epoch = keras.ops.minimum(keras.ops.cast(step, "int32") // self.steps, len(self.table) - 1)
        return keras.ops.take(keras.ops.convert_to_tensor(self.table), epoch)


def make_optimizer(run, steps):
    """SGD along the run's schedule: the paper's, or one cosine to 0, which falls at every step."""
    if run.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(run.learning_rate, run.epochs * steps)
    else:
        rate = _PaperDecay(run.learning_rate, run.epochs, steps)
    return keras.optimizers.SGD(rate, momentum=0.9)


# One stage of training


def trained(run, net, *, schedule=None, moves=None, around=None, stage=0):
    """Trains `net`, in place, as a run says; goes on where a killed process left it, or gives it the weights it has.

    An epoch depends on the run and on the state alone. The state is all variables: weights, masks, optimizer, random
    seeds, magnitude. If another process is at this run, this one waits for it.

    Args:
        run: The stage: its key decides the folder. Weights that are zero stay zero.
        net: The network, with the weights from which it begins.
        schedule: A pruning schedule, `ramp`, followed globally. The best epoch is then one of the second half.
        moves: `moves(augment)` returns the callback that moves the magnitude of the run's RandAugment.
        around: `around(run, net, stage)` returns the model that is fitted and its RandAugment or None. Default: the
            network behind the run's augmentation.
        stage: Counts the stages of a run from 0; each has its own order of the images and its own draws.

    Returns:
        The result: accuracies, seconds, how many images there are, and where they come from.
    """
    done = run.folder / keeper.DONE
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder / "lock"):
        if done.exists():
            result, weights = keeper.load_arrays(done, "weights")
            keeper.check_backend(run, done, result.get("versions", {}))
            net.set_weights(weights)
            return result
        fitted, small, callbacks = _prepare(run, net, schedule, moves, around or classifier, stage)
        try:
            result = provenance() | _fit(run, fitted, callbacks, run.epochs // 2 if schedule else 0, stage)
        except BaseException:
            _COMPILED.clear()  # on JAX, an epoch that breaks off leaves variables without values
            raise
        net.set_weights(small().get_weights())
        keeper.save_arrays(done, result, weights=net.get_weights())
        (run.folder / keeper.STATE).unlink(missing_ok=True)
        return result


def classifier(run, net, stage):
    """Returns the network behind the run's augmentation, and its RandAugment."""
    data = data_of(run)
    *base_seeds, seed = layer_seeds(run, 3, stage)
    augment = None if run.magnitude is None or run.augment_in == "pipeline" else rand_augment(run, seed)
    layers = [*base_augmentation(data, *base_seeds), *([augment] if augment else []), net]
    return keras.Sequential([keras.Input(data.input_shape, dtype="uint8"), *layers]), augment


def _prepare(run, net, schedule, moves, around, stage):
    """Returns the compiled model, a function that returns the plain network in it, and its callbacks."""
    callbacks, steps = [], steps_per_epoch(run)
    optimizer, carried = make_optimizer(run, steps), None
    if schedule or kc.sparsity(net):
        if run.carrier == "optimizer":
            optimizer = kc.PruningOptimizer(optimizer, schedule, scope="global")
        else:
            keep = kc.ConstantSparsity(kc.sparsity(net), begin_step=0, end_step=0, frequency=1)
            carried = kc.prune_low_magnitude(net, pruning_schedule=schedule or keep, scope="global")
            callbacks = [kc.UpdatePruningStep()]
    is_wrapped = carried is not None
    if not is_wrapped:
        carried = keras.models.clone_model(net)
        carried.set_weights(net.get_weights())
    fitted, augment = around(run, carried, stage)
    # What acts between two calls must be there at every step at which masks are due.
    together = math.gcd(schedule.frequency, steps) if schedule and (callbacks or moves) else steps
    if keras.backend.backend() == "torch" or devices.is_mirrored(run.devices):
        together = 1  # Keras takes steps one by one; TensorFlow has no loops in the loop of several replicas
    if devices.is_mirrored(run.devices):
        devices.synchronize(fitted)
    compile_classifier(fitted, optimizer, run.devices, steps_per_execution=together)
    fitted.optimizer.build(fitted.trainable_variables)
    alike = _alike(run, net, schedule, around, together)
    fitted, carried, augment = _compiled_before(alike, fitted, carried, augment)
    callbacks += [moves(augment)] if moves else []
    return fitted, lambda: kc.strip_pruning(carried) if is_wrapped else carried, callbacks


def _alike(run, net, schedule, around, together):
    """Returns what decides a compiled step: all but the values of variables."""
    values = {"figure", "arm", "sparsity", "magnitude", "seed", "strong", "teacher", "path", "evaluate_every"}
    values |= {"target", "step", "content", "crop_area"}
    return (
        *(value for name, value in run.key.items() if name not in values),
        *((variable.path, tuple(variable.shape)) for variable in net.variables),
        run.magnitude is None,
        run.devices,
        repr(schedule.get_config()) if schedule else kc.sparsity(net),
        together,
        around is not classifier and (run.figure, run.arm, run.teacher),
    )


_COMPILED = {}  # of this process, at most so many
MOST_COMPILED = 16


def _compiled_before(alike, fitted, *parts):
    """Returns the model and its parts; of an earlier run, with the state of this one's, where they are alike.

    Tracing and compiling take as long as 10 to 30 epochs of a small study.
    """
    if alike not in _COMPILED:
        if len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.clear()
            keras.utils.clear_session()
        _COMPILED[alike] = fitted, *parts
    earlier, *_ = _COMPILED[alike]
    if earlier is not fitted:
        keeper.assign(keeper.state_of(earlier), keeper.numpy(keeper.state_of(fitted)))
    return _COMPILED[alike]


def _fit(run, fitted, callbacks, best_from, stage):
    data = data_of(run)
    kept = keeper.Keeper(run, fitted, best_from)
    kept.load()
    looks = [epoch for epoch in range(1, run.epochs + 1) if epoch % run.evaluate_every == 0 or epoch == run.epochs]
    if kept.epochs < run.epochs:
        with_places = getattr(fitted, "takes_places", False)
        if with_places and (data.in_files or devices.is_mirrored(run.devices)):
            raise ValueError(f"{run} needs its images in memory, and on TensorFlow one device.")
        images = _epochs_of_files(run, stage, kept.epochs) if data.in_files else _Epochs(run, stage, with_places)
        fitted.fit(
            images,
            shuffle=False,
            steps_per_epoch=steps_per_epoch(run) if data.in_files else None,
            initial_epoch=kept.epochs,
            epochs=run.epochs,
            validation_data=_in_order(data.validation, run.devices),
            validation_batch_size=None if data.in_files else EVALUATE // run.devices * run.devices,
            validation_freq=looks,
            callbacks=[*callbacks, *([] if data.in_files else [images.follower()]), kept],
            verbose=0,
        )
    return kept.result(data, lambda split: accuracy(fitted, split, run.devices))


def _epoch_seed(run, stage, epoch):
    """Returns what decides the order of the images in an epoch."""
    return run.seed, round(100 * run.sparsity), epoch, stage


def _epochs_of_files(run, stage, first):
    """Returns the remaining epochs as one dataset, each decided by its number alone."""
    images, labels = data_of(run).train
    augment = rand_augment(run, 0) if run.augment_in == "pipeline" and run.magnitude is not None else None
    seeds = [_epoch_seed(run, stage, epoch) for epoch in range(first, run.epochs)]
    return images.epochs(labels, run.batch_size, seeds, augment, run.crop_area)


def _in_order(split, count):
    """Returns the images and labels of a split as `fit` and `evaluate` take them, on `count` devices.

    Of a batch each device takes an equal part, so where images are short, the first one fills up, with a weight of 0.
    """
    images, *others = split
    if short := -len(images) % count:
        index = np.append(np.arange(len(images)), np.zeros(short, int))
        weights = np.append(np.ones(len(images), "float32"), np.zeros(short, "float32"))
        images, others = images[index], [others[0][index], weights]
    if isinstance(images, folder.Files):
        return images.in_order(others, EVALUATE // 5 // count * count)
    return images, *others


def compile_classifier(model, optimizer, count=1, **settings):
    """Compiles a model for `count` devices."""
    settings["metrics" if count == 1 else "weighted_metrics"] = ["accuracy"]  # some images weigh nothing: `_in_order`
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile="auto" if keras.backend.backend() != "tensorflow" or on_gpu() else False,  # XLA is slower there
        **settings,
    )


class _Epochs(keras.utils.PyDataset):
    """The training images, in an order that the run and the epoch decide; with their places among all, if wanted."""

    def __init__(self, run, stage, with_places=False):
        super().__init__()
        self.run, self.stage, self.with_places = run, stage, with_places
        self.images, self.labels = data_of(run).train
        self.begin(0)

    def follower(self):
        """Returns the callback that begins each epoch; Keras' own hooks are called more often than there are epochs.

        It is not kept here: Keras holds on to a data set after `fit`, and the callback to the model.
        """
        return keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: self.begin(epoch))

    def begin(self, epoch):
        seed = _epoch_seed(self.run, self.stage, epoch)
        self.order = np.random.default_rng(seed).permutation(len(self.labels))

    def __len__(self):
        return len(self.labels) // self.run.batch_size

    def __getitem__(self, step):
        index = self.order[step * self.run.batch_size :][: self.run.batch_size]
        images = self.images[index]
        return {"images": images, "places": index} if self.with_places else images, self.labels[index]


def accuracy(model, split, count=1):
    given = _in_order(split, count)
    settings = {"verbose": 0, "return_dict": True}
    if isinstance(given, tuple):
        images, labels, *weights = given
        settings |= {"sample_weight": weights[0] if weights else None, "batch_size": EVALUATE // count * count}
        return round(model.evaluate(images, labels, **settings)["accuracy"], 6)
    return round(model.evaluate(given, **settings)["accuracy"], 6)


def sizes(model):
    """Returns the trainable parameters of a model, how many are not zero, and its sparsity over prunable kernels."""
    weights = keeper.numpy(model.trainable_variables)
    return {
        "parameters": sum(w.size for w in weights),
        "nonzeros": int(sum(np.count_nonzero(w) for w in weights)),
        "live_sparsity": round(kc.sparsity(model), 6),
    }


# Schemes of several stages


class Course:
    """The stages of one run of a scheme, one after the other (Figures 4 and 6).

    A stage is decided by all that led to it, and its key is named for that: the `path` so far, such as ["M=14x200",
    "prune=0.4", "M=8x200"]. A run that comes to a stage of another run takes the weights it has left.
    """

    def __init__(self, run, epochs):
        self.run, self.epochs = run, epochs  # of each stage
        self.path, self.results = [], []

    def then(self, name, change):
        """Returns `change`, a function from a network to another, so that it also writes its name into the path."""

        def named(net):
            self.path.append(name)
            return change(net)

        return named

    def stage(self, magnitude, sparsity=0.0):
        """Returns the next stage, as a run of its own."""
        epochs = self.epochs[len(self.results)]
        step = f"M={'none' if magnitude is None else format(magnitude, 'g')}x{epochs}"
        arm = "+".join([*self.path, step])
        changes = {"arm": arm, "sparsity": sparsity, "magnitude": magnitude, "epochs": epochs}
        return dataclasses.replace(self.run, **changes, strong=None, after=None, work=epochs)

    def fit(self, net, magnitude):
        """Trains `net` for the next stage, from the full learning rate on; or gives it the weights this stage left."""
        run = self.stage(magnitude, round(kc.sparsity(net), 2))
        self.results.append(trained(run, net, stage=len(self.results)))
        self.path.append(run.arm.rpartition("+")[2])

    def outcome(self, small):
        """Returns what the row says of the network that the last stage has left."""
        return (
            self.results[-1]
            | {"seconds": round(sum(result["seconds"] for result in self.results), 1)}
            | sizes(small)
            | {"total_epochs": sum(self.epochs), "stages": self.path}
        )
