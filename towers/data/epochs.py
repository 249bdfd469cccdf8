"""The order of training rows: a function of (seed, epoch), so that a step number is a place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_ALIGNED = 64  # bytes, of what TensorFlow takes for a tensor
_ROUNDS = 8  # with 4, rows that met in a batch of an epoch meet again more often than by chance


def step_rows(num_rows: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """The rows of a step, counted over all epochs from 0: int64, `batch_size` of them or fewer."""
    epoch, place = divmod(step, -(-num_rows // batch_size))
    return _rows(num_rows, batch_size, _key(seed, epoch), place).numpy()


def epoch_dataset(
    columns: Mapping[str, np.ndarray], batch_size: int, *, seed: int, first_step: int = 0
) -> tf.data.Dataset:
    """Batches of shuffled rows; one iteration is one epoch, the next iteration the next epoch.

    An epoch counts when its first batch is asked for: Keras makes an iterator that it never
    uses at the start of `fit`.

    Args:
      columns: arrays [n] of equal length, by name.
      batch_size: rows of a batch; the last one of an epoch may be shorter.
      seed: of the order.
      first_step: batches that were trained on before, in this and earlier epochs: the first
        iteration goes on after them.

    Returns:
      A dataset of dicts with the names of `columns`; its cardinality is known unless it starts
      in mid-epoch.
    """
    num_rows = len(next(iter(columns.values())))
    steps = -(-num_rows // batch_size)
    first_epoch, skipped = divmod(first_step, steps)
    epochs = itertools.count(first_epoch)
    with tf.device("CPU"):
        tensors = {name: _tensor(column) for name, column in columns.items()}

    def next_epoch() -> Iterator[tuple[np.ndarray, int]]:
        epoch = next(epochs)
        yield _key(seed, epoch), skipped if epoch == first_epoch else 0

    def batches(key: tf.Tensor, first: tf.Tensor) -> tf.data.Dataset:
        def batch(place: tf.Tensor) -> dict[str, tf.Tensor]:
            rows = _rows(num_rows, batch_size, key, place)
            return {name: tf.gather(column, rows) for name, column in tensors.items()}

        return tf.data.Dataset.range(first, steps).map(batch)

    signature = (tf.TensorSpec([3], tf.uint32), tf.TensorSpec([], tf.int64))
    numbers = tf.data.Dataset.from_generator(next_epoch, output_signature=signature)
    dataset = numbers.flat_map(batches)
    if skipped == 0:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    options = tf.data.Options()
    options.autotune.enabled = False  # an iterator ends with its thread: up to a minute
    return dataset.prefetch(2).with_options(options)


def _key(seed: int, epoch: int) -> np.ndarray:
    """What an epoch is shuffled by: uint32 [3]."""
    return np.random.SeedSequence([seed, epoch]).generate_state(3)


def _rows(num_rows: int, batch_size: int, key: Any, place: Any) -> tf.Tensor:
    """The rows of the batch at a place of an epoch: a part of a permutation that is never made."""
    first = tf.cast(place, tf.int64) * batch_size
    return tf.raw_ops.RandomIndexShuffle(
        index=tf.range(first, tf.minimum(first + batch_size, num_rows)),
        seed=key,
        max_index=tf.constant(num_rows - 1, tf.int64),
        rounds=_ROUNDS,
    )


def _tensor(column: np.ndarray) -> tf.Tensor:
    """The values of an array; those of a private mapping of a file are not copied."""
    private = isinstance(column, np.memmap) and column.mode == "c"
    if not private or not column.flags.c_contiguous or column.ctypes.data % _ALIGNED:
        return tf.constant(column)
    shared = column.view(np.ndarray)
    shared.flags.writeable = True  # DLPack hands on nothing else; a dataset only reads
    return tf.experimental.dlpack.from_dlpack(shared.__dlpack__())
