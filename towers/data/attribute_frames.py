"""Attributes from a DataFrame: the rules of `twotower prepare` on a table, in memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.contract import schema
from pipeline.features.encoding import describe, encode, make_spec
from pipeline.features.values import infer_kind, values_of
from pipeline.prepare.settings import PrepareConfig
from pipeline.read.cells import Checks, ids_of
from towers.data.attributes import Features
from towers.data.interactions import Vocabulary, find_ids

if TYPE_CHECKING:
    import pandas as pd


def check_columns(df: pd.DataFrame, what: str, *columns: str | None) -> None:
    """Raises ValueError where `what` is not a frame with such columns; None stands for none."""
    if not hasattr(df, "iloc") or not hasattr(df, "columns"):
        remedy = "read a file by pd.read_csv, and what was prepared by towers.open_data"
        raise ValueError(f"{what} must be one of pandas, got {type(df).__name__}: {remedy}.")
    if not df.columns.is_unique:
        name = df.columns[df.columns.duplicated()][0]
        raise ValueError(f"{what} must have one column {name!r}, got several: drop the others.")
    for column in columns:
        if column is not None and column not in df.columns:
            hint = ": make one of the index by reset_index()" if df.index.name == column else ""
            known = list(df.columns)
            raise ValueError(f"{what} must have a column {column!r}, got {known}{hint}.")


def features_of(
    df: pd.DataFrame,
    id_column: str,
    side: str,
    vocabulary: Vocabulary,
    train: np.ndarray,
    config: PrepareConfig,
) -> Features:
    """The attributes of the ids of a vocabulary, and of those without interactions.

    `train`, bool [V], tells which ids have train rows: they alone say what values there are.
    """
    what = "user_features" if side == "query" else "item_features"
    check_columns(df, what, id_column, *config.kinds_of(side))
    if len(df) == 0:
        raise ValueError(f"{what} must have rows, got none: leave it out.")
    try:
        table = pa.Table.from_pandas(df, preserve_index=False)
    except pa.ArrowException as error:
        raise ValueError(f"{what} cannot be read: {error.args[0]}; mend the column.") from error
    checks = Checks(len(df))
    codes, (prints, raw) = ids_of(table[id_column].combine_chunks(), id_column, checks)
    kinds, values = _kinds(table, id_column, what, config.kinds_of(side)), {}
    for name, kind in kinds.items():
        column = table[name].combine_chunks()
        values[name] = values_of(column, kind, name, config.feature_separator, checks)
    for row, reason in checks.failures():
        raise ValueError(f"{what}: {reason} in row {row}; mend it, or drop the row.")
    ids = pa.array([raw[code].decode() for code in codes], pa.string())
    prints = prints[codes]
    if len(repeated := np.flatnonzero(np.bincount(codes, minlength=1) > 1)):
        name = raw[repeated[0]].decode()
        raise ValueError(f"{what} must have one row an id, got {name!r} twice: drop one of them.")
    places, known = find_ids(vocabulary.fingerprints, prints)
    if not known.any():
        theirs = vocabulary.raw_ids[0].as_py()
        raise ValueError(
            f"{what} must have ids of the log, such as {theirs!r}, got none, but such as "
            f"{ids[0].as_py()!r}: name or convert the column."
        )
    cold = np.flatnonzero(~np.isin(prints, vocabulary.fingerprints))
    cold = cold[np.argsort(ids.take(pa.array(cold)).to_numpy(zero_copy_only=False), kind="stable")]
    specs, texts = [], {}
    of_known: dict[str, pa.Array] = {}
    of_cold: dict[str, pa.Array] = {schema.RAW_ID: ids.take(pa.array(cold))}
    for name, kind in kinds.items():
        joined = pa.chunked_array([values[name].take(pa.array(places, mask=~known))])
        spec, values_table = make_spec(name, kind, side, describe(joined, kind, train))
        encoded, unknown = encode(joined, spec, values_table)
        of_known |= encoded
        rest = pa.chunked_array([values[name].take(pa.array(cold))])
        of_cold |= encode(rest, spec, values_table)[0]
        specs.append(dataclasses.replace(spec, unknown=int(unknown.sum())))
        if values_table is not None:
            texts[name] = values_table[schema.VALUE].combine_chunks()
    return Features(tuple(specs), pa.table(of_known), pa.table(of_cold), texts)


def _kinds(table: pa.Table, id_column: str, what: str, given: dict[str, str]) -> dict[str, str]:
    """The kind of every column that is kept."""
    kinds = {}
    for name in table.column_names:
        if name == id_column or given.get(name) == "skip":
            continue
        try:
            kinds[name] = given.get(name) or infer_kind(table.schema.field(name).type)
        except TypeError:
            raise ValueError(
                f"{what}: column {name!r} holds {table.schema.field(name).type}, which has no "
                "kind: convert it, or leave it out."
            ) from None
        kinds[name] = kinds[name] or "categorical"  # without any value
    if not kinds:
        raise ValueError(f"{what} must have a column beside the id {id_column!r}, got none.")
    return kinds
