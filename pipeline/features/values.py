"""Cells of an attribute table → values of a kind, in one form whatever the format of the file.

A category is a text: whole numbers in decimal (also those that a missing value made floats of),
true and false, dates as YYYY-MM-DD. Null, an empty text and a NaN of a float column are missing.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.read.cells import Checks, numbers_of, text_of

TEXT = pa.large_string()  # offsets of 64 bits: a range of a long table can hold more than 2 GB
VALUE_TYPES = {
    "categorical": TEXT,
    "multi": pa.large_list(TEXT),
    "numeric": pa.float64(),
    "text": TEXT,
}
LARGEST = 1e150  # of the numbers of a numeric column: their squares stay finite
_UNIT = 1130  # `Moments` count units of 2^-1130, smaller than the last bit of any float64
_WHOLE = 2.0**53  # whole numbers below it are exact as floats


def values_of(column: pa.Array, kind: str, name: str, separator: str, checks: Checks) -> pa.Array:
    """The values of a column of cells, [n], of the type that `VALUE_TYPES` has for the kind.

    `checks` takes the rows that cannot be read; `separator` parts the values of a multi text.
    """
    if kind == "multi":
        return _many(column, name, separator, checks)
    read = _number if kind == "numeric" else _category
    return read(column, name, checks)


def infer_kind(column_type: pa.DataType) -> str:
    """The kind of a column by its type in Parquet, "" for none; TypeError: the type has no kind."""
    types = pa.types
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    if types.is_null(column_type):
        return ""
    if is_list(column_type) and infer_kind(column_type.value_type) in ("", "categorical"):
        return "multi"
    if types.is_integer(column_type) or types.is_boolean(column_type) or is_text(column_type):
        return "categorical"
    numbers = (types.is_floating, types.is_decimal, types.is_date, types.is_timestamp)
    if any(is_kind(column_type) for is_kind in numbers):
        return "numeric"
    raise TypeError


def is_list(column_type: pa.DataType) -> bool:
    """Whether a cell of the type holds several values."""
    return isinstance(column_type, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def is_text(column_type: pa.DataType) -> bool:
    """Whether a cell of the type is a text, or the bytes of one."""
    return column_type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _plain(column: pa.Array, name: str, checks: Checks) -> pa.Array:
    """Without dictionaries; a text is valid UTF-8, or its row has failed."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):  # by way of bytes: a file may say that it is UTF-8 and lie
        column = text_of(column.cast(pa.large_binary()), name, checks)
    return column


def _category(column: pa.Array, name: str, checks: Checks) -> pa.Array:
    column = _plain(column, name, checks)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), _WHOLE))
        number = pc.if_else(whole, column, None).cast(pa.int64()).cast(TEXT)
        text = pc.coalesce(number, column.cast(pa.string()).cast(TEXT))
    else:
        text = column.cast(pa.string()).cast(TEXT) if not is_text(column.type) else column
    return pc.if_else(pc.equal(text, ""), None, text.cast(TEXT))


def _number(column: pa.Array, name: str, checks: Checks) -> pa.Array:
    column = _plain(column, name, checks)
    if is_text(column.type):
        missing = pc.equal(pc.utf8_trim_whitespace(column), "").fill_null(True)
        column = pc.if_else(missing, "0", column)
    else:
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())  # since 1970
        column = column.cast(pa.float64(), safe=False)
        missing = pc.is_null(column, nan_is_null=True)
        column = pc.if_else(missing, 0.0, column)
    values = numbers_of(column, name, checks)
    checks.fail(np.abs(values) > LARGEST, f"{name} is out of range")
    return pa.array(values, mask=missing.to_numpy(zero_copy_only=False))


def _many(column: pa.Array, name: str, separator: str, checks: Checks) -> pa.Array:
    """Lists of categories, each once and in the order of the cell; an empty one is missing."""
    if not is_list(column.type):
        column = _category(column, name, checks)
        column = pc.split_pattern(column, separator)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(column)), lengths)
    cells = pc.list_flatten(column)
    inner = Checks(len(cells))
    values = _category(cells, name, inner)
    broken = np.zeros(len(column), bool)
    broken[rows[~inner.good]] = True
    checks.fail(broken, f"{name} is not UTF-8")
    encoded = pc.dictionary_encode(values)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    _, first = np.unique(rows * (len(encoded.dictionary) + 1) + codes, return_index=True)
    kept = np.sort(first)
    kept = kept[codes[kept] >= 0]
    sizes = np.bincount(rows[kept], minlength=len(column))
    offsets = pa.array(np.r_[0, np.cumsum(sizes)], pa.int64())
    return pa.LargeListArray.from_arrays(offsets, values.take(pa.array(kept)))


class Moments(NamedTuple):
    """The number of values, their exact sum in units of 2^-1130, of their squares in 2^-2260.

    A sum of floating-point numbers depends on its order, so on how the work was cut. A float64 is a
    whole number of tiny units, and sums of whole numbers do not: here they are Python integers.
    """

    number: int = 0
    total: int = 0
    squares: int = 0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """The moments of finite numbers, float64 [n], none above `LARGEST`."""
        mantissa, exponent = np.frexp(np.asarray(values, np.float64))
        whole = np.ldexp(mantissa, 53).astype(np.int64)  # values = whole · 2^(exponent - 53)
        total = squares = 0
        for power in np.unique(exponent).tolist():
            alike = whole[exponent == power].tolist()
            shift = power - 53 + _UNIT
            total += sum(alike) << shift
            squares += sum(number * number for number in alike) << 2 * shift
        return cls(len(whole), total, squares)

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 of no values."""
        return float(Fraction(self.total, self.number << _UNIT)) if self.number else 0.0

    @property
    def std(self) -> float:
        """The standard deviation, divided by n; 1 where all values are equal."""
        if not self.number:
            return 1.0
        mean = Fraction(self.total, self.number << _UNIT)
        variance = Fraction(self.squares, self.number << 2 * _UNIT) - mean * mean
        return math.sqrt(float(variance)) or 1.0
