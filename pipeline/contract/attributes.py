"""Attributes that a candidate can be chosen by: texts, lists of texts and numbers, in Arrow.

    as_attributes(pa.table({"brand": ["a", "b"], "price": [1, 2.5], "in_stock": [True, None]}))

has the columns brand and in_stock ("true" or null) of texts, and price of float64.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TEXT, LIST, NUMBER = pa.string(), pa.list_(pa.string()), pa.float64()


def as_attributes(table: pa.Table, like: pa.Schema | None = None) -> pa.Table:
    """The columns as `TEXT`, `LIST` or `NUMBER`; null is missing, as empty texts and NaN are.

    Args:
      table: texts, lists of texts, true and false (texts from here on) and numbers.
      like: the columns that the result is to have, with their types; what the table does not have
        is missing. None for the columns of the table.

    Raises:
      ValueError: a column holds something else.
    """
    fields = like or pa.schema([(name, _type_of(table, name)) for name in table.column_names])
    columns = []
    for field in fields:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        try:
            columns.append(_as_type(table[field.name].combine_chunks(), field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            rule = {"text": "texts", "list": "lists of texts", "number": "numbers"}
            kind = rule[kind_of(field.type)]
            raise ValueError(f"attribute {field.name!r} must hold {kind}: {error}.") from error
    return pa.table(columns, schema=fields)


def kind_of(column_type: pa.DataType) -> str:
    """text, list or number; types of lists that are equal may have different hashes."""
    if column_type == NUMBER:
        return "number"
    return "list" if column_type == LIST else "text"


def texts(column: pa.Array) -> pa.Array:
    """As `prepare` reads categories: whole numbers in decimal, true and false, dates; or null."""
    if pa.types.is_floating(column.type):  # a missing value made floats of whole numbers
        column = pc.if_else(pc.is_nan(column), None, column)
        if pc.all(pc.equal(pc.floor(column), column)).as_py() is not False:
            column = column.cast(pa.int64())
    column = column.cast(TEXT)
    return pc.if_else(pc.equal(column, ""), None, column)


def with_values(lists: pa.Array, values: pa.Array) -> pa.Array:
    """Lists of the same lengths with other values, which come one list after the other."""
    sizes = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _type_of(table: pa.Table, name: str) -> pa.DataType:
    kind, types = table.schema.field(name).type, pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind):
        return TEXT
    if types.is_null(kind):  # no row has a value
        return TEXT
    if types.is_list(kind) or types.is_large_list(kind):
        return LIST
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return NUMBER
    raise ValueError(
        f"attribute {name!r} must hold texts, true and false, numbers or lists of texts, got "
        f"{kind}: convert it, or leave it out."
    )


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kind == NUMBER:
        column = column.cast(NUMBER)
        return pc.if_else(pc.is_finite(column), column, None)
    if kind == TEXT:
        return texts(column)
    if pa.types.is_null(column.type):
        return column.cast(LIST)
    return with_values(column, texts(pc.list_flatten(column)))
