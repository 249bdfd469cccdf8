"""The encoders of a bundle: raw ids, histories and attributes → embeddings, in one graph.

The graph does all of it with what training read: vocabularies, means, the hashing of texts, the
tables and layers of the tower. It needs neither Keras nor this package. Signatures:

  serving_default, of queries: query_id string [B] -> embedding float32 [B, D], known bool [B].
  request_embedding: the id of a query or candidate, string [B], and what its tower reads beside it
    -> embedding, known, unknown_history int32 [B]: candidates of the history that are not known.
    `history` is string [B, W], the oldest first; a categorical column or a text string [B], a
    column of several values string [B, W], a number float64 [B].

An empty string, a list of them and NaN stand for what the request leaves out. What is stored of a
known id is then read in its place; of other ids it counts as missing, as in training. A query is
known where its id is or where anything is given, unless that leaves nothing to embed.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from towers.data.attributes import Column, encode_column
from towers.data.interactions import RetrievalData
from towers.data.ragged import Lists, last_distinct
from towers.encoders.feature_tower import FeatureTower
from towers.encoders.history_tower import HistoryTower
from towers.encoders.tower import Tower

if TYPE_CHECKING:
    from towers.model.two_tower import TwoTower

REQUEST = "request_embedding"  # the signature that takes all inputs
HISTORY, UNKNOWN_HISTORY = "history", "unknown_history"

Inputs = dict[str, tf.Tensor]
_TableInitializer: Any = tf.lookup.TextFileInitializer.__base__


def save_encoder(data: RetrievalData, model: TwoTower, side: str, path: str | Path) -> None:
    """Writes the SavedModel of one tower of a trained model; a side is "query" or "candidate".

    A ValueError where two columns have names that a graph cannot tell apart.
    """
    with tempfile.TemporaryDirectory() as scratch:
        Encoder(data, model, side, Path(scratch)).save(path)


class Encoder(tf.Module):
    """One tower of a trained model, as a graph over raw values.

    Args:
      data: that the model was trained on.
      model: trained.
      side: "query" or "candidate".
      scratch: an empty directory for files that `save` copies into the SavedModel.
    """

    def __init__(self, data: RetrievalData, model: TwoTower, side: str, scratch: Path) -> None:
        super().__init__(name=f"{side}_encoder")
        tower: Tower = getattr(model, f"{side}_tower")
        self._dim, self._side, self._scratch = tower.dim, side, scratch
        self._kept: list[tf.Variable] = []
        raw_ids = getattr(data, f"{side}_vocabulary").raw_ids
        self._row_of = self._table(f"{side}_ids", pa.concat_arrays([raw_ids, tower.cold_ids]))
        columns = tower.columns if isinstance(tower, FeatureTower) else ()
        self._columns = dict(zip(_input_names(side, columns), columns, strict=True))
        self._values = {
            column.name: self._table(f"values_{number}", data.features(side).values[column.name], 1)
            for number, column in enumerate(columns)
            if column.kind in ("categorical", "multi")
        }
        self._item_code: tf.lookup.StaticHashTable | None = None
        if tower.reads_history:
            ids = data.candidate_vocabulary.raw_ids
            self._item_code = self._table("history_ids", ids, 1)
        scale = model.temperature if side == "query" else 1.0
        embed = self._embedder(tower, model)
        self._embed = lambda *inputs: tf.cast(embed(*inputs) / scale, tf.float32)
        self._kept += tower.variables

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        """The inputs of `request_embedding`."""
        specs = {f"{self._side}_id": tf.TensorSpec([None], tf.string)}
        if self._item_code is not None:
            specs[HISTORY] = tf.TensorSpec([None, None], tf.string)
        for name, column in self._columns.items():
            shape = [None, None] if column.kind == "multi" else [None]
            dtype = tf.float64 if column.kind == "numeric" else tf.string
            specs[name] = tf.TensorSpec(shape, dtype)
        return {name: tf.TensorSpec(s.shape, s.dtype, name) for name, s in specs.items()}

    def save(self, path: str | Path) -> None:
        """Writes the SavedModel; a tower that knows ids alone has `serving_default` only."""
        specs = self.specs
        signatures = {}
        if self._side == "query":
            signatures["serving_default"] = tf.function(self.stored).get_concrete_function(
                specs[schema.QUERY_ID]
            )
        if len(specs) > 1:
            names = list(specs)
            signatures[REQUEST] = tf.function(
                lambda *values: self.requested(dict(zip(names, values, strict=True)))
            ).get_concrete_function(*specs.values())
        tf.saved_model.save(self, str(path), signatures=signatures)

    def stored(self, raw_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """string [B] → embedding float32 [B, D], zeros for unknown ids, and known bool [B]."""
        rows = self._row_of.lookup(raw_ids)
        embedding = self._embed(rows, {}, None)
        known = (rows >= 0) & _has_direction(embedding)
        return {"embedding": tf.where(known[:, None], embedding, 0.0), "known": known}

    def requested(self, inputs: Inputs) -> dict[str, tf.Tensor]:
        """The outputs of `request_embedding` for its inputs by name."""
        rows = self._row_of.lookup(inputs[f"{self._side}_id"])
        known, unknown = rows >= 0, tf.zeros_like(rows, tf.int32)
        columns: dict[str, tuple[tf.Tensor, tf.Tensor]] = {}  # given [B], what its tower reads
        for name, column in self._columns.items():
            values = inputs[name]
            given = ~tf.math.is_nan(values) if column.kind == "numeric" else values != ""
            given = tf.reduce_any(given, axis=1) if column.kind == "multi" else given
            table = self._values.get(column.name)
            columns[column.name] = given, encode_column(column, values, table)
            known |= given
        history = None
        if self._item_code is not None:
            codes = tf.maximum(self._item_code.lookup(inputs[HISTORY]), 0)
            there = inputs[HISTORY] != ""
            unknown = tf.reduce_sum(tf.cast(there & (codes == 0), tf.int32), axis=1)
            history = tf.reduce_any(there, axis=1), codes
            known |= tf.reduce_any(codes > 0, axis=1)
        embedding = self._embed(rows, columns, history)
        known &= _has_direction(embedding)
        return {
            "embedding": tf.where(known[:, None], embedding, 0.0),
            "known": known,
            UNKNOWN_HISTORY: unknown,
        }

    def _embedder(self, tower: Tower, model: TwoTower) -> Callable[..., tf.Tensor]:
        """Rows [B], -1 for none, columns and history as given → embeddings [B, D]."""
        if isinstance(tower, FeatureTower):
            return self._of_attributes(tower)
        if isinstance(tower, HistoryTower):
            return self._of_sums(tower)
        vectors = model.temperature * model.query_embeddings()
        table = self._keep(vectors.numpy())
        return lambda rows, columns, history: tf.gather(table, tf.maximum(rows, 0))

    def _of_sums(self, tower: HistoryTower) -> Callable[..., tf.Tensor]:
        lists = Lists(*map(self._keep, map(np.asarray, tower.lists)))

        def embed(rows: tf.Tensor, columns: Any, history: Any) -> tf.Tensor:
            total = tower.sum_of_lists(tf.maximum(rows, 0), lists)
            if history is not None:
                given, codes = history
                summed = tower.sum_of(last_distinct(codes))
                total = tf.where(given[:, None], summed, total)
            return tower(tower.beside_row(total, rows))

        return embed

    def _of_attributes(self, tower: FeatureTower) -> Callable[..., tf.Tensor]:
        source = tower.source.as_tensors(self._keep)

        def embed(rows: tf.Tensor, columns: Any, history: Any) -> tf.Tensor:
            known = rows >= 0
            inputs = source.inputs(tf.maximum(rows, 0), tower.columns)
            inputs["has_id"] &= known
            for name, (given, values) in columns.items():
                stays = known & ~given if values.shape.rank == 1 else (known & ~given)[:, None]
                inputs["columns"][name] = tf.where(stays, inputs["columns"][name], values)
            if history is not None:
                given, codes = history
                last = tower.last_of(codes)
                inputs["history"] = tf.where((known & ~given)[:, None], inputs["history"], last)
            return tower(tower.rows(inputs))

        return embed

    def _keep(self, array: np.ndarray) -> tf.Variable:
        """As a variable: a graph ends at 2 GB."""
        self._kept.append(tf.Variable(array, trainable=False))
        return self._kept[-1]

    def _table(self, name: str, keys: pa.Array, first: int = 0) -> tf.lookup.StaticHashTable:
        """Raw values → their place among the keys, from `first` on; -1 for others."""
        path = self._scratch / f"{name}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as file:
            for key in keys.cast(pa.large_binary()).to_pylist():
                file.write(key)
        return tf.lookup.StaticHashTable(_Records(path, len(keys), first), default_value=-1)


class _Records(_TableInitializer):
    """Fills a table of strings from a file of the SavedModel, a record a key, whatever is in it."""

    def __init__(self, path: Path, size: int, first: int) -> None:
        super().__init__(tf.string, tf.int64)
        self._size, self._first = size, first
        self._unique_name = f"records_{uuid.uuid4()}"  # tables of one name are one table
        self._file = self._track_trackable(tf.saved_model.Asset(str(path)), "_file")

    @property
    def _shared_name(self) -> str:
        return self._unique_name

    def initialize(self, table: Any) -> tf.Operation:
        records = tf.data.TFRecordDataset(self._file.asset_path).batch(self._size + 1)
        keys = tf.zeros([0], tf.string) if not self._size else records.get_single_element()
        values = self._first + tf.range(self._size, dtype=tf.int64)
        return tf.raw_ops.InitializeTableV2(
            table_handle=table.resource_handle, keys=keys, values=values
        )


def _input_names(side: str, columns: Sequence[Column]) -> list[str]:
    """The name of the input of each column."""
    names = [schema.input_name(column.name) for column in columns]
    taken: dict[str, str] = {f"{side}_id": "the id", HISTORY: "the history"}
    for name, column in zip(names, columns, strict=True):
        if name in taken:
            raise ValueError(
                f"column {column.name!r} of the {side} features and {taken[name]} would both be "
                f"the input {name!r} of the exported model: rename the column."
            )
        taken[name] = f"column {column.name!r}"
    return names


def _has_direction(embeddings: tf.Tensor) -> tf.Tensor:
    """Whether candidates differ in their scores; of an empty sum they all are 0: bool [B]."""
    return tf.reduce_any(embeddings != 0, axis=1)
