"""Snapshots of streaming frequencies: what they hold, which one is next, who may write them.

A directory of snapshots holds one directory a run, `00000001`, `00000002`, ... Each is written
aside and renamed once; a run that is killed leaves those before it as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.beam.staging import Staging, load_array
from pipeline.contract import schema
from pipeline.contract.files import (
    absolute,
    asking_store,
    checksum,
    describe_files,
    held,
    is_remote,
    stamp_of,
)
from pipeline.contract.stores import finished_below, local_place, newest, numbered
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.log import DEAD_LETTERS
from pipeline.streaming.estimator import FILES, STATE, occurrences

_SHARED = ["item_column", "timestamp_column", "timestamp_format", "rating_threshold"]
_SHARED += ["num_hashes", "num_buckets", "alpha", "step_seconds", "unbounded"]
_RECORDED = ["delimiter", "max_bad_share", "max_ahead_seconds", "allowed_lateness_seconds"]


class Input(NamedTuple):
    """A file to read, as it is before it is read."""

    path: str  # absolute
    checksum: str
    stamp: tuple[Any, ...]  # its size first; tells whether the file was written since

    def recorded(self) -> dict[str, Any]:
        """What snapshots remember of a file that was read."""
        return {"file": self.path, "bytes": self.stamp[0], "checksum": self.checksum}


def describe(paths: list[str]) -> list[Input]:
    """Looks at files before they are read."""
    files = [absolute(path) for path in paths]
    stamps = [stamp_of(file) for file in files]
    with ThreadPoolExecutor() as pool:
        return list(map(Input, files, pool.map(checksum, files), stamps))


class Position(NamedTuple):
    """How far a stream has come: what a later run needs beside the arrays and pending rows."""

    step: int = 0  # t, the last one that was applied; it may be not full yet
    rows: int = 0  # that were applied in all steps
    origin: int | None = None  # the period of event time that is step 1, where time decides
    newest: int | None = None  # latest event time seen, s since 1970


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A finished snapshot."""

    path: Path
    manifest: schema.Manifest

    @property
    def position(self) -> Position:
        """How far it has come."""
        details = self.manifest.details
        return Position(**{name: details[name] for name in Position._fields})

    @property
    def consumed(self) -> list[dict[str, Any]]:
        """The files of all runs so far: file, bytes and checksum of each."""
        return self.manifest.details["consumed"]

    @property
    def pending(self) -> str:
        """The file of its pending rows; empty where rows decide the step."""
        named = schema.STREAMING_PENDING in self.manifest.files
        return str(self.path / schema.STREAMING_PENDING) if named else ""


def rule_of(config: FrequenciesConfig) -> dict[str, Any]:
    """The settings that all runs of one stream share; they stand in the manifest."""
    rated = config.rating_threshold is not None
    return {name: getattr(config, name) for name in _SHARED} | {
        "rating_column": config.rating_column if rated else None,
        "batch_size": None if config.step_seconds else config.batch_size,
    }


def describe_snapshot(
    directory: Path,
    config: FrequenciesConfig,
    counts: dict[str, int],
    position: Position,
    weight: np.ndarray,
    **details: Any,
) -> schema.Manifest:
    """The manifest of a snapshot whose files lie in a directory; `weight` is w, [A, H]."""
    by_time = position.rows / position.step if position.step else 0.0
    details = {"previous": None, "late": {}, "consumed": []} | position._asdict() | details
    details["rows_per_step"] = by_time if config.step_seconds else float(config.batch_size)
    details["buckets"] = occurrences(weight, config.alpha)
    return schema.Manifest(
        kind="streaming_frequency",
        source=config.source,
        configuration=rule_of(config)
        | {name: getattr(config, name) for name in _RECORDED}
        | {"format_version": schema.FORMAT_VERSION},
        counts=counts,
        files=describe_files(directory),
        details=details,
    )


def open_snapshot(path: str | os.PathLike[str], config: FrequenciesConfig) -> Snapshot:
    """The snapshot at a path, or the newest one in a directory of them.

    Raises:
      ValueError: it is missing, or of a stream with other settings.
    """
    directory = [Path(path), *schema.snapshot_directories(path)][-1].resolve()
    manifest = schema.read_snapshot(directory)
    for name, value in rule_of(config).items():
        before = manifest.configuration.get(name, value)  # older ones do not say unbounded
        if before != value:
            raise ValueError(
                f"{directory} was made with {name} {before}, got {value}: a stream keeps its "
                f"settings; change --{name}, or begin a new stream: another --output and "
                "no --previous."
            )
    before = manifest.configuration["allowed_lateness_seconds"]
    if config.allowed_lateness_seconds < before:
        raise ValueError(
            f"{directory} was made with allowed_lateness_seconds {before}, got "
            f"{config.allowed_lateness_seconds}: rows that it would still wait for would be late; "
            f"give --allowed_lateness_seconds {before} or more."
        )
    for name, described in manifest.files.items():
        file = directory / name
        if not file.is_file() or checksum(file) != described["checksum"]:
            raise ValueError(f"{file} is missing or damaged; go on from an earlier snapshot.")
    return Snapshot(directory, manifest)


