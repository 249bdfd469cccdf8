"""Candidates drawn in proportion to a weight, such as a power of their train rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from samplers.candidates import Candidates
from samplers.proposals.frequency import log_pop


class PopularitySampler:
    """Draws candidates with replacement, candidate j with probability w_j / Σ w.

    By inversion of the cumulative distribution, in float64, so that rare candidates of a large
    corpus keep their share. Candidates of weight 0 are never drawn.

    Args:
      weights: [N], at least 0, not all 0.

    Attributes:
      log_q: float32 [N], log-probability of each candidate; -inf where the weight is 0.

    Raises:
      ValueError: as `log_pop`, the rules for weights being those for counts.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self.log_q = tf.constant(log_pop(weights))
        cumulative = np.cumsum(np.asarray(weights, np.float64))
        self._cumulative = tf.constant(cumulative / cumulative[-1])  # ends in exactly 1

    def sample(self, shape: tf.Tensor | Sequence[Any], *, seed: tf.Tensor) -> Candidates:
        """Independent draws.

        Args:
          shape: of the draws, such as [C] or [B, N].
          seed: int [2], the only source of randomness.

        Returns:
          ids and log_q of that shape.
        """
        draws = tf.random.stateless_uniform(shape, seed, dtype=tf.float64)  # below 1
        places = tf.searchsorted(
            self._cumulative, tf.reshape(draws, [-1]), side="right", out_type=tf.int64
        )
        ids = tf.reshape(places, tf.shape(draws))
        return Candidates(ids, tf.gather(self.log_q, ids))
