"""A cache of candidates that were often drawn, shared by all queries (XIR)."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from samplers.candidates import Candidates
from samplers.proposals.popularity import log_pop
from samplers.state import renewed_variable, state_variable

_BLOCK = 128  # candidates whose occurrences are added up before a draw


class CandidateCache(tf.Module):
    """Draws candidates in proportion to how often they were drawn before, with replacement.

    Chen et al., NeurIPS 2022, Algorithm 2: the occurrences o start at 1, after each step they
    grow by its draws, and the cache is drawn anew ∝ o. So the cache needs no memory of its own:
    `sample` draws it at the start of a step from the occurrences at the end of the last one,
    uniformly at first. A step calls `sample`, then `record` with its draws, then `update`.

    Differs: o starts at 0 in the paper, where the first redraw would have nothing to go by;
    the published code starts at 1. Candidates without train rows stay at 0 and out of the cache:
    their weight in the loss would be infinite.

    Args:
      frequency: [N], train rows of each candidate.
      from_drawn: draw from the candidates that the last step drew instead of the whole corpus,
        as the published code does; from the corpus before the first step.

    Attributes:
      occurrences, drawn: int64 [N], o and the draws of the last loss.
    """

    def __init__(self, frequency: np.ndarray, *, from_drawn: bool = False) -> None:
        super().__init__(name="candidate_cache")
        start = tf.constant(np.isfinite(log_pop(frequency)).astype(np.int64))
        self.occurrences = state_variable(start, "occurrences")
        self.drawn = renewed_variable(tf.zeros_like(start), "drawn")
        nothing = tf.zeros_like(start)
        self._last_drawn = state_variable(nothing, "last_drawn") if from_drawn else None

    def sample(self, size: int, *, seed: tf.Tensor) -> Candidates:
        """The cache of a step: ids [C] and log(o_j / Σ o), a function of state and seed."""
        weights = tf.convert_to_tensor(self.occurrences)
        if self._last_drawn is not None:
            drawn = self._last_drawn > 0
            again = tf.where(drawn, weights, tf.zeros_like(weights))
            weights = tf.where(tf.reduce_any(drawn), again, weights)
        # Block by block, then in the blocks that are drawn: a cumulative sum of all takes longer.
        nothing = tf.zeros([-weights.shape[0] % _BLOCK], weights.dtype)
        blocks = tf.reshape(tf.concat([weights, nothing], axis=0), [-1, _BLOCK])
        ends = tf.cumsum(tf.cast(tf.reduce_sum(blocks, axis=1), tf.float64))  # whole numbers, exact
        points = tf.random.stateless_uniform([size], seed, dtype=tf.float64) * ends[-1]  # below it
        block = tf.searchsorted(ends, points, side="right", out_type=tf.int64)
        in_block = tf.cast(tf.gather(blocks, block), tf.float64)
        after = tf.cumsum(in_block, axis=1, reverse=True, exclusive=True)
        passed = tf.gather(ends, block)[:, None] - after <= points[:, None]
        ids = block * _BLOCK + tf.math.count_nonzero(passed, axis=1)
        log_q = tf.math.log(tf.cast(tf.gather(weights, ids), tf.float64) / ends[-1])
        return Candidates(ids, tf.cast(log_q, tf.float32))

    def record(self, ids: tf.Tensor, counts: tf.Tensor) -> None:
        """Notes the draws of a step, until `update`: ids [n] with repetitions, counts [n].

        The one thing that a loss writes. A loss that no `update` follows changes no later draw.
        """
        size = self.drawn.shape[0]
        sums = tf.math.unsorted_segment_sum(tf.cast(counts, tf.float64), ids, size)
        self.drawn.assign(tf.cast(sums, tf.int64))

    def update(self) -> None:
        self.occurrences.assign_add(self.drawn)
        if self._last_drawn is not None:
            self._last_drawn.assign(self.drawn)
