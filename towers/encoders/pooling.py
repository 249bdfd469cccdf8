"""Several embeddings of one id → one."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from towers.encoders.initial import glorot, normal
from towers.legacy_keras import tf_keras


def mean_of(embeddings: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """The mean of those that are valid, zeros of none: [..., W, D] and bool [..., W] → [..., D]."""
    weights = tf.cast(valid, embeddings.dtype)[..., None]
    total = tf.reduce_sum(embeddings * weights, axis=-2)
    return total / tf.maximum(tf.reduce_sum(weights, axis=-2), 1)


class AttentionPooling(tf_keras.layers.Layer):
    """A mean whose weights a small network gives to each embedding, by its place as well.

    Yang et al., NAACL 2016, doi:10.18653/v1/N16-1174, eq. (5)-(7), with an embedding p_k of the
    place in place of their bias:
        weights = softmax_k(v · tanh(W e_k + p_k)), over the valid k

    At first v is 0, and all weights are equal.

    Args:
      width: places of a list.
      dim: D, of the embeddings.
      seed: of the initial weights.
    """

    def __init__(self, width: int, dim: int, *, seed: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._matrix = self.add_weight(name="matrix", shape=(dim, dim), initializer=glorot(seed))
        places = normal(0.1, (seed[0], seed[1] + 1))
        self._places = self.add_weight(name="places", shape=(width, dim), initializer=places)
        self._vector = self.add_weight(name="vector", shape=(dim,), initializer="zeros")
        self.built = True

    def call(self, embeddings: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
        """[..., W, D] and bool [..., W] → [..., D], zeros where none is valid."""
        hidden = tf.tanh(tf.tensordot(embeddings, self._matrix, 1) + self._places)
        logits = tf.tensordot(hidden, self._vector, 1)
        lowest = tf.constant(logits.dtype.min / 2, logits.dtype)
        weights = tf.nn.softmax(tf.where(valid, logits, lowest), axis=-1)
        weights = tf.where(valid, weights, tf.zeros_like(weights))
        return tf.reduce_sum(embeddings * weights[..., None], axis=-2)
