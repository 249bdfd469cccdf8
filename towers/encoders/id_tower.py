"""Towers that know an id only: one row of a table for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from towers.encoders.tower import Maybe, Tower, normal


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
