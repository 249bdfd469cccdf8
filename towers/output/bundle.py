"""Writes a trained run as a bundle: all that serving needs, and nothing of the trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contract import schema
from pipeline.contract.bundle import SeenLists, write_bundle
from towers.data.attributes import raw_values
from towers.data.interactions import RetrievalData, open_data
from towers.encoders.feature_tower import FeatureTower
from towers.model.encoder import save_encoder
from towers.model.top_k import all_ids, vectors
from towers.model.two_tower import TwoTower
from towers.training.earlier_run import open_to_serve
from towers.training.run_directory import METRICS, TRAINING, read_json

log = logging.getLogger(__name__)

_SAMPLES = 1_000  # query vectors to measure an index with
_SAMPLES_SEED = 0


def export_bundle(
    data_dir: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    bundle_dir: str | os.PathLike[str],
    filter_columns: Sequence[str] = (),
    text_columns: Sequence[str] = (),
) -> Path:
    """Writes the bundle of a trained run; `pipeline.contract.schema` describes what is in it.

    The metrics of the run go with it where they are those of its weights.

    Args:
      data_dir, run_dir, bundle_dir: prepared data, the run on it or on an earlier preparation,
        and what is written.
      filter_columns: attributes of candidates that requests may filter by.
      text_columns: others, of any kind, to be shown, such as titles.

    Raises:
      ValueError: there is no trained run, it is of other data, or it has diverged; or the data
        do not have a column.
    """
    model, config, data = open_to_serve(run_dir, open_data(data_dir))
    path, metrics = Path(run_dir) / METRICS, None
    if path.is_file():
        metrics, weights = read_json(path), read_json(Path(run_dir) / TRAINING)["weights"]
        if metrics.get("weights") != weights:
            text = "%s was trained on after its evaluation: %s is left out; evaluate it again"
            log.warning(text, run_dir, METRICS)
            metrics = None
    return write_model(
        *(data, model, bundle_dir, filter_columns, text_columns),
        configuration=config.recorded(),
        metrics=metrics,
    )


def write_model(
    data: RetrievalData,
    model: TwoTower,
    bundle_dir: str | os.PathLike[str],
    filter_columns: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    *,
    configuration: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> Path:
    """Writes the bundle of a model; see `export_bundle`, `configuration` is for its card."""
    attributes = None
    if filter_columns or text_columns:
        attributes = raw_values(data.features("candidate"), filter_columns, text_columns)
    queries = model.query_embeddings().numpy()
    candidates = np.asarray(memoryview(vectors(model, "candidate")))  # not a copy, as numpy() is
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise ValueError(
            "the embeddings must be finite, got NaN or infinity: train again with a smaller "
            "learning_rate."
        )
    raw_ids = all_ids(data, model, "query")
    embeds_new = isinstance(model.candidate_tower, FeatureTower)
    draw = np.random.default_rng(_SAMPLES_SEED)
    return write_bundle(
        bundle_dir,
        candidates,
        all_ids(data, model, "candidate"),
        query_model=partial(save_encoder, data, model, "query"),
        candidate_model=partial(save_encoder, data, model, "candidate") if embeds_new else None,
        sample_queries=queries[np.sort(draw.permutation(len(queries))[:_SAMPLES])],
        query_ids=raw_ids,
        seen=_seen(data, len(raw_ids)),
        attributes=None if attributes is None else attributes.slice(0, len(candidates)),
        manifest=_manifest(data, model, candidates, configuration, metrics),
    )


def _seen(data: RetrievalData, num_ids: int) -> SeenLists:
    """What each query chose in train and validation, by time where there are times."""
    parts = [data.arrays(split) for split in ("train", "validation")]
    names = schema.CANDIDATE_ID, schema.TIMESTAMP, schema.QUERY_ID
    keys = [np.concatenate([p[name] for p in parts]) for name in names if name in parts[0]]
    order = np.lexsort(keys)
    sizes = np.bincount(keys[-1], minlength=num_ids)
    return SeenLists(np.concatenate([[0], np.cumsum(sizes)]), keys[0][order])


def _manifest(
    data: RetrievalData,
    model: TwoTower,
    candidates: np.ndarray,
    configuration: dict[str, Any],
    metrics: dict[str, Any] | None,
) -> schema.Manifest:
    """The manifest of the bundle; it has nothing that depends on time or place."""
    details: dict[str, Any] = {
        "configuration": configuration,
        "data": {"source": data.source, "fingerprint": data.fingerprint},
    }
    if metrics is not None:
        details["metrics"] = {name: v for name, v in metrics.items() if name != "seconds"}
    return schema.Manifest(
        kind="bundle",
        source=data.source,
        configuration=configuration,
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
