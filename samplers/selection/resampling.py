"""Resampling the columns of dot-product scores for each query, at once or block by block."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from samplers.candidates import Part, at_least_float32, positive_scores
from samplers.losses.streamed_softmax import (
    Counted,
    Valid,
    dot_logsumexp,
    fold_columns,
    logsumexp_of_parts,
    scores_are_small,
    take_columns,
)
from samplers.random_numbers import split_seed_in_step, uniform_numbers
from samplers.selection.draws import first_points, resample, rounded_counts


@dataclasses.dataclass(eq=False)
class Resampling:
    """n draws from the columns for each query with weights softmax_j(q_b · v_j - log q_j).

    The draws, without gradient, do not depend on `block_size` but for the rounding of scores; in
    blocks they are "rounded" or "expected".
    """

    query: tf.Tensor  # [B, D]
    candidates: tf.Tensor  # [C, D]
    log_q: tf.Tensor  # [C]; columns with -inf are not drawn
    n: tf.Tensor | int  # draws for each query
    seed: tf.Tensor  # int [2]
    _: dataclasses.KW_ONLY
    valid: Valid | None = None  # which columns a row may draw; None for all
    draws: str = "rounded"  # this and `part` as in `resample`
    block_size: int | None = None  # columns scored at once; None for all
    part: Part | None = None

    def __post_init__(self) -> None:
        self._query = tf.stop_gradient(at_least_float32(self.query))
        self._candidates = tf.stop_gradient(at_least_float32(self.candidates))
        self._log_q = tf.cast(tf.stop_gradient(self.log_q), self._query.dtype)
        self._num_columns = tf.shape(self.candidates)[0]
        if self.block_size is not None:
            self._counted = self._counted_by_block(self.block_size)
            return
        scores = tf.matmul(self._query, self._candidates, transpose_b=True)
        scores = self._masked(scores, tf.range(self._num_columns))
        small = scores_are_small(self._query, self._candidates)
        self._draw = resample(scores, self._log_q, self.n, self.seed, self.draws, self.part, small)

    def mean_score(self) -> tuple[tf.Tensor, tf.Tensor]:
        """(1/m) Σ_j n_bj q_b · v_j, with gradients, and whether m = Σ_j n_bj > 0: [B] each."""
        counts = tf.cast(self._draw.counts, self._query.dtype)
        drawn = tf.reduce_sum(counts, axis=1)
        shares = tf.math.divide_no_nan(counts, drawn[:, None])
        means = tf.matmul(shares, at_least_float32(self.candidates))
        return positive_scores(self.query, means), drawn > 0

    def log_total(self, *, importance: bool = False) -> tf.Tensor:
        """log Σ_j n_bj e^(q_b · v_j), [B], with gradients for the queries and the candidates.

        With `importance` each term is divided by m w_bj, with m = Σ_j n_bj and w the weights of
        the draws, which are constants; needs all columns at once.
        """
        query, candidates, size = self.query, self.candidates, self.block_size
        if size is not None:
            bias = tf.zeros_like(self._log_q)
            return dot_logsumexp(query, candidates, bias, counted=self._counted, block_size=size)
        draw = self._draw
        parts, level, factors = draw.counts, draw.level, tf.ones_like(draw.factors)
        if importance:  # e^s / w = q · Σ_k e^(s_k - log q_k)
            factors = tf.math.reciprocal_no_nan(draw.factors)
            m = tf.maximum(tf.reduce_sum(parts, axis=1), 1.0)
            level += tf.where(draw.total > 0, tf.math.log(draw.total / m), tf.zeros_like(m))
        else:  # without another exponential
            parts *= draw.powers
        terms = (tf.cast(x, self._query.dtype) for x in (parts, level, factors))
        return logsumexp_of_parts(query, candidates, *terms)

    def column_sums(self, rows: tf.Tensor | None = None) -> tf.Tensor:
        """How often each column is drawn by all rows, or those where bool [B] is True.

        Whole numbers as float32 [C], exact where they are below 2^24, unless they are expected.
        """

        def sums(counts: tf.Tensor) -> tf.Tensor:
            # Not a product with ones: a GPU may round its factors.
            if rows is not None:
                counts *= tf.cast(rows, tf.float32)[:, None]
            return tf.reduce_sum(counts, axis=0)

        if self.block_size is None:
            return sums(self._draw.counts)

        def write(columns: tf.Tensor, carry: tuple[()]) -> Any:
            block = take_columns(self._candidates, columns)
            scores = tf.matmul(self._query, block, transpose_b=True)
            return carry, sums(self._counted.counts(scores, columns))

        size = self.block_size
        writes = (tf.float32, [size])
        _, blocks = fold_columns(write, (), self._num_columns, size, writes=writes)
        return blocks.concat()[: self._num_columns]

    def _masked(self, scores: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        if self.valid is None:
            return scores
        return tf.where(self.valid(columns), scores, -float("inf"))

    def _counted_by_block(self, block_size: int) -> Counted:
        seeds, size = split_seed_in_step(self.seed, 2), self._num_columns
        for_rows = first_points(self._query, seeds[1], self.part)
        for_columns = uniform_numbers([size], seeds[0])
        drawn = tf.math.is_finite(self._log_q)
        bias = tf.where(drawn, -self._log_q, -float("inf"))
        n, tables = tf.cast(self.n, self._query.dtype), (self._query, self._candidates)
        log_total = dot_logsumexp(*tables, bias, valid=self.valid, block_size=block_size)
        is_empty = log_total == -float("inf")
        level = tf.where(is_empty, float("inf"), log_total)  # or -inf - -inf would be NaN

        def counts(scores: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
            logits = self._masked(scores, columns) + take_columns(bias, columns, -float("inf"))
            expected = tf.cast(tf.exp(logits - level[:, None]) * n, tf.float32)
            if self.draws == "expected":
                return expected
            return rounded_counts(expected, for_rows, take_columns(for_columns, columns))

        # From log Σ e^(s - log q), a bound of s. A column that is drawn is not far below: at most
        # 40 and the logarithm of C, or it would hardly be drawn, and the span of log q.
        largest = tf.reduce_max(tf.where(drawn, self._log_q, self._log_q.dtype.min))
        return Counted(counts, tf.where(is_empty, tf.zeros_like(level), log_total + largest))
