"""Recall of parts of a split: by the popularity of what is held out, and by how active queries are.

A mean hides whom a model serves. Both parts set the model beside the ranking by popularity, which
finds what is popular anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from towers.metrics.definitions import half_width, recall
from towers.metrics.held_out import HeldOut, Ranking

POPULARITY_CUTS = (*(share / 10 for share in range(1, 10)), 0.99)  # deciles, and the top 1 %
ACTIVITY_CUTS = (0.25, 0.5, 0.75)


def breakdown(held_out: HeldOut, rankings: dict[str, Ranking], k: int) -> dict[str, Any]:
    """Recall@k of some rankings in each bucket of candidates and of queries.

    In a bucket of candidates, the recall of a query looks only at its positives of that bucket,
    and the mean is over the queries that have some.

    Args:
      held_out: what was ranked for.
      rankings: by name, all of `held_out`, at least k deep.
      k: the cut-off.

    Returns:
      {"k": k, "by_popularity": buckets of candidates by their train rows, "by_activity": buckets
      of queries by theirs}. A bucket has `from` and `to`, the least and the most train rows in it;
      `candidates` or nothing, `positives` and `queries`, how many they are; and for each ranking
      `mean` and `half_width`, of the 95 % interval, None for a single query.
    """
    return {
        "k": k,
        "by_popularity": _by_popularity(held_out, rankings, k),
        "by_activity": _by_activity(held_out, rankings, k),
    }


def bucket_of(counts: np.ndarray, cuts: tuple[float, ...]) -> np.ndarray:
    """Buckets by ascending count, cut at quantiles; equal counts are never apart.

    Those without any rows are a bucket of their own, and no part of the quantiles.

    Args:
      counts: int64 [n], at least 0.
      cuts: quantiles, ascending, in (0, 1).

    Returns:
      int64 [n], numbers from 0 on; no bucket is empty, so there may be fewer than cuts + 1.
    """
    positive = counts[counts > 0]
    if len(positive) == 0:
        return np.zeros(len(counts), np.int64)
    edges = np.quantile(positive, cuts, method="inverted_cdf")
    codes = np.where(counts > 0, 1 + np.searchsorted(edges, counts, side="left"), 0)
    return np.unique(codes, return_inverse=True)[1]


def _by_popularity(held_out: HeldOut, rankings: dict[str, Ranking], k: int) -> list[dict[str, Any]]:
    counts = held_out.train_counts
    buckets = bucket_of(counts, POPULARITY_CUTS)
    shape = len(held_out.query_ids), int(buckets.max()) + 1
    rows, candidates = held_out.pairs
    positives = _count(rows, buckets[candidates], shape)
    recalls = {}
    for name, ranking in rankings.items():
        rows, ranks = np.nonzero(ranking.hits[:, :k])
        hits = _count(rows, buckets[ranking.candidates[rows, ranks]], shape)
        recalls[name] = hits / np.maximum(positives, 1)
    return [
        _span(counts[buckets == bucket])
        | {"candidates": int((buckets == bucket).sum())}
        | _describe(positives[:, bucket], {name: recalls[name][:, bucket] for name in recalls})
        for bucket in range(shape[1])
    ]


def _count(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often each cell is named: int64 of that shape."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _by_activity(held_out: HeldOut, rankings: dict[str, Ranking], k: int) -> list[dict[str, Any]]:
    buckets = bucket_of(held_out.train_rows, ACTIVITY_CUTS)
    positives = held_out.num_positives
    recalls = {name: recall(ranking.hits, positives, k) for name, ranking in rankings.items()}
    return [
        _span(held_out.train_rows[inside])
        | _describe(positives[inside], {name: recalls[name][inside] for name in recalls})
        for inside in (buckets == bucket for bucket in range(int(buckets.max()) + 1))
    ]


def _span(counts: np.ndarray) -> dict[str, Any]:
    return {"from": int(counts.min()), "to": int(counts.max())}


def _describe(positives: np.ndarray, recalls: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over the queries with positives: arguments are [U] each."""
    counted = positives > 0
    queries = int(counted.sum())
    bucket: dict[str, Any] = {"positives": int(positives.sum()), "queries": queries}
    for name, values in recalls.items():
        bucket[name] = {
            "mean": float(values[counted].mean()) if queries else None,
            "half_width": float(half_width(values[counted])) if queries > 1 else None,
        }
    return bucket
