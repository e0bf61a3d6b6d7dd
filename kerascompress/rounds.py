"""How a batch is carried out: every image by the rows that it drew, in as many rounds as it drew rows.

A row says what to do with an image, by one of three functions: `table`, `warp` or `pixels` (see `augment.Op`). A round
is one of four functions too, with one result: `_single_round` for one image, `_fused_round` for accelerators and for
sizes that a trace does not know, `_grouped_round` for processors, `_eager_round` where nothing is compiled.
"""

import contextlib
import contextvars
import functools
import itertools
import math

import keras
import numpy as np
from keras import ops as kops

from kerascompress import image_ops

KINDS = ("identity", "table", "warp", "pixels")  # of rows, by what they do


def apply(rows, images, op, argument, *, good=True, value_range=(0, 255), fill_value=0, interpolation="nearest"):
    """Applies to every image the rows that it drew, one after the other.

    Args:
        rows: The table, a sequence of `augment.Op`.
        images: `(batch, height, width, channels)`, float, or uint8 if `value_range` is (0, 255).
        op: int32 `(num_ops, batch)`, indices into `rows`.
        argument: float32 `(num_ops, batch)`, in the units of the rows.
        good: What `on_scale` says; float images become NaN where it is False.
        value_range: See `RandAugment`, as for the other arguments.
        fill_value: See there.
        interpolation: See there.

    Returns:
        The images, in the same shape, dtype and range.
    """
    dtype = keras.backend.standardize_dtype(images.dtype)
    if "float" not in dtype and dtype != "uint8":
        raise ValueError(f"RandAugment needs float images, or uint8 from 0 to 255. Received: {dtype} images.")
    outside = {"fill_value": fill_value, "interpolation": interpolation}
    if keras.backend.backend() == "torch":
        return _run_eagerly(rows, images, op, argument, value_range, **outside)
    run = _engine(
        keras.backend.backend(),
        _on_cpu(),
        tuple(rows),
        (images.shape[0] if keras.backend.backend() == "jax" or images.shape[0] == 1 else None, *images.shape[1:]),
        dtype,
        op.shape[0],
        tuple(value_range),
        **outside,
    )
    given = images, op, argument, kops.convert_to_tensor(good)
    if keras.backend.backend() == "tensorflow" and images.shape[0] is None:
        return kops.cond(kops.shape(images)[0] > 0, lambda: run(*given), lambda: images)  # such as a replica's share
    return run(*given)


@functools.lru_cache
def _engine(backend, on_cpu, rows, shape, dtype, num_ops, value_range, **outside):
    """`apply`, compiled by XLA wherever it is called from: its kernels are several times faster than TensorFlow's."""
    compiled = backend == "jax" or (backend == "tensorflow" and None not in shape[1:])
    grouped = compiled and on_cpu and shape[0] != 1
    one_round = _single_round if shape[0] == 1 else _grouped_round if grouped else _fused_round
    black, white = value_range
    step = (white - black) / 255.0

    def run(images, op, argument, good):
        if dtype != "uint8":
            images = image_ops.to_bytes(kops.round((kops.cast(images, "float32") - black) / step))
        if grouped:
            images = kops.pad(images, ((0, 1), (0, 0), (0, 0), (0, 0)))
        # a loop, so that a round ends in memory: compilers would repeat the first for every pixel that the second reads
        images = kops.fori_loop(
            0, num_ops, lambda k, images: one_round(rows, images, op[k], argument[k], **outside), images
        )
        if grouped:
            images = images[:-1]
        if dtype == "uint8":
            return images
        return kops.cast(kops.cast(images, "float32") * kops.where(good, step, float("nan")) + black, dtype)

    if backend == "jax":
        import jax

        return jax.jit(run)
    if compiled:
        import tensorflow as tf

        batch = shape[0] if shape[0] == 1 else None  # one trace for batches of all sizes
        per_image = [tf.TensorSpec((num_ops, batch), kind) for kind in (tf.int32, tf.float32)]
        signature = [tf.TensorSpec((batch, *shape[1:]), dtype), *per_image, tf.TensorSpec((), tf.bool)]
        return tf.function(run, jit_compile=True, autograph=False, input_signature=signature)
    return run


