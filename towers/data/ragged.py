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


def first_distinct(codes: tf.Tensor, width: int) -> tf.Tensor:
    """The first different codes of each row, [B, W] → [B, width]; 0 is no code, and at the end.

    >>> first_distinct(tf.constant([[7, 0, 9, 7, 8]]), 4).numpy().tolist()
    [[7, 9, 8, 0]]
    """
    return _distinct(codes).to_tensor(shape=[None, width])


def last_distinct(codes: tf.Tensor, width: int | None = None) -> tf.Tensor:
    """The last of them, or all, a repeated one where it is first; 0 at the start.

    >>> last_distinct(tf.constant([[7, 0, 9, 7, 8]]), 2).numpy().tolist()
    [[9, 8]]
    """
    return tf.reverse(_distinct(codes)[:, ::-1].to_tensor(shape=[None, width]), axis=[1])


def _distinct(codes: tf.Tensor) -> tf.RaggedTensor:
    order = tf.argsort(codes, axis=1, stable=True)
    ranked = tf.gather(codes, order, batch_dims=1)
    is_new = tf.concat([tf.ones_like(ranked[:, :1], tf.bool), ranked[:, 1:] != ranked[:, :-1]], 1)
    is_first = tf.gather(is_new, tf.argsort(order, axis=1), batch_dims=1)
    return tf.ragged.boolean_mask(codes, is_first & (codes > 0))


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
