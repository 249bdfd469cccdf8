"""What is known of ids before any weight is involved: dense ids → codes, numbers, histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from towers.data.attributes import Arrays, Column, read_column
from towers.data.ragged import Lists


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
    """The inputs of a feature tower by row; rows are dense ids, or ids that have none.

    Holds NumPy arrays, or after `as_tensors` what a graph can gather from.
    """

    rows: Any  # int64 [V], of the table of ids
    has_id: Any  # bool [V], whether that table has learnt the id: it has train rows
    columns: Arrays
    history: Any = None  # int64 [V, H], see `History.last`

    @classmethod
    def of(
        cls, has_id: np.ndarray, columns: Arrays, history: np.ndarray | None = None
    ) -> FeatureSource:
        """From what is known of ids 0 … V - 1."""
        return cls(np.arange(len(has_id), dtype=np.int64), has_id, columns, history)

    @classmethod
    def cold(cls, size: int, columns: Arrays, history_length: int = 0) -> FeatureSource:
        """Of ids without interactions, which have nothing but columns."""
        history = np.zeros((size, history_length), np.int64) if history_length else None
        return cls(np.zeros(size, np.int64), np.zeros(size, bool), columns, history)

    def followed_by(self, other: FeatureSource) -> FeatureSource:
        """These rows, then the other ones."""
        columns = {
            name: values.followed_by(other.columns[name])
            if isinstance(values, Lists)
            else np.concatenate([values, other.columns[name]])
            for name, values in self.columns.items()
        }
        return FeatureSource(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.has_id, other.has_id]),
            columns,
            None if self.history is None else np.concatenate([self.history, other.history]),
        )

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
