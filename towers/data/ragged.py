"""Lists of unequal length by dense id, in two arrays, and their first values as tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
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

    def followed_by(self, other: Lists) -> Lists:
        """These lists, then the other ones."""
        values = np.concatenate([self.values[:-1], other.values])
        return Lists(values, np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]))


def first_values(lists: Lists, ids: tf.Tensor, width: int) -> tf.Tensor:
    """The first values of lists: ids [...] → int64 [..., width], 0 where a list ends."""
    starts, ends = (tf.gather(lists.offsets, place) for place in (ids, ids + 1))
    return values_between(lists, starts, ends, width)


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
