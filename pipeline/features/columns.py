"""Columns of features: what is to be known of them, their codes and numbers, and their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.beam.accounting import AccountingError
from pipeline.beam.blocks import partition
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.features.values import TEXT, VALUE_TYPES, Moments
from pipeline.prepare.shards import shard_of
from pipeline.prepare.vocabulary import write_table

DENSE = "dense"  # column of joined values: dense id, -1 for an id without interactions
Key = tuple[bool, int]  # whether of ids without interactions; shard
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
        encoded = pa.array(np.nan_to_num(scaled, nan=0.0).astype(np.float32))
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


@dataclasses.dataclass(frozen=True)
class FeatureFiles:
    """The feature files of a side, written from joined values."""

    side: str
    specs: list[schema.FeatureSpec]
    firsts: list[int]  # dense id of the first row of every vocabulary shard
    num_cold: int  # shards for ids without interactions
    out: Path  # also holds the vocabularies of columns

    def encode(self, path: str) -> Iterator[tuple[Key, pa.Table]]:
        """Joined values → rows of shards; a tally of unknown values comes to lie beside them."""
        joined = pq.read_table(path)
        dense, prints = (joined[column].to_numpy() for column in (DENSE, schema.FINGERPRINT))
        table, unknown = self._encode_table(joined, dense >= 0)
        write_json(Path(path).parent, f"unknown-{Path(path).stem}", unknown)
        known, rest = np.flatnonzero(dense >= 0), np.flatnonzero(dense < 0)
        shards = np.searchsorted(self.firsts, dense[known], "right") - 1
        cold_shards = shard_of(prints[rest].view(np.uint64), self.num_cold)
        for shard, rows in partition(known, shards, len(self.firsts)):
            yield (False, shard), table.take(pa.array(rows))
        for shard, rows in partition(rest, cold_shards, self.num_cold):
            yield (True, shard), table.take(pa.array(rows))

    def _encode_table(self, joined: pa.Table, known: np.ndarray) -> tuple[pa.Table, list[int]]:
        """Dense id, raw id and all columns; of each how many values of known ids are unknown."""
        arrays = [joined[DENSE], joined[schema.RAW_ID].cast(pa.string())]
        names, unknown = [DENSE, schema.RAW_ID], []
        for number, spec in enumerate(self.specs):
            vocabulary = pq.read_table(self.out / spec.vocabulary) if spec.vocabulary else None
            encoded, unseen = encode(joined[str(number)], spec, vocabulary)
            names += encoded
            arrays += encoded.values()
            unknown.append(int(unseen[known].sum()))
        return pa.Table.from_arrays(arrays, names), unknown

    def _name(self, key: Key) -> str:
        if key[0]:
            return schema.cold_features_name(self.side, key[1], self.num_cold)
        return schema.features_name(self.side, key[1], len(self.firsts))

    def write(self, key: Key, tables: Iterable[pa.Table]) -> None:
        """Writes a shard, in order of dense ids, or of raw ids where there are none."""
        (cold, shard), name = key, self._name(key)
        table = pa.concat_tables([self._empty(), *tables]).combine_chunks()
        if cold:
            table = table.sort_by(schema.RAW_ID).drop_columns([DENSE])
        else:
            table = table.sort_by(DENSE)
            first = self.firsts[shard]
            if (table[DENSE].to_numpy() != np.arange(first, first + len(table))).any():
                raise AccountingError(
                    f"{name}: the rows of its {len(table)} ids do not lie side by side"
                )
            table = table.drop_columns([DENSE, schema.RAW_ID])
        write_table(table.combine_chunks(), self.out / name)

    def write_empty(self) -> None:
        """Writes the cold shards that no id fell to."""
        for shard in range(self.num_cold):
            if not (self.out / self._name((True, shard))).exists():
                self.write((True, shard), ())

    def _empty(self) -> pa.Table:
        fields = [(DENSE, pa.int64()), (schema.RAW_ID, TEXT)]
        fields += [(str(n), VALUE_TYPES[spec.kind]) for n, spec in enumerate(self.specs)]
        return self._encode_table(pa.schema(fields).empty_table(), np.empty(0, bool))[0]
