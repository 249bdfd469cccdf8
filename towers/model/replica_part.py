"""A training step on several replicas of `tf.distribute`: who has which rows, and how they join.

Every replica looks up the rows of its part of a batch. Then there are two ways, both of which sum
up, over the replicas, to the gradients that one replica would have with the joined batch:

- `OwnPart`, where the loss of a row looks at no other row: each replica has the loss of its rows.
- `OwnRows`, where the rows of a batch are negatives of each other: the embeddings of positives are
  gathered, and each replica has the loss of its rows over these columns. The gradients by them
  are summed over the replicas, and each goes on with those of its own.

Methods draw for the joined batch, by one seed, so that replicas draw the same. Gathers stand
outside of what XLA compiles, and outside of inner functions, where replicas cannot meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from samplers.candidates import Batch, Candidates
from towers.encoders.tower import Rows
from towers.encoders.tower_pair import Embedded, Tables, TowerPair, floats_in
from towers.legacy_keras import tf_keras
from towers.model.distribution import part_bounds

_SUM = tf.distribute.ReduceOp.SUM


class WholeBatch:
    """The batch of a single replica, which is joined with nothing.

    Attributes:
      batch: what the loss is taken of.
      joined: what the method draws for, and remembers: the batch of all replicas.
      rows: what the loss is a function of, by name.
      own: what of it is differentiated further on this replica.
      num_rows: what a mean is divided by, float32; None: the rows of `batch`.
    """

    def __init__(self, batch: Batch, rows: dict[str, Rows]) -> None:
        self.batch = self.joined = batch
        self.rows = self.own = rows
        self.num_rows: tf.Tensor | None = None

    def queries(self, query: tf.Tensor) -> tf.Tensor:
        """The embeddings of the queries of `joined` from those of `rows`: [B, D]."""
        return query

    def drawn(self, proposed: Candidates) -> Candidates:
        """What was drawn for `batch` of what was drawn for `joined`."""
        return proposed

    def add_proposed(self, ids: tf.Tensor, look_up: Callable[[tf.Tensor], Rows]) -> None:
        """Looks up the proposed candidates; in the gradient tape of the step."""
        self.rows["proposed"] = look_up(ids)

    def by_looked_up(self, tables: Tables, gradients: list[Any]) -> list[Any]:
        """Gradients by `tables` and `own` from those by `tables` and `rows`."""
        del tables
        return gradients

    def sum_up(self, counted: Iterable[tf.Variable]) -> None:
        """Makes what was counted over the rows of `batch` that of the rows of `joined`."""

    def total(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss of the joined batch."""
        return loss


class OwnPart(WholeBatch):
    """The rows of one replica: `batch` is its own; in replica context."""

    def __init__(self, batch: Batch, rows: dict[str, Rows]) -> None:
        super().__init__(batch, rows)
        self.own = dict(rows)  # or what is proposed would be added to both
        self.joined, self._first = _join(batch)
        self._end = self._first + tf.size(batch.query_ids)
        valid = self.joined.valid
        counted = tf.ones_like(self.joined.query_ids) if valid is None else valid
        self.num_rows = tf.reduce_sum(tf.cast(counted, tf.float32))
        # Of the rows that all replicas have: the name in `own` of a part of them, and which part.
        self._shares: dict[str, tuple[str, tf.Tensor, tf.Tensor]] = {}

    def queries(self, query: tf.Tensor) -> tf.Tensor:
        return _gather(query)

    def drawn(self, proposed: Candidates) -> Candidates:
        if proposed.ids.shape.rank == 1:  # all queries share them
            return proposed
        proposed = proposed.by_row(tf.size(self.joined.query_ids))  # parts may cut a group
        return Candidates(*(None if x is None else x[self._first : self._end] for x in proposed))

    def add_proposed(self, ids: tf.Tensor, look_up: Callable[[tf.Tensor], Rows]) -> None:
        if ids.shape.rank != 1:
            self.rows["proposed"] = self.own["proposed"] = look_up(ids)
            return
        self.rows["proposed"] = tf.nest.map_structure(tf.stop_gradient, look_up(ids))
        context = _context()
        number, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
        first, end = part_bounds(tf.shape(ids)[0], number, replicas)
        self._shares["proposed"] = ("proposed", first, end)
        self.own["proposed"] = look_up(ids[first:end])

    def by_looked_up(self, tables: Tables, gradients: list[Any]) -> list[Any]:
        rest = iter(gradients)
        by_tables = list(itertools.islice(rest, len(floats_in(tables))))
        by_rows = {
            name: list(itertools.islice(rest, len(floats_in(self.rows[name]))))
            for name in sorted(self.rows)
        }
        shared = {name: by_rows.pop(name) for name in self._shares}
        in_all = tf.nest.pack_sequence_as(shared, _sum_of_all(tf.nest.flatten(shared)))
        for name, summed in in_all.items():
            own, first, end = self._shares[name]
            here = [None if gradient is None else gradient[first:end] for gradient in summed]
            parts = zip(by_rows.get(own, [None] * len(here)), here, strict=True)
            by_rows[own] = [sum_gradients(both) for both in parts]
        return [*by_tables, *(gradient for name in sorted(self.own) for gradient in by_rows[name])]

    def sum_up(self, counted: Iterable[tf.Variable]) -> None:
        for variable in counted:
            variable.assign(_context().all_reduce(_SUM, variable.read_value()))

    def total(self, loss: tf.Tensor) -> tf.Tensor:
        return _context().all_reduce(_SUM, loss)


