"""A bundle, what a trainer hands over to be served: written from arrays, read and checked.

    write_bundle("bundle", vectors, ids, query_model="saved_model")

and then `twotower export --bundle bundle --models models`; whoever trained the vectors.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from pipeline.contract.attributes import as_attributes
from pipeline.contract.files import check_files, describe_files, made_aside, replace_directory

_SEEN = (schema.BUNDLE_QUERY_IDS, schema.BUNDLE_SEEN_OFFSETS, schema.BUNDLE_SEEN_CANDIDATES)
_CHUNK = 1 << 16  # rows that are checked at a time, so that a large file is not copied


class SeenLists(NamedTuple):
    """What each of Q queries has seen: of query q, `candidates[offsets[q] : offsets[q + 1]]`."""

    offsets: np.ndarray  # int64 [Q + 1]
    candidates: np.ndarray  # int32, rows of the vectors

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> SeenLists:
        """From one list a query.

        >>> SeenLists.of([[4, 1], [], [3]]).offsets.tolist()
        [0, 2, 2, 3]
        """
        rows = np.concatenate([np.empty(0, np.int64), *map(np.asarray, lists)])
        return cls(np.cumsum([0, *map(len, lists)]), rows)


def write_bundle(
    directory: str | os.PathLike[str],
    vectors: np.ndarray,
    candidate_ids: Sequence[str] | pa.Array,
    *,
    source: str = "",
    query_model: str | os.PathLike[str] | Callable[[Path], object] | None = None,
    candidate_model: str | os.PathLike[str] | Callable[[Path], object] | None = None,
    sample_queries: np.ndarray | None = None,
    query_ids: Sequence[str] | pa.Array | None = None,
    seen: Sequence[Sequence[int]] | SeenLists | None = None,
    counts: np.ndarray | None = None,
    attributes: pa.Table | None = None,
    manifest: schema.Manifest | None = None,
) -> Path:
    """Writes and checks a bundle; one that stood there is replaced when the new one is whole.

    Args:
      directory: of the bundle.
      vectors: numbers [N, D]; the score of a candidate is the dot product with a query's
        embedding. Stored as float32.
      candidate_ids: N raw ids, in the order of the vectors.
      source: where it comes from, for the model card.
      query_model: a SavedModel whose `serving_default` takes query_id string [B] and gives
        embedding float32 [B, D] and known bool [B], or a function that writes it to a path.
        Without one, a version takes embeddings.
        It may have `request_embedding` beside it, which takes the query_id and whatever else it
        reads: a history string [B, W], columns string [B] or [B, W] or float64 [B].
      candidate_model: likewise, of candidates: its `request_embedding` takes candidate_id and
        columns, for `twotower items`.
      sample_queries: embeddings of typical queries, [S, D]: the index is tuned to them. Without
        them it is tuned to the candidate vectors, which queries may not resemble.
      query_ids: raw ids of the queries with a history, for `exclude_seen`.
      seen: rows of the vectors that each of them had in training.
      counts: [N], how popular each candidate is, for unknown queries. Without them, `seen` says.
      attributes: N rows of what requests may choose candidates by (`where`): see
        `pipeline.contract.attributes`.
      manifest: says more than the source; its `files` are filled in.

    Returns:
      The directory.

    Raises:
      ValueError: the parts do not fit together; see `read_bundle`.
    """
    if (query_ids is None) != (seen is None):
        raise ValueError("query_ids and seen must be given together: the history of each query.")
    numbers = {"candidates": len(vectors)}
    manifest = manifest or schema.Manifest("bundle", source, {}, numbers, {})
    finished = Path(directory)
    with made_aside(finished) as aside:
        np.save(aside / schema.BUNDLE_VECTORS, np.asarray(vectors, np.float32))
        _write_ids(aside / schema.BUNDLE_CANDIDATE_IDS, candidate_ids)
        for name, model in (
            (schema.BUNDLE_QUERY_MODEL, query_model),
            (schema.BUNDLE_CANDIDATE_MODEL, candidate_model),
        ):
            if callable(model):
                model(aside / name)
            elif model is not None:
                shutil.copytree(model, aside / name)
        if sample_queries is not None:
            np.save(aside / schema.BUNDLE_SAMPLE_QUERIES, np.asarray(sample_queries, np.float32))
        if query_ids is not None and seen is not None:
            _write_ids(aside / schema.BUNDLE_QUERY_IDS, query_ids)
            offsets, candidates = seen if isinstance(seen, SeenLists) else SeenLists.of(seen)
            np.save(aside / schema.BUNDLE_SEEN_OFFSETS, offsets.astype(np.int64))
            np.save(aside / schema.BUNDLE_SEEN_CANDIDATES, candidates.astype(np.int32))
        if counts is not None:
            np.save(aside / schema.BUNDLE_CANDIDATE_COUNTS, np.asarray(counts, np.int64))
        if attributes is not None:
            pq.write_table(as_attributes(attributes), aside / schema.BUNDLE_ATTRIBUTES)
        dataclasses.replace(manifest, files=describe_files(aside)).write(aside)
        read_bundle(aside)
        replace_directory(aside, finished)
    return finished


def _write_ids(path: Path, ids: Sequence[str] | pa.Array) -> None:
    column = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    pq.write_table(pa.table({schema.RAW_ID: column}), path)


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
    def candidate_model(self) -> Path | None:
        """Where the candidate SavedModel stands, None where the bundle has none."""
        path = self.path / schema.BUNDLE_CANDIDATE_MODEL
        return path if path.exists() else None

    @property
    def retrieval_files(self) -> list[str]:
        """The files that a version keeps outside its graph."""
        names = [schema.BUNDLE_VECTORS, schema.BUNDLE_CANDIDATE_IDS]
        names += _SEEN if self.num_queries is not None else ()
        optional = [schema.BUNDLE_CANDIDATE_COUNTS, schema.BUNDLE_ATTRIBUTES]
        optional.append(schema.BUNDLE_SAMPLE_QUERIES)  # an index may be built anew
        names += [name for name in optional if (self.path / name).exists()]
        return names

    def query_ids(self, limit: int) -> list[str]:
        """The first raw ids of the queries that have a seen list; [] if no query has one."""
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
    check_files(path, manifest.files, content=True)
    vectors, candidate_ids = _read_candidates(path)
    file, samples, dim = path / schema.BUNDLE_SAMPLE_QUERIES, None, vectors.shape[1]
    if file.exists():
        rule = f"float32 [S, {dim}] like the candidate vectors"
        samples = _read_array(file, rule, lambda a: a.dtype == np.float32 and a.shape[1:] == (dim,))
    num_queries = _check_seen(path, len(vectors))
    file = path / schema.BUNDLE_ATTRIBUTES
    if file.exists():
        _check_attributes(file, len(vectors))
    return Bundle(path, manifest, vectors, candidate_ids, samples, num_queries)


def read_raw_ids(path: Path, name: str = schema.RAW_ID) -> list[str]:
    """A column of ids of a Parquet file, in order.

    Raises:
      ValueError: the file or the column is missing, or an id is null, empty or twice there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: write the raw ids there, column {name!r}.")
    try:
        column = pq.read_table(path, columns=[name]).column(name)
        ids = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        raise ValueError(
            f"{path} must be Parquet with a column {name!r} of strings, as "
            f"DataFrame.to_parquet makes it: {str(error).rstrip('.')[:99]}."
        ) from error
    if not all(ids):
        row = next(row for row, raw_id in enumerate(ids) if not raw_id)
        raise ValueError(f"{path} must have an id in every row, got {ids[row]!r} in row {row}.")
    if len(set(ids)) != len(ids):
        [(repeated, _)] = Counter(ids).most_common(1)
        raise ValueError(f"{path} must name every id once, got {repeated!r} twice.")
    return ids


