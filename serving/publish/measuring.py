"""Recall and time of an index on queries whose exact results are known.

Recall at n is the share of the first n results whose score reaches the exact n-th best, so that
it does not matter which of several equal candidates is returned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

BATCH = 64  # queries in a batch, where milliseconds per batch are reported
_TIMINGS = 9  # at least so many give a median
_SAME_SCORE = 1e-5  # relative; two candidates that close in score are equally right

Search = Callable[..., tuple[tf.Tensor, tf.Tensor]]


class Measured(NamedTuple):
    """What came out of one setting."""

    recall: float  # mean over the queries
    error: float  # standard error of that mean
    batch_ms: float  # median time of a batch of 64


class Judge:
    """Queries in batches of 64, with the lowest score that belongs into the top of each.

    Args:
      queries: float32 [S, D], S at least 1.
      exact: exact search, [B, D] → rows and scores [B, K].
      at: the rank up to which results count, at most K.
    """

    def __init__(self, queries: np.ndarray, exact: Search, at: int) -> None:
        self.num_queries, self.at = len(queries), at
        whole = -(-len(queries) // BATCH) * BATCH  # the last batch is filled with the first
        filled = np.resize(queries, (whole, queries.shape[1]))
        self._batches = [tf.constant(batch) for batch in np.split(filled, whole // BATCH)]
        last = [exact(batch)[1][:, at - 1 : at].numpy() for batch in self._batches]
        self._lowest = [scores - _SAME_SCORE * np.abs(scores) for scores in last]

    def measure(self, search: Search, *parameters: int, timings: int = _TIMINGS) -> Measured:
        """Recall over all queries, and the median of at least so many timings."""
        inputs = [tf.constant(parameter) for parameter in parameters]
        search(self._batches[0], *inputs)  # what happens once does not count
        shares, times = [], []
        for batch, lowest in zip(self._batches, self._lowest, strict=True):
            start = time.perf_counter()
            rows, scores = search(batch, *inputs)
            best_rows, reached = (part.numpy()[:, : self.at] for part in (rows, scores))
            times.append(time.perf_counter() - start)
            shares.append(((best_rows >= 0) & (reached >= lowest)).mean(axis=1))
        while len(times) < timings:
            times.append(_seconds(search, self._batches[len(times) % len(self._batches)], *inputs))
        share = np.concatenate(shares)[: self.num_queries]
        error = float(share.std() / np.sqrt(len(share)))
        return Measured(float(share.mean()), error, 1000 * statistics.median(times))

    def latency(self, search: Search, *parameters: int) -> dict[str, float]:
        """Median milliseconds of a batch of 64 and of a single query."""
        inputs = [tf.constant(parameter) for parameter in parameters]
        report = {}
        for name, size in (("batch_ms", BATCH), ("single_ms", 1)):
            batches = [batch[:size] for batch in self._batches]
            search(batches[0], *inputs)
            times = [_seconds(search, batches[n % len(batches)], *inputs) for n in range(15)]
            report[name] = round(1000 * statistics.median(times), 4)
        return report


def _seconds(search: Search, batch: tf.Tensor, *inputs: Any) -> float:
    start = time.perf_counter()
    search(batch, *inputs)[1].numpy()
    return time.perf_counter() - start
