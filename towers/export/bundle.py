"""Writes a trained run as a bundle: all that serving needs, and nothing of the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.bundle import SeenLists, write_bundle
from towers.data.interactions import RetrievalData, open_data
from towers.encoders.feature_tower import FeatureTower
from towers.encoders.tower import Tower
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
    queries, candidates = model.query_embeddings().numpy(), candidate_vectors(model)
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise ValueError(
            f"the embeddings of {run_dir} must be finite, got NaN or infinity: train again with "
            "a smaller --learning_rate."
        )
    raw_ids = all_ids(data, model, "query")
    graph = make_query_model(raw_ids.to_pylist(), model.query_tower, queries, model.temperature)
    draw = np.random.default_rng(_SAMPLES_SEED)
    seen = data.positives("train", "validation")
    nothing = np.full(len(model.query_tower.cold_ids), seen.offsets[-1])
    return write_bundle(
        bundle_dir,
        candidates,
        all_ids(data, model, "candidate"),
        query_model=lambda path: tf.saved_model.save(
            graph, str(path), signatures={"serving_default": graph.embed}
        ),
        sample_queries=queries[np.sort(draw.permutation(len(queries))[:_SAMPLES])],
        query_ids=raw_ids,
        seen=SeenLists(np.concatenate([seen.offsets, nothing]), seen.candidate_ids),
        manifest=_manifest(data, model, candidates, config, Path(run_dir)),
    )


def candidate_vectors(model: TwoTower) -> np.ndarray:
    """What candidates are scored by: float32 [N + cold, D], by dense id, then the cold ones."""
    return _with_cold(model.candidate_embeddings(), model.candidate_tower).numpy()


def query_vectors(model: TwoTower) -> tf.Tensor:
    """The same of queries, over the temperature: float32 [Q + cold, D]."""
    return _with_cold(model.query_embeddings(), model.query_tower, model.temperature)


def _with_cold(embeddings: tf.Tensor, tower: Tower, temperature: float = 1.0) -> tf.Tensor:
    if not len(tower.cold_ids):
        return embeddings
    cold = tf.cast(tower.embed_cold() / temperature, tf.float32)
    return tf.concat([embeddings, cold], axis=0)


def all_ids(data: RetrievalData, model: TwoTower, side: str) -> pa.Array:
    """Raw ids by dense id, then those that the tower knows by their attributes alone."""
    vocabulary, tower = getattr(data, f"{side}_vocabulary"), getattr(model, f"{side}_tower")
    return pa.concat_arrays([vocabulary.raw_ids, tower.cold_ids])


def _manifest(
    data: RetrievalData, model: TwoTower, candidates: np.ndarray, config: TrainConfig, run: Path
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


class QueryModel(tf.Module):
    """Raw query ids → embeddings; a plain module, so that serving needs no Keras.

    Args:
      raw_ids: Q ids; the row of an id is its place among them.
      embed_rows: int64 [B] → the embeddings of rows, [B, D], over the temperature.
      kept: the variables that `embed_rows` reads.
    """

    def __init__(
        self,
        raw_ids: Sequence[str],
        embed_rows: Callable[[tf.Tensor], tf.Tensor],
        kept: Sequence[tf.Variable],
    ) -> None:
        super().__init__(name="query_model")
        keys = tf.constant(raw_ids, tf.string)
        rows = tf.range(tf.size(keys, tf.int64), dtype=tf.int64)
        self._row_of = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(keys, rows), default_value=-1
        )
        self._embed_rows, self._kept = embed_rows, list(kept)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="query_id")])
    def embed(self, query_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """string [B] → embedding float32 [B, D], zeros for unknown ids, and known bool [B]."""
        rows = self._row_of.lookup(query_id)
        known = rows >= 0
        embedding = tf.cast(self._embed_rows(tf.maximum(rows, 0)), tf.float32)
        return {"embedding": tf.where(known[:, None], embedding, 0.0), "known": known}


def make_query_model(
    raw_ids: Sequence[str], tower: Tower, embeddings: np.ndarray, temperature: float
) -> QueryModel:
    """What a bundle holds for a trained tower of queries.

    A feature tower looks up what is known of an id inside the graph, and computes its embedding;
    of other towers the graph holds the embeddings themselves.

    Args:
      raw_ids: of the vocabulary, then the cold ids of the tower.
      tower: of queries.
      embeddings: float32 [V, D] by dense id, over the temperature.
      temperature: what embeddings are divided by.
    """
    if not isinstance(tower, FeatureTower):
        table = tf.Variable(embeddings, trainable=False, name="query_embeddings")
        return QueryModel(raw_ids, lambda rows: tf.gather(table, rows), [table])
    inputs: list[tf.Variable] = []

    def keep(array: np.ndarray) -> tf.Variable:
        inputs.append(tf.Variable(array, trainable=False))
        return inputs[-1]

    source = tower.source.followed_by(tower.cold).as_tensors(keep)
    return QueryModel(
        raw_ids,
        lambda rows: tower.embed_source(source, rows) / temperature,
        [*inputs, *tower.variables],
    )
