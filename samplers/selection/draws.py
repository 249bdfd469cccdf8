"""Resampling: how often each column comes up in draws by the softmax of its scores.

Only counts enter a loss, so no ids are drawn. Pure and without gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from samplers.candidates import Part
from samplers.random_numbers import for_rows, split_seed_in_step, uniform_bits, uniform_numbers

_RANGE = 2.0**30  # the masses of a row add up to at most this plus the number of columns


class Draw(NamedTuple):
    """Counts, and the weights that they were drawn by."""

    counts: tf.Tensor  # float32 [B, C], whole numbers; 0 in a row without any column to draw
    weights: tf.Tensor  # float32 [B, C], e^(s_bj - log q_j - highest_b)
    highest: tf.Tensor  # float32 [B], the maximum of s_bj - log q_j, finite where all are -inf


def resample(
    scores: tf.Tensor,
    log_q: tf.Tensor,
    n: tf.Tensor | int,
    seed: tf.Tensor,
    systematic: bool = True,
    part: Part | None = None,
) -> Draw:
    """Counts of n draws with weights w_b = softmax_j(s_bj - log q_j), for each row.

    Both ways have E[count_bj] = n · w_bj; counts are at least 0 and add up to n.
    - Systematic: the points (i + u) / n, i = 0 .. n - 1, with one uniform u for each row, fall
      into the intervals of lengths w_bj: count_bj is n · w_bj rounded down or up. The variance
      is less than that of the multinomial draw, and the work is that of a cumulative sum.
    - Multinomial: n independent draws. Several times slower.

    The weights become integers, so that cumulative sums are exact in whatever order they are
    added, on every device: a count is never negative, a column of weight 0 is never drawn. They
    are rounded up or down at random with the right expectation, or columns of very small weight
    would never be drawn at all. What is left is the rounding of float32 where n · Σ_{k≤j} w_k is
    compared with a point, at most about n · 1e-7.

    Args:
      scores: [B, C]; -inf where a column must not be drawn.
      log_q: [C] or [B, C]; a column with -inf, which no sampler draws, is not drawn either.
      n: draws for each row.
      seed: int [2].
      part: where the rows are a part of a batch, which: each has the draws that it has in it.
    """
    scores = tf.stop_gradient(tf.convert_to_tensor(scores))
    log_q = tf.cast(tf.stop_gradient(log_q), scores.dtype)
    correction = tf.where(tf.math.is_finite(log_q), log_q, float("inf"))
    logits = tf.cast(scores - correction, tf.float32)
    seeds = split_seed_in_step(seed, 2)
    columns = tf.shape(logits)[1]
    top = highest(logits)
    weights = tf.exp(logits - top[:, None])
    masses = integer_masses(weights, uniform_numbers([columns], seeds[0]), num_columns=columns)
    cumulative = tf.cumsum(masses, axis=1)
    total = cumulative[:, -1]
    if systematic:
        nothing, first = tf.zeros_like(total), first_points(logits, seeds[1], part)
        counts = systematic_counts(nothing, cumulative, total, n, first)
    else:
        counts = _multinomial(cumulative, total, n, seeds[1], part)
    return Draw(counts, weights, top)


def highest(logits: tf.Tensor) -> tf.Tensor:
    """The maximum of each row [B, C] → [B]; finite where all are -inf."""
    return tf.maximum(tf.reduce_max(logits, axis=1), logits.dtype.min)


def first_points(like: tf.Tensor, seed: tf.Tensor, part: Part | None = None) -> tf.Tensor:
    """The uniform number of each row: [B, ...] → [B]."""
    return for_rows(lambda rows: uniform_numbers([rows], seed), tf.shape(like)[0], part)


def integer_masses(weights: tf.Tensor, rounding: tf.Tensor, *, num_columns: tf.Tensor) -> tf.Tensor:
    """Integers in proportion to weights, whose sum over all columns of a row fits an int32.

    From weights [B, c] of some of the `num_columns` columns, between 0 and 1, and uniform numbers
    [c]: int32 [B, c], 0 where the weight is 0.
    """
    scale = _RANGE / tf.cast(num_columns, tf.float32)
    return tf.cast(weights * scale + rounding[None, :], tf.int32)  # rounds down


def systematic_counts(
    before: tf.Tensor,
    cumulative: tf.Tensor,
    total: tf.Tensor,
    n: tf.Tensor | int,
    first: tf.Tensor,
) -> tf.Tensor:
    """How many of the points (i + u) / n, i < n, fall into each column: float32 [B, c].

    Args:
      before: int32 [B], the sum of the masses of the columns before these.
      cumulative: int32 [B, c], the sum of the masses up to and with each of these.
      total: int32 [B], the sum over all columns.
      n: the number of points.
      first: [B], u.
    """
    draws = tf.cast(n, tf.float32)
    for_each = tf.math.divide_no_nan(draws, tf.cast(total, tf.float32))[:, None]

    def points_below(sums: tf.Tensor) -> tf.Tensor:
        # All steps are monotonic, in float32 too, so that no count is negative. As u < 1, the
        # first one is 0.
        points = tf.math.ceil(tf.cast(sums, tf.float32) * for_each - first[:, None])
        points = tf.minimum(points, draws)
        return tf.where(sums == total[:, None], draws, points)

    shifted = tf.concat([before[:, None], cumulative[:, :-1]], axis=1)
    return points_below(cumulative) - points_below(shifted)


def _multinomial(
    cumulative: tf.Tensor,
    total: tf.Tensor,
    n: tf.Tensor | int,
    seed: tf.Tensor,
    part: Part | None,
) -> tf.Tensor:
    """Counts of n independent draws, [B, C], by binary search in the cumulative masses."""
    shape = tf.shape(cumulative)
    rows, columns = shape[0], shape[1]
    bits = tf.cast(for_rows(lambda size: uniform_bits([size, n], seed), rows, part), tf.int64)
    # A uniform integer below the total; the remainder would not be uniform.
    scaled = bits * tf.cast(total, tf.int64)[:, None]
    target = tf.cast(tf.bitwise.right_shift(scaled, tf.constant(32, tf.int64)), tf.int32)

    def search(step: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        probe = found + step - 1
        sums = tf.gather(cumulative, tf.minimum(probe, columns - 1), batch_dims=1)
        return step // 2, tf.where((probe < columns) & (sums <= target), found + step, found)

    _, drawn = tf.while_loop(
        lambda step, found: step > 0, search, (tf.constant(2**29), tf.zeros_like(target))
    )
    cells = tf.range(rows)[:, None] * columns + drawn
    cells = tf.where(total[:, None] > 0, cells, -1)  # segment sums leave out what is negative
    ones = tf.ones_like(cells, tf.float32)
    counts = tf.math.unsorted_segment_sum(ones, cells, rows * columns)
    return tf.reshape(counts, shape)
