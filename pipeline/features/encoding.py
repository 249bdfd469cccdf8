"""Columns of features: what is to be known of them, and their codes and numbers; without Beam."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import schema
from pipeline.features.values import TEXT, Moments

_COUNTED = pa.schema([(schema.VALUE, TEXT), (schema.COUNT, pa.int64())])


class Statistics(NamedTuple):
    """What some ids say of a column; those without train rows say only what is missing."""

    counts: pa.Table  # value, count: ids with train rows that have the value
    moments: Moments  # of a numeric column, each id with train rows once
    max_length: int  # of a multi column, most values of an id with train rows
    train_missing: int  # ids with train rows that have no value
    missing: int  # ids that have no value
    ids: int  # of which all of this is said


def describe(column: pa.ChunkedArray, kind: str, train: np.ndarray) -> Statistics:
    """The statistics of values of some ids, [n]; `train`, bool [n], tells who has train rows."""
    sizes = _sizes(column, kind)
    seen = column.filter(pa.array(train))
    counts, moments = _COUNTED.empty_table(), Moments()
    if kind in ("categorical", "multi"):
        values = pc.list_flatten(seen) if kind == "multi" else seen.drop_null()
        counted = values.value_counts()
        columns = [counted.field("values").cast(TEXT), counted.field("counts")]
        counts = pa.Table.from_arrays(columns, schema=_COUNTED)
    if kind == "numeric":
        moments = Moments.of(seen.drop_null().to_numpy())
    trained = sizes[train]
    longest = int(trained.max(initial=0)) if kind == "multi" else 0
    train_missing, missing = (int((known == 0).sum()) for known in (trained, sizes))
    return Statistics(counts, moments, longest, train_missing, missing, len(train))


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of all ids from those of disjoint sets of them."""
    counts, moments, lengths, *numbers = zip(*parts, strict=True)
    added = pa.concat_tables(counts).group_by(schema.VALUE).aggregate([(schema.COUNT, "sum")])
    added = added.select([schema.VALUE, f"{schema.COUNT}_sum"]).rename_columns(_COUNTED.names)
    return Statistics(added, reduce(Moments.plus, moments), max(lengths), *map(sum, numbers))


def rank_values(counts: pa.Table, min_count: int) -> pa.Table:
    """The vocabulary of a column: by descending count, then by value; code = row + 1."""
    kept = counts.filter(pc.greater_equal(counts[schema.COUNT], min_count))
    kept = kept.sort_by([(schema.COUNT, "descending"), (schema.VALUE, "ascending")])
    return kept.set_column(0, schema.VALUE, kept[schema.VALUE].cast(pa.string()))


def make_spec(
    name: str, kind: str, side: str, statistics: Statistics, min_count: int = 1
) -> tuple[schema.FeatureSpec, pa.Table | None]:
    """The spec of a column, and the vocabulary of one that has codes, see `rank_values`."""
    spec = schema.FeatureSpec(
        name,
        kind,
        mean=statistics.moments.mean,
        std=statistics.moments.std,
        max_length=statistics.max_length,
        has_presence=kind == "numeric" and statistics.train_missing > 0,
        missing=statistics.missing,
    )
    if kind not in ("categorical", "multi"):
        return spec, None
    vocabulary = rank_values(statistics.counts, min_count)
    file = schema.feature_vocabulary_name(side, name)
    return dataclasses.replace(spec, vocabulary=file, size=len(vocabulary)), vocabulary


def encode(
    column: pa.ChunkedArray, spec: schema.FeatureSpec, vocabulary: pa.Table | None
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """The columns of a feature file for some ids, and how many values of each id are unknown.

    Values [n] of a type in `VALUE_TYPES` → (name → [n] as `schema.FeatureSpec` says, int64 [n]).
    """
    values = column.combine_chunks()
    unknown = np.zeros(len(values), np.int64)
    if spec.kind == "numeric":
        scaled = (values.to_numpy(zero_copy_only=False) - spec.mean) / spec.std  # null as NaN
        missing = np.isnan(scaled)
        scaled = np.where(missing, 0.0, scaled).astype(np.float32)
        encoded = pa.array(scaled, mask=None if spec.has_presence else missing)
    elif spec.kind == "text":
        encoded = values.fill_null("").cast(pa.string())
    elif spec.kind == "categorical":
        codes = _codes(values, vocabulary)
        encoded = pa.array(codes)
        unknown += (codes == 0) & values.is_valid().to_numpy(zero_copy_only=False)
    else:
        sizes = _sizes(values, spec.kind)
        rows = np.repeat(np.arange(len(values)), sizes)
        codes = _codes(pc.list_flatten(values), vocabulary)
        known = np.bincount(rows[codes > 0], minlength=len(values))
        offsets = pa.array(np.r_[0, np.cumsum(known)], pa.int32())
        encoded = pa.ListArray.from_arrays(offsets, pa.array(codes[codes > 0]))
        unknown += sizes - known
    columns = {spec.name: encoded}
    if spec.has_presence:
        columns[spec.presence] = pa.array(_sizes(values, spec.kind) > 0)
    return columns, unknown


def _sizes(column: pa.ChunkedArray | pa.Array, kind: str) -> np.ndarray:
    """How many values each id has: int64 [n], 0 or 1 unless they are many."""
    if kind == "multi":
        sizes = pc.fill_null(pc.list_value_length(column), 0)
    else:
        sizes = pc.is_valid(column)
    return np.asarray(sizes.to_numpy(zero_copy_only=False), np.int64)


def _codes(values: pa.Array, vocabulary: pa.Table | None) -> np.ndarray:
    """The code of each value, int32 [n]; 0 where it is missing or unknown."""
    assert vocabulary is not None
    known = vocabulary[schema.VALUE].cast(TEXT).combine_chunks()
    places = pc.index_in(values, value_set=known).fill_null(-1)
    return (places.to_numpy(zero_copy_only=False) + 1).astype(np.int32)
