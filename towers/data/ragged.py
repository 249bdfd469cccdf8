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


def first_values(lists: Lists, ids: tf.Tensor, width: int) -> tf.Tensor:
    """The first values of lists: ids [...] → int64 [..., width], 0 where a list ends."""
    starts, ends = (tf.gather(lists.offsets, place) for place in (ids, ids + 1))
    return values_between(lists, starts, ends, width)


def first_distinct(codes: tf.Tensor, width: int) -> tf.Tensor:
    """The first different codes of each row, [B, W] → [B, width]; 0 is no code, and at the end.

    >>> first_distinct(tf.constant([[7, 0, 9, 7, 8]]), 4).numpy().tolist()
    [[7, 9, 8, 0]]
    """
    size = tf.shape(codes)[1]
    places = tf.sort(_first_places(codes, size), axis=1)[:, :width]
    missing = tf.maximum(width - size, 0)
    places = tf.pad(places, [[0, 0], [0, missing]], constant_values=-1)
    return tf.ensure_shape(_at(codes, places), [None, width])


def last_distinct(codes: tf.Tensor, width: int | None = None) -> tf.Tensor:
    """The last of them, or all, a repeated one where it is first; 0 at the start.

    >>> last_distinct(tf.constant([[7, 0, 9, 7, 8]]), 2).numpy().tolist()
    [[9, 8]]
    """
    places = tf.sort(_first_places(codes, -1), axis=1)
    if width is not None:
        missing = tf.maximum(width - tf.shape(codes)[1], 0)
        places = tf.pad(places[:, -width:], [[0, 0], [missing, 0]], constant_values=-1)
        places = tf.ensure_shape(places, [None, width])
    return _at(codes, places)


def _first_places(codes: tf.Tensor, otherwise: tf.Tensor | int) -> tf.Tensor:
    """Where each different code of a row is first, in any order: int64 [B, W]."""
    size = tf.shape(codes, tf.int64)[1]
    ranked = tf.sort(tf.cast(codes, tf.int64) * size + tf.range(size), axis=1)  # equal: by place
    values, places = ranked // size, ranked % size
    is_new = tf.pad(values[:, 1:] != values[:, :-1], [[0, 0], [1, 0]], constant_values=True)
    is_first = is_new[:, :size] & (values > 0)
    return tf.where(is_first, places, tf.cast(otherwise, tf.int64))


def _at(codes: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """The codes of each row at places [B, n]; 0 at negative ones, and at W."""
    size = tf.shape(codes, tf.int64)[1]
    places = tf.where(places < 0, size, places)
    return tf.gather(tf.pad(codes, [[0, 0], [0, 1]]), places, batch_dims=1)


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
