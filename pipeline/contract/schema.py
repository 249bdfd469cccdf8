"""The contract between the rooms: names of artifacts, their columns, the manifest, fingerprints.

Everything that one room writes and another reads is named here and nowhere else. The module
imports neither Beam nor TensorFlow, so that a trainer and a server can read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contract.feature_spec import (  # noqa: F401, part of the contract
    FEATURE_KINDS,
    FEATURES,
    VALUE,
    FeatureSpec,
    cold_features_name,
    feature_specs,
    feature_vocabulary_name,
    features_name,
    presence_name,
)

FORMAT_VERSION = "1.0"  # major.minor; a reader refuses a newer major version

MANIFEST = "manifest.json"  # written last: no manifest, no data set
QUALITY_PAGE = "quality.html"  # details["quality"] of the manifest, for people
DATASET = "interactions"  # shards are {DATASET}-{split}.tfrecord-0000i-of-0000N
SPLITS = ("train", "validation", "test")
SIDES = ("query", "candidate")

# Columns of an example (dense ids) and of a vocabulary table (row number = dense id).
QUERY_ID, CANDIDATE_ID, TIMESTAMP, WEIGHT = "query_id", "candidate_id", "timestamp", "weight"
RAW_ID, FINGERPRINT, COUNT = "raw_id", "fingerprint", "count"

# A job of its own counts items: files of raw_id, fingerprint, count (float64) and log_q (float64),
# by ascending fingerprint over all shards.
FREQUENCIES = "candidate_frequencies"
LOG_Q = "log_q"

# A snapshot of streaming frequencies lies in a directory of snapshots, named by its number.
STREAMING_LAST_STEP = "last_step.npy"  # int64 [A, H], of each bucket of each hash array
STREAMING_INTERVAL = "interval.npy"  # float64 [A, H], mean steps between two occurrences
STREAMING_WEIGHT = "weight.npy"  # float64 [A, H], 1 - (1 - α)^n after n occurrences
STREAMING_PENDING = "pending.npy"  # int64 [P, 3], fingerprint, period of time, rows

# A bundle is what a trainer hands to `serving`: vectors, ids and, where there is one, a query
# SavedModel with query_id string [B] -> embedding float32 [B, D], known bool [B].
BUNDLE_QUERY_MODEL = "query_model"
BUNDLE_VECTORS = "candidate_vectors.npy"  # float32 [N, D]; score = embedding · vector
BUNDLE_CANDIDATE_IDS = "candidate_ids.parquet"  # column raw_id, row = row of the vectors
BUNDLE_QUERY_IDS = "query_ids.parquet"  # column raw_id, row = row of the seen lists
BUNDLE_SEEN_OFFSETS = "seen_offsets.npy"  # int64 [Q + 1]
BUNDLE_SEEN_CANDIDATES = "seen_candidates.npy"  # int32, rows of the vectors
BUNDLE_SAMPLE_QUERIES = "sample_queries.npy"  # float32 [S, D], to measure an index with
BUNDLE_CANDIDATE_COUNTS = "candidate_counts.npy"  # int64 [N], training rows; optional


def fingerprint(raw_id: str) -> int:
    """Eight bytes of blake2b of the UTF-8 of `raw_id`, as a signed little-endian int64.

    The same on every machine and in every run. Equal ids have equal fingerprints; that no two
    different ids of one data set share one is checked when its vocabulary is made.
    """
    digest = hashlib.blake2b(raw_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprints(raw_ids: Iterable[bytes]) -> np.ndarray:
    """The fingerprints of ids that are already UTF-8 bytes: int64 [n]."""
    digests = b"".join(hashlib.blake2b(raw, digest_size=8).digest() for raw in raw_ids)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """The file name of one shard, as `tfds.builder_from_directory` expects it."""
    return f"{DATASET}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def vocabulary_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id`, `fingerprint` and `count` (over all splits) in dense-id order."""
    return f"{side}_vocabulary-{shard:05d}-of-{num_shards:05d}.parquet"