def find_previous(config: FrequenciesConfig) -> Snapshot | None:
    """The snapshot to go on from; None for a new stream.

    A watched stream goes on from the newest one in its own output, wherever it began.

    Raises:
      ValueError: there are snapshots and neither --previous nor --overwrite says what to do; or
        the snapshot is of a stream with other settings.
    """
    begun = bool(schema.snapshot_directories(config.output)) and not config.overwrite
    if begun and config.watch:
        return open_snapshot(config.output, config)
    snapshot = open_snapshot(config.previous, config) if config.previous else None
    if begun and (snapshot is None or snapshot.path.parent != Path(config.output).resolve()):
        raise ValueError(
            f"{config.output} already holds snapshots: --previous {config.output} goes on from "
            "them, --overwrite begins a new stream."
        )
    return snapshot


def newest_snapshot(output: str) -> str:
    """The newest snapshot in a directory or a place in a store; "" without one."""
    if is_remote(output):
        return newest(output).removesuffix(output)
    return "".join(map(str, schema.snapshot_directories(output)[-1:]))


def next_directory(output: str) -> Path:
    """Where the next snapshot belongs."""
    numbers = [int(path.name) for path in schema.snapshot_directories(output)]
    return Path(output) / f"{max(numbers, default=0) + 1:08d}"


def keep_newest(output: str, number: int) -> None:
    """Removes all but the newest finished snapshots; their dead letters stay, beside them."""
    if is_remote(output):
        finished = numbered(finished_below(output))
        with asking_store(output.rstrip("/")) as (store, root):
            for step in sorted(finished)[:-number]:
                store.rm(f"{root}/{finished[step]}", recursive=True)
        return
    for path in schema.snapshot_directories(output)[:-number]:
        if (path / DEAD_LETTERS).exists():
            os.replace(path / DEAD_LETTERS, path.with_name(f"{path.name}.{DEAD_LETTERS}"))
        retired = path.with_name(f".{path.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)  # of a worker that was killed here
        os.rename(path, retired)
        shutil.rmtree(retired)


@contextlib.contextmanager
def only_writer(output: str) -> Iterator[None]:
    """Keeps other runs out of a directory of snapshots, and clears what a killed one left.

    Raises:
      ValueError: another run writes there, or it is a directory of something else.
    """
    root = local_place(output)
    made = not root.exists()
    if (root / schema.MANIFEST).exists():
        raise ValueError(
            f"{root} is no directory of snapshots, there is a {schema.MANIFEST} in it; choose "
            "another --output."
        )
    refused = f"another run writes snapshots to {root}; wait for it, or choose another --output."
    try:
        with held(root / ".lock", refused):
            for left in [*root.glob("*.partial"), *root.glob(".*.retired*")]:
                shutil.rmtree(left)
            yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            if made:
                root.rmdir()


def write_arrays(directory: Path, state: np.ndarray) -> None:
    """Writes all buckets, STATE [A, H], a file for each field."""
    for name, file in zip(STATE.names or (), FILES, strict=True):
        np.save(directory / file, np.ascontiguousarray(state[name]))


def write_window(
    step: int, origin: int, state: np.ndarray, rows: int, config: FrequenciesConfig
) -> str:
    """Writes the snapshot of an unbounded stream after a step, named by it; its directory.

    It knows neither files nor rows of later steps: those are in the checkpoints of the runner.
    """
    directory = f"{config.output.rstrip('/')}/{step:08d}"
    with Staging(directory, overwrite=True) as staging:
        write_arrays(staging.out, state)
        place, counts = Position(step, rows, origin), {"applied": rows}
        weight = state["weight"]
        describe_snapshot(staging.out, config, counts, place, weight).write(staging.out)
        staging.commit()
    keep_newest(config.output, config.keep_snapshots)
    return directory


def write_pending(path: Path, blocks: list[Path]) -> int:
    """Joins staged files of pending rows, int64 [n, 3] each, one at a time; their rows in all."""
    parts, rows = [load_array(block, mmap_mode="r") for block in blocks], 0
    header = {"descr": "<i8", "fortran_order": False, "shape": (sum(map(len, parts)), 3)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            rows += int(part[:, 2].sum())
            file.write(part.tobytes())
    return rows
