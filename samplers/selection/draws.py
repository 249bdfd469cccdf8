"""Resampling: how often each column comes up in draws by the softmax of its scores.

Only counts enter a loss, so no ids are drawn. Pure and without gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from samplers.candidates import Part
from samplers.random_numbers import for_rows, split_seed_in_step, uniform_bits, uniform_numbers

DRAWS = ("rounded", "systematic", "independent", "expected")
DRAWS_IN_BLOCKS = ("rounded", "expected")  # without a sum over all columns before each
_RANGE = 2.0**30  # the masses of a row add up to at most this plus the number of columns


class Draw(NamedTuple):
    """Counts, and the weights that they were drawn by."""

    counts: tf.Tensor  # float32 [B, C]; 0 in a row without any column to draw
    weights: tf.Tensor  # float32 [B, C], e^(s_bj - log q_j - highest_b)
    highest: tf.Tensor  # float32 [B], the maximum of s_bj - log q_j, finite where all are -inf


def resample(
    scores: tf.Tensor,
    log_q: tf.Tensor,
    n: tf.Tensor | int,
    seed: tf.Tensor,
    draws: str = "rounded",
    part: Part | None = None,
) -> Draw:
    """Counts of n draws with weights w_b = softmax_j(s_bj - log q_j), for each row.

    All have E[count_bj] = n · w_bj.
    - "rounded": n · w_bj rounded down or up, see `rounded_counts`. Elementwise, so the cheapest
      one; a row has n draws only on average, with a standard deviation of at most √C / 2.
    - "systematic": the points (i + u) / n, i = 0 .. n - 1, with one uniform u for each row, fall
      into the intervals of lengths w_bj. Rounded down or up, too, and n in each row, by a
      cumulative sum.
    - "independent": n multinomial draws, by a binary search for each.
    - "expected": n · w_bj itself, without randomness.

    The weights of a cumulative sum become integers, so that it is exact in whatever order it is
    added, on every device: a count is never negative, a column of weight 0 is never drawn. They
    are rounded up or down at random with the right expectation, or columns of very small weight
    would never be drawn at all. What is left is the rounding of float32 where n · Σ_{k≤j} w_k is
    compared with a point, at most about n · 1e-7.

    Args:
      scores: [B, C]; -inf where a column must not be drawn.
      log_q: [C] or [B, C]; a column with -inf, which no sampler draws, is not drawn either.
      n: draws for each row.
      seed: int [2].
      draws: one of `DRAWS`.
      part: where the rows are a part of a batch, which: each has the draws that it has in it.
    """
    scores = tf.stop_gradient(tf.convert_to_tensor(scores))
    log_q = tf.cast(tf.stop_gradient(log_q), scores.dtype)
    correction = tf.where(tf.math.is_finite(log_q), log_q, float("inf"))
    logits = tf.cast(scores - correction, tf.float32)
    top = highest(logits)
    weights = tf.exp(logits - top[:, None])
    seeds = split_seed_in_step(seed, 2)
    for_columns = uniform_numbers([tf.shape(logits)[1]], seeds[0])
    if draws in DRAWS_IN_BLOCKS:
        total = tf.reduce_sum(weights, axis=1)
        expected = weights * tf.math.divide_no_nan(tf.cast(n, tf.float32), total)[:, None]
        if draws == "expected":
            return Draw(expected, weights, top)
        rows = first_points(logits, seeds[1], part)
        return Draw(rounded_counts(expected, rows, for_columns), weights, top)
    masses = integer_masses(weights, for_columns)
    cumulative = tf.cumsum(masses, axis=1)
    if draws == "systematic":
        counts = systematic_counts(cumulative, n, first_points(logits, seeds[1], part))
    else:
        counts = _multinomial(cumulative, n, seeds[1], part)
    return Draw(counts, weights, top)


def rounded_counts(expected: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Whole numbers with the expectation n · w_bj: float32 [B, C].

        count_bj = floor(n · w_bj + frac(u_b + v_j))

    frac(u_b + v_j) is uniform, and independent of that of another column of the row. So a count is
    rounded up with the probability of its fraction f, the variance of a row's sum is Σ_j f (1 - f).

    Args:
      expected: [B, C], n · w_bj.
      rows, columns: uniform numbers u [B] and v [C].
    """
    offset = rows[:, None] + columns[None, :]
    return tf.floor(expected + (offset - tf.floor(offset)))


def highest(logits: tf.Tensor) -> tf.Tensor:
    """The maximum of each row [B, C] → [B]; finite where all are -inf."""
    return tf.maximum(tf.reduce_max(logits, axis=1), logits.dtype.min)


def first_points(like: tf.Tensor, seed: tf.Tensor, part: Part | None = None) -> tf.Tensor:
    """The uniform number of each row: [B, ...] → [B]."""
    return for_rows(lambda rows: uniform_numbers([rows], seed), tf.shape(like)[0], part)


def integer_masses(weights: tf.Tensor, rounding: tf.Tensor) -> tf.Tensor:
    """Integers in proportion to weights, whose sum over the columns of a row fits an int32.

    From weights [B, C] between 0 and 1, and uniform numbers [C]: int32 [B, C], 0 where the weight
    is 0.
    """
    scale = _RANGE / tf.cast(tf.shape(weights)[1], tf.float32)
    return tf.cast(weights * scale + rounding[None, :], tf.int32)  # rounds down


def systematic_counts(cumulative: tf.Tensor, n: tf.Tensor | int, first: tf.Tensor) -> tf.Tensor:
    """How many of the points (i + u) / n, i < n, fall into each column: float32 [B, C].

    Args:
      cumulative: int32 [B, C], the sum of the masses up to and with each column.
      n: the number of points.
      first: [B], u.
    """
    draws, total = tf.cast(n, tf.float32), cumulative[:, -1:]
    for_each = tf.math.divide_no_nan(draws, tf.cast(total, tf.float32))
    # All steps are monotonic, in float32 too, so that no count is negative. As u < 1, the first
    # one is 0.
    below = tf.math.ceil(tf.cast(cumulative, tf.float32) * for_each - first[:, None])
    below = tf.where(cumulative == total, draws, tf.minimum(below, draws))
    below = tf.where(total > 0, below, tf.zeros_like(below))
    return below - tf.concat([tf.zeros_like(below[:, :1]), below[:, :-1]], axis=1)


def _multinomial(
    cumulative: tf.Tensor, n: tf.Tensor | int, seed: tf.Tensor, part: Part | None
) -> tf.Tensor:
    """Counts of n independent draws, [B, C], by binary search in the cumulative masses."""
    shape, total = tf.shape(cumulative), cumulative[:, -1]
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
