"""Lists of unequal length by dense id, in two arrays, and their first values as tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf


class Lists(NamedTuple):
    """Codes from 1 in lists, one list after the other (compressed sparse rows).

    All int64: TensorFlow keeps tensors of int32 in the memory of the host, even beside a GPU.
    """

    values: np.ndarray | tf.Tensor  # int64 [n + 1], the last is a 0 that belongs to no list
    offsets: np.ndarray | tf.Tensor  # int64 [V + 1]

    @classmethod
    def of(cls, values: np.ndarray, sizes: np.ndarray) -> Lists:
        """From all values, [n], and the length of every list, [V]."""
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return cls(np.append(values, 0).astype(np.int64), offsets)

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> Lists:
        """From a column of lists of codes without missing lists."""
        values = pc.list_flatten(column).to_numpy()
        return cls.of(values, pc.list_value_length(column).to_numpy())

    def followed_by(self, other: Lists) -> Lists:
        """These lists, then the other ones."""
        values = np.concatenate([self.values[:-1], other.values])
        return Lists(values, np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]))

    @property
    def longest(self) -> int:
        """The length of the longest list."""
        return int(np.diff(self.offsets).max(initial=0))


def first_values(lists: Lists, ids: tf.Tensor, width: int) -> tf.Tensor:
    """The first values of some lists: ids [...] → int64 [..., width], 0 where a list ends."""
    return values_between(
        lists, tf.gather(lists.offsets, ids), tf.gather(lists.offsets, ids + 1), width
    )


def values_between(lists: Lists, starts: tf.Tensor, ends: tf.Tensor, width: int) -> tf.Tensor:
    """The first values from places on: int64 [..., width], 0 at an end and after it.

    Args:
      lists: to read from.
      starts, ends: int64 [...], places in `lists.values`; what lies before 0 is an end too.
      width: values of each row.
    """
    places = starts[..., None] + tf.range(width, dtype=tf.int64)
    inside = (places >= 0) & (places < ends[..., None])
    return tf.where(inside, tf.gather(lists.values, tf.where(inside, places, 0)), 0)
