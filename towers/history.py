"""What a query chose before: the candidates of its train rows, by time where there are times.

The history of a query holds train rows only. A query that is trained on must not see the
candidate that it is to find:

- with timestamps, it sees what it chose at an earlier time, and nothing of the same time or
  later, so that training looks back as serving does;
- without them, it sees its other train rows, in the order of the rows, without that candidate.

Everywhere else (negatives drawn for a query, evaluation, serving) it sees its whole history.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from pipeline import schema
from towers.lists import Lists, values_between


class History:
    """The last candidates of each query, as codes: dense id + 1, 0 where there are fewer.

    Args:
      rows: the arrays of the train split.
      num_queries: Q.
      num_candidates: N.
      length: H, candidates that are seen at a time.

    Attributes:
      last: int32 [Q, H], the whole history, the latest at the end.
    """

    def __init__(
        self, rows: Mapping[str, np.ndarray], num_queries: int, num_candidates: int, length: int
    ) -> None:
        self.length, self._num_candidates = length, num_candidates
        query = np.asarray(rows[schema.QUERY_ID], np.int64)
        candidate = np.asarray(rows[schema.CANDIDATE_ID], np.int64)
        times = rows.get(schema.TIMESTAMP)
        # Equal times stay in the order of the rows, a hash that knows nothing of popularity.
        order = np.argsort(query, kind="stable") if times is None else np.lexsort((times, query))
        sizes = np.bincount(query, minlength=num_queries)
        lists = Lists.of(candidate[order] + 1, sizes)
        self._ends_of_rows: tuple[tf.Tensor, tf.Tensor] | None = None
        if times is not None:
            pairs = query * num_candidates + candidate
            ends = np.empty(len(order), np.int64)
            ends[order] = _first_of_time(query[order], np.asarray(times)[order])
            by_pair = np.argsort(pairs, kind="stable")
            self._ends_of_rows = tf.constant(pairs[by_pair]), tf.constant(ends[by_pair])
        self._lists = Lists(tf.constant(lists.values), tf.constant(lists.offsets))
        self.last = self.of(tf.range(num_queries, dtype=tf.int64)).numpy()

    def of(self, query_ids: tf.Tensor) -> tf.Tensor:
        """The whole history: dense ids [...] → int32 [..., H]."""
        return self._before(query_ids, tf.gather(self._lists.offsets, query_ids + 1))

    def without(self, query_ids: tf.Tensor, positives: tf.Tensor) -> tf.Tensor:
        """What a query may see of itself when it is trained on a candidate.

        Args:
          query_ids, positives: dense ids [...], train rows. The history of a pair that is none
            is the whole one, without the candidate.

        Returns:
          int32 [..., H].
        """
        ends = tf.gather(self._lists.offsets, query_ids + 1)
        if self._ends_of_rows is not None:
            pairs, ends_of_rows = self._ends_of_rows
            sought = query_ids * self._num_candidates + positives
            places = tf.searchsorted(pairs, tf.reshape(sought, [-1]), out_type=tf.int64)
            places = tf.minimum(tf.reshape(places, tf.shape(sought)), len(pairs) - 1)
            found = tf.gather(pairs, places) == sought
            ends = tf.where(found, tf.gather(ends_of_rows, places), ends)
        seen = self._before(query_ids, ends)
        return tf.where(seen == tf.cast(positives, tf.int32)[..., None] + 1, 0, seen)

    def _before(self, query_ids: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
        """The last H candidates before places in the lists, the latest at the end."""
        firsts = tf.gather(self._lists.offsets, query_ids)
        starts = ends - self.length
        values = values_between(self._lists, starts, ends, self.length)
        own = starts[..., None] + tf.range(self.length, dtype=tf.int64) >= firsts[..., None]
        return tf.where(own, values, 0)


def _first_of_time(queries: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The first place of the same query and time, for rows in that order: int64 [n]."""
    new = np.r_[True, (queries[1:] != queries[:-1]) | (times[1:] != times[:-1])][: len(queries)]
    starts = np.flatnonzero(new)
    return np.repeat(starts, np.diff(np.append(starts, len(queries))))
