"""What a tower is: dense ids → embeddings, in two phases; towers of ids; what towers draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import tensorflow as tf

from towers.legacy_keras import tf_keras

Initializer = Callable[..., tf.Tensor]
Maybe: TypeAlias = tf.Tensor | None
Rows = Any  # tensors that belong to ids, in a nest; those of floats get a gradient

_BLOCK = 16_384  # ids that are embedded at a time, where all are
_BITS = 0xFFFFFFFF


class Tower(tf_keras.layers.Layer):
    """Dense ids → embeddings: `lookup` gathers rows, the layer itself turns rows into embeddings.

    A training step gathers outside its compiled region and takes the gradient with respect to the
    rows, so that the gradients of tables stay sparse.

    Attributes:
      dim: D, the size of the embeddings.
      vocabulary_size: V, the number of dense ids.
      normalize: whether scores are cosines.
      reads_history: whether a query is embedded by what it chose.
      cold_ids: string [C], raw ids without a dense id that the tower can embed all the same.
    """

    dim: int
    vocabulary_size: int
    normalize: bool
    reads_history: bool = False
    cold_ids: pa.Array = pa.array([], pa.string())

    def lookup(
        self, ids: Maybe, *, table: Maybe = None, positives: Maybe = None, seed: Maybe = None
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
        return self.scaled(rows)

    def scaled(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Of length 1 when scores are cosines, or as they are: [..., D]."""
        if not self.normalize:
            return embeddings
        wide = tf.cast(embeddings, tf.float32)  # squares are not added up in half precision
        return tf.cast(tf.math.l2_normalize(wide, axis=-1), embeddings.dtype)

    def embed(self, ids: tf.Tensor | None = None, **how: Any) -> tf.Tensor:
        """Both phases: ids [...] → [..., D], or the whole vocabulary; `how` is for `lookup`."""
        return self(self.lookup(ids, **how))

    def embed_history(self, ids: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
        """Queries with a history in place of the stored one, where the tower `reads_history`.

        Args:
          ids: int64 [B], dense ids.
          codes: int64 [B, W], dense ids of candidates + 1, the oldest first; 0 for none.
        """
        raise NotImplementedError

    def embed_cold(self) -> tf.Tensor:
        """The embeddings of `cold_ids`: float32 [C, D]."""
        return tf.zeros([0, self.dim])


class IdTower(Tower):
    """The embedding of an id is its row of a table.

    Args:
      lengths: float32 [V], what embeddings are multiplied by once scaled; None: 1.

    Attributes:
      table: float32 [V, D], at first N(0, init_stddev²), a function of the seed.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        *,
        normalize: bool = False,
        lengths: np.ndarray | None = None,
        init_stddev: float = 0.1,
        seed: tuple[int, int] = (10, 0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._lengths = None if lengths is None else tf.constant(lengths[:, None], tf.float32)
        self.normalize, self.dim, self.vocabulary_size = normalize, dim, vocabulary_size
        initial = normal(init_stddev, seed)
        self.table = self.add_weight("table", (vocabulary_size, dim), tf.float32, initial)
        self.built = True

    def lookup(
        self, ids: Maybe, *, table: Maybe = None, positives: Maybe = None, seed: Maybe = None
    ) -> tf.Tensor:
        """Rows of the table, or of another: ids [...] → float32 [..., D], then their lengths."""
        del positives, seed
        source = self.table if table is None else table
        rows = tf.convert_to_tensor(source) if ids is None else tf.gather(source, ids)
        if self._lengths is None:
            return rows
        lengths = self._lengths if ids is None else tf.gather(self._lengths, ids)
        return tf.concat([rows, tf.cast(lengths, rows.dtype)], axis=-1)

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Rows → embeddings [..., D]; of their lengths when scores are cosines."""
        if self._lengths is None:
            return self.scaled(rows)
        return self.scaled(rows[..., :-1]) * tf.stop_gradient(rows[..., -1:])


class GmfTower(IdTower):
    """The queries of generalized matrix factorization: the embedding is h ∘ row.

    He et al., WWW 2017, doi:10.1145/3038912.3052569, eq. (9) with a_out = the identity: the score
    h · (q ∘ c) is the dot product of h ∘ q and c, so that h is folded into the query.

    Attributes:
      factor_weights: h, float32 [D], at first 1, where the score is the dot product.
    """

    def __init__(self, vocabulary_size: int, dim: int, **kwargs: Any) -> None:
        super().__init__(vocabulary_size, dim, **kwargs)
        self.factor_weights = self.add_weight("factor_weights", (dim,), tf.float32, "ones")

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Rows → h ∘ rows [..., D]; of length 1 when scores are cosines."""
        return super().call(rows * self.factor_weights)


def in_blocks(embed: Callable[[tf.Tensor], tf.Tensor], size: int) -> tf.Tensor:
    """The embeddings of 0 … size - 1, not all at once: the rows of a block may need much memory."""
    starts = range(0, max(size, 1), _BLOCK)
    blocks = [tf.range(start, min(start + _BLOCK, size), dtype=tf.int64) for start in starts]
    return tf.concat([embed(block) for block in blocks], axis=0)


def normal(stddev: float, seed: tuple[int, int], *, zero_rows: int = 0) -> Initializer:
    """N(0, stddev²) for a table; its first `zero_rows` rows are 0."""

    def initial(shape: Any, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
        # A graph scales in place, eager operations copy; a concrete function logs no retracing.
        draw = tf.function(lambda: tf.random.stateless_normal(shape, seed, 0.0, stddev, dtype))
        values = draw.get_concrete_function()()
        kept = tf.range(shape[0]) >= zero_rows
        return tf.where(kept[:, None], values, 0.0) if zero_rows else values

    return initial


def glorot(seed: tuple[int, int]) -> Initializer:
    """Uniform within ±sqrt(6 / (inputs + outputs)), for a matrix [inputs, outputs].

    Glorot and Bengio, AISTATS 2010, eq. (16).
    """

    def initial(shape: Any, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
        limit = math.sqrt(6 / (shape[0] + shape[1]))
        return tf.random.stateless_uniform(shape, seed, -limit, limit, dtype=dtype)

    return initial


def uniform_by_id(ids: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A number in [0, 1) for each id, the same wherever the id occurs: float32 [...].

    The mixing steps of MurmurHash3 (Appleby) over 32 bits, in int64, which every device multiplies.
    """
    seed = tf.cast(seed, tf.int64)
    mixed = tf.bitwise.bitwise_and(tf.cast(ids, tf.int64), _BITS)
    for word in (seed[0], seed[1]):
        mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.bitwise_and(word, _BITS))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, shift))
            mixed = tf.bitwise.bitwise_and(mixed * factor, _BITS)
    return tf.cast(tf.bitwise.right_shift(mixed, 8), tf.float32) * 2.0**-24
