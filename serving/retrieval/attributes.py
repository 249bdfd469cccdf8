"""What `where` of a request says of candidates → which rows it keeps."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract.attributes import LIST, NUMBER, kind_of
from pipeline.contract.settings import did_you_mean
from serving.errors import InvalidRequest
from serving.retrieval.requests import shown

MAX_WHERE_VALUES = 10_000  # of a request
_MAX_CACHED, _MAX_CACHED_BYTES = 1000, 1 << 26  # of masks: 64 of a million rows
_LARGEST = sys.float_info.max

Conditions = Mapping[str, Any]  # column → texts, or (lowest, highest)


class _Texts(NamedTuple):
    """A column of texts, or of lists of them."""

    code_of: dict[str, int]
    codes: np.ndarray  # int32 [n], -1 for a missing value
    rows: np.ndarray | None  # int32 [n], whose they are; None where each row has one, in order


class Attributes:
    """The attributes of n candidates; masks of repeated conditions are kept.

    Example:
      >>> columns = Attributes(pa.table({"brand": ["a", "b", "a"], "price": [1.0, 2.0, 3.0]}))
      >>> columns.mask(columns.check({"brand": ["a"], "price": {"min": 2}})).tolist()
      [False, False, True]

    Args:
      table: as `pipeline.contract.attributes.as_attributes` makes it.
    """

    def __init__(self, table: pa.Table) -> None:
        self.schema, self._size = table.schema, len(table)
        columns = self._columns = {name: _read(table[name]) for name in table.column_names}
        size = len(table)
        kept = min(_MAX_CACHED, _MAX_CACHED_BYTES // max(1, size))
        # Without self, so that reference counting frees it with its user.
        self._mask_of = lru_cache(kept)(lambda name, key: _fulfil(columns[name], key, size))

    def kinds(self) -> dict[str, str]:
        """Of each column, what it holds: text, list (of texts) or number."""
        return {field.name: kind_of(field.type) for field in self.schema}

    def check(self, where: Mapping[str, Any]) -> Conditions:
        """The conditions of a request; InvalidRequest: unknown, of another kind, or too many."""
        kinds, count = self.kinds(), 0
        conditions: dict[str, Any] = {}
        for name, value in where.items():
            if name not in kinds:
                has = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
                hint = did_you_mean(str(name)[:40], list(kinds), "")
                raise InvalidRequest(
                    f"where has {shown(name)}, which this version does not know: it has "
                    f"{has or 'no attributes, export with filter_columns'}. {hint}".rstrip()
                )
            if kinds[name] == "number":
                conditions[name] = _bounds(name, value)
                continue
            texts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            if (count := count + len(texts)) > MAX_WHERE_VALUES:
                raise InvalidRequest(f"where may have at most {MAX_WHERE_VALUES} values.")
            if not all(isinstance(text, str | bool) for text in texts):
                rule = "a string, true or false, or a list of them: any of these is meant"
                raise InvalidRequest(f"where: {name} must be {rule}, got {shown(value)}.")
            conditions[name] = [t if isinstance(t, str) else str(t).lower() for t in texts]
        return conditions

    def mask(self, conditions: Conditions) -> np.ndarray:
        """Which rows fulfil all conditions: bool [n], not to be changed.

        A column of lists fulfils one if any of its values does; what is missing fulfils none.
        """
        masks = [self._mask(name, condition) for name, condition in conditions.items()]
        if not masks:
            return np.ones(self._size, bool)
        return masks[0] if len(masks) == 1 else np.logical_and.reduce(masks)

    def _mask(self, name: str, condition: Any) -> np.ndarray:
        column = self._columns[name]
        if isinstance(column, _Texts):  # of the values that are there, so that a key is short
            codes = {column.code_of[text] for text in condition if text in column.code_of}
            return self._mask_of(name, np.sort(np.fromiter(codes, np.int32, len(codes))).tobytes())
        return self._mask_of(name, np.array(condition).tobytes())


def as_where(pairs: Sequence[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The `where` that a command line says: ["brand=a,b", "price:max=20"].

    Texts are parted by commas; `kinds` are those of `Attributes.kinds`.

    Raises:
      ValueError: a pair has another form, or the value of a number is not a number.
    """
    where: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        name, _, bound = name.rpartition(":") if name.endswith((":min", ":max")) else (name, "", "")
        if not (name and value):
            raise ValueError(f"where must be NAME=VALUE, NAME:min=N or NAME:max=N, got {pair!r}.")
        kind = kinds.get(name)
        if kind is None:  # which `check` refuses
            where[name] = value
            continue
        if kind != "number":
            if bound:
                raise ValueError(f"where must have no {bound} of {name}, which holds texts.")
            where.setdefault(name, []).extend(value.split(","))
            continue
        try:
            bounds = dict.fromkeys([bound] if bound else ["min", "max"], float(value))
        except ValueError as error:
            raise ValueError(f"where must give {name} a number, got {value!r}.") from error
        where[name] = where.get(name, {}) | bounds
    return where


def _read(column: pa.ChunkedArray) -> _Texts | np.ndarray:
    """Codes of texts, or numbers float64 [n], NaN where they are missing."""
    values, rows = column.combine_chunks(), None
    if column.type == NUMBER:
        return values.fill_null(math.nan).to_numpy()
    if column.type == LIST:
        sizes = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(values), dtype=np.int32), sizes)
        values = pc.list_flatten(values)
    encoded = values.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy()
    return _Texts({v: n for n, v in enumerate(encoded.dictionary.to_pylist())}, codes, rows)


def _fulfil(column: _Texts | np.ndarray, condition: bytes, size: int) -> np.ndarray:
    """Which rows have a code of int32s, or a number from one float64 to the other: bool [n]."""
    if not isinstance(column, _Texts):
        lowest, highest = np.frombuffer(condition)
        return (column >= lowest) & (column <= highest)
    is_meant = np.zeros(len(column.code_of) + 1, bool)  # the last is for missing values, -1
    is_meant[np.frombuffer(condition, np.int32)] = True
    hits = is_meant[column.codes]
    if column.rows is None:
        return hits
    mask = np.zeros(size, bool)
    mask[column.rows[hits]] = True
    return mask


def _bounds(name: str, value: Any) -> tuple[float, float]:
    bounds = value if isinstance(value, Mapping) else {}
    are_numbers = all(
        isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= _LARGEST
        for number in bounds.values()
    )
    if not bounds or bounds.keys() - {"min", "max"} or not are_numbers:
        rule = 'numbers as {"min": 1, "max": 2}, or one of them'
        raise InvalidRequest(f"where: {name} must be {rule}, got {shown(value)}.")
    return float(bounds.get("min", -math.inf)), float(bounds.get("max", math.inf))
