"""Writes a trained run as a bundle: all that serving needs, and nothing of the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.bundle import SeenLists, write_bundle
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

    Returns:
      The directory of the bundle.

    Raises:
      ValueError: there is no trained run, it is of other data, or it has diverged.
    """
    data = open_data(data_dir)
    model, config = open_run(run_dir, data)
    queries, candidates = _embeddings(model, run_dir)
    raw_ids = _ids_of(data.query_vocabulary, model.query_tower)
    graph = make_query_model(raw_ids.to_pylist(), model.query_tower, queries, model.temperature)
    draw = np.random.default_rng(_SAMPLES_SEED)
    return write_bundle(
        bundle_dir,
        candidates,
        _ids_of(data.candidate_vocabulary, model.candidate_tower),
        query_model=lambda path: tf.saved_model.save(
            graph, str(path), signatures={"serving_default": graph.embed}
        ),
        sample_queries=queries[np.sort(draw.permutation(len(queries))[:_SAMPLES])],
        query_ids=raw_ids,
        seen=_seen(data, model),
        manifest=_manifest(data, model, candidates, config, Path(run_dir)),
    )


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


def _ids_of(vocabulary: Vocabulary, tower: Tower) -> pa.Array:
    """All raw ids that a tower can embed: by dense id, then the cold ones."""
    return pa.concat_arrays([vocabulary.raw_ids, tower.cold_ids])


def _seen(data: RetrievalData, model: TwoTower) -> SeenLists:
    seen = data.positives("train", "validation")
    nothing = np.full(len(model.query_tower.cold_ids), seen.offsets[-1])
    return SeenLists(np.concatenate([seen.offsets, nothing]), seen.candidate_ids)


def _manifest(
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
        files={},
        details=details,
    )
