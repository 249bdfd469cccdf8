"""Reading: pieces of a table of attributes → blocks of values, dead letters and tallies."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.beam.blocks import partition, partition_of
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.features.tables import Table
from pipeline.features.values import TEXT, VALUE_TYPES, values_of
from pipeline.read.cells import Checks, content_of, ids_of
from pipeline.read.discover import (
    BROKEN_FILE,
    Piece,
    column_names,
    delimiter_of,
    resolve_columns,
)
from pipeline.read.readers import (
    Batches,
    DeadLetter,
    parquet_batches,
    text_batches,
)


def values_schema(table: Table) -> pa.Schema:
    """Of a block of values: id, then every feature under its number, null where it is missing."""
    fields = [(schema.FINGERPRINT, pa.int64()), (schema.RAW_ID, TEXT)]
    kinds = enumerate(table.kinds.values())
    return pa.schema(fields + [(str(number), VALUE_TYPES[kind]) for number, kind in kinds])


class ReadTable(beam.DoFn):
    """(side, piece) → (side · partitions + range of fingerprints, block of values).

    A tally and the dead letters of the piece become files, in which a piece that cannot be read
    to its end is told too: an exception would reach the user as a worker's stack trace.
    """

    def __init__(self, tables: dict[str, Table], partitions: int, out: Path) -> None:
        self._tables, self._partitions, self._out = tables, partitions, out

    def process(self, element: tuple[str, Piece]) -> Iterator[tuple[int, pa.Table]]:
        side, piece = element
        num_read, problem = 0, ""
        letters: list[DeadLetter] = []
        first = schema.SIDES.index(side) * self._partitions
        try:
            for block in read_values(piece, self._tables[side]):
                num_read += block.num_read
                letters += block.bad
                prints = block.values[schema.FINGERPRINT].to_numpy()
                parts = partition_of(prints, self._partitions)
                for part, rows in partition(np.arange(len(prints)), parts, self._partitions):
                    yield first + part, block.values.take(pa.array(rows))
        except ValueError as error:
            problem = str(error)
        name = f"{side}-{piece.number:06d}"
        lines = [letter.as_json() + "\n" for letter in sorted(letters)]
        write_atomically(self._out / f"{name}.jsonl", "".join(lines))
        tally = {"path": piece.path, "read": num_read, "bad": len(letters), "problem": problem}
        write_json(self._out, name, tally)


class Values(NamedTuple):
    """What one block of a piece gave."""

    values: pa.Table  # `values_schema`
    bad: list[DeadLetter]
    num_read: int


def read_values(piece: Piece, table: Table) -> Iterator[Values]:
    """Reads and validates one piece.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """
    try:
        for batch, numbers, bad in _batches(piece, table):
            yield _validate(batch, numbers, bad, piece, table)
    except BROKEN_FILE as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{piece.path} cannot be read to its end: {reason}") from error


def _batches(piece: Piece, table: Table) -> Batches:
    names = column_names(piece, table.config)
    columns = [_id_column(names, piece, table), *table.kinds]
    if piece.kind == "parquet":
        return parquet_batches(piece, columns)
    return text_batches(piece, columns, delimiter_of(piece.path, table.config), names)


def _id_column(names: list[str], piece: Piece, table: Table) -> str:
    return resolve_columns(names, table.config, piece.path).item


def _validate(
    batch: pa.RecordBatch,
    numbers: np.ndarray,
    bad: list[DeadLetter],
    piece: Piece,
    table: Table,
) -> Values:
    checks = Checks(len(batch))
    id_column = _id_column(batch.schema.names, piece, table)
    codes, (prints, raw) = ids_of(batch[id_column], id_column, checks)
    ids = pa.array(raw, pa.binary())
    columns = [
        values_of(batch[name], kind, name, table.separator, checks)
        for name, kind in table.kinds.items()
    ]
    good = pa.array(np.flatnonzero(checks.good))
    codes = codes[checks.good]
    known = [pa.array(prints[codes]), ids.take(pa.array(codes)).cast(pa.string()).cast(TEXT)]
    values = pa.Table.from_arrays(
        known + [column.take(good) for column in columns], schema=values_schema(table)
    )
    letters = [
        DeadLetter(piece.number, int(numbers[row]), piece.path, reason, content_of(batch, row))
        for row, reason in checks.failures()
    ]
    return Values(values, bad + letters, len(batch) + len(bad))
