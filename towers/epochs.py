"""The order of training rows: a function of (seed, epoch), so that a step number is a place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in the order in which they are trained on: int64 [n]."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(num_rows)


def step_rows(num_rows: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """The rows of a step, counted over all epochs from 0: int64, `batch_size` of them or fewer."""
    epoch, place = divmod(step, -(-num_rows // batch_size))
    order = epoch_order(num_rows, seed=seed, epoch=epoch)
    return order[place * batch_size : (place + 1) * batch_size]


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

    def batches() -> Iterator[dict[str, np.ndarray]]:
        epoch = next(epochs)
        order = epoch_order(num_rows, seed=seed, epoch=epoch)
        for step in range(skipped if epoch == first_epoch else 0, steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            yield {name: column[rows] for name, column in columns.items()}

    signature = {
        name: tf.TensorSpec([None], tf.as_dtype(column.dtype)) for name, column in columns.items()
    }
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    if skipped == 0:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    return dataset.prefetch(2)
