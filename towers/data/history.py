"""What a query chose before: the candidates of its train rows, by time where there are times.

The history of a query holds train rows only. A query that is trained on a candidate sees what it
chose earlier, and nothing of the same time or later, so that training looks back as serving does.
Without timestamps the order of the rows, which is that of a hash, stands for time. To leave out
the candidate alone would give it away: it would be the one of the query's choices that is missing.

Everywhere else (queries that a method draws, evaluation, serving) a query has its whole history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.contract import schema
from towers.data.interactions import RetrievalData
from towers.data.ragged import Lists, values_between


class History:
    """The last candidates of each query, as codes: dense id + 1, 0 where there are fewer.

    Args:
      rows: the arrays of the train split.
      num_queries: Q.
      num_candidates: N.
      length: H, candidates that are seen at a time.

    Attributes:
      last: int64 [Q, H], the whole history, the latest at the end.
    """

    def __init__(
        self, rows: Mapping[str, np.ndarray], num_queries: int, num_candidates: int, length: int
    ) -> None:
        self.length, self._num_candidates = length, num_candidates
        query = np.asarray(rows[schema.QUERY_ID], np.int64)
        candidate = np.asarray(rows[schema.CANDIDATE_ID], np.int64)
        times = np.asarray(rows.get(schema.TIMESTAMP, np.arange(len(query))))
        # Equal times stay in the order of the rows, a hash that knows nothing of popularity.
        order = np.lexsort((times, query))
        lists = Lists.of(candidate[order] + 1, np.bincount(query, minlength=num_queries))
        self._lists = Lists(tf.constant(lists.values), tf.constant(lists.offsets))
        pairs, ends = query * num_candidates + candidate, np.empty(len(order), np.int64)
        ends[order] = _first_of_equal(query[order], times[order])
        by_pair = np.argsort(pairs, kind="stable")
        self._pairs, self._ends = tf.constant(pairs[by_pair]), tf.constant(ends[by_pair])
        self.last = self.of(tf.range(num_queries, dtype=tf.int64)).numpy()

    def of(self, query_ids: tf.Tensor) -> tf.Tensor:
        """The whole history: dense ids [...] → int64 [..., H]."""
        return self._before(query_ids, tf.gather(self._lists.offsets, query_ids + 1))

    def earlier(self, query_ids: tf.Tensor, positives: tf.Tensor) -> tf.Tensor:
        """What a query may see of itself when it is trained on a candidate.

        Args:
          query_ids, positives: dense ids [...], train rows. The history of a pair that is none
            is the whole one.

        Returns:
          int64 [..., H].
        """
        sought = query_ids * self._num_candidates + positives
        places = tf.searchsorted(self._pairs, tf.reshape(sought, [-1]), out_type=tf.int64)
        places = tf.minimum(tf.reshape(places, tf.shape(sought)), len(self._pairs) - 1)
        whole = tf.gather(self._lists.offsets, query_ids + 1)
        known = tf.gather(self._pairs, places) == sought
        return self._before(query_ids, tf.where(known, tf.gather(self._ends, places), whole))

    def _before(self, query_ids: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
        """The last H candidates before places in the lists, the latest at the end."""
        firsts = tf.gather(self._lists.offsets, query_ids)
        starts = ends - self.length
        values = values_between(self._lists, starts, ends, self.length)
        own = starts[..., None] + tf.range(self.length, dtype=tf.int64) >= firsts[..., None]
        return tf.where(own, values, 0)


class Before(NamedTuple):
    """What the query of each row of a split had chosen before that row, the oldest first.

    These are its rows in the splits before, and the rows of the same split with an earlier time.
    """

    candidate_ids: np.ndarray  # int64 [n], of all queries, one after the other
    offsets: np.ndarray  # int64 [R], where that of each row begins
    sizes: np.ndarray  # int64 [R], how many there are

    @classmethod
    def rows_of(cls, data: RetrievalData, split: str) -> Before:
        """Of each row of `data.arrays(split)`, in order; a ValueError for data without times."""
        splits = schema.SPLITS[: schema.SPLITS.index(split) + 1]
        parts = [data.arrays(name) for name in splits if data.num_rows(name)]
        if schema.TIMESTAMP not in parts[-1]:
            raise ValueError(
                "a live history needs times, and the data have none: prepare them from a log with "
                "a column of times."
            )
        columns = (schema.QUERY_ID, schema.CANDIDATE_ID, schema.TIMESTAMP)
        query, candidate, times = (np.concatenate([p[name] for p in parts]) for name in columns)
        num_rows = len(parts[-1][schema.QUERY_ID])
        in_split = np.arange(len(query)) >= len(query) - num_rows
        order = np.lexsort((times, in_split, query))
        ends = np.empty(len(query), np.int64)
        ends[order] = _first_of_equal(query[order], in_split[order], times[order])
        offsets = np.searchsorted(query[order], query[-num_rows:])
        return cls(candidate[order], offsets, ends[-num_rows:] - offsets)

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """The histories of some rows: int64 [B, longest of them], dense id + 1, 0 at the end."""
        steps = np.arange(self.sizes[rows].max(initial=0))
        inside = steps < self.sizes[rows, None]
        places = np.where(inside, self.offsets[rows, None] + steps, 0)
        return np.where(inside, self.candidate_ids[places] + 1, 0)


def _first_of_equal(*columns: np.ndarray) -> np.ndarray:
    """The first place with the same values, for rows in their order: int64 [n].

    >>> _first_of_equal(np.array([4, 4, 4, 7]), np.array([1, 2, 2, 2])).tolist()
    [0, 1, 1, 3]
    """
    size = len(columns[0])
    new = np.any([np.r_[True, column[1:] != column[:-1]][:size] for column in columns], axis=0)
    starts = np.flatnonzero(new)
    return np.repeat(starts, np.diff(np.append(starts, size)))
