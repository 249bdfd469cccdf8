"""Reads a bundle and checks it: what a trainer, this project's or another's, hands over.

A bundle of another framework needs the vectors, their ids and a manifest, which
`pipeline.contract.schema.Manifest("bundle", source, {}, {}, {}).write(directory)` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from serving.version.versions import check_files

_SEEN = (schema.BUNDLE_QUERY_IDS, schema.BUNDLE_SEEN_OFFSETS, schema.BUNDLE_SEEN_CANDIDATES)
_CHUNK = 1 << 16  # rows that are checked at a time, so that a large file is not copied


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A checked bundle; arrays are mapped from its files, not read into memory."""

    path: Path
    manifest: schema.Manifest
    vectors: np.ndarray  # float32 [N, D]
    candidate_ids: list[str]  # N, in the order of the vectors
    sample_queries: np.ndarray | None  # float32 [S, D]
    num_queries: int | None  # Q, None where there are no seen lists

    @property
    def query_model(self) -> Path | None:
        """Where the query SavedModel stands, None where the bundle has none."""
        path = self.path / schema.BUNDLE_QUERY_MODEL
        return path if path.exists() else None

    @property
    def retrieval_files(self) -> list[str]:
        """The files that a version keeps for filtering, outside its graph."""
        names = [schema.BUNDLE_VECTORS, schema.BUNDLE_CANDIDATE_IDS]
        names += _SEEN if self.num_queries is not None else ()
        if (self.path / schema.BUNDLE_CANDIDATE_COUNTS).exists():
            names.append(schema.BUNDLE_CANDIDATE_COUNTS)
        return names

    def query_ids(self, limit: int) -> list[str]:
        """The first raw ids of the queries that have a seen list; [] where there are none."""
        if self.num_queries is None:
            return []
        return read_raw_ids(self.path / schema.BUNDLE_QUERY_IDS)[:limit]


def read_bundle(path: str | Path) -> Bundle:
    """Opens a bundle and checks all that a version relies on.

    Raises:
      ValueError: it is unfinished, was changed since, or its parts do not fit together.
    """
    path = Path(path)
    manifest = schema.read_manifest(path, "bundle")
    check_files(path, manifest, content=True)
    vectors = _read_vectors(path / schema.BUNDLE_VECTORS)
    candidate_ids = _read_candidate_ids(path / schema.BUNDLE_CANDIDATE_IDS, len(vectors))
    _check_not_zero(path / schema.BUNDLE_VECTORS, vectors, candidate_ids)
    _check_counts(path / schema.BUNDLE_CANDIDATE_COUNTS, len(vectors))
    samples = path / schema.BUNDLE_SAMPLE_QUERIES
    return Bundle(
        path=path,
        manifest=manifest,
        vectors=vectors,
        candidate_ids=candidate_ids,
        sample_queries=_read_samples(samples, vectors.shape[1]) if samples.exists() else None,
        num_queries=_check_seen(path, len(vectors)),
    )


