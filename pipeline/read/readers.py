"""Reads a piece of a source in batches of Arrow columns, with the number of every row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.read.cells import Checks, content_of, is_utf8
from pipeline.read.discover import Piece, column_names
from pipeline.read.formats import BROKEN_FILE, delimiter_of, open_text, parquet_file, tfds_builder
from pipeline.read.settings import SourceConfig

BLOCK_ROWS = 262_144
BLOCK_BYTES = 16 << 20  # of a text file
_BROKEN = "\x00not UTF-8\x00"


class DeadLetter(NamedTuple):
    """A row that cannot be used."""

    piece: int
    row: int  # from 1, the header and blank lines of a text file not counted
    source: str
    reason: str
    content: str

    def as_json(self) -> str:
        """One line of the dead-letter file."""
        fields = {"source": self.source, "row": self.row, "reason": self.reason}
        return json.dumps(fields | {"content": self.content}, ensure_ascii=False)


# Columns, the number of each row in its file from 1, and the rows that are no columns at all.
Batches = Iterator[tuple[pa.RecordBatch, np.ndarray, list[DeadLetter]]]
Validated = TypeVar("Validated")


def read_checked(
    piece: Piece,
    config: SourceConfig,
    choose: Callable[[list[str]], list[str]],
    validate: Callable[[pa.RecordBatch, np.ndarray, Checks], Validated],
) -> Iterator[tuple[Validated, list[DeadLetter], int]]:
    """Reads a piece: what `validate` makes of each batch, its bad rows, and how many rows it has.

    `choose` tells which of all columns to read; `validate` also gets the numbers of the rows.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """
    try:
        for batch, numbers, bad in _batches(piece, config, choose):
            checks = Checks(len(batch))
            validated = validate(batch, numbers, checks)
            number = len(batch) + len(bad)
            for row, reason in checks.failures():
                place = (piece.number, int(numbers[row]), piece.path)
                bad.append(DeadLetter(*place, reason, content_of(batch, row)))
            yield validated, bad, number
    except BROKEN_FILE as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{piece.path} cannot be read to its end: {reason}") from error


def _batches(
    piece: Piece, config: SourceConfig, choose: Callable[[list[str]], list[str]]
) -> Batches:
    names = column_names(piece, config)
    columns = choose(names)
    if piece.kind == "parquet":
        return parquet_batches(piece, columns)
    if piece.kind == "tfds":
        return tfds_batches(piece, columns, config.source)
    return text_batches(piece, columns, delimiter_of(piece.path, config), names)


class _Utf8Lines(io.RawIOBase):
    """A text file whose lines that are not UTF-8 became one marker field each.

    The parser hands a row with a wrong number of columns to a callback, but stops at one that
    is not UTF-8; so a broken line takes the same way, and row numbers stay right.
    """

    def __init__(self, file: BinaryIO | pa.NativeFile) -> None:
        self.broken: dict[int, str] = {}  # marker number → the line, bad bytes escaped
        self._file, self._rest = file, b""
        self._ready = memoryview(b"")
        self._num_broken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._file.read(BLOCK_BYTES)
            if not chunk:
                self._ready, self._rest = memoryview(self._repair(self._rest)), b""
                break
            whole, newline, self._rest = (self._rest + chunk).rpartition(b"\n")
            self._ready = memoryview(self._repair(whole + newline))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _repair(self, lines: bytes) -> bytes:
        if is_utf8(lines):
            return lines
        return b"".join(map(self._repair_line, lines.splitlines(keepends=True)))

    def _repair_line(self, line: bytes) -> bytes:
        if is_utf8(line):
            return line
        number = self._num_broken
        self.broken[number] = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
        self._num_broken += 1
        return f"{_BROKEN}{number}\n".encode()


def parquet_batches(piece: Piece, columns: list[str]) -> Batches:
    """The batches of a row group."""
    file = parquet_file(piece.path)
    row = piece.first_row
    for batch in file.iter_batches(BLOCK_ROWS, [piece.part], columns, use_threads=False):
        yield batch, np.arange(row + 1, row + 1 + len(batch)), []
        row += len(batch)


def text_batches(piece: Piece, columns: list[str], delimiter: str, header: list[str]) -> Batches:
    """The batches of a text file, all cells as bytes.

    A row with another number of columns than `header` has, or that is not UTF-8, is a dead letter.
    """
    wrong: list[DeadLetter] = []
    with open_text(piece.path) as file:
        lines = _Utf8Lines(file)

        def collect(row: pa_csv.InvalidRow) -> str:
            reason = f"expected {row.expected_columns} columns, found {row.actual_columns}"
            text = row.text
            if text.startswith(_BROKEN):
                reason = "the line is not UTF-8"
                text = lines.broken.pop(int(text.removeprefix(_BROKEN)))
            wrong.append(DeadLetter(piece.number, row.number - 1, piece.path, reason, text))
            return "skip"

        batches = pa_csv.open_csv(
            lines,
            pa_csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=header, skip_rows=1
            ),
            pa_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=collect),
            pa_csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())
            ),
        )
        row = 0
        for batch in batches:
            bad, wrong[:] = list(wrong), []
            numbers = np.arange(row + 1, row + 1 + len(batch) + len(bad))
            row += len(numbers)
            left = np.setdiff1d(numbers, [letter.row for letter in bad], assume_unique=True)
            yield batch, left[: len(batch)], bad


def tfds_batches(piece: Piece, columns: list[str], source: str) -> Batches:
    """The batches of a shard of a TFDS split."""
    import tensorflow_datasets as tfds

    builder = tfds_builder(source)
    shard = builder.info.splits[piece.path].shard_lengths[piece.part]
    instruction = f"{piece.path}[{piece.first_row}:{piece.first_row + shard}]"
    examples = builder.as_dataset(
        split=instruction,
        batch_size=BLOCK_ROWS,
        decoders=tfds.decode.PartialDecoding(dict.fromkeys(columns, True)),
        shuffle_files=False,
    )
    row = piece.first_row
    for examples_of_batch in tfds.as_numpy(examples):
        # numbers keep their width, because it says which of them are exact
        arrays = [
            pa.array(values.tolist() if values.dtype == object else values)
            for values in map(examples_of_batch.get, columns)
        ]
        batch = pa.RecordBatch.from_arrays(arrays, columns)
        yield batch, np.arange(row + 1, row + 1 + len(batch)), []
        row += len(batch)