def _single_round(rows, images, op, argument, **outside):
    """For one image: the operation that it drew, and no other."""

    def branch(row):
        def apply_row(images, argument):
            if row.table:
                return image_ops.lookup(images, _tables(row, images, argument))
            if row.warp:
                return _warp(images, row.warp(argument, *kops.shape(images)[1:3]), **outside)
            return _pixels(row, images, argument) if row.pixels else images

        return apply_row

    made = kops.switch(op[0], [branch(row) for row in rows], images, argument)
    return kops.reshape(
        made, kops.shape(images)
    )  # of a size that a trace does not know, branches forget that it is one


def _fused_round(rows, images, op, argument, **outside):
    """For accelerators: a few passes over the whole batch, with tables, maps and pixels selected per image."""
    batch, height, width, channels = kops.shape(images)
    result = images
    if any(row.table for row in rows):
        tables = kops.broadcast_to(kops.convert_to_tensor(np.arange(256, dtype="uint8")), (batch, channels, 256))
        for i, row in enumerate(rows):
            if row.table:
                tables = kops.where((op == i)[:, None, None], image_ops.to_bytes(row.table(images, argument)), tables)
        result = image_ops.lookup(result, tables)
    if any(row.warp for row in rows):
        matrices = _matrices(rows, op, argument, height, width)
        result = _warp(result, matrices, **outside)
    for i, row in enumerate(rows):
        if row.pixels:
            result = kops.where((op == i)[:, None, None, None], _pixels(row, images, argument), result)
    return result


# Values in a chunk of a batch: what is made of them on the way stays in the cache of a processor, and does not ask the
# system for memory, which is slow to touch for the first time.
_CHUNK_VALUES = 2**20


def _run_eagerly(rows, images, op, argument, value_range, **outside):
    """`apply` on Torch, where everything is known and is carried out as it is written."""
    black, white = value_range
    step = (white - black) / 255.0
    dtype = keras.backend.standardize_dtype(images.dtype)

    def to_levels(values):
        values = kops.cast(values, "float32")
        return image_ops.to_bytes(kops.round(values if (black, step) == (0, 1) else (values - black) / step))

    def from_levels(levels):
        values = kops.cast(levels, "float32")
        return kops.cast(values if (black, step) == (0, 1) else values * step + black, dtype)

    place = np.arange(images.shape[0])  # of every image in `levels`
    levels = images if dtype == "uint8" else kops.concatenate(_in_chunks(to_levels, images, place))
    for drawn, each in zip(kops.convert_to_numpy(op), argument, strict=True):
        order, made = _eager_round(rows, levels, place, drawn, each, **outside)
        place, levels = np.argsort(order), kops.concatenate(made)
    return kops.concatenate(_in_chunks(from_levels if dtype != "uint8" else lambda levels: levels, levels, place))