def _read_candidates(path: Path) -> tuple[np.ndarray, list[str]]:
    """Vectors float32 [N, D], none of them without a direction, and their ids."""
    file = path / schema.BUNDLE_VECTORS
    vectors = _read_array(
        file,
        "float32 [N, D] with rows and columns",
        lambda a: a.dtype == np.float32 and a.ndim == 2 and 0 not in a.shape,
        ": convert it before publishing",
    )
    ids = read_raw_ids(path / schema.BUNDLE_CANDIDATE_IDS)
    if len(ids) != len(vectors):
        raise ValueError(
            f"{path / schema.BUNDLE_CANDIDATE_IDS} must have one id for each of the "
            f"{len(vectors)} candidate vectors, got {len(ids)} ids: write both in the same order."
        )
    row = _first_row(vectors, lambda rows: rows.any(axis=1))
    if row is not None:  # zeros score 0 whatever the query is
        raise ValueError(
            f"{file} must hold vectors that a search can find, got only zeros in row {row}, "
            f"candidate {ids[row]!r}: train it, or leave it out of the bundle."
        )
    file = path / schema.BUNDLE_CANDIDATE_COUNTS
    if file.exists():
        rule = f"int64 [{len(ids)}] of at least 0, one for each candidate vector"
        shape = (len(ids),)
        _read_array(file, rule, lambda a: a.dtype == np.int64 and a.shape == shape and a.min() >= 0)
    return vectors, ids


