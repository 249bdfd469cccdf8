"""Attributes of the ids of one side, as prepared data hold them, and as arrays for a tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from towers.data.lists import Lists, first_values
from towers.data.ngrams import MOST_CODES, text_codes

_LARGEST = 5.0  # standard deviations; numbers beyond are cut off there
_MOST_VALUES = 64  # of a multi-valued column; the rest of a longer list is left out


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The feature files of one side; `pipeline.contract.feature_spec` says what they hold."""

    specs: tuple[schema.FeatureSpec, ...]
    table: pa.Table  # [V], the row number is the dense id
    cold: pa.Table  # [C], ids without interactions: raw_id, then the same columns

    def chosen(self, names: Sequence[str], side: str) -> Features:
        """With these columns only, in this order.

        Raises:
          ValueError: there is no such column.
        """
        known = {spec.name: spec for spec in self.specs}
        for name in names:
            if name not in known:
                word = "user" if side == "query" else "item"
                raise ValueError(
                    f"{side}_inputs names {name!r}, which is no column of the data: it has "
                    f"{', '.join(known) or 'none'}; prepare it with --{word}_features that have "
                    f"the column, or change --{side}_inputs."
                )
        return dataclasses.replace(self, specs=tuple(known[name] for name in names))


@dataclasses.dataclass(frozen=True)
class Column:
    """How a tower reads a column.

    Attributes:
      name: of the column.
      kind: one of `schema.FEATURE_KINDS`.
      num_codes: codes are 1 … num_codes, and 0 for none; 0 for numbers.
      width: codes of one id in a multi or text column.
    """

    name: str
    kind: str
    num_codes: int = 0
    width: int = 0


Arrays = Mapping[str, Any]  # column → Lists, int64 [V] or float32 [V, 2], in NumPy or as tensors


def no_features(side: str) -> Features:
    """What a side without a table of attributes has."""
    del side
    return Features((), pa.table({}), pa.table({schema.RAW_ID: pa.array([], pa.string())}))


def columns_of(features: Features, text_buckets: int) -> tuple[tuple[Column, ...], Arrays, Arrays]:
    """How to read the columns, their values by dense id, and those of cold ids.

    Args:
      features: of the columns that are wanted.
      text_buckets: codes that the n-grams of texts are hashed to.
    """
    columns, arrays, cold = [], {}, {}
    for spec in features.specs:
        name, kind = spec.name, spec.kind
        arrays[name] = _values(features.table, spec, text_buckets)
        cold[name] = _values(features.cold, spec, text_buckets)
        if kind == "text":
            width = min(arrays[name].longest, MOST_CODES)
            columns.append(Column(name, kind, text_buckets, max(width, 1)))
        elif kind == "multi":
            width = min(spec.max_length, _MOST_VALUES)
            columns.append(Column(name, kind, spec.size, max(width, 1)))
        else:
            columns.append(Column(name, kind, spec.size if kind == "categorical" else 0))
    return tuple(columns), arrays, cold


def _values(table: pa.Table, spec: schema.FeatureSpec, text_buckets: int) -> Any:
    column = table[spec.name]
    if spec.kind == "text":
        return text_codes(column.to_pylist(), text_buckets)
    if spec.kind == "multi":
        return Lists.of_column(column)
    if spec.kind == "categorical":
        return column.to_numpy().astype(np.int64)
    numbers = np.clip(column.to_numpy().astype(np.float32), -_LARGEST, _LARGEST)
    present = table[spec.presence].to_numpy() if spec.has_presence else np.ones(len(numbers), bool)
    return np.stack([numbers, present.astype(np.float32)], axis=1)


def followed_by(first: Arrays, second: Arrays) -> Arrays:
    """Arrays of some ids, then those of others."""
    return {
        name: values.followed_by(second[name])
        if isinstance(values, Lists)
        else np.concatenate([values, second[name]])
        for name, values in first.items()
    }


def read_column(column: Column, values: Any, ids: tf.Tensor) -> tf.Tensor:
    """The values of ids [...]: codes int64 [...] or [..., width], or numbers float32 [..., 2]."""
    if column.kind in ("multi", "text"):
        return first_values(values, ids, column.width)
    return tf.gather(values, ids)
