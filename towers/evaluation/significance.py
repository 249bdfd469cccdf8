"""Whether a paired difference over queries is more than chance.

Two tests of the mean difference: Student's paired t-test, and the randomisation test, which
supposes nothing about the distribution: where two rankings are equally good, each difference could
as well have the other sign (Fisher; for retrieval Smucker, Allan and Carterette, CIKM 2007,
doi:10.1145/1321440.1321528).
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from towers.metrics.definitions import half_width

_MAX_SIGNS = 4_000_000  # in memory at a time


def compare_paired(differences: np.ndarray, *, resamples: int, seed: int) -> pd.DataFrame:
    """Tests the mean of each column of differences against 0.

    Args:
      differences: float [U, M].
      resamples: draws of the randomisation test; all 2^n assignments of signs to the n queries
        that differ are gone through where they are no more.
      seed: of the draws.

    Returns:
      M rows: `difference`, the mean over queries, and `half_width` of its 95 % interval; two-sided
      `p_t_test` and `p_permutation`; numbers of queries that are `better`, `worse` and `equal`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p_t_test = stats.ttest_1samp(differences, 0.0).pvalue
    return pd.DataFrame(
        {
            "difference": differences.mean(axis=0),
            "half_width": half_width(differences),
            "p_t_test": np.where(np.isnan(p_t_test), 1.0, p_t_test),  # one query, or none differs
            "p_permutation": permutation_test(differences, resamples=resamples, seed=seed),
            "better": (differences > 0).sum(axis=0),
            "worse": (differences < 0).sum(axis=0),
            "equal": (differences == 0).sum(axis=0),
        }
    )


def permutation_test(differences: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean under random signs: float64 [M]; arguments as above.

    A drawn p is (1 + b) / (1 + resamples), where b draws are at least as extreme, so that it is
    never 0 and the test keeps its level (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    differing = differences[(differences != 0).any(axis=1)].astype(np.float64)
    count, random = len(differing), np.random.default_rng(seed)
    if count < 2:
        return np.ones(differences.shape[1])
    exact = count <= math.log2(resamples)
    total = 2**count if exact else resamples

    def distances(signs: np.ndarray) -> np.ndarray:
        """Rounded: sums of the same numbers in another order may differ in their last bits."""
        return np.round(np.abs(signs @ differing) / count, 12)

    observed, extreme = distances(np.ones(count)), np.zeros(differing.shape[1])
    batch = max(1, _MAX_SIGNS // count)
    for start in range(0, total, batch):
        numbers = np.arange(start, min(start + batch, total))
        if exact:
            bits = numbers[:, None] >> np.arange(count) & 1
        else:
            bits = random.integers(0, 2, (len(numbers), count), np.int8)
        extreme += (distances(1.0 - 2 * bits) >= observed).sum(axis=0)
    return extreme / total if exact else (1 + extreme) / (1 + total)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, [n]: the step-down procedure of Holm (1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]
