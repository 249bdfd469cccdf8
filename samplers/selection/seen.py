"""What every query has seen: its train positives, which may be left out of its negatives."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf


class Seen:
    """The train positives of every query, to look candidates up in.

        seen = Seen(candidate_ids=[1, 4, 0], offsets=[0, 2, 2, 3])  # 1 and 4, none, 0
        seen.holds(tf.constant([0, 2]), tf.constant([[4, 0], [4, 0]]))  # [[True, False],
                                                                        #  [False, True]]

    Args:
      candidate_ids: int [n], those of query 0 in ascending order, then those of query 1, ...
      offsets: int [Q + 1], where those of each query begin and end.
    """

    def __init__(self, candidate_ids: np.ndarray, offsets: np.ndarray) -> None:
        offsets = np.asarray(offsets, np.int64)
        # Nothing is sought behind the end, but a gather needs an element. int64: tables of int32
        # would lie in the memory of the host.
        self._candidate_ids = tf.constant(np.append(candidate_ids, -1).astype(np.int64))
        self._offsets = tf.constant(offsets)
        self._most = int(np.diff(offsets).max(initial=0))

    def holds(self, query_ids: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
        """Whether queries [B] have seen candidates of their own [B, N], int64: bool [B, N]."""
        end = tf.gather(self._offsets, query_ids + 1)[:, None]
        place = tf.gather(self._offsets, query_ids)[:, None] + tf.zeros_like(ids)
        # A binary search in the part of each query. `tf.searchsorted` takes one order for all.
        for bit in reversed(range(self._most.bit_length())):
            probe = place + (2**bit - 1)
            below = (probe < end) & (self._at(probe) < ids)
            place = tf.where(below, place + 2**bit, place)
        return (place < end) & (self._at(place) == ids)

    def hits(self, query_ids: tf.Tensor, column_ids: tf.Tensor) -> tf.Tensor:
        """Which columns, shared by the queries of a batch, hold what a query has seen.

        From queries [B] and the candidate of each column [C]: int64 [H, 2], (row, column), filled
        up with `padded`.
        """
        pairs = self.pairs(query_ids)
        order = tf.argsort(column_ids)
        in_order = tf.gather(column_ids, order)
        first = tf.searchsorted(in_order, pairs[:, 1], out_type=tf.int64)
        at_first = tf.gather(in_order, tf.minimum(first, tf.size(in_order, tf.int64) - 1))
        found = tf.where(at_first == pairs[:, 1])[:, 0]
        first, held = tf.gather(first, found), tf.gather(pairs, found)
        end = tf.searchsorted(in_order, held[:, 1], side="right", out_type=tf.int64)
        number, place = _unfolded(end - first)  # a candidate may be in several columns
        column = tf.gather(order, tf.gather(first, number) + place)
        row = tf.gather(held[:, 0], number)
        return padded(tf.stack([row, tf.cast(column, tf.int64)], axis=1))

    def pairs(self, query_ids: tf.Tensor) -> tf.Tensor:
        """What the queries [B] of a batch have seen: int64 [T, 2], (row, candidate), by row."""
        begin = tf.gather(self._offsets, query_ids)
        row, place = _unfolded(tf.gather(self._offsets, query_ids + 1) - begin)
        return tf.stack([row, self._at(tf.gather(begin, row) + place)], axis=1)

    def _at(self, places: tf.Tensor) -> tf.Tensor:
        last = tf.size(self._candidate_ids, tf.int64) - 1
        return tf.gather(self._candidate_ids, tf.minimum(places, last))


def padded(hits: tf.Tensor) -> tf.Tensor:
    """Rows [H, 2] with as many (0, -1) after them that few different sizes remain.

    Or XLA would compile a step again for every batch. A size is at least 1,024, and has three bits
    that count, so that it is at most a quarter larger than need be.
    """
    size = tf.shape(hits, tf.int64)[0]
    exponent = tf.math.log(tf.cast(tf.maximum(size, 1024), tf.float64)) / math.log(2)
    unit = tf.cast(2.0 ** tf.floor(exponent - 2), tf.int64)
    missing = tf.maximum((size + unit - 1) // unit * unit, 1024) - size
    return tf.concat([hits, tf.tile(tf.constant([[0, -1]], tf.int64), [missing, 1])], axis=0)


def _unfolded(sizes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The number of a group and the place in it, for each member of groups of these sizes.

    [2, 0, 1] → [0, 0, 2] and [0, 1, 0], int64.
    """
    end, total = tf.cumsum(sizes), tf.reduce_sum(sizes)
    ends_at = tf.scatter_nd(end[:, None], tf.ones_like(sizes), total[None] + 1)
    group, member = tf.cumsum(ends_at)[:-1], tf.range(total)
    return group, member - tf.gather(end - sizes, group)
