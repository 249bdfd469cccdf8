"""How popular candidates are, and draws by popularity, by another weight, or uniformly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates


def log_pop(counts: np.ndarray) -> np.ndarray:
    """log(f_j / Σ f): the log-probability that a random train row holds candidate j.

    The logQ correction of Yi et al., RecSys 2019, doi:10.1145/3298689.3346996, for candidates
    that come as the positives of other rows. Never clipped: a floor on the probability would
    silently stop the correction of rare candidates.

        log_pop([1, 0, 3])  # log .25, -inf, log .75

    From the train rows [N] of each candidate by dense id: float32 [N], computed in float64, -inf
    for candidates without train rows.

    Raises:
      ValueError: counts is not a vector, or has negative, non-finite or only zero entries.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1:
        raise ValueError(f"counts must have shape [N], one per candidate, got {counts.shape}.")
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ValueError(
            f"counts must be finite and at least 0, got {counts.min()} … {counts.max()}: "
            "pass the number of train rows of each candidate."
        )
    total = counts.sum()
    if total == 0:
        raise ValueError(
            f"counts must have an entry above 0, got {len(counts)} zeros: "
            "check that the train split is not empty."
        )
    with np.errstate(divide="ignore"):  # log 0 = -inf is what is meant
        return (np.log(counts) - np.log(total)).astype(np.float32)


class PopularityTable:
    """log pop of candidates, see `log_pop`, or where `frequency` is None that of each batch."""

    def __init__(self, method: str, frequency: np.ndarray | None) -> None:
        self._method = method
        self._table = None if frequency is None else tf.constant(log_pop(frequency))

    def of_batch(self, batch: Batch) -> tf.Tensor:
        """float32 [B], of the positives: `batch.log_pop`, or else from the counts."""
        if batch.log_pop is not None:
            return tf.stop_gradient(tf.cast(batch.log_pop, tf.float32))
        return self.of_ids(batch.candidate_ids)

    def of_ids(self, ids: tf.Tensor) -> tf.Tensor:
        """float32, of candidates by dense id, of any shape; a ValueError without counts."""
        if self._table is None:
            raise ValueError(
                f"{self._method} needs frequency=, got None: pass the number of train rows of "
                "each candidate, [N], or the sampling probability with every batch."
            )
        return tf.gather(self._table, ids)


class PopularitySampler:
    """Draws candidates with replacement, candidate j with probability w_j / Σ w.

    By inversion of the cumulative distribution, in float64, so that rare candidates of a large
    corpus keep their share. Candidates of weight 0 are never drawn.

    `log_q` [N] and the errors are those of `log_pop` of the weights [N].
    """

    def __init__(self, weights: np.ndarray) -> None:
        self.log_q = tf.constant(log_pop(weights))
        cumulative = np.cumsum(np.asarray(weights, np.float64))
        self._cumulative = tf.constant(cumulative / cumulative[-1])  # ends in exactly 1

    def sample(self, shape: tf.Tensor | Sequence[Any], *, seed: tf.Tensor) -> Candidates:
        """Independent draws of a shape, such as [C] or [B, N], from a seed, int [2]."""
        draws = tf.random.stateless_uniform(shape, seed, dtype=tf.float64)  # below 1
        points = tf.reshape(draws, [-1])
        ids = tf.searchsorted(self._cumulative, points, side="right", out_type=tf.int64)
        ids = tf.reshape(ids, tf.shape(draws))
        return Candidates(ids, tf.gather(self.log_q, ids))


@dataclasses.dataclass(frozen=True)
class UniformSampler:
    """Draws candidates uniformly and with replacement, also those that were never observed."""

    num_candidates: int

    def sample(self, shape: tf.Tensor | Sequence[Any], *, seed: tf.Tensor) -> Candidates:
        """As `PopularitySampler.sample`; log_q is -log N everywhere."""
        size = self.num_candidates
        ids = tf.random.stateless_uniform(shape, seed, minval=0, maxval=size, dtype=tf.int64)
        return Candidates(ids, tf.fill(tf.shape(ids), -math.log(size)))
