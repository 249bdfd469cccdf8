"""The query model of a bundle: raw query ids → embeddings, without Keras."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from towers.encoders.feature_tower import FeatureTower
from towers.encoders.tower import Tower


class QueryModel(tf.Module):
    """Raw query ids → embeddings; a plain module, so that serving needs no Keras.

    Args:
      raw_ids: Q ids; the row of an id is its place among them.
      embed_rows: int64 [B] → the embeddings of rows, [B, D], over the temperature.
      kept: the variables that `embed_rows` reads.
    """

    def __init__(
        self,
        raw_ids: Sequence[str],
        embed_rows: Callable[[tf.Tensor], tf.Tensor],
        kept: Sequence[tf.Variable],
    ) -> None:
        super().__init__(name="query_model")
        keys = tf.constant(raw_ids, tf.string)
        rows = tf.range(tf.size(keys, tf.int64), dtype=tf.int64)
        self._row_of = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(keys, rows), default_value=-1
        )
        self._embed_rows, self._kept = embed_rows, list(kept)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="query_id")])
    def embed(self, query_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """string [B] → embedding float32 [B, D], zeros for unknown ids, and known bool [B]."""
        rows = self._row_of.lookup(query_id)
        known = rows >= 0
        embedding = tf.cast(self._embed_rows(tf.maximum(rows, 0)), tf.float32)
        return {"embedding": tf.where(known[:, None], embedding, 0.0), "known": known}


def make_query_model(
    raw_ids: Sequence[str], tower: Tower, embeddings: np.ndarray, temperature: float
) -> QueryModel:
    """What a bundle holds for a trained tower of queries.

    A feature tower looks up what is known of an id inside the graph, and computes its embedding;
    of other towers the graph holds the embeddings themselves.

    Args:
      raw_ids: of the vocabulary, then the cold ids of the tower.
      tower: of queries.
      embeddings: float32 [V, D] by dense id, over the temperature.
      temperature: what embeddings are divided by.
    """
    if not isinstance(tower, FeatureTower):
        table = tf.Variable(embeddings, trainable=False, name="query_embeddings")
        return QueryModel(raw_ids, lambda rows: tf.gather(table, rows), [table])
    inputs: list[tf.Variable] = []

    def keep(array: np.ndarray) -> tf.Variable:
        inputs.append(tf.Variable(array, trainable=False))
        return inputs[-1]

    source = tower.source.followed_by(tower.cold).as_tensors(keep)
    return QueryModel(
        raw_ids,
        lambda rows: tower.embed_source(source, rows) / temperature,
        [*inputs, *tower.variables],
    )
