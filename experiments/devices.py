"""One training over several devices: every update is that of one device up to rounding, whatever their number.

On TensorFlow each device holds a part of every batch (`tf.distribute.MirroredStrategy`), on JAX XLA shares out the work
on the whole of it (`keras.distribution.DataParallel`). Without GPUs, the devices are virtual ones of the processor.
"""

import contextlib
import functools
import os

import keras
from keras import ops as kops

from kerascompress import graph, rounds


def claim(count):
    """Makes so many virtual devices of the processor, where there is no GPU; to be called before anything computes."""
    backend = keras.backend.backend()
    if count == 1 or backend == "torch":
        return
    with contextlib.suppress(RuntimeError):  # it has computed already; `spread` sees what there is
        if backend == "jax":
            import jax

            if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
                jax.config.update("jax_num_cpu_devices", count)
        else:
            import tensorflow as tf

            if not tf.config.list_physical_devices("GPU"):
                cpu = tf.config.list_physical_devices("CPU")[0]
                tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)


def spread(count):
    """Returns a context in which models are made and trained on so many devices."""
    if count == 1:
        return contextlib.nullcontext()
    backend = keras.backend.backend()
    if backend == "torch":
        raise ValueError(f"--devices needs the TensorFlow or the JAX backend: Keras has none of it on Torch. {count=}.")
    claim(count)
    devices = keras.distribution.list_devices()
    if len(devices) < count:
        raise ValueError(
            f"--devices={count} needs so many devices in each process. Received: {', '.join(devices)}. Give each "
            "worker more GPUs; virtual devices are made only before anything else has computed."
        )
    if backend == "jax":
        return keras.distribution.DataParallel(devices=devices[:count], auto_shard_dataset=False).scope()
    return _strategy(tuple(name.upper() for name in devices[:count])).scope()


@functools.cache  # of two strategies in a process, TensorFlow mixes up what their replicas send to one another
def _strategy(names):
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(names)


def is_mirrored(count):
    """Whether each device has variables of its own and a part of the batch."""
    return count > 1 and keras.backend.backend() == "tensorflow"


def synchronize(model):
    """Lets BatchNorm see the whole batch, as it does on one device."""
    for layer in graph.walk(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True


class RandomFlip(keras.layers.RandomFlip):
    """Keras' own, but that replicas of a strategy, which have one seed, mirror other images."""

    def get_random_transformation(self, data, training=True, seed=None):
        draw = super().get_random_transformation
        shape = kops.shape(data)
        if not training or len(shape) != 4:
            return draw(data, training, seed)

        def flips(of):
            return kops.reshape(draw(kops.zeros((*of, 1, 1, 1)), training, seed)["flips"], (-1,))

        return {"flips": rounds.draw(flips, shape[:1])[:, None, None, None], "input_shape": shape}
