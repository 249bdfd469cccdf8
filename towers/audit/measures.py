"""How far the gradient of a method is from that of the full softmax, and where it looks.

For a pair (u, i) a loss is a function of the scores s_uj, and w_j = ∂loss / ∂s_uj is all of its
gradient: that by the embedding of the query is Σ_j w_j v_j. The full softmax has
w_j = p_j - [j = i], p the softmax over the corpus. What a method puts on j ≠ i, divided by the
sum, is the distribution of negatives that it implies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from scipy.stats import entropy

from towers.audit.subjects import Batches, Frozen, Subject
from towers.data.interactions import Positives


class Reference(NamedTuple):
    """The audited pairs of one batch, and the full softmax of their scores, in float64."""

    query: np.ndarray  # [A, D], over the temperature
    weights: np.ndarray  # [A, N], ∂loss / ∂s of the full softmax
    ranks: np.ndarray  # int32 [A, N], from 0, among what the query did not choose; else N
    gradient: np.ndarray  # [A, D], of the full softmax, by the embedding of the query


class Sums(NamedTuple):
    """Sums over the audited pairs of each of T batches, and over them alone."""

    product: np.ndarray  # [T], <E g, full>
    squared: np.ndarray  # [T], |E g|², without bias
    variance: np.ndarray  # [T], E |g - E g|²
    full_squared: np.ndarray  # [T], |full|²
    pairs: np.ndarray  # [T], those with a negative
    buckets: np.ndarray  # [T, G], shares of the negative mass
    full_buckets: np.ndarray  # [T, G]
    seen: np.ndarray  # [T], share on other candidates that the query chose in train
    ranked: np.ndarray  # [T, N], share of the other mass by rank, the highest score first


def popularity_buckets(counts: np.ndarray, num_buckets: int = 10) -> np.ndarray:
    """Candidates by descending train count in equal parts, equal counts by id: int64 [N].

    0 holds the most popular candidates. Fewer buckets where there are fewer candidates.
    """
    place = np.argsort(np.argsort(-counts, kind="stable"))
    parts = np.array_split(place, min(num_buckets, len(place)))
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])[place]


def references(frozen: Frozen, batches: Batches, positives: Positives) -> list[Reference]:
    """The full softmax of every batch; takes 12 bytes for each pair and candidate."""
    expected = []
    for rows in batches.pairs:
        query_ids = frozen.query_ids[rows]
        query = frozen.query[query_ids].astype(np.float64)
        scores = query @ frozen.candidate.astype(np.float64).T
        weights = softmax(scores, axis=1)
        weights[np.arange(len(rows)), frozen.candidate_ids[rows]] -= 1
        ranks = np.empty(scores.shape, np.int32)
        for row, query_id in enumerate(query_ids):
            seen = positives.of(query_id)
            scores[row, seen] = -np.inf
            ranks[row, np.argsort(-scores[row], kind="stable")] = np.arange(ranks.shape[1])
            ranks[row, seen] = ranks.shape[1]
        gradient = query_gradient(frozen, query, weights)
        expected.append(Reference(query, weights, ranks, gradient))
    return expected


def query_gradient(frozen: Frozen, query: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ_j w_aj v_j, float64 [A, D]; for cosines without its part along the query."""
    gradient = weights @ frozen.candidate.astype(weights.dtype, copy=False)
    if not frozen.normalize:
        return gradient.astype(np.float64)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    return gradient - (gradient * unit).sum(axis=1, keepdims=True) * unit


def measure(
    subject: Subject, frozen: Frozen, expected: list[Reference], buckets: np.ndarray, draws: int
) -> Sums:
    """Draws every batch so many times, at least 2, and compares with the full softmax.

    The state of the method stays as it is, but for the pools of the adasir methods, which are
    renewed for every draw.
    """
    by_batch = []
    for number, reference in enumerate(expected):
        total = np.zeros(reference.weights.shape)
        mean, squares = np.zeros_like(reference.gradient), 0.0
        for draw in range(draws):
            weights = subject.weights(number, draw)
            gradient = query_gradient(frozen, reference.query, weights)
            total += weights
            mean += gradient / draws
            squares += (gradient**2).sum()
        # |mean|² holds the variance of the mean beside |E g|²: both are estimated without bias.
        variance = max(0.0, (squares - draws * (mean**2).sum()) / (draws - 1))
        mass, full = _negative_shares(total), _negative_shares(reference.weights)
        has_negatives = mass.sum(axis=1) > 0
        seen, ranked = shares_by_rank(mass, reference.ranks)
        sums = Sums(
            product=(mean * reference.gradient).sum(),
            squared=(mean**2).sum() - variance / draws,
            variance=variance,
            full_squared=(reference.gradient**2).sum(),
            pairs=has_negatives.sum(),
            buckets=np.bincount(buckets, mass.sum(axis=0)),
            full_buckets=np.bincount(buckets, full[has_negatives].sum(axis=0)),
            seen=seen,
            ranked=ranked,
        )
        by_batch.append(sums)
    return Sums(*map(np.stack, zip(*by_batch, strict=True)))


