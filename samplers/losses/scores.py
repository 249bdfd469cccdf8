"""Scores of queries with candidates: dot products, multiplied and summed in float32."""

from __future__ import annotations

import tensorflow as tf


def at_least_float32(embeddings: tf.Tensor) -> tf.Tensor:
    """As float32 where they are of half precision: scores and losses are never that."""
    return embeddings if embeddings.dtype == tf.float64 else tf.cast(embeddings, tf.float32)


def positive_scores(query: tf.Tensor, positive: tf.Tensor) -> tf.Tensor:
    """Each query with its positive: [B, D] and [B, D] → [B]."""
    return tf.reduce_sum(at_least_float32(query) * at_least_float32(positive), axis=1)


def candidate_scores(query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Each query with candidates of its own: [B, D] and [B, N, D] → [B, N]."""
    return tf.linalg.matvec(at_least_float32(candidates), at_least_float32(query))
