"""Resampling: how often each column comes up in draws by the softmax of its scores.

Only counts enter a loss, so no ids are drawn. Pure and without gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from samplers.candidates import Part
from samplers.random_numbers import for_rows, split_seed_in_step, uniform_bits, uniform_numbers

DRAWS = ("rounded", "independent", "expected")
DRAWS_IN_BLOCKS = ("rounded", "expected")  # without a sum over all columns before each
_RANGE = 2.0**30  # the masses of a row add up to at most this plus the number of columns


class Draw(NamedTuple):
    """Counts, and the weights that they were drawn by, powers_bj · factors_j / total_b."""

    counts: tf.Tensor  # float32 [B, C]; 0 in a row without any column to draw
    powers: tf.Tensor  # float32 [B, C], e^(s_bj - level_b)
    level: tf.Tensor  # float32 [B], finite
    factors: tf.Tensor  # float32 [C], 1 / q_j over the largest of them, 0 where q_j is 0
    total: tf.Tensor  # float32 [B]


def resample(
    scores: tf.Tensor,
    log_q: tf.Tensor,
    n: tf.Tensor | int,
    seed: tf.Tensor,
    draws: str = "rounded",
    part: Part | None = None,
    small: tf.Tensor | bool = False,
) -> Draw:
    """Counts of n draws with weights w_b = softmax_j(s_bj - log q_j), for each row.

    All have E[count_bj] = n · w_bj.
    - "rounded": n · w_bj rounded down or up, see `rounded_counts`. Elementwise, so the cheapest
      one; a row has n draws only on average, with a standard deviation of at most √C / 2.
    - "independent": n multinomial draws, by a binary search for each in a cumulative sum. There the
      weights become integers, rounded at random, or columns of very small weight would never be
      drawn. So the sum is exact on every device, and no column of weight 0 is drawn.
    - "expected": n · w_bj itself, without randomness.

    Args:
      scores: [B, C]; -inf where a column must not be drawn.
      log_q: [C]; a column with -inf, which no sampler draws, is not drawn either.
      n: draws for each row.
      seed: int [2].
      draws: one of `DRAWS`.
      part: where the rows are a part of a batch, which: each has the draws that it has in it.
      small: whether every e^s is a normal number, so that no maximum is looked for.
    """

    def drawable() -> tf.Tensor:  # made twice, or XLA would keep it between both uses
        return tf.where(known, scores, -float("inf"))

    def highest() -> tf.Tensor:  # finite where all are -inf
        return tf.maximum(tf.reduce_max(drawable(), axis=1), scores.dtype.min)

    scores = tf.stop_gradient(tf.cast(scores, tf.float32))
    log_q = tf.cast(tf.stop_gradient(log_q), tf.float32)
    known = tf.math.is_finite(log_q)
    smallest = tf.reduce_min(tf.where(known, log_q, log_q.dtype.max))
    factors = tf.where(known, tf.exp(smallest - log_q), tf.zeros_like(log_q))
    level = tf.cond(tf.convert_to_tensor(small), lambda: tf.zeros_like(scores[:, 0]), highest)
    powers = tf.exp(drawable() - level[:, None])
    total = tf.linalg.matvec(powers, factors)
    seeds = split_seed_in_step(seed, 2)
    for_columns = uniform_numbers([tf.size(log_q)], seeds[0])
    if draws in DRAWS_IN_BLOCKS:
        by_row = tf.math.divide_no_nan(tf.cast(n, tf.float32), total)
        counts = powers * factors * by_row[:, None]
        if draws == "rounded":
            counts = rounded_counts(counts, first_points(scores, seeds[1], part), for_columns)
    else:
        weights = powers * factors
        weights = tf.math.divide_no_nan(weights, tf.reduce_max(weights, axis=1, keepdims=True))
        scale = _RANGE / tf.cast(tf.size(log_q), tf.float32)  # so that the sum fits an int32
        cumulative = tf.cumsum(tf.cast(weights * scale + for_columns, tf.int32), axis=1)
        counts = _multinomial(cumulative, n, seeds[1], part)
    return Draw(counts, powers, level, factors, total)


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


def first_points(like: tf.Tensor, seed: tf.Tensor, part: Part | None = None) -> tf.Tensor:
    """The uniform number of each row: [B, ...] → [B]."""
    return for_rows(lambda rows: uniform_numbers([rows], seed), tf.shape(like)[0], part)


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
