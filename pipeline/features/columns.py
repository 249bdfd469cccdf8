"""The feature files of a side: joined values → codes and numbers in shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beam.accounting import AccountingError
from pipeline.beam.blocks import partition
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.features.encoding import encode
from pipeline.features.values import TEXT, VALUE_TYPES
from pipeline.prepare.shards import shard_of
from pipeline.prepare.vocabulary import write_table

DENSE = "dense"  # column of joined values: dense id, -1 for an id without interactions
Key = tuple[bool, int]  # whether of ids without interactions; shard


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
