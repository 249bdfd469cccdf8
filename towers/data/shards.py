"""Files of a preparation: tables, and shards that are decoded once into arrays in files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import checksum, made_aside, replace_directory, write_atomically

log = logging.getLogger(__name__)

_ROWS_A_STEP = 65_536  # parsed at a time
_CACHE = ".arrays"  # beside the shards, where that can be written
_STAMPS = "stamps.json"  # in a cache: sizes and times of the files when they were looked at


def load_split(root: Path, manifest: schema.Manifest, split: str) -> dict[str, np.ndarray]:
    """The columns of a split: query_id and candidate_id int64 [n], perhaps timestamp and weight.

    Decoded at the first call into `<directory>/.arrays`, or below the user's cache directory
    where that cannot be written or is full; later calls map the files. A shard that was touched
    since is compared with its checksum again, and arrays that were are made anew. A ValueError
    where a shard is missing or is not the one that the manifest describes.
    """
    columns = manifest.details.get("columns") or [schema.QUERY_ID, schema.CANDIDATE_ID]
    names = manifest.files_of(f"{schema.DATASET}-{split}.tfrecord-")
    num_rows = int(manifest.counts.get(split, 0)) if names else 0
    if num_rows == 0:
        return {column: np.empty(0, _dtype(column)) for column in columns}
    shards = _Shards(root, manifest, names, columns, num_rows)
    for place in _cache_roots(root):
        cache = place / f"{split}-{shards.key}"
        if not _is_whole(cache, shards):
            try:
                _make(cache, shards)
            except OSError:  # not ours to write, or full: the next place
                continue
        return {column: _mapped(cache / f"{column}.npy") for column in columns}
    raise ValueError(
        f"no directory for the decoded shards of {root} can be written: make the data "
        "directory writable, set XDG_CACHE_HOME, or make room."
    )


def check_files(root: Path, manifest: schema.Manifest, names: Iterable[str]) -> None:
    """Raises ValueError where files of a preparation are missing or not those of its manifest."""
    for path in (root / name for name in names):
        if not path.is_file() or checksum(path) != manifest.files[path.name]["checksum"]:
            state = "was changed since its preparation, or is of another one"
            raise ValueError(
                f"{path} {state if path.is_file() else 'is missing from its preparation'}: "
                "make the data again with `twotower prepare`."
            )


def read_table(root: Path, manifest: schema.Manifest, prefix: str, columns: list[str]) -> pa.Table:
    """All shards of a Parquet table, in order."""
    names = manifest.files_of(prefix) or [f"{prefix}*"]
    check_files(root, manifest, names)
    return pa.concat_tables([pq.read_table(root / name, columns=columns) for name in names])


class _Shards(NamedTuple):
    """The shards of a split."""

    root: Path
    manifest: schema.Manifest
    names: list[str]
    columns: list[str]
    num_rows: int

    @property
    def key(self) -> str:
        """Names the cache, so that a new preparation never meets an old one."""
        checksums = [[name, self.manifest.files[name]["checksum"]] for name in self.names]
        text = json.dumps([checksums, self.columns])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def check(self) -> None:
        check_files(self.root, self.manifest, self.names)

    def stamps(self, cache: Path) -> dict[str, Any]:
        """What the arrays of a cache and the shards look like now."""
        arrays = [f"{column}.npy" for column in self.columns]
        return {"arrays": _stamps(cache, arrays), "shards": _stamps(self.root, self.names)}


def _mapped(path: Path) -> np.ndarray:
    """An array that stays in its file; private, so that TensorFlow takes it as it lies there."""
    array = np.load(path, mmap_mode="c")
    array.flags.writeable = False
    return array


def _dtype(column: str) -> np.dtype:
    return np.dtype(np.float32 if column == schema.WEIGHT else np.int64)


def _cache_roots(root: Path) -> Iterator[Path]:
    yield root / _CACHE
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield Path(home) / "twotower" / "arrays"
    yield Path(tempfile.gettempdir()) / f"twotower-arrays-{os.getuid()}"


def _is_whole(cache: Path, shards: _Shards) -> bool:
    """Whether a cache is there and as it was made, from shards that are as they were."""
    try:
        before = json.loads((cache / _STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    now = shards.stamps(cache)
    if before.get("arrays") != now["arrays"]:
        return False
    if before.get("shards") != now["shards"]:
        shards.check()
        try:
            write_atomically(cache / _STAMPS, json.dumps(now))
        except OSError:  # not ours to write: they are compared each time
            log.debug("%s cannot be written", cache)
    return True


def _stamps(root: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of change of files; of a missing one nothing."""
    paths = {name: root / name for name in names}
    stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _make(cache: Path, shards: _Shards) -> None:
    """Decodes the shards aside, and puts the arrays in their place."""
    with made_aside(cache) as aside:
        if _is_whole(cache, shards):  # another process was faster with the same
            return
        shards.check()
        _decode(shards, aside)
        write_atomically(aside / _STAMPS, json.dumps(shards.stamps(aside)))
        replace_directory(aside, cache)


def _decode(shards: _Shards, out: Path) -> None:
    """Parses tf.Examples into one .npy file a column."""
    log.info("Decoding %d rows of %s, once ...", shards.num_rows, shards.root)
    spec = {name: tf.io.FixedLenFeature([], tf.as_dtype(_dtype(name))) for name in shards.columns}
    arrays = {column: _new_array(out / f"{column}.npy", shards.num_rows) for column in spec}
    examples = (
        tf.data.TFRecordDataset([str(shards.root / name) for name in shards.names])
        .batch(_ROWS_A_STEP)
        .map(lambda rows: tf.io.parse_example(rows, spec), num_parallel_calls=2)
        .prefetch(1)
    )
    start = 0
    for block in examples.as_numpy_iterator():
        end = start + len(block[shards.columns[0]])
        for column, array in arrays.items():
            array[start:end] = block[column]
        start = end
    if start != shards.num_rows:
        raise ValueError(
            f"{shards.root} holds {start} rows where its manifest says {shards.num_rows}: "
            "make the data again with `twotower prepare`."
        )
    for array in arrays.values():
        array.flush()


def _new_array(path: Path, num_rows: int) -> np.memmap:
    """A new .npy file [num_rows], mapped; its room is taken at once.

    A write to a mapped file that finds the disk full kills the process.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=_dtype(path.stem), shape=(num_rows,))
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
