"""Queries as what they chose: FISM, and SVD++, which has a row for the query beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract.schema import CANDIDATE_ID, QUERY_ID
from towers.data.ragged import Lists, last_distinct
from towers.encoders.tower import Maybe, Tower, normal, uniform_by_id


class HistoryTower(Tower):
    """The embedding of a query is the sum of rows of all candidates that it chose.

        embedding(u | i) = row(u) + |N(u)∖i|^(-1/2) Σ_{j in N(u)∖i} y_j

    Koren, KDD 2008, doi:10.1145/1401890.1401944, eq. (15), as the query of a two-tower model;
    without row(u): FISM, Kabbur et al., KDD 2013, doi:10.1145/2487575.2487589, eq. (6), whose
    rule it is that a query which is trained on a candidate i does not know it: N(u)∖i. There is no
    order in N(u); what came after i is in it. Where scores are cosines, y_j has length 1, as the
    embedding of the candidate has. Of long histories a step of training reads `length`
    candidates, others in every step, and scales their sum; everywhere else the whole history is
    read.

    Args:
      rows: the arrays of the train split.
      num_queries, num_candidates, dim: Q, N and D.
      length: H, candidates of a query that a step of training reads.
      items: y, [N, D], a table of the candidate tower; None: one of its own.
      has_table: whether queries have rows: `table`, float32 [Q, D].
      seed: of the tables.
    """

    reads_history = True

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        num_queries: int,
        num_candidates: int,
        dim: int,
        *,
        length: int,
        items: tf.Variable | None = None,
        has_table: bool = False,
        normalize: bool = False,
        init_stddev: float = 0.1,
        seed: tuple[int, int] = (10, 0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalize, self.dim, self.vocabulary_size = normalize, dim, num_queries
        self._length, self._num_candidates = length, num_candidates
        query, chosen = np.asarray(rows[QUERY_ID]), np.asarray(rows[CANDIDATE_ID])
        # In an order of chance, so that what stands side by side is a sample of the history.
        order = np.lexsort((np.random.default_rng(seed).permutation(len(query)), query))
        lists = Lists.of(chosen[order] + 1, np.bincount(query, minlength=num_queries))
        self.lists = Lists(tf.constant(lists.values), tf.constant(lists.offsets))
        self.table = self._rows("table", num_queries, init_stddev, seed) if has_table else None
        if items is None:
            items = self._rows("items", num_candidates, init_stddev, (seed[0], seed[1] + 1_000))
        self.items = items
        self.built = True

    def lookup(
        self, ids: Maybe, *, table: Maybe = None, positives: Maybe = None, seed: Maybe = None
    ) -> tf.Tensor:
        """What `call` scales to length 1: ids [...] → float32 [..., D]."""
        assert table is None, "a history tower has no embeddings of a graph"
        if ids is None:
            ids = tf.range(self.vocabulary_size, dtype=tf.int64)
        if positives is None:
            total = self.sum_of_lists(ids, self.lists)
        else:
            total = self._without(ids, positives, seed)
        return total if self.table is None else total + tf.gather(self.table, ids)

    def beside_row(self, total: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
        """With the row of each id where the tower has rows; of id -1 there is none: [..., D]."""
        if self.table is None:
            return total
        own = tf.gather(self.table, tf.maximum(ids, 0))
        return total + tf.where((ids >= 0)[..., None], own, 0.0)

    def embed_history(self, ids: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
        """As `Tower.embed_history`: all of the history is read."""
        return self(self.beside_row(self.sum_of(last_distinct(codes)), ids))

    def sum_of(self, codes: tf.Tensor) -> tf.Tensor:
        """The scaled sum over histories of a request: codes [B, W], 0 for none → [B, D]."""
        weights = tf.cast(codes > 0, self.items.dtype)
        rows = self._embed_items(tf.maximum(codes - 1, 0))
        total = tf.reduce_sum(rows * weights[..., None], axis=1)
        return total * tf.math.rsqrt(tf.maximum(tf.reduce_sum(weights, axis=1), 1))[:, None]

    def sum_of_lists(self, ids: tf.Tensor, lists: Lists) -> tf.Tensor:
        """The scaled sum over whole histories in lists: [...] → [..., D]."""
        flat = tf.reshape(ids, [-1])
        starts, sizes = _spans(lists, flat)
        ends = tf.cumsum(sizes)  # of the histories, one after the other
        places = tf.range(tf.reduce_sum(sizes))
        owners = tf.searchsorted(ends, places, side="right", out_type=tf.int64)
        places += tf.gather(starts - ends + sizes, owners)
        rows = self._embed_items(tf.gather(lists.values, places) - 1)
        total = tf.math.unsorted_segment_sum(rows, owners, tf.size(flat))
        scaled = total * tf.math.rsqrt(tf.cast(tf.maximum(sizes, 1), total.dtype))[:, None]
        return tf.reshape(scaled, tf.concat([tf.shape(ids), [self.dim]], 0))

    def _without(self, ids: tf.Tensor, positives: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
        """The same without what the queries are trained on, from H of the others: [B, D].

        The H stand in a ring from a place on that is drawn for each pair and step.
        """
        starts, sizes = _spans(self.lists, ids)
        if seed is None:
            seed = tf.zeros([2], tf.int64)
        share = uniform_by_id(ids * self._num_candidates + positives, seed)
        first = tf.cast(share * tf.cast(sizes, tf.float32), tf.int64)
        steps = tf.range(self._length, dtype=tf.int64)
        places = starts[:, None] + (first[:, None] + steps) % tf.maximum(sizes, 1)[:, None]
        chosen = tf.gather(self.lists.values, places) - 1
        other = (steps < sizes[:, None]) & (chosen != positives[:, None])
        weights = tf.cast(other, self.items.dtype)
        rows = self._embed_items(tf.maximum(chosen, 0))
        total = tf.reduce_sum(rows * weights[..., None], axis=1)
        # mean of the read ones · n / sqrt(n), n = |N(u)∖i|: of a history that is not read as a
        # whole, i is taken to be a part, as in every pair of the train split
        num_read = tf.reduce_sum(weights, axis=1)
        num_others = tf.where(sizes > self._length, tf.cast(sizes - 1, total.dtype), num_read)
        return total * (tf.sqrt(num_others) / tf.maximum(num_read, 1))[:, None]

    def _embed_items(self, ids: tf.Tensor) -> tf.Tensor:
        """y_j: [...] → [..., D]."""
        return self.scaled(tf.gather(self.items, ids))

    def _rows(self, name: str, size: int, stddev: float, seed: tuple[int, int]) -> tf.Variable:
        return self.add_weight(name, (size, self.dim), tf.float32, normal(stddev, seed))


def _spans(lists: Lists, ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where the lists of ids start, and how long they are."""
    starts = tf.gather(lists.offsets, ids)
    return starts, tf.gather(lists.offsets, ids + 1) - starts
