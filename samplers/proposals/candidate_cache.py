"""A cache of candidates that were often drawn, shared by all queries (XIR)."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from samplers.candidates import Candidates
from samplers.proposals.popularity import log_pop
from samplers.state import renewed_variable, state_variable


class CandidateCache(tf.Module):
    """Draws candidates in proportion to how often they were drawn before, with replacement.

    Chen et al., NeurIPS 2022, Algorithm 2: the occurrences o start at 1, after each step they
    grow by its draws, and the cache is drawn anew ∝ o. So the cache needs no memory of its own:
    `sample` draws it at the start of a step from the occurrences at the end of the last one,
    uniformly at first. A step calls `sample`, then `record` with its draws, then `update`.

    Differs: o starts at 0 in the paper, where the first redraw would have nothing to go by;
    the published code starts at 1. Candidates without train rows stay at 0 and out of the cache:
    their weight in the loss would be infinite.

    A step passes over the sums of blocks of about √N / 32 candidates, and over the blocks that are
    drawn from; over all candidates it does not.

    Args:
      frequency: [N], train rows of each candidate.
      from_drawn: draw from the candidates that the last step drew instead of the whole corpus,
        as the published code does; from the corpus before the first step.

    Attributes:
      occurrences: int64 [N], o.
      ids, drawn: int64 [n] each, what the last loss could draw, with repetitions, and how often it
        did.
    """

    def __init__(self, frequency: np.ndarray, *, from_drawn: bool = False) -> None:
        super().__init__(name="candidate_cache")
        start = np.isfinite(log_pop(frequency)).astype(np.int64)
        self.occurrences = state_variable(tf.constant(start), "occurrences")
        self._block = max(1, math.isqrt(len(start)) // 32)
        sums = np.add.reduceat(start, np.arange(0, len(start), self._block))
        self._in_blocks = state_variable(sums, "in_blocks")
        nothing = tf.zeros([0], tf.int64)
        self.ids = renewed_variable(nothing, "ids", shape=[None])
        self.drawn = renewed_variable(nothing, "drawn", shape=[None])
        self._last_drawn = None
        if from_drawn:
            self._last_drawn = state_variable(nothing, "last_drawn", shape=[None])

    def sample(self, size: int, *, seed: tf.Tensor) -> Candidates:
        """The cache of a step: ids [C] and log(o_j / Σ o), a function of state and seed."""
        points = tf.random.stateless_uniform([size], seed, dtype=tf.float64)
        if self._last_drawn is None:
            ids, total = self._of_corpus(points)
        else:
            last = tf.convert_to_tensor(self._last_drawn)
            ids, total = tf.cond(
                tf.size(last) > 0,
                lambda: self._of_last_drawn(last, points),
                lambda: self._of_corpus(points),
            )
        log_q = tf.math.log(tf.cast(tf.gather(self.occurrences, ids), tf.float64) / total)
        return Candidates(ids, tf.cast(log_q, tf.float32))

    def _of_corpus(self, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The candidates at points in [0, 1) of the cumulative occurrences, and their total."""
        # Block by block, then in the blocks that are drawn: a cumulative sum of all takes longer.
        ends = tf.cumsum(tf.cast(self._in_blocks, tf.float64))  # whole numbers, exact
        points *= ends[-1]  # below it
        block = tf.searchsorted(ends, points, side="right", out_type=tf.int64)
        first, size = block[:, None] * self._block, self.occurrences.shape[0]
        places = first + tf.range(self._block, dtype=tf.int64)
        in_block = tf.gather(self.occurrences, tf.minimum(places, size - 1))
        in_block = tf.cast(tf.where(places < size, in_block, 0), tf.float64)
        after = tf.cumsum(in_block, axis=1, reverse=True, exclusive=True)
        passed = tf.gather(ends, block)[:, None] - after <= points[:, None]
        return first[:, 0] + tf.math.count_nonzero(passed, axis=1), ends[-1]

    def _of_last_drawn(self, last: tf.Tensor, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `_of_corpus`, of these ids alone, which may repeat."""
        last = tf.sort(last)
        is_first = tf.concat([[True], last[1:] != last[:-1]], axis=0)
        weights = tf.where(is_first, tf.gather(self.occurrences, last), 0)
        ends = tf.cumsum(tf.cast(weights, tf.float64))
        return tf.gather(last, tf.searchsorted(ends, points * ends[-1], side="right")), ends[-1]

    def expect(self, ids: tf.Tensor) -> None:
        """Says what a loss will draw from: ids [n] with repetitions; not to be compiled by XLA.

        XLA keeps the shapes of variables, so that `drawn` must have its own before.
        """
        self.ids.assign(ids)
        self.drawn.assign(tf.zeros_like(ids))

    def record(self, counts: tf.Tensor) -> None:
        """Notes how often each of the expected ids was drawn, until `update`: counts [n].

        A loss that no `update` follows changes no later draw.
        """
        self.drawn.assign(tf.cast(counts, tf.int64))

    def update(self) -> None:
        """Adds what was drawn to the occurrences."""
        ids, drawn = tf.convert_to_tensor(self.ids), tf.convert_to_tensor(self.drawn)
        self.occurrences.scatter_add(tf.IndexedSlices(drawn, ids))
        self._in_blocks.scatter_add(tf.IndexedSlices(drawn, ids // self._block))
        if self._last_drawn is not None:
            self._last_drawn.assign(tf.boolean_mask(ids, drawn > 0))
