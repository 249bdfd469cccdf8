"""Recall of parts of a split: by the popularity of what is held out, and by how active queries are.

A mean hides whom a model serves. Both parts set the model beside the ranking by popularity, which
finds what is popular anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from towers.metrics.held_out import HeldOut, Ranking
from towers.metrics.significance import half_width

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
    number = int(buckets.max()) + 1
    rows, candidates = held_out.pairs
    cells = rows * number + buckets[candidates]
    shape = len(held_out.query_ids), number
    positives = np.bincount(cells, minlength=shape[0] * number).reshape(shape)
    recalls = {}
    for name, ranking in rankings.items():
        hit_rows, ranks = np.nonzero(ranking.hits[:, :k])
        hit_cells = hit_rows * number + buckets[ranking.candidates[hit_rows, ranks]]
        hits = np.bincount(hit_cells, minlength=shape[0] * number).reshape(shape)
        recalls[name] = hits / np.maximum(positives, 1)
    return [
        _span(counts[buckets == bucket])
        | {"candidates": int((buckets == bucket).sum())}
        | _describe(positives[:, bucket], {name: all_[:, bucket] for name, all_ in recalls.items()})
        for bucket in range(number)
    ]


def _by_activity(held_out: HeldOut, rankings: dict[str, Ranking], k: int) -> list[dict[str, Any]]:
    buckets = bucket_of(held_out.train_rows, ACTIVITY_CUTS)
    recalls = {
        name: ranking.hits[:, :k].sum(axis=1) / held_out.num_positives
        for name, ranking in rankings.items()
    }
    return [
        _span(held_out.train_rows[here])
        | _describe(
            held_out.num_positives[here], {name: each[here] for name, each in recalls.items()}
        )
        for here in (buckets == bucket for bucket in range(int(buckets.max()) + 1))
    ]


def _span(counts: np.ndarray) -> dict[str, Any]:
    return {"from": int(counts.min()), "to": int(counts.max())}


def _describe(positives: np.ndarray, recalls: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over the queries with positives: arguments are [U] each."""
    counted = positives > 0
    number = int(counted.sum())
    found: dict[str, Any] = {"positives": int(positives.sum()), "queries": number}
    for name, values in recalls.items():
        values = values[counted]
        error = values.std(ddof=1) / np.sqrt(number) if number > 1 else None
        found[name] = {
            "mean": float(values.mean()) if number else None,
            "half_width": None if error is None else float(half_width(error, number)),
        }
    return found
