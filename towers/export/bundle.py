"""Writes a trained run as a bundle: all that serving needs, and nothing of the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import describe_files, made_aside, replace_directory
from towers.data.interactions import RetrievalData, Vocabulary, open_data
from towers.encoders.tower import Tower
from towers.export.query_model import make_query_model
from towers.model.two_tower import TwoTower
from towers.training.run_directory import METRICS, open_run, read_json
from towers.training.settings import TrainConfig

_SAMPLES = 1_000  # query vectors to measure an index with
_SAMPLES_SEED = 0


def export_bundle(
    data_dir: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    bundle_dir: str | os.PathLike[str],
) -> Path:
    """Writes the bundle of a trained run; `pipeline.contract.schema` describes what is in it.

    Made aside and renamed into place, the manifest last; a bundle that stood there is replaced.

    Returns:
      The directory of the bundle.

    Raises:
      ValueError: there is no trained run, it is of other data, or it has diverged.
    """
    data = open_data(data_dir)
    model, config = open_run(run_dir, data)
    destination = Path(bundle_dir)
    with made_aside(destination) as aside:
        queries, candidates = _embeddings(model, run_dir)
        _write_queries(aside, data, model, queries)
        _write_candidates(aside, data, model, candidates)
        _write_seen(aside, data, model)
        _manifest(aside, data, model, candidates, config, Path(run_dir)).write(aside)
        replace_directory(aside, destination)
    return destination


def _embeddings(model: TwoTower, run_dir: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of queries by dense id, and of candidates by dense id, then of cold ones."""
    queries = model.query_embeddings().numpy().astype(np.float32)
    candidates = model.candidate_embeddings().numpy().astype(np.float32)
    if len(model.candidate_tower.cold_ids):
        cold = model.candidate_tower.embed_cold().numpy().astype(np.float32)
        candidates = np.concatenate([candidates, cold])
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise ValueError(
            f"the embeddings of {run_dir} must be finite, got NaN or infinity: train again with "
            "a smaller --learning_rate."
        )
    return queries, candidates


def _write_queries(out: Path, data: RetrievalData, model: TwoTower, embeddings: np.ndarray) -> None:
    raw_ids = _ids_of(data.query_vocabulary, model.query_tower)
    graph = make_query_model(raw_ids.to_pylist(), model.query_tower, embeddings, model.temperature)
    tf.saved_model.save(
        graph,
        str(out / schema.BUNDLE_QUERY_MODEL),
        signatures={"serving_default": graph.embed},
    )
    pq.write_table(pa.table({schema.RAW_ID: raw_ids}), out / schema.BUNDLE_QUERY_IDS)
    draw = np.random.default_rng(_SAMPLES_SEED)
    rows = np.sort(draw.permutation(len(embeddings))[:_SAMPLES])
    np.save(out / schema.BUNDLE_SAMPLE_QUERIES, embeddings[rows])


def _write_candidates(
    out: Path, data: RetrievalData, model: TwoTower, embeddings: np.ndarray
) -> None:
    raw_ids = _ids_of(data.candidate_vocabulary, model.candidate_tower)
    np.save(out / schema.BUNDLE_VECTORS, embeddings)
    pq.write_table(pa.table({schema.RAW_ID: raw_ids}), out / schema.BUNDLE_CANDIDATE_IDS)


def _ids_of(vocabulary: Vocabulary, tower: Tower) -> pa.Array:
    """All raw ids that a tower can embed: by dense id, then the cold ones."""
    return pa.concat_arrays([vocabulary.raw_ids, tower.cold_ids])


def _write_seen(out: Path, data: RetrievalData, model: TwoTower) -> None:
    seen = data.positives("train", "validation")
    nothing = np.full(len(model.query_tower.cold_ids), seen.offsets[-1])
    offsets = np.concatenate([seen.offsets, nothing])
    np.save(out / schema.BUNDLE_SEEN_OFFSETS, offsets.astype(np.int64))
    np.save(out / schema.BUNDLE_SEEN_CANDIDATES, seen.candidate_ids.astype(np.int32))


def _manifest(
    out: Path,
    data: RetrievalData,
    model: TwoTower,
    candidates: np.ndarray,
    config: TrainConfig,
    run: Path,
) -> schema.Manifest:
    """The manifest of the bundle; it has nothing that depends on time or place."""
    details: dict[str, Any] = {
        "configuration": config.recorded(),
        "data": {"source": data.source, "fingerprint": data.fingerprint},
    }
    if (run / METRICS).is_file():
        metrics = read_json(run / METRICS)
        metrics.pop("seconds", None)
        details["metrics"] = metrics
    return schema.Manifest(
        kind="bundle",
        source=data.source,
        configuration=config.recorded(),
        counts={
            "queries": data.num_queries + len(model.query_tower.cold_ids),
            "cold_queries": len(model.query_tower.cold_ids),
            "candidates": len(candidates),
            "cold_candidates": len(model.candidate_tower.cold_ids),
            "dim": candidates.shape[1],
        },
        files=describe_files(out),
        details=details,
    )