def _in_chunks(function, images, place, *others):
    """`function(images[place], *others)`, chunk by chunk."""
    size = max(_CHUNK_VALUES // math.prod(images.shape[1:]), 1)
    chunks = [slice(first, first + size) for first in range(0, len(place), size)]
    return [
        function(image_ops.gather(images, kops.convert_to_tensor(place[at])), *(each[at] for each in others))
        for at in chunks
    ]


def _eager_round(rows, images, place, op, argument, **outside):
    """Where nothing is compiled: a row is given the images that drew it, so that they pay for no other.

    Returns the order in which the images come out, and chunks of them.
    """
    height, width, _ = images.shape[1:]
    order, made = [], []
    for kind in KINDS:
        drawn = [
            (row, which, image_ops.gather(argument, kops.convert_to_tensor(which)))
            for row, which in ((row, np.flatnonzero(op == i)) for i, row in enumerate(rows) if row.kind == kind)
            if which.size
        ]
        if not drawn:
            continue
        order.append(np.concatenate([which for _, which, _ in drawn]))
        if kind == "identity":
            made += _in_chunks(lambda images: images, images, place[order[-1]])
        elif kind == "table":
            tables = [
                each
                for row, which, given in drawn
                for each in _in_chunks(functools.partial(_tables, row), images, place[which], given)
            ]
            made += _in_chunks(image_ops.lookup, images, place[order[-1]], kops.concatenate(tables))
        elif kind == "warp":
            matrices = kops.concatenate([row.warp(given, height, width) for row, _, given in drawn])
            made += _in_chunks(functools.partial(_warp, **outside), images, place[order[-1]], matrices)
        else:
            for row, which, given in drawn:
                made += _in_chunks(functools.partial(_pixels, row), images, place[which], given)
    return np.concatenate(order), made


_LOOK_AT = 16  # so many images of a batch tell its scale: all of them would cost a fifth of a round
# Images in a chunk. With more, the last chunk of an operation wastes work; with fewer, the loop outweighs its body.
_CHUNK = 4


def _grouped_round(rows, images, op, argument, **outside):
    """For processors: in chunks of what was drawn, so that an image pays for its own operation only.

    Shapes stay static, as compilers want them: where an operation has no more images, its last chunk takes a spare one,
    the last of `images`.
    """
    spare, height, width, channels = kops.shape(images)
    spare = spare - 1
    in_order = sorted(range(len(rows)), key=lambda i: KINDS.index(rows[i].kind))
    rows = [rows[i] for i in in_order]
    place = kops.take(np.argsort(in_order).astype("int32"), op)
    starts = kops.sum(kops.cast(place[None, :] < np.arange(len(rows) + 1, dtype="int32")[:, None], "int32"), axis=1)
    order = kops.pad(kops.cast(kops.argsort(place), "int32"), (0, _CHUNK))
    argument = kops.take(argument, order)
    matrices = _matrices(rows, kops.take(place, order), argument, height, width)
    drawn = (starts, order, spare)

    def look_up(images, argument, tables, matrices):
        return image_ops.lookup(images, tables)

    def warp(images, argument, tables, matrices):
        return _warp(images, matrices, **outside)

    bounds = np.searchsorted([KINDS.index(row.kind) for row in rows], range(len(KINDS) + 1)).tolist()
    tables = kops.zeros((spare + _CHUNK, channels, 256), "uint8")
    of_table, of_pixels = range(bounds[1], bounds[2]), range(bounds[3], bounds[4])
    if of_table:
        makers = [functools.partial(_tables, rows[i]) for i in of_table]
        tables = _walk(drawn, [(i, i + 1) for i in of_table], makers, images, [argument], _put_tables, tables)
    stretches = [*itertools.pairwise(bounds[1:4]), *((i, i + 1) for i in of_pixels)]
    branches = [look_up, warp, *(_pixels_branch(rows[i]) for i in of_pixels)]
    return _walk(drawn, stretches, branches, None, [argument, tables, matrices], _put_images, images)


def _walk(drawn, stretches, branches, images, inputs, update, state):
    """Updates the state with what its branch makes of the images of every stretch of rows, (first, last)."""
    starts, order, spare = drawn
    first, last = (kops.take(starts, np.array(bound, "int32")) for bound in zip(*stretches, strict=True))
    chunks = (last - first + (_CHUNK - 1)) // _CHUNK
    done = kops.cumsum(chunks)

    def body(step, state):
        stretch = kops.sum(kops.cast(step >= done, "int32"))
        start = kops.take(first, stretch) + (step - kops.take(done - chunks, stretch)) * _CHUNK
        # gathers, as TensorFlow would compile a slice anew for every start; before the branch, as compilers would read
        # for every pixel anew what is not in memory when it begins
        places = start + kops.arange(_CHUNK, dtype="int32")
        index = kops.where(places < kops.take(last, stretch), image_ops.gather(order, places), spare)
        chunk = image_ops.gather(state if images is None else images, index)
        made = kops.switch(stretch, branches, chunk, *(image_ops.gather(each, places) for each in inputs))
        return step + 1, update(state, made, start, index)

    return kops.while_loop(lambda step, state: step < done[-1], body, (0, state))[1]


def _pixels_branch(row):
    return lambda images, argument, tables, matrices: _pixels(row, images, argument)


ZERO = np.int32(0)  # JAX wants all indices of one type, and has others under `jax_enable_x64`


def _put_tables(tables, made, start, index):
    return kops.slice_update(tables, (kops.cast(start, "int32"), ZERO, ZERO), made)


def _put_images(images, made, start, index):
    for k in range(_CHUNK):
        images = kops.slice_update(images, (kops.cast(index[k], "int32"), ZERO, ZERO, ZERO), made[k : k + 1])
    return images


def _tables(row, images, argument):
    tables = image_ops.to_bytes(row.table(images, argument))
    return kops.broadcast_to(tables, (kops.shape(images)[0], images.shape[-1], 256))


def _warp(images, matrices, **outside):
    return image_ops.to_bytes(image_ops.warp(images, matrices, **outside))


def _pixels(row, images, argument):
    return image_ops.to_bytes(row.pixels(kops.cast(images, "float32"), argument))


def _matrices(rows, op, argument, height, width):
    matrix = kops.broadcast_to(kops.convert_to_tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (kops.shape(op)[0], 6))
    for i, row in enumerate(rows):
        if row.warp:
            matrix = kops.where((op == i)[:, None], row.warp(argument, height, width), matrix)
    return matrix


def check_value_range(value_range: tuple[float, float]) -> None:
    if len(value_range) != 2 or not value_range[0] < value_range[1]:
        raise ValueError(
            "`value_range` must be `(black, white)` with black < white, such as (0, 255), (0, 1) or (-1, 1). "
            f"Received: value_range={value_range}."
        )


def on_scale(images, value_range, name):
    """Whether images are on the scale of `value_range`, as far as their extremes tell: an error if not, or a scalar.

    On a wrong scale, they would turn into black or white without a word. No batch of `value_range` is at most one of
    the 256 levels brighter than black, nor partly darker than black and nowhere brighter than 16 levels (standardised
    images under (0, 255)), nor half the range beyond black or white. No step that XLA has compiled can raise: to it,
    `Assert` is no operation, and a callback of JAX would keep it out of the compilation cache. There, who calls turns
    images into NaN by the scalar, and the loss is NaN at once.

    Args:
        images: `(batch, height, width, channels)`. Whole numbers are taken for 0..255, however dark.
        value_range: The values of black and white.
        name: Of the layer, for the error.

    Returns:
        True, or a boolean scalar where the values are not known yet.
    """
    black, white = value_range
    dtype = keras.backend.standardize_dtype(images.dtype)
    if "float" not in dtype:
        if tuple(value_range) == (0, 255):
            return True
        raise ValueError(
            f"{name} needs float images, or whole numbers with value_range=(0, 255). Received: {dtype} images with "
            f"value_range={value_range}."
        )
    some = kops.cast(images[:_LOOK_AT], "float32")
    extremes = [kops.min(some), kops.max(some)]
    low, high = ((value - black) * (255 / (white - black)) for value in extremes)
    dark = ((high > 0) & (high < 1.5)) | ((low < -0.5) & (high < 16))
    good = (low >= -127.5) & (high <= 255 + 127.5) & kops.logical_not(dark)
    good = good & kops.all(kops.isfinite(some))  # as when a layer before has said no; extremes may leave NaN out
    received = f"{name} needs images with values in value_range={value_range}. Received: values from"
    advice = (
        "Give it the range of your images, such as value_range=(0, 1) or (-1, 1), or put it in front of what "
        "normalises them. Images of 0 to 255 that are almost black pass as uint8."
    )
    try:
        seen = [float(kops.stop_gradient(value)) for value in extremes]
    except TypeError:  # while a step is being traced
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.debugging.Assert(good, [received, extremes[0], "to", extremes[1], advice])
        return good
    if not good:
        raise ValueError(f"{received} {seen[0]:g} to {seen[1]:g}. {advice}")
    return True


def _on_cpu() -> bool:
    """Whether what is being traced, on TensorFlow or JAX, will run on a processor."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return inside_tf_data() or not tf.config.list_logical_devices("GPU")
    return not any(device.startswith(("gpu", "cuda", "tpu")) for device in keras.distribution.list_devices())


_VIEWS = contextvars.ContextVar("views", default=1)  # replicas are threads of their own


@contextlib.contextmanager
def views(count):
    """Within it, a batch is so many views of its images: the first of each, then the second of each, and so on."""
    token = _VIEWS.set(count)
    try:
        yield
    finally:
        _VIEWS.reset(token)


def draw(make, shape):
    """Returns `make(shape)`: random numbers, the last axis of which are the images of a batch.

    The replicas of a `tf.distribute` strategy have one seed. So each draws for the images of all of them and takes its
    own part: draws differ between replicas, and are those of one device.
    """
    replica, replicas = _replica()
    if replicas == 1:
        return make(shape)
    *others, batch = shape
    of_all = kops.reshape(make((*others, batch * replicas)), (*others, _VIEWS.get(), replicas, -1))
    return kops.reshape(kops.take(of_all, replica, axis=-2), (*others, -1))


def _replica():
    """The number of the replica that is being traced, and how many there are."""
    if keras.backend.backend() != "tensorflow":
        return 0, 1
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context():
        return 0, 1
    context = tf.distribute.get_replica_context()
    return context.replica_id_in_sync_group, context.num_replicas_in_sync


def inside_tf_data() -> bool:
    """Whether a `tf.data` transformation is being traced: `dataset.map(augment)` is there in order to augment."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    while graph is not None and not getattr(graph, "name", "").startswith("Dataset_"):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None
