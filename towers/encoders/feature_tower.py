"""A tower that knows attributes, and what a query chose before, beside the id or without it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import tensorflow as tf

from towers.data.attributes import Column
from towers.data.history import History
from towers.encoders.feature_source import FeatureSource
from towers.encoders.initial import glorot, normal
from towers.encoders.pooling import AttentionPooling, mean_of
from towers.encoders.tower import Tower, in_blocks
from towers.encoders.tower_config import TowerConfig
from towers.legacy_keras import tf_keras


class FeatureTower(Tower):
    """The sum of a row for the id, the pooled history, and a network over all but the id.

        embedding = row(id) + pool(rows of the history) + MLP(columns || pool(...))

    A categorical value has a row of a table of its column; the rows of several values, and of the
    n-grams of a text, are averaged; numbers enter as they are, each beside whether it is there.
    The network has ReLU layers and a linear one on top.

    An id without train rows has no row of its own: such ids are embedded by the rest alone, and so
    are those of `cold_ids`. So that the rest can do without the row, a step of training drops the
    rows of a share of the ids (Volkovs et al., DropoutNet, NIPS 2017), each in all of its places.

    Args:
      source: what is known by dense id.
      cold: what is known of `cold_ids`.
      columns: how to read the columns of both.
      config: settings of the tower.
      dim: D, size of the embeddings, of the rows of ids, and of those of the history.
      history: of queries, for training; None: the tower has none.
      has_table: whether ids have rows.
      items: [N, D], the table that the history gathers from; None: one of its own.
      num_items: N, of that one.
      cold_ids: raw ids of the rows of `cold`.
      seed: of the initial weights; another one for every tower.
    """

    def __init__(
        self,
        source: FeatureSource,
        cold: FeatureSource,
        columns: tuple[Column, ...],
        config: TowerConfig,
        dim: int,
        *,
        history: History | None = None,
        has_table: bool = True,
        items: tf.Variable | None = None,
        num_items: int = 0,
        cold_ids: pa.Array | None = None,
        normalize: bool = False,
        init_stddev: float = 0.1,
        seed: tuple[int, int] = (10, 0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dim, self.vocabulary_size, self.normalize = dim, len(source.rows), normalize
        self.columns, self.source, self.cold = columns, source, cold
        self.cold_ids = pa.array([], pa.string()) if cold_ids is None else cold_ids
        self._tensors = source.as_tensors(tf.constant)
        self._history = history
        self._id_dropout = config.id_dropout if columns or history is not None else 0.0
        self._seed, self._stddev, self._weights_made = seed, init_stddev, 0
        self.table = self._table("table", self.vocabulary_size, dim) if has_table else None
        self.items = items
        if history is not None and items is None:
            self.items = self._table("items", num_items, dim)
        self._value_tables = {
            column.name: self._table(f"values_{number}", column.num_codes + 1, config.feature_dim)
            for number, column in enumerate(columns)
            if column.kind != "numeric"
        }
        self._attention = None
        if history is not None and config.history_pooling == "attention":
            self._attention = AttentionPooling(
                history.length, dim, seed=self._next_seed(), name="attention"
            )
        self._dense = self._network(config)
        self.built = True

    def lookup(
        self,
        ids: tf.Tensor | None,
        *,
        table: tf.Tensor | None = None,
        positives: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> dict[str, Any]:
        """What `rows` gives for dense ids; queries with `positives` do not see these."""
        assert table is None, "a feature tower has no embeddings of a graph"
        if ids is None:
            ids = tf.range(self.vocabulary_size, dtype=tf.int64)
        inputs = self._tensors.inputs(ids, self.columns)
        if self._history is not None and positives is not None:
            inputs["history"] = self._history.earlier(ids, positives)
        return self.rows(inputs, seed=seed)

    def rows(self, inputs: dict[str, Any], *, seed: tf.Tensor | None = None) -> dict[str, Any]:
        """Rows of the tables for what `FeatureSource.inputs` knows, [...]; columns are averaged.

        Returns:
          `columns` [..., sum of their widths]; where the tower has them `id` [..., D], `history`
          [..., H, D] and `in_history` bool [..., H].
        """
        parts = [
            self._column_rows(column, inputs["columns"][column.name]) for column in self.columns
        ]
        found: dict[str, Any] = {"columns": tf.concat(parts, axis=-1)} if parts else {}
        if self.table is not None:
            known = inputs["has_id"]
            if seed is not None and self._id_dropout > 0:
                known &= uniform_by_id(inputs["row"], seed) >= self._id_dropout
            own = tf.gather(self.table, inputs["row"])
            found["id"] = tf.where(known[..., None], own, tf.zeros_like(own))
        if self._history is not None:
            codes = inputs["history"]
            found["history"] = tf.gather(self.items, tf.maximum(codes - 1, 0))
            found["in_history"] = codes > 0
        return found

    def call(self, rows: dict[str, Any]) -> tf.Tensor:
        """Rows → embeddings [..., D]; of length 1 when scores are cosines."""
        terms = [rows["id"]] if "id" in rows else []
        known = [rows["columns"]] if "columns" in rows else []
        if "history" in rows:
            pool = mean_of if self._attention is None else self._attention
            terms.append(pool(rows["history"], rows["in_history"]))
            known.append(terms[-1])
        if known:
            hidden = tf.concat(known, axis=-1)
            for layer in self._dense:
                hidden = layer(hidden)
            terms.append(hidden)
        embedding = tf.add_n(terms)
        return self.scaled(embedding)

    def embed_cold(self) -> tf.Tensor:
        """The embeddings of `cold_ids`: float32 [C, D]."""
        tensors = self.cold.as_tensors(tf.constant)
        return in_blocks(lambda ids: self.embed_source(tensors, ids), len(self.cold_ids))

    def embed_source(self, source: FeatureSource, ids: tf.Tensor) -> tf.Tensor:
        """The embeddings of rows [...] of another source with the same columns: [..., D]."""
        return self(self.rows(source.inputs(ids, self.columns)))

    def _column_rows(self, column: Column, values: tf.Tensor) -> tf.Tensor:
        """One column as numbers: float32 [..., d]."""
        if column.kind == "numeric":
            return values
        rows = tf.gather(self._value_tables[column.name], values)
        return rows if column.kind == "categorical" else mean_of(rows, values > 0)

    def _network(self, config: TowerConfig) -> list[Any]:
        sizes = [2 if column.kind == "numeric" else config.feature_dim for column in self.columns]
        width = sum(sizes) + (self.dim if self._history is not None else 0)
        layers = []
        for number, units in enumerate([*config.hidden, self.dim] if width else []):
            activation = "relu" if number < len(config.hidden) else None
            layers.append(
                tf_keras.layers.Dense(
                    units,
                    activation=activation,
                    kernel_initializer=glorot(self._next_seed()),
                    name=f"dense_{number}",
                )
            )
            layers[-1].build((None, width))
            width = units
        return layers

    def _table(self, name: str, num_rows: int, dim: int) -> tf.Variable:
        """Rows at first N(0, init_stddev²); in tables of values row 0, of none, is 0."""
        return self.add_weight(
            name=name,
            shape=(num_rows, dim),
            initializer=normal(
                self._stddev, self._next_seed(), zero_rows=int(name.startswith("values"))
            ),
            dtype=tf.float32,
        )

    def _next_seed(self) -> tuple[int, int]:
        self._weights_made += 2
        return self._seed[0], 1_000 * (self._seed[1] + 1) + self._weights_made


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


_BITS = 0xFFFFFFFF
