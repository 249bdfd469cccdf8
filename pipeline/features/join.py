"""Reading tables of attributes, joining their values by id with the ids of the vocabulary, by range
of fingerprints, and then replacing them by codes and numbers in the feature files.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.beam.accounting import AccountingError, look_up
from pipeline.beam.blocks import begins, by_range, partition
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.features.encoding import Statistics, describe, encode
from pipeline.features.tables import Table
from pipeline.features.values import TEXT, VALUE_TYPES, values_of
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.shards import shard_of
from pipeline.prepare.vocabulary import write_table
from pipeline.read.cells import Checks, ids_of
from pipeline.read.discover import Piece, resolve_columns
from pipeline.read.log import tallied
from pipeline.read.readers import DeadLetter, read_checked

DENSE = "dense"  # column of joined values: dense id, -1 for an id without interactions
Key = tuple[bool, int]  # of a file: whether of ids without interactions; shard
_KNOWN = pa.schema([(schema.FINGERPRINT, pa.int64()), (schema.RAW_ID, TEXT), (DENSE, pa.int64())])


def values_schema(table: Table) -> pa.Schema:
    """Of a block of values: id, then every feature under its number, null where it is missing."""
    fields = [(schema.FINGERPRINT, pa.int64()), (schema.RAW_ID, TEXT)]
    kinds = enumerate(table.kinds.values())
    return pa.schema(fields + [(str(number), VALUE_TYPES[kind]) for number, kind in kinds])


def read_table(piece: Piece, table: Table, out: Path) -> Iterator[tuple[int, pa.Table]]:
    """Blocks of values by range; a tally and the dead letters of the piece become files."""
    name = f"{table.side}-{piece.number:06d}"
    with tallied(piece, out / name, out / name) as (tally, keep):
        for values, bad, size in read_values(piece, table):
            tally["counts"].update(read=size)
            keep(bad)
            prints = values[schema.FINGERPRINT].to_numpy()
            for part, rows in by_range(prints, table.config.partitions):
                yield part, values.take(pa.array(rows))


def read_values(piece: Piece, table: Table) -> Iterator[tuple[pa.Table, list[DeadLetter], int]]:
    """Reads and validates a piece: good values, bad rows, number of both; see `read_checked`."""

    def id_column(names: list[str]) -> str:
        return resolve_columns(names, table.config, piece.path).item

    def validate(batch: pa.RecordBatch, _: np.ndarray, checks: Checks) -> pa.Table:
        name = id_column(batch.schema.names)
        codes, (prints, raw) = ids_of(batch[name], name, checks)
        columns = [
            values_of(batch[column], kind, column, table.separator, checks)
            for column, kind in table.kinds.items()
        ]
        codes, good = codes[checks.good], pa.array(np.flatnonzero(checks.good))
        ids = pa.array(raw, pa.binary()).take(pa.array(codes)).cast(pa.string()).cast(TEXT)
        arrays = [pa.array(prints[codes]), ids, *(column.take(good) for column in columns)]
        return pa.Table.from_arrays(arrays, schema=values_schema(table))

    return read_checked(
        piece, table.config, lambda names: [id_column(names), *table.kinds], validate
    )


class VocabularyShard(NamedTuple):
    """A file of a vocabulary."""

    path: str
    first: int  # dense id of the first row
    rows: int


def vocabulary_shards(out: Path, side: str) -> list[VocabularyShard]:
    """The files of the vocabulary of a side, in order."""
    shards, first = [], 0
    for path in sorted(out.glob(f"{side}_vocabulary-*.parquet")):
        shards.append(VocabularyShard(str(path), first, pq.read_metadata(path).num_rows))
        first += shards[-1].rows
    return shards


def load_vocabulary(shard: VocabularyShard, partitions: int) -> Iterator[tuple[int, pa.Table]]:
    """The ids of a shard by range: fingerprint, raw id and dense id of each."""
    table = pq.read_table(shard.path, columns=[schema.FINGERPRINT, schema.RAW_ID])
    dense = pa.chunked_array([np.arange(shard.first, shard.first + shard.rows)])
    columns = [table[schema.FINGERPRINT], table[schema.RAW_ID].cast(TEXT), dense]
    known = pa.Table.from_arrays(columns, schema=_KNOWN)
    for part, rows in by_range(known[schema.FINGERPRINT].to_numpy(), partitions):
        yield part, known.take(pa.array(rows)).combine_chunks()


def train_ids(
    element: tuple[int, np.ndarray], config: PrepareConfig, side: str
) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
    """(range, rows with their split) → by range: ids that have train rows, and how many rows."""
    train = element[1][side][element[1]["split"] == schema.SPLITS.index("train")]
    prints, counts = np.unique(train, return_counts=True)
    for part, places in by_range(prints, config.partitions):
        yield part, (prints[places], int(counts[places].sum()))


def join_range(
    element: tuple[int, dict[str, Iterable[Any]]], table: Table, out: Path
) -> Iterator[tuple[int, Statistics]]:
    """Stages the joined values of one range: (column, their statistics).

    Every id of the vocabulary has a row, of nulls where the table has none. A tally tells what
    became of the rows of the table.
    """
    part, grouped = element
    blocks = [values_schema(table).empty_table(), *grouped["values"]]
    values, duplicates, conflicts = distinct_rows(pa.concat_tables(blocks).combine_chunks())
    known = pa.concat_tables([_KNOWN.empty_table(), *grouped["known"]]).combine_chunks()
    prints, given = (ids[schema.FINGERPRINT].to_numpy() for ids in (known, values))
    train_prints, train_rows = zip((np.empty(0, np.int64), 0), *grouped["train"], strict=True)
    places, hit = look_up(prints, given)
    joined = values.take(pa.array(places, mask=~hit))
    other = pc.not_equal(joined[schema.RAW_ID], known[schema.RAW_ID])  # of one fingerprint
    conflicts += known[schema.RAW_ID].filter(other).to_pylist()
    rest = values.filter(pa.array(~np.isin(given, prints)))
    dense = pa.chunked_array([*known[DENSE].chunks, np.full(len(rest), -1)])
    staged = pa.concat_tables([joined, rest]).append_column(DENSE, dense)
    name = f"{table.side}-{part:05d}"
    write_table(staged.combine_chunks(), out / f"{name}.parquet")
    tally = {
        "ids": len(known),
        "duplicates": duplicates,
        "joined": int(hit.sum()),
        "cold": len(rest),
        "train": sum(train_rows),
        "conflicts": sorted(conflicts)[:1],
    }
    write_json(out, f"tally-{name}", tally)
    train = np.isin(prints, np.concatenate(train_prints))
    for number, kind in enumerate(table.kinds.values()):
        yield number, describe(joined[str(number)], kind, train)


def distinct_rows(values: pa.Table) -> tuple[pa.Table, int, list[str]]:
    """Each id once by fingerprint, rows that repeat one, ids whose rows are not equal."""
    order = np.argsort(values[schema.FINGERPRINT].to_numpy(), kind="stable")
    values = values.take(pa.array(order)).combine_chunks()
    first = begins(values[schema.FINGERPRINT].to_numpy())
    later = np.flatnonzero(~first)
    before, repeated = (values.take(pa.array(rows)) for rows in (later - 1, later))
    same = np.ones(len(later), bool)
    for name in values.column_names:
        same &= _equal(before[name], repeated[name])
    conflicts = repeated[schema.RAW_ID].filter(pa.array(~same)).to_pylist()
    return values.filter(pa.array(first)), len(later), conflicts


def _equal(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Where two columns agree, a null with a null too: bool [n]."""
    if pa.types.is_large_list(first.type):
        pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
        return np.array([a == b for a, b in pairs], bool)
    both = pc.and_(pc.is_null(first), pc.is_null(second))
    return pc.coalesce(pc.equal(first, second), both).to_numpy()


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
        """Writes a shard by dense id, or by raw id where ids have no dense one."""
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
