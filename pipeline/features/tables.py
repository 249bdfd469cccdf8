"""Tables of attributes before they are read: their files, and the kind of every column."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import pyarrow as pa

from pipeline.contract import schema
from pipeline.features.values import infer_kind, is_list
from pipeline.prepare.settings import PrepareConfig
from pipeline.read.cells import NUMBER
from pipeline.read.discover import Piece, column_names, find_pieces, resolve_columns, source_files
from pipeline.read.formats import parquet_file, sample_of, suffix_of, typed_header
from pipeline.read.settings import SourceConfig

WORDS = {"query": "user", "candidate": "item"}  # side → how its flags begin
_INTEGER = r"^\s*[+-]?\d+\s*$"


@dataclasses.dataclass(frozen=True)
class TableConfig(SourceConfig):
    """A table of attributes as a source of which only the id, `item_column`, is known."""

    user_column: str = ""
    timestamp_column: str = ""
    foreign_endings: ClassVar[tuple[str, ...]] = (".inter",)


class Table(NamedTuple):
    """A table of attributes, and how to read it."""

    side: str
    config: TableConfig
    pieces: list[Piece]
    kinds: dict[str, str]  # column → kind, in the order of the first file, without skipped ones
    separator: str  # between the values of a multi cell that is a text

    @property
    def flag(self) -> str:
        """The flag that names it."""
        return f"--{WORDS[self.side]}_features"


def find_tables(config: PrepareConfig) -> dict[str, Table]:
    """Side → its table of attributes; ValueError: a file, a column or its kind is wrong."""
    tables = {}
    for side in schema.SIDES:
        table_config = _table_config(config, side)
        if table_config is not None:
            with in_words_of(side):
                pieces = find_pieces(table_config)
            kinds = _choose_kinds(pieces, table_config, config, side)
            separator, endings = config.feature_separator, {suffix_of(p.path) for p in pieces}
            if separator == "|" and endings <= {".user", ".item"}:
                separator = " "
            tables[side] = Table(side, table_config, pieces, kinds, separator)
    return tables


def feature_files(config: PrepareConfig) -> list[str]:
    """The files of the tables of attributes, to see whether they changed."""
    tables = (_table_config(config, side) for side in schema.SIDES)
    return [path for table in tables if table is not None for path in source_files(table)]


@contextlib.contextmanager
def in_words_of(side: str) -> Iterator[None]:
    """What reads logs names the flags of logs in its errors; here they have other names."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("--source", f"--{WORDS[side]}_features")
        text = text.replace("--item_column", f"--{WORDS[side]}_features_id")
        raise ValueError(text) from error


def _table_config(config: PrepareConfig, side: str) -> TableConfig | None:
    word = WORDS[side]
    path: str = getattr(config, f"{word}_features")
    if not path:
        return None
    if path == "demo" or path.startswith("tfds:"):
        raise ValueError(f"--{word}_features must be a file, directory or glob, got {path!r}.")
    return TableConfig(
        source=path,
        output=config.output,
        item_column=getattr(config, f"{word}_features_id") or getattr(config, f"{word}_column"),
        delimiter=config.delimiter,
        max_bad_share=config.max_bad_share,
        allow_empty_files=config.allow_empty_files,
        partitions=config.partitions,
    )


def _choose_kinds(
    pieces: list[Piece], table: TableConfig, config: PrepareConfig, side: str
) -> dict[str, str]:
    """The kind of every column but the id: by the flag, else by the files."""
    flag = f"--{WORDS[side]}_feature_kinds"
    given = config.kinds_of(side)
    files = list({piece.path: piece for piece in pieces}.values())
    names = _columns_of(files[0], table)
    for name in given:
        if name not in names:
            raise ValueError(
                f"{files[0].path} has no column {name!r} beside its id, it has "
                f"{', '.join(map(repr, names))}; change {flag}."
            )
    inferred: dict[str, tuple[str, str]] = {}  # column → kind, and the file that says so
    for piece in files:
        changed = set(names) ^ set(_columns_of(piece, table))
        if changed:
            raise ValueError(
                f"{piece.path} and {files[0].path} differ in the columns {sorted(changed)}; "
                f"write one of them again, or name other files with --{WORDS[side]}_features."
            )
        if piece.kind == "parquet":
            kinds = _parquet_kinds(piece.path, names, given, flag)
        else:
            kinds = {} if inferred else _text_kinds(piece.path, table)
        for name, kind in kinds.items():
            earlier, where = inferred.setdefault(name, (kind, piece.path))
            if kind != earlier and name not in given:
                raise ValueError(
                    f"column {name!r} looks {kind} in {piece.path} and {earlier} in {where}; say "
                    f"what it is with {flag} {name}=KIND."
                )
    kinds = {name: inferred.get(name, ("categorical", ""))[0] for name in names} | given
    return _checked({name: kind for name, kind in kinds.items() if kind != "skip"}, flag)


def _columns_of(piece: Piece, table: TableConfig) -> list[str]:
    """The names of the columns of a file, without its id."""
    names = column_names(piece, table)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{piece.path} has two columns {twice[0]!r}; rename one of them.")
    id_column = resolve_columns(names, table, piece.path).item
    return [name for name in names if name != id_column]


def _parquet_kinds(path: str, names: list[str], given: dict[str, str], flag: str) -> dict[str, str]:
    fields = parquet_file(path).schema_arrow
    kinds = {}
    for name in names:
        column_type, kind = fields.field(name).type, given.get(name, "")
        if kind == "skip":
            continue
        if not _fits(column_type, kind):
            wish = f"kind {kind}" if kind else "a kind"
            raise ValueError(
                f"{path}: column {name!r} of type {column_type} cannot be of {wish}; choose "
                f"another with {flag}, or leave it out with {flag} {name}=skip."
            )
        kinds[name] = kind or infer_kind(column_type)
    return {name: kind for name, kind in kinds.items() if kind}


def _fits(column_type: pa.DataType, kind: str) -> bool:
    """Whether a column can be of a kind; with an empty one, whether its type has one."""
    try:
        infer_kind(column_type.value_type if kind and is_list(column_type) else column_type)
    except TypeError:
        return False
    return kind in ("", "multi") or not is_list(column_type)


def _text_kinds(path: str, table: TableConfig) -> dict[str, str]:
    """A column whose cells are all numbers, and not all whole ones, is numeric."""
    header, rows = typed_header(path, table), sample_of(path, table)
    columns = zip(*(row for row in rows if len(row) == len(header)), strict=True)
    kinds = {}
    for (name, _), cells in zip(header, columns, strict=False):
        filled = [cell for cell in cells if cell.strip()]
        if all(re.match(NUMBER, cell) for cell in filled):
            whole = all(re.match(_INTEGER, cell) for cell in filled)
            kinds[name] = "categorical" if whole else "numeric"
    return kinds | {name: kind for name, kind in header if kind}


def _checked(kinds: dict[str, str], flag: str) -> dict[str, str]:
    if not kinds:
        raise ValueError(f"{flag} leaves no column beside the id; keep one, or give no table.")
    taken = {schema.RAW_ID, *map(schema.presence_name, kinds)} & set(kinds)
    if taken:
        raise ValueError(
            f"a column of attributes may not be called {min(taken)!r}, features need that name; "
            f"rename it, or leave it out with {flag} {min(taken)}=skip."
        )
    return kinds
