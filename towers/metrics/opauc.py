"""One-way partial AUC, and how it bounds recall and precision.

OPAUC(β) of a query looks at the share β of its negatives that score highest: it is what hard
negative sampling optimizes ("On the Theories behind Hard Negative Sampling", WWW 2023).
"""

from __future__ import annotations

import numpy as np


def opauc(
    hits: np.ndarray, num_positives: np.ndarray, num_negatives: np.ndarray, beta: np.ndarray | float
) -> np.ndarray:
    """OPAUC(β) = Σ_i Σ_j [r_i > r_j] / (n₊ n₋), j over the β·n₋ negatives of highest score.

    The estimator of Theorem 3 and of eq. (12); 1 - β + this is what the slides print with I < for
    I >. In [0, β]. Equal scores count as the ranking has ordered them.

    Args:
      hits: bool [U, K'], whether the candidate at each rank, best first, is a positive. K' at
        least β·n₋ + n₊, or the whole ranking: a positive that is not in it counts as below.
      num_positives: int [U], n₊, at least 1.
      num_negatives: int [U] or a number, n₋.
      beta: β, in (0, 1], [U] or a number; β·n₋ is rounded to a whole number of negatives.

    Returns:
      float64 [U].

    Raises:
      ValueError: β is outside (0, 1], β·n₋ is 0, or K' is too small.
    """
    beta, num_negatives = np.asarray(beta, np.float64), np.asarray(num_negatives)
    looked_at = np.rint(beta * num_negatives).astype(np.int64)
    if not ((beta > 0) & (beta <= 1) & (looked_at >= 1)).all():
        raise ValueError("beta must be in (0, 1] and reach at least one negative: raise it.")
    needed = np.minimum(looked_at + num_positives, num_negatives + num_positives).max()
    if hits.shape[1] < needed:
        raise ValueError(f"hits must have at least {needed} ranks for this beta: rank deeper.")
    above = np.cumsum(~hits, axis=1)  # negatives above each rank
    beaten = np.where(hits, np.maximum(looked_at.reshape(-1, 1) - above, 0), 0)
    return np.asarray(beaten.sum(axis=1) / (num_positives * num_negatives), np.float64)


def recall_bounds(
    value: np.ndarray, num_positives: np.ndarray, num_negatives: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """What OPAUC(k / n₋) says about recall@k: Theorem 3, eq. (17).

    Precision@k has the same bounds times n₊ / k, eq. (18).

    Args:
      value: OPAUC(β) with β = k / n₋, float [U].
      num_positives: int [U], n₊.
      num_negatives: int [U], n₋.
      k: the cut-off, below n₊ and n₋.

    Returns:
      The lowest and the highest recall@k that it allows, float64 [U] each.

    Raises:
      ValueError: k is not below n₊ and n₋, where the theorem says nothing.
    """
    if not ((num_positives > k) & (num_negatives > k)).all():
        raise ValueError(f"k must be below the positives and the negatives of all, got {k}.")
    pairs = num_positives * num_negatives * value  # positives above negatives, a whole number
    total = num_positives + k
    root = np.sqrt(np.maximum(total**2 - 4.0 * pairs, 0.0))
    return (total - root) / (2.0 * num_positives), np.sqrt(pairs) / num_positives
