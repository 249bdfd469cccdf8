"""Reads a piece of a source in blocks, and tells good rows from bad ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.config import EPOCH_UNITS, SourceConfig
from pipeline.rows import ROW
from pipeline.sources import (
    Columns,
    Piece,
    delimiter_of,
    header_of,
    open_text,
    resolve_columns,
    tfds_builder,
)

BLOCK_ROWS = 262_144
BLOCK_BYTES = 16 << 20  # of a text file
_BROKEN = "\x00not UTF-8\x00"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


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


class Block(NamedTuple):
    """What one block of a piece gave."""

    rows: np.ndarray  # ROW [n], ids are fingerprints
    ids: dict[str, tuple[np.ndarray, list[bytes]]]  # side → fingerprints, raw ids; each id once,
    # without a side whose column is not read
    bad: list[DeadLetter]
    num_read: int
    num_below: int  # rows below the rating threshold
    has_times: bool  # whether rows have a timestamp


def read_blocks(piece: Piece, config: SourceConfig) -> Iterator[Block]:
    """Reads and validates one piece.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """
    reader: Callable[..., Iterator[tuple[pa.RecordBatch, np.ndarray, list[DeadLetter]]]]
    reader = {"parquet": _read_parquet, "text": _read_text, "tfds": _read_tfds}[piece.kind]
    try:
        for batch, numbers, bad in reader(piece, config):
            columns = resolve_columns(batch.schema.names, config, piece.path)
            yield _validate(batch, numbers, bad, columns, piece, config)
    except (pa.ArrowException, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{piece.path} cannot be read to its end: {reason}") from error


def _read_parquet(
    piece: Piece, config: SourceConfig
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, list[DeadLetter]]]:
    file = pq.ParquetFile(piece.path)
    columns = resolve_columns(file.schema_arrow.names, config, piece.path).read()
    row = piece.first_row
    for batch in file.iter_batches(BLOCK_ROWS, [piece.part], columns, use_threads=False):
        yield batch, np.arange(row + 1, row + 1 + len(batch)), []
        row += len(batch)


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
        try:
            lines.decode()
            return lines
        except UnicodeDecodeError:
            return b"".join(map(self._repair_line, lines.splitlines(keepends=True)))

    def _repair_line(self, line: bytes) -> bytes:
        try:
            line.decode()
            return line
        except UnicodeDecodeError:
            marker = f"{_BROKEN}{self._num_broken}\n"
            text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
            self.broken[self._num_broken] = text
            self._num_broken += 1
            return marker.encode()


def _read_text(
    piece: Piece, config: SourceConfig
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, list[DeadLetter]]]:
    wrong: list[DeadLetter] = []
    header = header_of(piece.path, config)
    names = resolve_columns(header, config, piece.path).read()
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
            pa_csv.ParseOptions(
                delimiter=delimiter_of(piece.path, config), invalid_row_handler=collect
            ),
            pa_csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.binary())
            ),
        )
        row = 0
        for batch in batches:
            bad, wrong[:] = list(wrong), []
            numbers = _row_numbers(row, len(batch), np.array([b.row for b in bad], np.int64))
            row += len(batch) + len(bad)
            yield batch, numbers, bad


def _row_numbers(before: int, good: int, wrong: np.ndarray) -> np.ndarray:
    """The numbers of the good rows of a block: those that the wrong rows leave, int64 [good]."""
    numbers = np.arange(before + 1, before + 1 + good + len(wrong))
    return np.setdiff1d(numbers, wrong, assume_unique=True)[:good]


def _read_tfds(
    piece: Piece, config: SourceConfig
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, list[DeadLetter]]]:
    import tensorflow_datasets as tfds

    builder = tfds_builder(config.source)
    columns = resolve_columns(list(builder.info.features), config, piece.path).read()
    shard = builder.info.splits[piece.path].shard_lengths[piece.part]
    instruction = f"{piece.path}[{piece.first_row}:{piece.first_row + shard}]"
    examples = builder.as_dataset(
        split=instruction,
        batch_size=BLOCK_ROWS,
        decoders=tfds.decode.PartialDecoding(dict.fromkeys(columns, True)),
        shuffle_files=False,
    )
    row = piece.first_row
    for batch in tfds.as_numpy(examples):
        arrays = [pa.array(batch[name].tolist()) for name in columns]
        yield (
            pa.RecordBatch.from_arrays(arrays, columns),
            np.arange(row + 1, row + 1 + len(arrays[0])),
            [],
        )
        row += len(arrays[0])


class _Checks:
    """The first reason against each row of a block."""

    def __init__(self, num_rows: int) -> None:
        self._reasons = [""]  # the first stands for a good row
        self._code = np.zeros(num_rows, np.int64)

    def fail(self, rows: np.ndarray, reason: str) -> None:
        """Marks rows, bool [n], unless an earlier check already did."""
        self._code[rows & self.good] = len(self._reasons)
        self._reasons.append(reason)

    @property
    def good(self) -> np.ndarray:
        """The rows that no check failed: bool [n]."""
        return self._code == 0

    def failures(self) -> list[tuple[int, str]]:
        """(row, reason) of every row that failed."""
        return [(int(row), self._reasons[self._code[row]]) for row in np.flatnonzero(self._code)]


def _validate(
    batch: pa.RecordBatch,
    numbers: np.ndarray,
    bad: list[DeadLetter],
    columns: Columns,
    piece: Piece,
    config: SourceConfig,
) -> Block:
    checks = _Checks(len(batch))
    rows = np.zeros(len(batch), ROW)
    rows["order"] = (piece.number << 40) + numbers
    rows["split"], rows["weight"] = piece.split, 1
    codes, ids = {}, {}
    for side, name in zip(schema.SIDES, (columns.user, columns.item), strict=True):
        if name:
            codes[side], ids[side] = _encode(batch[name], name, checks)
    if columns.timestamp:
        rows["timestamp"] = _seconds(batch[columns.timestamp], columns.timestamp, config, checks)
    if columns.weight:
        rows["weight"] = _numbers(batch[columns.weight], columns.weight, checks)
        checks.fail(rows["weight"] < 0, f"{columns.weight} is negative")
    keep = checks.good
    if columns.rating:
        keep &= _numbers(batch[columns.rating], columns.rating, checks) >= config.rating_threshold
    keep &= checks.good
    used = {}
    for side, (fingerprints, raw) in ids.items():
        rows[side] = fingerprints[codes[side]] if len(fingerprints) else 0
        present = np.unique(codes[side][keep])
        used[side] = (fingerprints[present], [raw[i] for i in present])
    letters = [
        DeadLetter(piece.number, int(numbers[row]), piece.path, reason, _content(batch, row))
        for row, reason in checks.failures()
    ]
    below = int(checks.good.sum() - keep.sum())
    num_read = len(batch) + len(bad)
    return Block(rows[keep], used, bad + letters, num_read, below, columns.timestamp is not None)


def _content(batch: pa.RecordBatch, row: int) -> str:
    def text(value: Any) -> str:
        return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)

    fields = {name: batch[name][row].as_py() for name in batch.schema.names}
    return json.dumps(
        {name: None if value is None else text(value) for name, value in fields.items()},
        ensure_ascii=False,
    )


def _encode(
    column: pa.Array, name: str, checks: _Checks
) -> tuple[np.ndarray, tuple[np.ndarray, list[bytes]]]:
    """Ids → codes int64 [n] into (fingerprints, raw ids in UTF-8), each id once."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # integers that met a missing value on their way
        whole = pc.equal(pc.floor(column), column)
        checks.fail(_true(pc.invert(whole)), f"{name} is not a whole number")
        column = pc.if_else(whole, column, None).cast(pa.int64())
    encoded = pc.dictionary_encode(column)
    raw = [_utf8(value) for value in encoded.dictionary.to_pylist()]
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    empty = np.array([value == b"" for value in raw] + [True])  # the last: code -1, null
    broken = np.array([value is None for value in raw] + [False])
    checks.fail(empty[codes], f"{name} is missing")
    checks.fail(broken[codes], f"{name} is not UTF-8")
    known = [value or b"" for value in raw]
    return np.maximum(codes, 0), (schema.fingerprints(known), known)


