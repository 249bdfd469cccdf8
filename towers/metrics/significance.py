"""Whether a paired difference over queries is more than chance.

Two tests of the mean difference: Student's paired t-test, and the randomisation test, which
supposes nothing about the distribution: where two rankings are equally good, each difference could
as well have the other sign (Fisher; for retrieval Smucker, Allan and Carterette, CIKM 2007,
doi:10.1145/1321440.1321528).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

_BLOCK = 4_000_000  # signs in memory at a time


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
    count = len(differences)
    mean = differences.mean(axis=0)
    spread = differences.std(axis=0, ddof=1) if count > 1 else np.zeros_like(mean)
    error = spread / np.sqrt(count)
    return Paired(
        mean,
        half_width(error, count),
        t_test(mean, error, count),
        permutation_test(differences, resamples=resamples, seed=seed),
        (differences > 0).sum(axis=0),
        (differences < 0).sum(axis=0),
        (differences == 0).sum(axis=0),
    )


def half_width(error: np.ndarray, count: int) -> np.ndarray:
    """Of the 95 % confidence interval of a mean of `count` values, from its standard error."""
    return _t_quantile(count) * error if count > 1 else np.zeros_like(error)


@functools.cache
def _t_quantile(count: int) -> float:
    """The t whose two-sided p is .05, by halving the interval that holds it."""
    low, high = 1.0, 16.0  # 12.7 for two values, 1.96 for very many
    for _ in range(40):
        middle = (low + high) / 2
        above = t_test(np.array([middle]), np.ones(1), count)[0] < 0.05
        low, high = (low, middle) if above else (middle, high)
    return low


def t_test(mean: np.ndarray, error: np.ndarray, count: int) -> np.ndarray:
    """Two-sided p of Student's t = mean / standard error: float64 [M].

    P(|T| >= t) = I_x(ν/2, 1/2) with x = ν / (ν + t²) and ν = count - 1, I the regularised
    incomplete beta function. 1 where the mean is 0, or there is one query alone.
    """
    if count < 2:
        return np.ones_like(mean)
    freedom = count - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)
        x = freedom / (freedom + t**2)
    return tf.math.betainc(
        tf.fill(x.shape, np.float64(freedom / 2)), tf.fill(x.shape, np.float64(0.5)), x
    ).numpy()


def permutation_test(differences: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean under random signs: float64 [M]; arguments as above.

    A drawn p is (1 + b) / (1 + resamples), where b draws are at least as extreme, so that it is
    never 0 and the test keeps its level (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    differing = differences[(differences != 0).any(axis=1)].astype(np.float64)
    count, observed = len(differing), np.abs(differing.sum(axis=0))
    # Sums of the same numbers in another order may differ in their last bits.
    observed = observed - 1e-12 * np.abs(differing).sum(axis=0)
    exact = count < 63 and 2**count <= resamples
    total = 2**count if exact else resamples
    draw, extreme = np.random.default_rng(seed), np.zeros(differences.shape[1], np.int64)
    block = max(1, _BLOCK // max(count, 1))
    for start in range(0, total, block):
        size = min(block, total - start)
        if exact:
            numbers = np.arange(start, start + size)
            negative = ((numbers[:, None] >> np.arange(count)) & 1).astype(np.uint8)
        else:
            packed = draw.integers(0, 256, (size, -(-count // 8)), np.uint8)
            negative = np.unpackbits(packed, axis=1, count=count)
        sums = differing.sum(axis=0) - 2 * (negative.astype(np.float64) @ differing)
        extreme += (np.abs(sums) >= observed).sum(axis=0)
    return extreme / total if exact else (1 + extreme) / (1 + total)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, [n]: the step-down procedure of Holm (1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
