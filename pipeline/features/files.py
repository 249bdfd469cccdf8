"""Writing: joined values → feature files, a row an id."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beam.accounting import AccountingError
from pipeline.beam.blocks import partition
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.features.columns import encode
from pipeline.features.join import DENSE
from pipeline.features.values import TEXT, VALUE_TYPES
from pipeline.prepare.shards import shard_of
from pipeline.prepare.vocabulary import without_mark, write_table

Key = tuple[int, int, int]  # side; 1 for ids without interactions, else 0; shard


@dataclasses.dataclass
class WriteFeatures(beam.PTransform):
    """Paths of joined values → feature files, and a tally of unknown values beside each path.

    Attributes:
      specs: side → the columns of its feature files.
      firsts: side → the dense id of the first row of every shard of its vocabulary.
      cold: side → the number of shards for ids without interactions.
      out: directory of the feature files and of the vocabularies of columns.
    """

    specs: dict[str, list[schema.FeatureSpec]]
    firsts: dict[str, list[int]]
    cold: dict[str, int]
    out: Path

    def expand(self, paths: beam.PCollection) -> beam.PCollection:
        rows = paths | "Encode" >> beam.FlatMap(self._encode)
        marks: list[tuple[Key, None]] = [  # a shard that gets no rows is written too
            ((schema.SIDES.index(side), cold, shard), None)
            for side in self.specs
            for cold, number in enumerate((len(self.firsts[side]), self.cold[side]))
            for shard in range(number)
        ]
        return (
            (rows, paths.pipeline | "Marks" >> beam.Create(marks))
            | "EveryShard" >> beam.Flatten()
            | "GroupShards" >> beam.GroupByKey()
            | "WriteShard" >> beam.MapTuple(self._write)
        )

    def _encode(self, path: str) -> Iterator[tuple[Key, pa.Table]]:
        name = Path(path).stem
        side, joined = name.split("-")[0], pq.read_table(path)
        dense, prints = (joined[column].to_numpy() for column in (DENSE, schema.FINGERPRINT))
        table, unknown = self._encode_table(joined, side, dense >= 0)
        write_json(Path(path).parent, f"unknown-{name}", unknown)
        firsts, num_cold = self.firsts[side], self.cold[side]
        known, rest = np.flatnonzero(dense >= 0), np.flatnonzero(dense < 0)
        shards = np.searchsorted(firsts, dense[known], "right") - 1
        cold_shards = shard_of(prints[rest].view(np.uint64), num_cold)
        parts = ((known, shards, len(firsts)), (rest, cold_shards, num_cold))
        for cold, arguments in enumerate(parts):
            for shard, rows in partition(*arguments):
                yield (schema.SIDES.index(side), cold, shard), table.take(pa.array(rows))

    def _encode_table(
        self, joined: pa.Table, side: str, known: np.ndarray
    ) -> tuple[pa.Table, list[int]]:
        """Dense id, raw id and all columns; of each how many values of known ids are unknown."""
        arrays = [joined[DENSE], joined[schema.RAW_ID].cast(pa.string())]
        names, unknown = [DENSE, schema.RAW_ID], []
        for number, spec in enumerate(self.specs[side]):
            vocabulary = pq.read_table(self.out / spec.vocabulary) if spec.vocabulary else None
            encoded, unseen = encode(joined[str(number)], spec, vocabulary)
            names += encoded
            arrays += encoded.values()
            unknown.append(int(unseen[known].sum()))
        return pa.Table.from_arrays(arrays, names), unknown

    def _write(self, key: Key, tables: Iterable[pa.Table | None]) -> str:
        side, cold, shard = schema.SIDES[key[0]], key[1], key[2]
        name_of = schema.cold_features_name if cold else schema.features_name
        name = name_of(side, shard, self.cold[side] if cold else len(self.firsts[side]))
        table = pa.concat_tables([self._empty(side), *without_mark(tables, name)]).combine_chunks()
        if cold:
            table = table.sort_by(schema.RAW_ID).drop_columns([DENSE])
        else:
            table = table.sort_by(DENSE)
            first = self.firsts[side][shard]
            if (table[DENSE].to_numpy() != np.arange(first, first + len(table))).any():
                raise AccountingError(
                    f"{name}: the rows of its {len(table)} ids do not lie side by side"
                )
            table = table.drop_columns([DENSE, schema.RAW_ID])
        write_table(table.combine_chunks(), self.out / name)
        return name

    def _empty(self, side: str) -> pa.Table:
        fields = [(DENSE, pa.int64()), (schema.RAW_ID, TEXT)]
        fields += [(str(n), VALUE_TYPES[spec.kind]) for n, spec in enumerate(self.specs[side])]
        return self._encode_table(pa.schema(fields).empty_table(), side, np.empty(0, bool))[0]
