"""Whether a paired difference over queries is more than chance.

Two tests of the mean difference: Student's paired t-test, and the randomisation test, which
supposes nothing about the distribution: where two rankings are equally good, each difference could
as well have the other sign (Fisher; for retrieval Smucker, Allan and Carterette, CIKM 2007,
doi:10.1145/1321440.1321528).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from towers.metrics.definitions import half_width

_MAX_SIGNS = 4_000_000  # in memory at a time


class Paired(NamedTuple):
    """A paired comparison of some columns of differences; float64 or int64 [M] each."""

    difference: np.ndarray  # mean over the queries
    half_width: np.ndarray  # of its 95 % confidence interval
    p_t_test: np.ndarray  # two-sided
    p_permutation: np.ndarray  # two-sided
    better: np.ndarray  # queries
    worse: np.ndarray
    equal: np.ndarray


def compare_paired(differences: np.ndarray, *, resamples: int, seed: int) -> Paired:
    """Tests the mean of each column of differences against 0.

    Args:
      differences: float [U, M].
      resamples: draws of the randomisation test; all 2^n assignments of signs to the n queries
        that differ are gone through where they are no more.
      seed: of the draws.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p_t_test = stats.ttest_1samp(differences, 0.0).pvalue
    return Paired(
        differences.mean(axis=0),
        half_width(differences),
        np.where(np.isnan(p_t_test), 1.0, p_t_test),  # one query alone, or none that differs
        permutation_test(differences, resamples=resamples, seed=seed),
        (differences > 0).sum(axis=0),
        (differences < 0).sum(axis=0),
        (differences == 0).sum(axis=0),
    )


def permutation_test(differences: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean under random signs: float64 [M]; arguments as above.

    A drawn p is (1 + b) / (1 + resamples), where b draws are at least as extreme, so that it is
    never 0 and the test keeps its level (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    differing = differences[(differences != 0).any(axis=1)].astype(np.float64)
    count = len(differing)
    if count < 2:
        return np.ones(differences.shape[1])
    if count <= math.log2(resamples):
        return stats.permutation_test(
            (differing,),
            _distance_from_0,
            permutation_type="samples",  # of one sample: its signs
            n_resamples=resamples,
            alternative="greater",
        ).pvalue

    def p_of(column: np.ndarray) -> float:
        random = np.random.default_rng(seed)

        def flipped(size: tuple[int, int]) -> np.ndarray:
            packed = random.integers(0, 256, (size[0], -(-count // 8)), np.uint8)
            return np.where(np.unpackbits(packed, axis=1, count=count), -column, column)

        return stats.monte_carlo_test(
            column,
            flipped,
            _distance_from_0,
            n_resamples=resamples,
            batch=max(1, _MAX_SIGNS // count),
            alternative="greater",
        ).pvalue

    return np.array([p_of(column) for column in differing.T])


def _distance_from_0(sample: np.ndarray, axis: int) -> np.ndarray:
    """Rounded: sums of the same numbers in another order may differ in their last bits."""
    return np.round(np.abs(sample.mean(axis=axis)), 12)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, [n]: the step-down procedure of Holm (1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]
