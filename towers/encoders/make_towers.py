"""Makes the towers that a configuration names, for some data."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.settings import require
from towers.data.attributes import Features, columns_of
from towers.data.history import History
from towers.data.interactions import RetrievalData
from towers.encoders.feature_tower import FeatureSource, FeatureTower
from towers.encoders.history_tower import HistoryTower
from towers.encoders.propagation import BipartiteGraph, LightGcn, Ngcf, Propagation
from towers.encoders.tower import GmfTower, IdTower, Tower
from towers.encoders.tower_config import INPUTS, SUMS, TowerConfig
from towers.encoders.tower_pair import TowerPair

_QUERY_SEED, _CANDIDATE_SEED = 0, 1


def make_towers(
    data: RetrievalData,
    config: TowerConfig,
    dim: int,
    *,
    normalize: bool,
    init_stddev: float,
    temperature: float,
    seed: int,
    jit_compile: bool | None,
) -> TowerPair:
    """The towers, untrained; all initial weights are functions of the seed.

    Args:
      data: what they are for: vocabularies, attributes, and the train split.
      dim: D; ngcf makes embeddings of (layers + 1) · D numbers.
      jit_compile: whether XLA compiles the propagation; None: on accelerators.

    Raises:
      ValueError: the data have no such attributes.
    """
    query: Tower
    shared: dict[str, Any] = {"normalize": normalize, "init_stddev": init_stddev}
    if config.tower == "features":
        query, candidate = _feature_towers(data, config, dim, seed, shared)
        return TowerPair(query, candidate, temperature=temperature)
    candidate = IdTower(
        data.num_candidates,
        dim,
        lengths=_lengths(data, config, normalize),
        seed=(seed, _CANDIDATE_SEED),
        name="candidate_tower",
        **shared,
    )
    shared |= {"seed": (seed, _QUERY_SEED), "name": "query_tower"}
    if config.tower in SUMS:
        query = HistoryTower(
            data.arrays("train"),
            data.num_queries,
            data.num_candidates,
            dim,
            length=config.history,
            items=candidate.table if config.share_items else None,
            has_table=config.tower == "svdpp",
            **shared,
        )
    else:
        query_tower = GmfTower if config.tower == "gmf" else IdTower
        query = query_tower(data.num_queries, dim, **shared)
    propagation = _propagation(data, config, dim, seed, jit_compile)
    return TowerPair(query, candidate, propagation, temperature=temperature)


def _lengths(data: RetrievalData, config: TowerConfig, normalize: bool) -> np.ndarray | None:
    """Of the embeddings of candidates, by their counts: [N]; 1 for the mean of them."""
    power = config.popularity_power
    if not power:
        return None
    require(normalize, "popularity_power", "must be 0 without normalize", power)
    counts = np.maximum(data.train_counts, 1)
    return (counts / counts.mean()) ** power


def _propagation(
    data: RetrievalData, config: TowerConfig, dim: int, seed: int, jit_compile: bool | None
) -> Propagation | None:
    if config.tower not in ("light_gcn", "ngcf"):
        return None
    if jit_compile is None:
        jit_compile = bool(tf.config.list_physical_devices("GPU"))
    rows = data.arrays("train")
    pairs = rows[schema.QUERY_ID], rows[schema.CANDIDATE_ID]
    graph = BipartiteGraph(*pairs, data.num_queries, data.num_candidates, segments=jit_compile)
    if config.tower == "light_gcn":
        return LightGcn(graph, dim, config.num_layers, jit_compile=jit_compile)
    return Ngcf(graph, dim, config.num_layers, jit_compile=jit_compile, seed=seed)


def _feature_towers(
    data: RetrievalData, config: TowerConfig, dim: int, seed: int, shared: dict[str, Any]
) -> tuple[FeatureTower, FeatureTower]:
    shared = shared | {"config": config, "dim": dim}
    candidate = _feature_tower(data, "candidate", None, seed=(seed, _CANDIDATE_SEED), **shared)
    history = None
    shared |= {"num_items": data.num_candidates, "seed": (seed, _QUERY_SEED)}
    if "history" in config.query_inputs:
        sizes = (data.num_queries, data.num_candidates)
        history = History(data.arrays("train"), *sizes, config.history)
        shared["items"] = candidate.table if config.share_items else None
    return _feature_tower(data, "query", history, **shared), candidate


def _feature_tower(
    data: RetrievalData, side: str, history: History | None, *, config: TowerConfig, **settings: Any
) -> FeatureTower:
    features = _chosen_features(data, config, side)
    columns, arrays = columns_of(features, config.text_buckets)
    size = data.num_queries if side == "query" else data.num_candidates
    column = schema.QUERY_ID if side == "query" else schema.CANDIDATE_ID
    trained = np.bincount(data.arrays("train")[column], minlength=size)
    num_cold = len(features.cold) if columns else 0
    if not columns and history is None:  # the row is all that there is
        trained = np.ones_like(trained)
    return FeatureTower(
        FeatureSource.of(trained > 0, arrays, None if history is None else history.last, num_cold),
        columns,
        config,
        history=history,
        has_table="id" in config.inputs(side),
        cold_ids=features.cold[schema.RAW_ID].combine_chunks() if num_cold else None,
        name=f"{side}_tower",
        **settings,
    )


def _chosen_features(data: RetrievalData, config: TowerConfig, side: str) -> Features:
    """Those that the inputs of a side name, in this order; all there are for `features`."""
    inputs, features = config.inputs(side), data.features(side)
    known = {spec.name: spec for spec in features.specs}
    word = "user" if side == "query" else "item"
    if "features" in inputs:
        has_any = any(data.features(each).specs for each in schema.SIDES)
        if known or (has_any and len(inputs) > 1):  # this side has other inputs
            return features
        raise ValueError(
            f"{side}_inputs has features, and the data have no attributes of that side: prepare "
            f"them with {word}_features, or leave features out of {side}_inputs."
        )
    names = [name for name in inputs if name not in INPUTS]
    for name in names:
        if name not in known:
            raise ValueError(
                f"{side}_inputs names {name!r}, which is no column of the data: it has "
                f"{', '.join(known) or 'none'}; prepare it with {word}_features that have "
                f"the column, or change {side}_inputs."
            )
    return dataclasses.replace(features, specs=tuple(known[name] for name in names))