def read_raw_ids(path: Path) -> list[str]:
    """The column `raw_id` of a Parquet file, in order.

    Raises:
      ValueError: the file or the column is missing, or an id is null, empty or twice there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: write the raw ids there, column {schema.RAW_ID!r}.")
    try:
        column = pq.read_table(path, columns=[schema.RAW_ID]).column(schema.RAW_ID)
        ids = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        raise ValueError(
            f"{path} must be Parquet with a column {schema.RAW_ID!r} of strings: {error}."
        ) from error
    if not all(ids):
        row = next(row for row, raw_id in enumerate(ids) if not raw_id)
        raise ValueError(f"{path} must have an id in every row, got {ids[row]!r} in row {row}.")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path} must name every id once, got {_first_repeated(ids)!r} twice.")
    return ids


def _first_repeated(ids: Sequence[str]) -> str:
    met: set[str] = set()
    for raw_id in ids:
        if raw_id in met:
            return raw_id
        met.add(raw_id)
    raise AssertionError("no id is repeated")


def _read_array(path: Path, remedy: str) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a NumPy file: {error}.") from error


def _read_vectors(path: Path) -> np.ndarray:
    vectors = _read_array(path, "write the candidate vectors there, float32 [N, D]")
    if vectors.dtype != np.float32 or vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(
            f"{path} must be float32 [N, D] with rows and columns, "
            f"got {vectors.dtype} {list(vectors.shape)}: convert it before publishing."
        )
    _check_finite(path, vectors)
    return vectors


def _read_samples(path: Path, dimensions: int) -> np.ndarray:
    samples = _read_array(path, "write sample queries there")
    if samples.dtype != np.float32 or samples.ndim != 2 or samples.shape[1] != dimensions:
        raise ValueError(
            f"{path} must be float32 [S, {dimensions}] like the candidate vectors, "
            f"got {samples.dtype} {list(samples.shape)}."
        )
    _check_finite(path, samples)
    return samples


def _check_finite(path: Path, rows: np.ndarray) -> None:
    for start in range(0, len(rows), _CHUNK):
        finite = np.isfinite(rows[start : start + _CHUNK]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise ValueError(
                f"{path} must hold finite numbers, got NaN or infinity in row {row}: "
                "the training diverged, export an earlier checkpoint."
            )


def _check_not_zero(path: Path, vectors: np.ndarray, candidate_ids: list[str]) -> None:
    """Refuses a vector that scores 0 for every query, whatever its candidate is."""
    for start in range(0, len(vectors), _CHUNK):
        there = vectors[start : start + _CHUNK].any(axis=1)
        if not there.all():
            row = start + int(np.argmin(there))
            raise ValueError(
                f"{path} must hold vectors that a search can find, got only zeros in row {row}, "
                f"candidate {candidate_ids[row]!r}: train it, or leave it out of the bundle."
            )


def _check_counts(path: Path, num_candidates: int) -> None:
    """Checks how popular the candidates are, where the bundle says it."""
    if not path.exists():
        return
    counts = _read_array(path, "write the training rows of each candidate")
    if counts.dtype != np.int64 or counts.shape != (num_candidates,) or (counts < 0).any():
        raise ValueError(
            f"{path} must be int64 [{num_candidates}] of at least 0, one for each candidate "
            f"vector, got {counts.dtype} {list(counts.shape)}."
        )


def _read_candidate_ids(path: Path, num_vectors: int) -> list[str]:
    ids = read_raw_ids(path)
    if len(ids) != num_vectors:
        raise ValueError(
            f"{path} must have one id for each of the {num_vectors} candidate vectors, "
            f"got {len(ids)} ids: write both in the same order."
        )
    return ids


def _check_seen(path: Path, num_candidates: int) -> int | None:
    """The number of queries with a seen list, None where the bundle has no seen lists."""
    missing = [name for name in _SEEN if not (path / name).exists()]
    if len(missing) == len(_SEEN):
        return None
    if missing:
        raise ValueError(f"{path} must have all of {', '.join(_SEEN)} or none, got no {missing}.")
    num_queries = len(read_raw_ids(path / schema.BUNDLE_QUERY_IDS))
    offsets = _read_array(path / schema.BUNDLE_SEEN_OFFSETS, "write the seen lists")
    seen = _read_array(path / schema.BUNDLE_SEEN_CANDIDATES, "write the seen lists")
    _check_offsets(path / schema.BUNDLE_SEEN_OFFSETS, offsets, num_queries, len(seen))
    if seen.dtype != np.int32 or seen.ndim != 1:
        raise ValueError(
            f"{path / schema.BUNDLE_SEEN_CANDIDATES} must be int32 [seen pairs], "
            f"got {seen.dtype} {list(seen.shape)}."
        )
    if len(seen) and (seen.min() < 0 or seen.max() >= num_candidates):
        raise ValueError(
            f"{path / schema.BUNDLE_SEEN_CANDIDATES} must hold rows of the {num_candidates} "
            f"candidate vectors, got {seen.min()} to {seen.max()}."
        )
    return num_queries


def _check_offsets(path: Path, offsets: np.ndarray, num_queries: int, num_seen: int) -> None:
    if offsets.dtype != np.int64 or offsets.shape != (num_queries + 1,):
        raise ValueError(
            f"{path} must be int64 [{num_queries + 1}], one more than the query ids, "
            f"got {offsets.dtype} {list(offsets.shape)}."
        )
    if offsets[0] != 0 or offsets[-1] != num_seen or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{path} must rise from 0 to the {num_seen} seen candidates, "
            f"got {offsets[0]} to {offsets[-1]}: seen offsets out of range."
        )