def train_counts_name(shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with one column `count`: train rows of each candidate in dense-id order."""
    return f"candidate_train_counts-{shard:05d}-of-{num_shards:05d}.parquet"


def frequencies_name(shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id`, `fingerprint`, `count` and `log_q` by ascending fingerprint."""
    return f"{FREQUENCIES}-{shard:05d}-of-{num_shards:05d}.parquet"


def checksum(path: str | os.PathLike[str]) -> str:
    """16 bytes of blake2b of the content of a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory holds and how it was made; its presence is what makes it complete.

    `kind` is `prepared`, `frequencies`, `streaming_frequency`, `bundle` or `version`. `counts`
    holds numbers of rows and ids, `files` maps a path relative to the directory to its size in
    bytes and its checksum.
    Nothing in it depends on the time, the machine or the number of workers.
    """

    kind: str
    source: str
    configuration: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """One checksum for the content of the whole directory: 16 hexadecimal digits."""
        text = json.dumps([self.configuration, self.files], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def files_of(self, prefix: str) -> list[str]:
        """The names of the files that start with `prefix`, in order."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes the manifest, atomically; call it when all else is in place."""
        path = Path(directory) / MANIFEST
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(path, text + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file aside and renames it into place, so that no reader sees half of it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; where writing fails, nothing does."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # workers may share a disk
    yield aside
    os.replace(aside, path)


def describe_files(
    directory: str | os.PathLike[str], rows: dict[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `directory`, for `Manifest.files`."""
    root, described = Path(directory), {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        described[name] = {"bytes": path.stat().st_size, "checksum": checksum(path)}
        if rows and name in rows:
            described[name]["rows"] = rows[name]
    return described


def read_manifest(directory: str | os.PathLike[str], kind: str) -> Manifest:
    """Reads the manifest of a directory that `kind` made.

    Raises:
      ValueError: there is no manifest, it is of another kind, or its format is newer.
    """
    path = Path(directory) / MANIFEST
    maker = {
        "prepared": "prepare",
        "frequencies": "frequencies",
        "streaming_frequency": "frequencies --streaming",
        "bundle": "export",
        "version": "export",
    }[kind]
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no finished {kind} data: there is no {MANIFEST} in it. "
            f"Make it with `twotower {maker}`."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = str(fields["format_version"])
        major = int(version.split(".")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}); make it again.") from error
    if major > int(FORMAT_VERSION.split(".")[0]):
        raise ValueError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update twotower."
        )
    if fields.get("kind") != kind:
        raise ValueError(
            f"{path} describes a {fields.get('kind')!r} directory, not {kind!r}: "
            "check the path that was given."
        )
    known = {field.name for field in dataclasses.fields(Manifest)}
    return Manifest(**{name: value for name, value in fields.items() if name in known})


@contextlib.contextmanager
def made_aside(destination: Path) -> Iterator[Path]:
    """An empty `.<name>.partial` for what `replace_directory` then puts in place; gone at the end.

    One process at a time has it, the others wait. What a killed one left goes first.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    with _only_holder(partial.with_name(f"{partial.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _only_holder(path: Path) -> Iterator[None]:
    """Waits for a lock file and holds it, then removes it; a killed process lets go of it."""
    while True:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock.fileno()).st_nlink:
                continue  # its holder has removed it
            try:
                yield
            finally:
                path.unlink()
            return


def replace_directory(finished: Path, destination: Path) -> None:
    """Renames a finished directory into place; what stood there before goes away after it.

    On one file system a reader sees the old directory or the new one; between the two renames
    of a replacement it may see none, never a mixture.
    """
    retired = finished.with_name(f"{finished.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)  # of a process that was killed here
    if destination.exists():
        os.rename(destination, retired)
    os.rename(finished, destination)
    shutil.rmtree(retired, ignore_errors=True)


def _mix(state: np.ndarray) -> np.ndarray:
    """The splitmix64 step (Steele, Lea, Flood, OOPSLA 2014, doi:10.1145/2660193.2660195)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_hash(seed: int, salt: str, *columns: np.ndarray) -> np.ndarray:
    """A pseudo-random number for every row, the same on every machine and in every order of rows.

    Rows are put in order by it, instead of being drawn: mix(... mix(mix(mix(seed) ^
    fingerprint(salt)) ^ column_1) ...), where mix is splitmix64. It is not for secrets.

    Args:
      seed: any int64 of the user's configuration.
      salt: what the numbers are for, so that two uses with one seed are independent.
      *columns: int64 [n] each, at least one; their order matters.

    Returns:
      uint64 [n].
    """
    state = _mix(np.array([seed], np.int64).view(np.uint64))
    state = _mix(state ^ np.array([fingerprint(salt)], np.int64).view(np.uint64))
    for column in columns:
        state = _mix(state ^ np.ascontiguousarray(column, np.int64).view(np.uint64))
    return state


def hash_buckets(fingerprints: np.ndarray, *, num_buckets: int, num_hashes: int) -> np.ndarray:
    """The bucket of each fingerprint in each hash array: int64 [n, A].

    bucket_h(f) = mix(f xor mix(h)) mod num_buckets for h = 0, 1, ..., unsigned, with the mix of
    `row_hash`. `samplers.proposals.streaming_frequency` has the same function: a trainer goes on
    with the estimates that a job has made.

    Args:
      fingerprints: int64 [n].
      num_buckets: H, of each array.
      num_hashes: A, the number of arrays.
    """
    keys = np.ascontiguousarray(fingerprints, np.int64).view(np.uint64)[:, None]
    arrays = _mix(np.arange(num_hashes, dtype=np.uint64))[None, :]
    return (_mix(keys ^ arrays) % np.uint64(num_buckets)).astype(np.int64)


def snapshot_directories(path: str | os.PathLike[str]) -> list[Path]:
    """The snapshots in a directory of them, oldest first; of a snapshot, itself alone."""
    if (Path(path) / MANIFEST).is_file():
        return [Path(path)]
    return sorted(one for one in Path(path).glob("[0-9]" * 8) if (one / MANIFEST).is_file())


def read_snapshot(directory: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest of a snapshot.

    Raises:
      ValueError: the manifest is missing, or the intervals are biased towards 1.
    """
    manifest = read_manifest(directory, "streaming_frequency")
    if STREAMING_WEIGHT not in manifest.files:
        raise ValueError(
            f"{directory} has no {STREAMING_WEIGHT}: an older twotower made it, whose estimates of "
            "rare candidates are too large; make it again from its log."
        )
    return manifest


def split_sizes(
    num_rows: np.ndarray, train_ratio: float, validation_ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many of a query's rows are train, validation and test: three int64 arrays.

    rint(train_ratio · n) rows (half to even), but at least one, are not test; the last
    rint(validation_ratio · those) of them are validation, where at least one stays train.

    Args:
      num_rows: int [Q], rows of each query.
      train_ratio: in (0, 1], the share of rows that are not test.
      validation_ratio: in [0, 1), the share of those that are validation.
    """
    if not 0 < train_ratio <= 1:
        raise ValueError(f"train_ratio must be above 0 and at most 1, got {train_ratio}.")
    if not 0 <= validation_ratio < 1:
        raise ValueError(
            f"validation_ratio must be at least 0 and below 1, got {validation_ratio}."
        )
    num_rows = np.asarray(num_rows, np.int64)
    known = np.maximum(np.rint(train_ratio * num_rows).astype(np.int64), np.minimum(num_rows, 1))
    validation = np.rint(validation_ratio * known).astype(np.int64)
    validation = np.clip(validation, 0, np.maximum(known - 1, 0))
    return known - validation, validation, num_rows - known


def split_codes(
    query_ids: np.ndarray, *order: np.ndarray, train_ratio: float, validation_ratio: float = 0.0
) -> np.ndarray:
    """The split of every row: int8 [n], an index into `SPLITS`.

    The rows of a query are put in order and cut by `split_sizes`: first train, then validation,
    then test.

    Args:
      query_ids: int64 [n], dense ids or fingerprints.
      *order: [n] each, the keys to put a query's rows in order by, the first decides first:
        `row_hash` for a random split; time, then `row_hash` for a split by time.
      train_ratio: in (0, 1], the share of rows that are not test.
      validation_ratio: in [0, 1), the share of those that are validation.
    """
    rows = np.lexsort((*reversed(order), query_ids))  # lexsort's last key decides first
    ordered = np.asarray(query_ids)[rows]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    sizes = np.diff(np.append(first, len(ordered)))
    parts = np.stack(split_sizes(sizes, train_ratio, validation_ratio), axis=1)  # [Q, 3]
    codes = np.empty(len(ordered), np.int8)
    codes[rows] = np.repeat(np.tile(np.arange(3, dtype=np.int8), len(sizes)), parts.ravel())
    return codes
