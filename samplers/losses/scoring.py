"""Scores of queries with candidates: dot products, multiplied and summed in float32."""

from __future__ import annotations

import tensorflow as tf

from samplers.losses.streamed_softmax import at_least_float32, own_scores


def positive_scores(query: tf.Tensor, positive: tf.Tensor) -> tf.Tensor:
    """Each query with its positive: [B, D] and [B, D] → float32 [B]."""
    return tf.cast(own_scores(query, positive), tf.float32)


def candidate_scores(query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Each query with candidates of its own: [B, D] and [B, N, D] → float32 [B, N]."""
    scores = tf.linalg.matvec(at_least_float32(candidates), at_least_float32(query))
    return tf.cast(scores, tf.float32)
