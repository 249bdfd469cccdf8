"""Ranking metrics of each query, and their means.

Each function takes `hits`, bool [U, K'] with K' >= k: whether the candidate at each rank, best
first, is one of the query's held-out positives; and `num_positives`, int [U], how many those
are, at least 1. It returns float64 [U].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit


def recall(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """Hits in the top k / all held-out positives."""
    return hits[:, :k].sum(axis=1) / num_positives


def precision(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """Hits in the top k / k."""
    del num_positives
    return hits[:, :k].sum(axis=1) / k


def ndcg(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """Σ_r hit_r / log2(r + 1) over the ranks r = 1 … k, divided by the best that can be had."""
    gains: np.ndarray = hits[:, :k] * _discounts(k)[: hits.shape[1]]
    return gains.sum(axis=1) / _ideal(num_positives, k)


def ndcg_xir(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """What the published code of XIR and BMNS calls NDCG: too large, and growing with k.

    Its discount is 1 at rank 1 and 1 / log2(3) at every rank from 2 on; its ideal is the true
    one. For comparison with the tables of those papers only.
    """
    discounts = np.full(k, 1 / np.log2(3))
    discounts[0] = 1.0
    gains: np.ndarray = hits[:, :k] * discounts[: hits.shape[1]]
    return gains.sum(axis=1) / _ideal(num_positives, k)


def hit_rate(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """1 where the top k holds a positive, else 0."""
    del num_positives
    return np.asarray(hits[:, :k].any(axis=1), np.float64)


def mrr(hits: np.ndarray, num_positives: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first positive in the top k, 0 without one."""
    del num_positives
    first = hits[:, :k].argmax(axis=1)
    return np.where(hits[:, :k].any(axis=1), 1 / (first + 1), 0.0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    metric.__name__: metric for metric in (recall, precision, ndcg, ndcg_xir, hit_rate, mrr)
}


def cut_offs(ks: Any) -> tuple[int, ...]:
    """Some cut-offs, or one; a ValueError where they are not whole numbers of at least 1."""
    values = tuple(np.atleast_1d(ks).tolist())
    if not values or not all(isinstance(k, int) and k >= 1 for k in values):
        raise ValueError(f"ks must be whole numbers of at least 1, as in (10, 50), got {ks!r}.")
    return values


def mean_metrics(
    hits: np.ndarray, num_positives: np.ndarray, ks: Sequence[int], owners: np.ndarray | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """All metrics at all cut-offs: means over queries, and 95 % confidence half-widths.

    Args:
      hits: bool [U, K'], K' >= max(ks).
      num_positives: int [U]; queries with 0 do not count.
      ks: the cut-offs.
      owners: int64 [U], the query of each row; a query counts with the mean over its rows. None:
        each row is a query.

    Returns:
      Two dicts with keys such as "recall@50"; a half-width is that of Student's interval.

    Raises:
      ValueError: no query has a held-out positive.
    """
    counted = num_positives > 0
    if not counted.any():
        raise ValueError("no query has a held-out positive: there is nothing to measure.")
    hits, num_positives = hits[counted], num_positives[counted]
    if owners is not None:
        owners = np.unique(owners[counted], return_inverse=True)[1]
    means, half_widths = {}, {}
    for name, metric in METRICS.items():
        for k in ks:
            values = metric(hits, num_positives, k)
            if owners is not None:
                values = np.bincount(owners, values) / np.bincount(owners)
            means[f"{name}@{k}"] = float(values.mean())
            half_widths[f"{name}@{k}"] = float(half_width(values))
    return means, half_widths


def half_width(values: np.ndarray) -> np.ndarray:
    """Of Student's 95 % interval of the mean over the first axis; 0 for a single value."""
    count = len(values)
    if count < 2:
        return np.zeros(values.shape[1:])
    error = values.std(axis=0, ddof=1) / np.sqrt(count)
    return np.asarray(stdtrit(count - 1, 0.975) * error)


def _discounts(k: int) -> np.ndarray:
    return 1 / np.log2(np.arange(2, k + 2))


def _ideal(num_positives: np.ndarray, k: int) -> np.ndarray:
    """The DCG of a ranking with min(k, positives) hits in front: float64 [U]."""
    return np.cumsum(_discounts(k))[np.minimum(num_positives, k) - 1]
