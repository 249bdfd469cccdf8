"""Cells of Arrow columns → ids, numbers, times; a cell that is none fails its row."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import hashing
from pipeline.read.settings import EPOCH_UNITS, ISO_8601, SourceConfig

# YYYY-MM-DD, and after a T or a space hh:mm, seconds, a fraction and a zone
_ISO_PARTS = (
    r"^\s*(?P<day>\d{4}-\d\d-\d\d)(?:[Tt ](?P<clock>\d\d:\d\d)(?P<second>:\d\d)?(?:[.,]\d+)?"
    r"\s?(?:[Zz]|(?P<hours>[+-]\d\d):?(?P<minutes>\d\d)?)?)?\s*$"
)
_ISO_DEFAULTS = {"day": "", "clock": "00:00", "second": ":00", "hours": "+00", "minutes": "00"}
NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


class Checks:
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


def ids_of(
    column: pa.Array, name: str, checks: Checks
) -> tuple[np.ndarray, tuple[np.ndarray, list[bytes]]]:
    """Ids → codes int64 [n] into (fingerprints, raw ids in UTF-8), each id once."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # integers that met a missing value on their way
        bits = np.finfo(column.type.to_pandas_dtype()).nmant + 1
        column = column.cast(pa.float64())
        exact = pc.less(pc.abs(column), 2.0**bits)  # from here on, two integers are one float
        whole = pc.and_(pc.is_finite(column), pc.equal(pc.floor(column), column))
        checks.fail(_true(pc.invert(whole)), f"{name} is not a whole number")
        remedy = f"a number of 2^{bits} or more in a floating-point column, which may be another"
        checks.fail(_true(pc.invert(exact)), f"{name} is {remedy}: write ids as text or integers")
        column = pc.if_else(pc.and_(whole, exact), column, None).cast(pa.int64())
    encoded = pc.dictionary_encode(column)
    values = encoded.dictionary.to_pylist()
    raw = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    empty = np.array([value == b"" for value in raw] + [True])  # the last: code -1, null
    broken = np.array([not is_utf8(value) for value in raw] + [False])
    checks.fail(empty[codes], f"{name} is missing")
    checks.fail(broken[codes], f"{name} is not UTF-8")
    return np.maximum(codes, 0), (hashing.fingerprints(raw), raw)


def is_utf8(value: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def text_of(column: pa.Array, name: str, checks: Checks) -> pa.Array:
    """Bytes → string, null where they are not UTF-8 (and the row has failed)."""
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        broken = np.array([not is_utf8(value or b"") for value in column.to_pylist()])
        checks.fail(broken, f"{name} is not UTF-8")
        return pc.if_else(broken, None, column).cast(pa.string())


def numbers_of(column: pa.Array, name: str, checks: Checks) -> np.ndarray:
    """A column as float64 [n]; rows that are no finite number fail and hold 0."""
    column = text_of(column, name, checks)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.if_else(pc.match_substring_regex(column, NUMBER), column, None)
        column = pc.utf8_trim_whitespace(column)
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(values)
    checks.fail(~finite, f"{name} is not a number")
    return np.where(finite, values, 0.0)


def seconds_of(column: pa.Array, name: str, config: SourceConfig, checks: Checks) -> np.ndarray:
    """A column as whole seconds since 1970, int64 [n]; rows that are no time fail and hold 0."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        ticks = 1
    elif config.timestamp_format not in EPOCH_UNITS:
        column, pattern = text_of(column, name, checks).cast(pa.string()), config.timestamp_format
        if pattern == ISO_8601:
            column, pattern = _full_times(column), "%Y-%m-%dT%H:%M:%S%z"
        times = pc.strptime(column, pattern, "s", error_is_null=True)
        no_day = _no_day(column, times, pattern)
        checks.fail(no_day, f"{name} is a day that no calendar has")
        column, ticks = times.cast(pa.int64()), 1
    else:
        ticks = EPOCH_UNITS[config.timestamp_format]
        if not pa.types.is_integer(column.type):
            values = numbers_of(column, name, checks) // ticks
            checks.fail(np.abs(values) >= 2**63, f"{name} is out of range")
            return np.where(np.abs(values) < 2**63, values, 0).astype(np.int64)
    checks.fail(_true(pc.is_null(column)), f"{name} is not a time")
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    too_large = values > np.iinfo(np.int64).max  # half of what uint64 holds
    checks.fail(too_large, f"{name} is out of range")
    return np.where(too_large, 0, values).astype(np.int64) // ticks


def _full_times(texts: pa.Array) -> pa.Array:
    """Times of ISO 8601 as YYYY-MM-DDThh:mm:ss+hhmm; null where a text is no time."""
    found, parts = pc.extract_regex(texts, _ISO_PARTS), []
    for name, default in _ISO_DEFAULTS.items():
        part = pc.struct_field(found, name)
        parts.append(pc.if_else(pc.equal(part, ""), default, part))
    return pc.binary_join_element_wise(parts[0], "T", *parts[1:], "")


def _no_day(texts: pa.Array, times: pa.Array, pattern: str) -> np.ndarray:
    """Rows with days such as 30 February, which Arrow takes for 1 March: bool [n]."""
    found = np.zeros(len(texts), bool)
    for hours in (-14, 0, 14) if "%z" in pattern else (0,):  # the day where the clock stood
        there = pc.add(times, pa.scalar(3600 * hours, pa.duration("s")))
        month, day = (part(there).fill_null(0).to_numpy(False) for part in (pc.month, pc.day))
        found |= np.isin(month * 100 + day, (301, 302, 303, 501, 701, 1001, 1201))
    for row in np.flatnonzero(found):
        found[row] = False
        try:
            datetime.datetime.strptime(texts[row].as_py(), pattern)
        except ValueError as error:  # or Python does not know the pattern
            found[row] = "day is out of range" in str(error)
    return found


def _true(mask: pa.Array) -> np.ndarray:
    """A Boolean column as bool [n], null as False."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False)


def content_of(batch: pa.RecordBatch, row: int) -> str:
    """A row as one line of JSON, for a dead letter."""

    def text(value: Any) -> str:
        return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)

    fields = {name: batch[name][row].as_py() for name in batch.schema.names}
    return json.dumps(
        {name: None if value is None else text(value) for name, value in fields.items()},
        ensure_ascii=False,
    )
