"""Reads a piece of a source in batches of Arrow columns, with the number of every row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.read.cells import Checks, content_of, is_utf8
from pipeline.read.discover import Piece, column_names
from pipeline.read.formats import BROKEN_FILE, delimiter_of, open_text, parquet_file, tfds_builder
from pipeline.read.settings import SourceConfig

BLOCK_ROWS = 262_144
BLOCK_BYTES = 16 << 20  # of a text file
_BROKEN = b"\x00broken\x00"


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


def _whole_rows(file: BinaryIO | pa.NativeFile) -> Iterator[bytes]:
    """A text file in blocks of whole rows, without the first line, which names the columns."""
    rest, names_came = b"", False
    while chunk := file.read(BLOCK_BYTES):
        rest += chunk
        end = _end_of_rows(rest)
        lines, rest = rest[:end], rest[end:]
        yield lines if names_came else lines.partition(b"\n")[2]
        names_came |= bool(lines)
    yield rest if names_came else b""


def _end_of_rows(lines: bytes) -> int:
    """Behind the last line end with an even number of quotes before it: it is in no quoted cell.

    Where no line end has that, it is behind the last one: a cell has a quote but is not quoted.
    """
    last = end = lines.rfind(b"\n") + 1
    odd = lines.count(b'"', 0, end) % 2
    while odd and end:
        start = lines.rfind(b"\n", 0, end - 1) + 1
        odd ^= lines.count(b'"', start, end) % 2
        end = start
    return end or last


def _repair(lines: bytes, broken: list[tuple[str, str]], more_delimiters: bytes) -> bytes:
    """Puts a marker, with a column more than the file has, in the place of each line not UTF-8.

    The parser hands a row with a wrong number of columns to a callback, but stops at one that is
    not UTF-8. `broken` takes what is wrong, and these lines, their bad bytes escaped.
    """
    if is_utf8(lines):
        return lines
    repaired = lines.splitlines(keepends=True)
    for place, line in enumerate(repaired):
        if not is_utf8(line):
            repaired[place] = _marker(line, "the line is not UTF-8", broken, more_delimiters)
    return b"".join(repaired)


def _without_open_quotes(
    lines: bytes, broken: list[tuple[str, str]], more_delimiters: bytes
) -> bytes:
    """As `_repair`, for each row with a cell that begins with a quote and does not end with one.

    The parser takes all that follows for a part of that cell, up to the next quote, however far.
    """
    border = rb"[\r\n" + re.escape(more_delimiters[:1]) + rb"]"
    quoted = re.compile(
        rb"(?:\A|(?<=" + border + rb'))"[^"]*+(?:""[^"]*+)*+("(?=' + border + rb"|\Z))?"
    )
    kept, done, row, place = [], 0, 0, 0  # places: of what is not kept yet, a row, the next cell
    while cell := quoted.search(lines, place):
        row = max(row, lines.rfind(b"\n", place, cell.start()) + 1)
        place = cell.end()
        if not cell[1] and b"\n" in cell[0]:
            place = lines.index(b"\n", cell.start()) + 1
            marker = _marker(lines[row:place], "a quote is not closed", broken, more_delimiters)
            kept += [lines[done:row], marker]
            done = row = place
    return b"".join([*kept, lines[done:]])


def _marker(
    line: bytes, reason: str, broken: list[tuple[str, str]], more_delimiters: bytes
) -> bytes:
    broken.append((reason, line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")))
    return _BROKEN + b"%d" % (len(broken) - 1) + more_delimiters + b"\n"


def parquet_batches(piece: Piece, columns: list[str]) -> Batches:
    """The batches of a row group."""
    file = parquet_file(piece.path)
    row = piece.first_row
    for batch in file.iter_batches(BLOCK_ROWS, [piece.part], columns, use_threads=False):
        yield batch, np.arange(row + 1, row + 1 + len(batch)), []
        row += len(batch)


def text_batches(piece: Piece, columns: list[str], delimiter: str, header: list[str]) -> Batches:
    """The batches of a text file, all cells as bytes.

    A row with another number of columns than `header` has, that is not UTF-8, or with a quote that
    nothing closes is a dead letter.
    """
    wrong: list[DeadLetter] = []
    broken: list[tuple[str, str]] = []
    row, more_delimiters = 0, delimiter.encode() * len(header)

    def collect(invalid: pa_csv.InvalidRow) -> str:
        reason = f"expected {invalid.expected_columns} columns, found {invalid.actual_columns}"
        text = invalid.text
        if text.startswith(_BROKEN.decode()):
            reason, text = broken[int(text[len(_BROKEN) :].rstrip(delimiter))]
        wrong.append(DeadLetter(piece.number, row + invalid.number, piece.path, reason, text))
        return "skip"

    parse = pa_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=collect)
    convert = pa_csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())
    )

    def table_of(lines: bytes) -> pa.Table:
        read = pa_csv.ReadOptions(use_threads=False, block_size=len(lines) + 1, column_names=header)
        # Not a reader of the whole file: it would collect what is wrong until a row is right.
        return pa_csv.read_csv(pa.BufferReader(lines), read, parse, convert).combine_chunks()

    with open_text(piece.path) as file:
        for lines in _whole_rows(file):
            if not lines.strip(b"\r\n"):
                continue
            wrong, broken = [], []
            lines = _repair(lines, broken, more_delimiters)
            table = table_of(lines)
            text = lines.rstrip(b"\r\n")
            odd = text.count(b'"', text.rfind(b"\n") + 1) % 2  # quotes in the last line
            if odd or len(table) + len(wrong) <= text.count(b"\n"):  # or a row has several lines
                wrong = []
                table = table_of(_without_open_quotes(lines, broken, more_delimiters))
            arrays = [table[name].combine_chunks() for name in columns]
            numbers = np.arange(row + 1, row + 1 + len(table) + len(wrong))
            row += len(numbers)
            left = np.setdiff1d(numbers, [letter.row for letter in wrong], assume_unique=True)
            yield pa.RecordBatch.from_arrays(arrays, columns), left, wrong


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
