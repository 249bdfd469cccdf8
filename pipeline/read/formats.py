"""Formats of files and data sets: what their names say, how they are opened, and their columns."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract.files import is_remote, readable_file, stamp_of
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
_SAMPLE_BYTES = 1 << 20  # of a text file, to see which columns hold numbers


def suffix_of(path: str) -> str:
    """The ending that names the format, without that of a compression or an archive."""
    name = _archive_and_name(path)[0].lower()
    for packed in (*COMPRESSIONS, ".zip"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def is_readable(path: str) -> bool:
    """Whether a file has the ending of a known format."""
    return suffix_of(path) in (".parquet", *TEXT_DELIMITERS)


def delimiter_of(path: str, config: SourceConfig) -> str:
    """The delimiter of a text file, by its name unless the configuration says it."""
    return config.delimiter or TEXT_DELIMITERS[suffix_of(path)]


def parquet_file(path: str) -> pq.ParquetFile:
    """Opens a Parquet file, local or of a store; a process reads its footer once."""
    return pq.ParquetFile(readable_file(path), metadata=_footer(path, stamp_of(path)))


@functools.lru_cache(16)
def _footer(path: str, stamp: tuple[Any, ...]) -> pq.FileMetaData:
    return pq.read_metadata(readable_file(path))


def open_text(path: str) -> BinaryIO | pa.NativeFile:
    """Opens a text file, or ARCHIVE.zip/NAME; .gz, .bz2 and .zst are decompressed."""
    archive, name = _archive_and_name(path)
    if name:
        return io.BufferedReader(zipfile.ZipFile(readable_file(archive)).open(name))
    packed = COMPRESSIONS.get(Path(path).suffix.lower())
    return pa.input_stream(readable_file(path), compression=packed)


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


def header_of(path: str, config: SourceConfig) -> list[str]:
    """The column names of a text file, RecBole's without types; ValueError: it cannot be read."""
    return [name for name, _ in typed_header(path, config)]


def typed_header(path: str, config: SourceConfig) -> list[tuple[str, str]]:
    """(column, its kind as an attribute) of a text file; "" where the header does not say it."""
    try:
        with open_text(path) as file:
            line = file.read(1 << 16).split(b"\n", 1)[0]
        text = line.decode("utf-8-sig").rstrip("\r")
    except (*BROKEN_FILE, UnicodeDecodeError, RuntimeError) as error:  # the last: it is encrypted
        raise ValueError(f"{path} cannot be read ({error}); check --source.") from error
    if not line:
        raise ValueError(f"{path} is empty; its first line must name the columns.")
    names = next(csv.reader([text], delimiter=delimiter_of(path, config)))
    if suffix_of(path) not in RECBOLE_ENDINGS:
        return [(name, "") for name in names]
    parts = [(name, *name.rpartition(":")[::2]) for name in names]
    kinds = RECBOLE_KINDS
    return [(base, kinds[kind]) if kind in kinds else (name, "") for name, base, kind in parts]


def sample_of(path: str, config: SourceConfig) -> list[list[str]]:
    """The first rows of a text file, none if Python cannot parse them; ValueError: it is broken."""
    try:
        with open_text(path) as file:
            content = file.read(_SAMPLE_BYTES)
    except BROKEN_FILE as error:
        raise ValueError(f"{path} cannot be read ({error}); write it again.") from error
    lines = content.decode("utf-8", "replace").split("\n")
    if len(content) == _SAMPLE_BYTES:
        lines.pop()  # it may have been cut
    try:
        return list(csv.reader(lines[1:], delimiter=delimiter_of(path, config)))
    except csv.Error:
        return []
