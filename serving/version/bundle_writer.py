"""Writes a bundle from arrays: the way in for vectors that another framework trained.

    write_bundle("bundle", vectors, ids, query_model="saved_model")

and then `twotower export --bundle bundle --models models`, or `serving.publish.publish.publish`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from pipeline.contract.files import describe_files, made_aside, replace_directory
from serving.version.bundle import read_bundle


def write_bundle(
    directory: str | os.PathLike[str],
    vectors: np.ndarray,
    candidate_ids: Sequence[str],
    *,
    source: str = "",
    query_model: str | os.PathLike[str] | None = None,
    sample_queries: np.ndarray | None = None,
    query_ids: Sequence[str] | None = None,
    seen: Sequence[Sequence[int]] | None = None,
    counts: np.ndarray | None = None,
) -> Path:
    """Writes and checks a bundle; one that stood there is replaced when the new one is whole.

    Args:
      directory: of the bundle.
      vectors: numbers [N, D]; the score of a candidate is the dot product with a query's
        embedding. Stored as float32.
      candidate_ids: N raw ids, in the order of the vectors.
      source: where it comes from, for the model card.
      query_model: a SavedModel whose `serving_default` takes query_id string [B] and gives
        embedding float32 [B, D] and known bool [B]. Without one, a version takes embeddings.
      sample_queries: embeddings of typical queries, [S, D]: the index is tuned to them. Without
        them it is tuned to the candidate vectors, which queries may not resemble.
      query_ids: raw ids of the queries with a history, for `exclude_seen`.
      seen: rows of the vectors that each of them had in training.
      counts: [N], how popular each candidate is, for unknown queries. Without them, `seen` says.

    Returns:
      The directory.

    Raises:
      ValueError: the parts do not fit together; see `serving.version.bundle.read_bundle`.
    """
    if (query_ids is None) != (seen is None):
        raise ValueError("query_ids and seen must be given together: the history of each query.")
    finished = Path(directory)
    with made_aside(finished) as aside:
        np.save(aside / schema.BUNDLE_VECTORS, np.asarray(vectors, np.float32))
        _write_ids(aside / schema.BUNDLE_CANDIDATE_IDS, candidate_ids)
        if query_model is not None:
            shutil.copytree(query_model, aside / schema.BUNDLE_QUERY_MODEL)
        if sample_queries is not None:
            np.save(aside / schema.BUNDLE_SAMPLE_QUERIES, np.asarray(sample_queries, np.float32))
        if query_ids is not None and seen is not None:
            _write_seen(aside, query_ids, seen)
        if counts is not None:
            np.save(aside / schema.BUNDLE_CANDIDATE_COUNTS, np.asarray(counts, np.int64))
        files = describe_files(aside)
        schema.Manifest("bundle", source, {}, {"candidates": len(vectors)}, files).write(aside)
        read_bundle(aside)
        replace_directory(aside, finished)
    return finished


def _write_seen(path: Path, query_ids: Sequence[str], seen: Sequence[Sequence[int]]) -> None:
    _write_ids(path / schema.BUNDLE_QUERY_IDS, query_ids)
    offsets = np.cumsum([0, *map(len, seen)], dtype=np.int64)
    np.save(path / schema.BUNDLE_SEEN_OFFSETS, offsets)
    rows = np.concatenate([np.empty(0, np.int64), *map(np.asarray, seen)])
    np.save(path / schema.BUNDLE_SEEN_CANDIDATES, rows.astype(np.int32))


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    pq.write_table(pa.table({schema.RAW_ID: pa.array(ids, pa.string())}), path)