def _utf8(value: Any) -> bytes | None:
    """The UTF-8 bytes of a raw id; None when it is bytes that are not UTF-8."""
    if not isinstance(value, bytes):
        return str(value).encode()
    try:
        value.decode()
    except UnicodeDecodeError:
        return None
    return value


def _text(column: pa.Array, name: str, checks: _Checks) -> pa.Array:
    """Bytes → string, null where they are not UTF-8 (and the row has failed)."""
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = column.to_pylist()
        decoded = [None if v is None or _utf8(v) is None else v.decode() for v in values]
        broken = [v is not None and _utf8(v) is None for v in values]
        checks.fail(np.array(broken), f"{name} is not UTF-8")
        return pa.array(decoded, pa.string())


def _numbers(column: pa.Array, name: str, checks: _Checks) -> np.ndarray:
    """A column as float64 [n]; rows that are no finite number fail and hold 0."""
    column = _text(column, name, checks)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.if_else(pc.match_substring_regex(column, _NUMBER), column, None)
        column = pc.utf8_trim_whitespace(column)
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(values)
    checks.fail(~finite, f"{name} is not a number")
    return np.where(finite, values, 0.0)


def _seconds(column: pa.Array, name: str, config: SourceConfig, checks: _Checks) -> np.ndarray:
    """A column as whole seconds since 1970, int64 [n]; rows that are no time fail and hold 0."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        ticks = 1
    elif "%" in config.timestamp_format:
        column = _text(column, name, checks).cast(pa.string())
        times = pc.strptime(column, config.timestamp_format, "s", error_is_null=True)
        column, ticks = times.cast(pa.int64()), 1
    else:
        ticks = EPOCH_UNITS[config.timestamp_format]
        if not pa.types.is_integer(column.type):
            values = _numbers(column, name, checks) // ticks
            checks.fail(np.abs(values) >= 2**63, f"{name} is out of range")
            return np.where(np.abs(values) < 2**63, values, 0).astype(np.int64)
    checks.fail(_true(pc.is_null(column)), f"{name} is not a time")
    return column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) // ticks


def _true(mask: pa.Array) -> np.ndarray:
    """A Boolean column as bool [n], null as False."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False)
