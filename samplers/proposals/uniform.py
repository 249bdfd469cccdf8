"""Candidates drawn uniformly from the corpus."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from samplers.candidates import Candidates


@dataclasses.dataclass(frozen=True)
class UniformSampler:
    """Draws candidates uniformly and with replacement, also those that were never observed."""

    num_candidates: int

    def sample(self, shape: tf.Tensor | Sequence[Any], *, seed: tf.Tensor) -> Candidates:
        """Independent draws.

        Args:
          shape: of the draws, such as [C] or [B, N].
          seed: int [2], the only source of randomness.

        Returns:
          ids and log_q of that shape; log_q is -log N everywhere.
        """
        ids = tf.random.stateless_uniform(
            shape, seed, minval=0, maxval=self.num_candidates, dtype=tf.int64
        )
        return Candidates(ids, tf.fill(tf.shape(ids), -math.log(self.num_candidates)))
