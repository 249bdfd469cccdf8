"""Which files an output was made from: for its manifest, and so that none is counted twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apache_beam as beam

from pipeline.beam.options import spread
from pipeline.beam.staging import Staging, read_json, write_json
from pipeline.contract.files import absolute, checksum, stamp_of
from pipeline.read.discover import source_files
from pipeline.read.formats import tfds_builder
from pipeline.read.settings import SourceConfig

_Config = TypeVar("_Config", bound=SourceConfig)
_LEAST_RANGES = 16
_RANGE_BYTES = 1 << 26  # some 3,000,000 rows of text or 8,000,000 of Parquet, 37 bytes a row


def input_files(config: SourceConfig) -> list[str]:
    """The files that a source consists of, in the order in which they are read."""
    if not config.source.startswith("tfds:"):
        return source_files(config)
    splits = tfds_builder(config.source).info.splits
    return [str(path) for name in sorted(splits) for path in splits[name].filepaths]


def stamps_of(files: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """The stamp of each file before it is read, for `check_unchanged`."""
    files = list(files)
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(stamp_of, files), strict=True))


def check_unchanged(stamps: dict[str, tuple[Any, ...]]) -> None:
    """Raises ValueError where a file changed since: the rows read may not be those described."""
    for path, stamp in stamps_of(stamps).items():
        if stamp != stamps[path]:
            raise ValueError(
                f"{path} changed while it was read; write files under another name, such as "
                "NAME.partial, and rename them when they are complete."
            )


def with_partitions(config: _Config, stamps: dict[str, tuple[Any, ...]]) -> _Config:
    """The settings with as many ranges as suit the bytes of files, where they name no number."""
    if config.partitions:
        return config
    size = sum(stamp[0] for stamp in stamps.values() if stamp)
    return dataclasses.replace(config, partitions=max(_LEAST_RANGES, -(-size // _RANGE_BYTES)))


def stage_inputs(
    pipeline: beam.Pipeline, files: dict[str, list[str]], staging: Staging
) -> beam.PCollection:
    """Workers take size and checksum of the files of each source; see `staged_inputs`."""
    out = staging.stage("inputs")
    numbered = [(f"{name}-{i:06d}", path) for name in files for i, path in enumerate(files[name])]
    describe = beam.MapTuple(partial(_stage_input, out=out))
    return spread(pipeline, "Files", numbered) | "Describe" >> describe


def _stage_input(name: str, path: str, out: Path) -> None:
    try:
        description = {"checksum": checksum(path), "bytes": stamp_of(path)[0]}
    except OSError as error:  # told later, as are pieces of the log that cannot be read
        description = {"problem": f"{path} cannot be read to its end: {error}."}
    write_json(out, name, description)


def staged_inputs(
    files: dict[str, list[str]], staging: Staging
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each source, path → file (its name below what all have in common), bytes, checksum.

    Raises ValueError where one could not be read.
    """
    staged = staging.stage("inputs")
    inputs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, paths in files.items():
        inputs[name] = {
            path: {"file": short} | read_json(staged, f"{name}-{i:06d}")
            for i, (path, short) in enumerate(short_names(paths).items())
        }
        if problems := [file["problem"] for file in inputs[name].values() if "problem" in file]:
            raise ValueError(problems[0])
    return inputs


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path → its name below the directory that all have in common; no machine is in it."""
    full_paths = {path: absolute(path) for path in paths}
    if not full_paths:
        return {}
    common = os.path.commonpath([os.path.dirname(path) for path in full_paths.values()])
    return {
        path: Path(os.path.relpath(full, common)).as_posix() for path, full in full_paths.items()
    }


def check_not_repeated(
    inputs: dict[str, dict[str, Any]], earlier: Iterable[dict[str, Any]]
) -> None:
    """Raises ValueError where a file has the content of an earlier or another one of this run."""
    known = {one["checksum"]: f"{one['file']} in an earlier run" for one in earlier}
    for path, described in inputs.items():
        where = known.setdefault(described["checksum"], f"{path} in this run")
        if where != f"{path} in this run":
            raise ValueError(
                f"{path} would be counted twice: its content is that of {where}; leave it out "
                "of --source, or count it all the same with --allow_repeated_files."
            )