def full_softmax_buckets(expected: list[Reference], buckets: np.ndarray) -> np.ndarray:
    """The share of the full softmax's negatives in each bucket, by all audited pairs: [G]."""
    mass = sum(_negative_shares(reference.weights).sum(axis=0) for reference in expected)
    in_buckets = np.bincount(buckets, np.asarray(mass))
    return in_buckets / in_buckets.sum()


def _negative_shares(weights: np.ndarray) -> np.ndarray:
    """The distribution of the negatives of each pair: [A, N]; all 0 for a pair without any."""
    mass = np.maximum(weights, 0)  # only the pair's own candidate has a weight below 0
    sums = mass.sum(axis=1, keepdims=True)
    return np.divide(mass, sums, out=np.zeros_like(mass), where=sums > 0)


def shares_by_rank(mass: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mass on what the queries chose, a number, and the rest by rank: [N]."""
    size = mass.shape[1]
    by_rank = np.bincount(ranks.reshape(-1), mass.reshape(-1), size + 1)
    return by_rank[size], by_rank[:size]


def summarize(sums: Sums, k: int) -> dict[str, Any]:
    """The measures of a method, each with its standard error.

    Standard errors are those of the jackknife over batches: pairs of a batch share its draws.

    Returns:
      {measure: {"value", "error"}}, None for what the draws do not determine. bias is
      1 - cosine of the mean gradient and the full one, all audited pairs as one vector;
      norm_ratio |E g| / |full|; noise E|g - E g|² / |E g|²; variance E|g - E g|² / |full|²; kl
      in nats, over popularity buckets; top_share the share of the negatives' mass on the K
      best candidates that the query did not choose; half_mass_rank the rank that half of it
      stays above; seen_share the share on others that the query did choose.
    """
    measures: dict[str, Callable[[Sums], float]] = {
        # Noise may have put |E g|² below 0: then it is not known, as its root is not.
        "bias": lambda s: 1 - s.product.sum() / np.sqrt(s.squared.sum() * s.full_squared.sum()),
        "norm_ratio": lambda s: np.sqrt(s.squared.sum() / s.full_squared.sum()),
        "noise": lambda s: s.variance.sum() / np.sqrt(s.squared.sum()) ** 2,
        "variance": lambda s: s.variance.sum() / s.full_squared.sum(),
        "kl": lambda s: entropy(s.full_buckets.sum(axis=0), s.buckets.sum(axis=0)),
        "top_share": lambda s: s.ranked[:, :k].sum() / s.ranked.sum(),
        "half_mass_rank": lambda s: half_mass_rank(s.ranked.sum(axis=0)),
        "seen_share": lambda s: s.seen.sum() / s.pairs.sum(),
    }
    return {name: _with_error(measure, sums) for name, measure in measures.items()}


def _with_error(statistic: Callable[[Sums], float], sums: Sums) -> dict[str, float | None]:
    size = len(sums.pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sums))
        others = [statistic(Sums(*(np.delete(s, n, axis=0) for s in sums))) for n in range(size)]
        error = float(np.sqrt((size - 1) * np.var(others)))
    figures = {"value": value, "error": error}
    return {name: x if np.isfinite(x) else None for name, x in figures.items()}


def half_mass_rank(ranked: np.ndarray) -> float:
    """The smallest r such that the r best candidates hold half of the mass."""
    cumulative = np.cumsum(ranked)
    rank = np.searchsorted(cumulative, cumulative[-1] / 2) + 1
    return float(rank) if cumulative[-1] > 0 else float("nan")
