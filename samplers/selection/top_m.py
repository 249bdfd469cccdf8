"""Which of the candidates drawn for a query are kept: indices, without gradient."""

from __future__ import annotations

import tensorflow as tf


def top_m(scores: tf.Tensor, m: int, *, valid: tf.Tensor | None = None) -> tf.Tensor:
    """The M candidates with the highest scores in each row.

    Args:
      scores: [B, N].
      m: M, at most N.
      valid: bool [B, N], False for what is taken only where a row has too few others.

    Returns:
      int32 [B, M], columns of `scores`, the highest first, ties by column.
    """
    scores = tf.stop_gradient(scores)
    if valid is not None:
        scores = tf.where(valid, scores, -float("inf"))
    return tf.math.top_k(scores, k=m).indices


def first_true(condition: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The first column of each row at which a condition holds.

    Args:
      condition: bool [B, N].

    Returns:
      int64 [B], that column, 0 where there is none; and bool [B], whether there is one.
    """
    first = tf.math.top_k(tf.cast(condition, tf.float32), k=1).indices  # argmax breaks ties at will
    return tf.cast(first, tf.int64)[:, 0], tf.reduce_any(condition, axis=1)