class OwnRows(OwnPart):
    """The rows of one replica, with the positives of all replicas as columns; in a tape."""

    def __init__(self, batch: Batch, rows: dict[str, Rows], towers: TowerPair) -> None:
        super().__init__(batch, rows)
        self.batch = batch._replace(whole=self.joined, first=self._first)
        positive = towers.candidate(rows["positive"])
        self.own["positive"] = Embedded(positive)
        columns = Embedded(tf.stop_gradient(_gather(positive)))
        self.rows = self.own | {"columns": columns}
        self._shares["columns"] = ("positive", self._first, self._end)


class MeanOfAll(tf_keras.metrics.Mean):
    """A mean of numbers that are the same on all replicas: that of the first, so none is sent."""

    def add_weight(self, *args: Any, **kwargs: Any) -> tf.Variable:
        """A variable whose value is that of the first replica."""
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        return super().add_weight(*args, **kwargs | {"aggregation": first})


def part_of(
    batch: Batch, rows: dict[str, Rows], towers: TowerPair, *, row_by_row: bool
) -> WholeBatch:
    """What the replica that one is in has to do with a batch; of a single one, all."""
    if not _among_others():
        return WholeBatch(batch, rows)
    return OwnPart(batch, rows) if row_by_row else OwnRows(batch, rows, towers)


def check_alone() -> None:
    """Raises ValueError in the context of one of several replicas."""
    if _among_others():
        raise ValueError(
            f"compute_loss must have the whole batch, and here it has the part of one of "
            f"{_context().num_replicas_in_sync} replicas, without the negatives of the others: "
            "call fit or train_step, or compute_loss outside of the strategy."
        )


def sum_gradients(gradients: Iterable[Any]) -> Any:
    """One gradient of several of the same table, or None: dense if one of them is dense.

    Repeated rows of sparse gradients stay repeated: whoever applies them adds them up.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    if len(known) < 2:
        return known[0] if known else None
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in known):
        return tf.IndexedSlices(
            tf.concat([gradient.values for gradient in known], axis=0),
            tf.concat([tf.cast(gradient.indices, tf.int64) for gradient in known], axis=0),
            known[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(gradient) for gradient in known])


_context = tf.distribute.get_replica_context


def _among_others() -> bool:
    return _context() is not None and _context().num_replicas_in_sync > 1


def _gather(values: tf.Tensor) -> tf.Tensor:
    """The rows of all replicas, in their order: [b, ...] → [B, ...]."""
    gathered = tf.cast(_context().all_gather(_sendable(values), axis=0), values.dtype)
    return tf.ensure_shape(gathered, [None, *values.shape[1:]])  # a gather forgets it


def _join(batch: Batch) -> tuple[Batch, tf.Tensor]:
    """The rows of all replicas, and the place in them of the first row of this one.

    All columns travel in one tensor, with the number of the replica: parts may differ in size.
    """
    number = tf.cast(_context().replica_id_in_sync_group, tf.int64)
    columns = {"number": tf.fill([tf.size(batch.query_ids), 1], number)}
    given = {name: column for name, column in batch._asdict().items() if column is not None}
    for name, column in given.items():
        bits = tf.bitcast(column, tf.int32) if column.dtype == tf.float32 else column
        bits = tf.cast(bits, tf.int64)
        columns[name] = bits[:, None] if column.shape.rank == 1 else bits
    widths = [tf.shape(column)[1] for column in columns.values()]
    gathered = _gather(tf.concat(list(columns.values()), axis=1))
    joined = dict(zip(columns, tf.split(gathered, widths, axis=1), strict=True))
    first = tf.math.count_nonzero(joined.pop("number") < number, dtype=tf.int32)
    for name, column in given.items():
        values = joined[name]
        if column.dtype == tf.float32:
            values = tf.bitcast(tf.cast(values, tf.int32), tf.float32)
        values = tf.cast(values, column.dtype)
        joined[name] = tf.reshape(values, [-1]) if column.shape.rank == 1 else values
    return Batch(**joined), first


def _sendable(values: tf.Tensor) -> tf.Tensor:
    """The same numbers; no collective operation of TensorFlow carries bfloat16."""
    return tf.cast(values, tf.float32) if values.dtype == tf.bfloat16 else values


def _sum_of_all(values: list[Any]) -> list[Any]:
    """Gradients, or None, by what all replicas have, summed over them in one message."""
    sent = [_sendable(tf.convert_to_tensor(value)) for value in values if value is not None]
    summed = iter(_context().all_reduce(_SUM, sent) if sent else [])
    return [None if value is None else tf.cast(next(summed), value.dtype) for value in values]
