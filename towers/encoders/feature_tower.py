"""A tower that knows attributes, and what a query chose before, beside the id or without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from towers.data.attributes import Arrays, Column, read_column
from towers.data.history import History
from towers.data.ragged import last_distinct
from towers.encoders.tower import Maybe, Tower, glorot, in_blocks, normal, uniform_by_id
from towers.encoders.tower_config import TowerConfig
from towers.legacy_keras import tf_keras


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
    """The inputs of a feature tower by row; rows are dense ids, then cold ids, that have none.

    Holds NumPy arrays, or after `as_tensors` what a graph can gather from.
    """

    rows: Any  # int64 [V + C], of the table of ids
    has_id: Any  # bool [V + C], whether that table has learnt the id: it has train rows
    columns: Arrays
    history: Any = None  # int64 [V + C, H], see `History.last`

    @classmethod
    def of(
        cls,
        has_id: np.ndarray,
        columns: Arrays,
        history: np.ndarray | None = None,
        num_cold: int = 0,
    ) -> FeatureSource:
        """Of ids 0 … V - 1, then of `num_cold` ones, which have nothing but columns."""
        behind = (0, num_cold)
        if history is not None:
            history = np.pad(history, (behind, (0, 0)))
        rows = np.pad(np.arange(len(has_id), dtype=np.int64), behind)
        return cls(rows, np.pad(has_id, behind), columns, history)

    def as_tensors(self, convert: Callable[[np.ndarray], Any]) -> FeatureSource:
        """With every array converted, such as by `tf.constant`."""
        columns = {name: tf.nest.map_structure(convert, v) for name, v in self.columns.items()}
        history = None if self.history is None else convert(self.history)
        return FeatureSource(convert(self.rows), convert(self.has_id), columns, history)

    def inputs(self, ids: tf.Tensor, columns: tuple[Column, ...]) -> dict[str, Any]:
        """What is known of rows [...]: row, has_id, columns by name, and history where kept."""
        values = {c.name: read_column(c, self.columns[c.name], ids) for c in columns}
        row, has_id = tf.gather(self.rows, ids), tf.gather(self.has_id, ids)
        known = {"row": row, "has_id": has_id, "columns": values}
        if self.history is not None:
            known["history"] = tf.gather(self.history, ids)
        return known


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
      source: what is known by dense id, then of `cold_ids`.
      columns: how to read its columns.
      config: settings of the tower.
      dim: D, size of the embeddings, of the rows of ids, and of those of the history.
      history: of queries, for training; None: the tower has none.
      has_table: whether ids have rows.
      items: [N, D], the table that the history gathers from; None: one of its own.
      num_items: N, of that one.
      cold_ids: raw ids of the last rows of `source`.
      seed: of the initial weights; another one for every tower.
    """

    def __init__(
        self,
        source: FeatureSource,
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
        self.cold_ids = pa.array([], pa.string()) if cold_ids is None else cold_ids
        self.dim, self.normalize = dim, normalize
        self.vocabulary_size = len(source.rows) - len(self.cold_ids)
        self.columns, self.source = columns, source
        self._tensors = source.as_tensors(tf.constant)
        self._history = history
        self._id_dropout = config.id_dropout if columns or history is not None else 0.0
        self.reads_history = history is not None
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
        self, ids: Maybe, *, table: Maybe = None, positives: Maybe = None, seed: Maybe = None
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
        parts = [self._column_rows(c, inputs["columns"][c.name]) for c in self.columns]
        rows: dict[str, Any] = {"columns": tf.concat(parts, axis=-1)} if parts else {}
        if self.table is not None:
            known = inputs["has_id"]
            if seed is not None and self._id_dropout > 0:
                known &= uniform_by_id(inputs["row"], seed) >= self._id_dropout
            own = tf.gather(self.table, inputs["row"])
            rows["id"] = tf.where(known[..., None], own, tf.zeros_like(own))
        if self._history is not None:
            codes = inputs["history"]
            rows["history"] = tf.gather(self.items, tf.maximum(codes - 1, 0))
            rows["in_history"] = codes > 0
        return rows

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
        return self.scaled(tf.add_n(terms))

    def embed_cold(self) -> tf.Tensor:
        """The embeddings of `cold_ids`: float32 [C, D]."""
        first = self.vocabulary_size
        return in_blocks(lambda ids: self(self.lookup(first + ids)), len(self.cold_ids))

    def embed_history(self, ids: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
        """As `Tower.embed_history`: the last H are read."""
        inputs = self._tensors.inputs(ids, self.columns) | {"history": self.last_of(codes)}
        return self(self.rows(inputs))

    def last_of(self, codes: tf.Tensor) -> tf.Tensor:
        """What the tower reads of histories of requests: codes [B, W], 0 for none → [B, H]."""
        assert self._history is not None
        return last_distinct(codes, self._history.length)

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
            initial, name = glorot(self._next_seed()), f"dense_{number}"
            layer = tf_keras.layers.Dense(units, activation, kernel_initializer=initial, name=name)
            layer.build((None, width))
            layers.append(layer)
            width = units
        return layers

    def _table(self, name: str, num_rows: int, dim: int) -> tf.Variable:
        """Rows at first N(0, init_stddev²); in tables of values row 0, of none, is 0."""
        zero_rows = int(name.startswith("values"))
        initial = normal(self._stddev, self._next_seed(), zero_rows=zero_rows)
        return self.add_weight(name, (num_rows, dim), tf.float32, initial)

    def _next_seed(self) -> tuple[int, int]:
        self._weights_made += 2
        return self._seed[0], 1_000 * (self._seed[1] + 1) + self._weights_made


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
