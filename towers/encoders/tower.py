"""What a tower is: dense ids → embeddings, in two phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import tensorflow as tf

from towers.legacy_keras import tf_keras

Rows = Any  # tensors that belong to ids, in a nest; those of floats get a gradient

_BLOCK = 16_384  # ids that are embedded at a time, where all are


class Tower(tf_keras.layers.Layer):
    """Dense ids → embeddings: `lookup` gathers rows, the layer itself turns rows into embeddings.

    A training step gathers outside its compiled region and takes the gradient with respect to the
    rows, so that the gradients of tables stay sparse.

    Attributes:
      dim: D, the size of the embeddings.
      vocabulary_size: V, the number of dense ids.
      normalize: whether scores are cosines.
      cold_ids: string [C], raw ids without a dense id that the tower can embed all the same.
    """

    dim: int
    vocabulary_size: int
    normalize: bool
    cold_ids: pa.Array = pa.array([], pa.string())

    def lookup(
        self,
        ids: tf.Tensor | None,
        *,
        table: tf.Tensor | None = None,
        positives: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> Rows:
        """The rows of ids [...], or of the whole vocabulary for None.

        Args:
          ids: dense ids.
          table: [V, D'], what to gather from in place of the tower's own table of ids.
          positives: dense ids of the other side, [...]: the candidate that each query is trained
            on, which a tower that knows what its query chose must not see.
          seed: int [2], of what a tower drops at random in training; None: nothing.
        """
        raise NotImplementedError

    def call(self, rows: Rows) -> tf.Tensor:
        """Rows → embeddings [..., D]; of length 1 when scores are cosines."""
        raise NotImplementedError

    def scaled(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Of length 1 when scores are cosines, or as they are: [..., D]."""
        if not self.normalize:
            return embeddings
        wide = tf.cast(embeddings, tf.float32)  # squares are not added up in half precision
        return tf.cast(tf.math.l2_normalize(wide, axis=-1), embeddings.dtype)

    def embed(self, ids: tf.Tensor | None = None, **how: Any) -> tf.Tensor:
        """Both phases: ids [...] → [..., D], or the whole vocabulary; `how` is for `lookup`."""
        return self(self.lookup(ids, **how))

    def embed_cold(self) -> tf.Tensor:
        """The embeddings of `cold_ids`: float32 [C, D]."""
        return tf.zeros([0, self.dim])


def in_blocks(embed: Callable[[tf.Tensor], tf.Tensor], size: int) -> tf.Tensor:
    """The embeddings of 0 … size - 1, not all at once: the rows of a block may need much memory."""
    starts = range(0, max(size, 1), _BLOCK)
    blocks = [tf.range(start, min(start + _BLOCK, size), dtype=tf.int64) for start in starts]
    return tf.concat([embed(block) for block in blocks], axis=0)
