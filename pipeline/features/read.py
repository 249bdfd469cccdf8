"""Reading: pieces of a table of attributes → blocks of values, dead letters and tallies."""

from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.beam.blocks import by_range
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.features.tables import Table
from pipeline.features.values import TEXT, VALUE_TYPES, values_of
from pipeline.read.cells import Checks, ids_of
from pipeline.read.discover import Piece, resolve_columns
from pipeline.read.readers import DeadLetter, read_checked


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
        num_read, problem, name = 0, "", f"{side}-{piece.number:06d}"
        letters: list[DeadLetter] = []
        first = schema.SIDES.index(side) * self._partitions
        try:
            for values, bad, size in read_values(piece, self._tables[side]):
                num_read += size
                letters += bad
                prints = values[schema.FINGERPRINT].to_numpy()
                for part, rows in by_range(prints, self._partitions):
                    yield first + part, values.take(pa.array(rows))
        except ValueError as error:
            problem = str(error)
        lines = "".join(letter.as_json() + "\n" for letter in sorted(letters))
        write_atomically(self._out / f"{name}.jsonl", lines)
        tally = {"path": piece.path, "read": num_read, "bad": len(letters), "problem": problem}
        write_json(self._out, name, tally)


def read_values(piece: Piece, table: Table) -> Iterator[tuple[pa.Table, list[DeadLetter], int]]:
    """Reads and validates one piece: good values, bad rows, and the number of both, by blocks.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """

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