def _check_seen(path: Path, num_candidates: int) -> int | None:
    """The number of queries with a seen list, None where the bundle has no seen lists."""
    missing = [name for name in _SEEN if not (path / name).exists()]
    if len(missing) == len(_SEEN):
        return None
    if missing:
        raise ValueError(f"{path} must have all of {', '.join(_SEEN)} or none, got no {missing}.")
    files = [path / name for name in _SEEN]
    num_queries = len(read_raw_ids(files[0]))
    shape = (num_queries + 1,)
    rule = f"int64 [{num_queries + 1}], one more than the query ids"
    offsets = _read_array(files[1], rule, lambda a: a.dtype == np.int64 and a.shape == shape)
    rule = "int32 [seen pairs]"
    seen = _read_array(files[2], rule, lambda a: a.dtype == np.int32 and a.ndim == 1)
    if offsets[0] != 0 or offsets[-1] != len(seen) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{files[1]} must rise from 0 to the {len(seen)} seen candidates, "
            f"got {offsets[0]} to {offsets[-1]}: seen offsets out of range."
        )
    if len(seen) and (seen.min() < 0 or seen.max() >= num_candidates):
        raise ValueError(
            f"{files[2]} must hold rows of the {num_candidates} candidate vectors, "
            f"got {seen.min()} to {seen.max()}."
        )
    return num_queries


def _check_attributes(path: Path, num_candidates: int) -> None:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file: {error}.") from error
    with file:
        columns, rows = file.schema_arrow, file.metadata.num_rows
    if rows != num_candidates:
        raise ValueError(
            f"{path} must have one row for each of the {num_candidates} candidate vectors, got "
            f"{rows}: write both in the same order."
        )
    if as_attributes(columns.empty_table()).schema.types != columns.types:
        raise ValueError(
            f"{path} must hold texts, lists of texts and float64: write it by `write_bundle`."
        )


def _read_array(
    path: Path, rule: str, fits: Callable[[np.ndarray], bool], remedy: str = ""
) -> np.ndarray:
    """Maps an array from its file and checks it; numbers of floating point must be finite."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: `pipeline.contract.schema` says what it holds.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a NumPy file: {error}.") from error
    if not fits(array):
        raise ValueError(f"{path} must be {rule}, got {array.dtype} {list(array.shape)}{remedy}.")
    if array.dtype == np.float32:
        row = _first_row(array, lambda rows: np.isfinite(rows).all(axis=1))
        if row is not None:
            raise ValueError(
                f"{path} must hold finite numbers, got NaN or infinity in row {row}: the training "
                "diverged, export an earlier checkpoint."
            )
    return array


def _first_row(array: np.ndarray, is_good: Callable[[np.ndarray], Any]) -> int | None:
    """The first row that is not good; None where all are."""
    for start in range(0, len(array), _CHUNK):
        good = is_good(array[start : start + _CHUNK])
        if not good.all():
            return start + int(np.argmin(good))
    return None
