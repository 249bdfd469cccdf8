"""Recall of parts of a split: by the popularity of what is held out, and by how active queries are.

A mean hides whom a model serves. Both parts set the model beside the ranking by popularity, which
finds what is popular anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from towers.metrics.definitions import half_width
from towers.metrics.held_out import HeldOut, Ranking

POPULARITY_CUTS = (*(share / 10 for share in range(1, 10)), 0.99)  # deciles, and the top 1 %
ACTIVITY_CUTS = (0.25, 0.5, 0.75)


def breakdown(held_out: HeldOut, rankings: dict[str, Ranking], k: int) -> dict[str, Any]:
    """Recall@k of some rankings of `held_out` in each bucket of candidates and of queries.

    In a bucket of candidates, the recall of a query looks only at its positives of that bucket,
    and the mean is over the queries that have some.

    Returns:
      {"k": k, "by_popularity": buckets of candidates by their train rows, "by_activity": buckets
      of queries by theirs}. A bucket has `from` and `to`, the least and the most train rows in it;
      `candidates` or nothing, `positives` and `queries`, how many they are; and for each ranking
      `mean` and `half_width`, of the 95 % interval, None for a single query.
    """
    return {
        "k": k,
        "by_popularity": _buckets(held_out, rankings, k, of_queries=False),
        "by_activity": _buckets(held_out, rankings, k, of_queries=True),
    }


def bucket_of(counts: np.ndarray, cuts: tuple[float, ...]) -> np.ndarray:
    """Buckets by ascending count, cut at quantiles; equal counts are never apart.

    Those without any rows are a bucket of their own, and no part of the quantiles. Of n counts
    int64 [n], numbers from 0 on; no bucket is empty, so there may be fewer than cuts + 1.
    """
    positive = counts[counts > 0]
    if len(positive) == 0:
        return np.zeros(len(counts), np.int64)
    edges = np.quantile(positive, cuts, method="inverted_cdf")
    codes = np.where(counts > 0, 1 + np.searchsorted(edges, counts, side="left"), 0)
    return np.unique(codes, return_inverse=True)[1]


def _buckets(
    held_out: HeldOut, rankings: dict[str, Ranking], k: int, *, of_queries: bool
) -> list[dict[str, Any]]:
    """The buckets of queries, or those of candidates."""
    counts = held_out.train_rows if of_queries else held_out.train_counts
    codes = bucket_of(counts, ACTIVITY_CUTS if of_queries else POPULARITY_CUTS)
    shape = len(held_out.query_ids), int(codes.max()) + 1

    def count(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """How many of some pairs each query has in each bucket: int64 [U, buckets]."""
        columns = codes[rows if of_queries else candidates]
        places = rows * shape[1] + columns
        return np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)

    positives = count(*held_out.pairs)
    recalls = {}
    for name, ranking in rankings.items():
        rows, ranks = np.nonzero(ranking.hits[:, :k])
        hits = count(rows, ranking.candidates[rows, ranks])
        recalls[name] = hits / np.maximum(positives, 1)
    buckets: list[dict[str, Any]] = []
    for code in range(shape[1]):
        inside, counted = counts[codes == code], positives[:, code] > 0
        bucket: dict[str, Any] = {"from": int(inside.min()), "to": int(inside.max())}
        if not of_queries:
            bucket["candidates"] = len(inside)
        bucket["positives"] = int(positives[:, code].sum())
        bucket["queries"] = queries = int(counted.sum())
        for name, recall in recalls.items():
            values = recall[counted, code]
            bucket[name] = {
                "mean": float(values.mean()) if queries else None,
                "half_width": float(half_width(values)) if queries > 1 else None,
            }
        buckets.append(bucket)
    return buckets
