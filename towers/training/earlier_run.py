"""What a run takes from an earlier one: its vectors by raw id, or its ranking as a teacher's."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import written_aside
from samplers.methods.full_softmax import SoftTargets
from towers.data.interactions import RetrievalData, find_ids
from towers.encoders.tower_config import SUMS
from towers.metrics.ranking import rank_blocks, tie_order
from towers.model.two_tower import TwoTower
from towers.training.run_directory import (
    CHECKPOINTS,
    CONFIG,
    TRAINING,
    VOCABULARIES,
    open_run,
    read_json,
)
from towers.training.settings import TrainConfig

log = logging.getLogger(__name__)

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # what TensorFlow appends to the path of a variable
_ITEMS = "query_tower/items"
_TABLES = (  # side that the rows are ids of, table, and the one that it may be shared with
    ("query", "query_tower/table", "query_tower/table"),
    ("candidate", _ITEMS, "candidate_tower/table"),
    ("candidate", "candidate_tower/table", _ITEMS),
)


def keep_vocabularies(run: str | os.PathLike[str], data: RetrievalData) -> None:
    """Writes which row of the tables is which id, for runs that start from this one."""
    if (Path(run) / VOCABULARIES).exists():
        return
    with written_aside(Path(run) / VOCABULARIES) as aside, open(aside, "wb") as file:
        prints: dict[str, Any] = {side: _fingerprints(data, side) for side in schema.SIDES}
        np.savez(file, **prints)


def start_from_run(config: TrainConfig, model: TwoTower, data: RetrievalData) -> None:
    """Gives a new model the weights of the run `config.init_from`.

    Ids are joined by the fingerprints of their raw ids; those that the earlier run did not know
    keep their initial draw. What belongs to no id is taken as it is. Rows for queries that the
    earlier run made of what they chose start as it embeds them. The states of the optimizer and of
    the method start anew.

    Raises:
      ValueError: there is no trained run, it has no ids in common with the data or vectors of
        another size, or the towers embed more than ids.
    """
    root = Path(config.init_from)
    for name in (TRAINING, VOCABULARIES):
        if not (root / name).is_file():
            raise ValueError(
                f"{root} holds no trained run: there is no {name} in it; change --init_from."
            )
    before = read_json(root / CONFIG)["configuration"]
    if "features" in (config.tower, before["tower"]):
        raise ValueError(
            "init_from starts from vectors of ids, and --tower features makes them of attributes, "
            "whose codes are those of one preparation: leave out --init_from."
        )
    checkpoint = root / CHECKPOINTS / read_json(root / TRAINING)["weights"]
    weights = tf.train.load_checkpoint(str(checkpoint))
    with np.load(root / VOCABULARIES) as known:
        for side, path, other in _TABLES:
            table, old = _table_of(model, path), _saved(weights, path, other)
            if table is None or old is None:
                continue
            if old.shape[1] != table.shape[1]:
                raise ValueError(
                    f"dim must be {old.shape[1]} as in {root}, got {table.shape[1]}; change --dim."
                )
            table.assign(_joined(table.numpy(), _fingerprints(data, side), old, known[side], root))
    _take_the_rest(model, weights)
    if before["tower"] in SUMS and config.tower not in SUMS:
        _embed_queries(root, model, data)


def _embed_queries(root: Path, model: TwoTower, data: RetrievalData) -> None:
    """Queries that the run made of what they chose start as it embeds them, if the data are its."""
    if read_json(root / CONFIG)["data_fingerprint"] != data.fingerprint:
        log.warning("train: queries start anew: %s made theirs of the rows of other data", root)
        return
    earlier, _ = open_run(root, data)
    model.query_tower.table.assign(earlier.query_embeddings() * earlier.temperature)


def _table_of(model: TwoTower, path: str) -> tf.Variable | None:
    tower, name = path.split("/")
    return getattr(getattr(model, tower), name, None)


def _saved(weights: Any, *paths: str) -> np.ndarray | None:
    """A table under the first of its names: one that towers share is saved under one of two."""
    keys = [f"model/{path}{_VALUE}" for path in paths]
    return next((weights.get_tensor(key) for key in keys if weights.has_tensor(key)), None)


def _fingerprints(data: RetrievalData, side: str) -> np.ndarray:
    return getattr(data, f"{side}_vocabulary").fingerprints


def _joined(
    new: np.ndarray, new_ids: np.ndarray, old: np.ndarray, old_ids: np.ndarray, root: Path
) -> np.ndarray:
    """The rows of the new table, from the old one where that has the id: float32 [V, D]."""
    places, known = find_ids(new_ids, old_ids)
    if not known.any():
        raise ValueError(
            f"none of the {len(new_ids)} ids of a side of the data is in {root}: prepare both from "
            "the same raw ids, or leave out --init_from."
        )
    log.info("train: %d of %d rows of a table are those of %s", known.sum(), len(known), root)
    return np.where(known[:, None], old[places], new)


def _take_the_rest(model: TwoTower, weights: Any) -> None:
    """Weights of towers and propagation that belong to no id, where both runs have them."""
    for key in weights.get_variable_to_shape_map():
        part, *names = key.removesuffix(_VALUE).removeprefix("model/").split("/")
        trained = part in ("query_tower", "candidate_tower", "propagation")
        if not trained or names[0] in ("table", "items"):
            continue
        variable: Any = model
        for name in (part, *names):
            variable = getattr(variable, name, None)
        if variable is not None:
            variable.assign(weights.get_tensor(key))


def soft_targets(
    model: TwoTower, data: RetrievalData, k: int, *, block_size: int = 256
) -> SoftTargets:
    """What a model ranks highest for each query among what the query did not choose in train.

    Held-out rows are not looked at: where the teacher ranks them high, it has found them.

    Args:
      model: the teacher, a trained model of the data.
      data: whose train split the student is trained on too.
      k: T, candidates of each query; fewer where the corpus is smaller.
      block_size: queries ranked at a time.
    """
    chosen = data.positives("train")
    blocks = rank_blocks(
        model.query_embeddings(),
        model.candidate_embeddings(),
        np.arange(data.num_queries),
        chosen,
        k=k,
        order=tie_order(data.candidate_vocabulary.fingerprints),
        block_size=block_size,
    )
    ids, scores = zip(*((ids.astype(np.int32), scores) for ids, scores in blocks), strict=True)
    return SoftTargets(
        np.concatenate(ids),
        np.concatenate(scores),
        chosen.candidate_ids.astype(np.int32),
        chosen.offsets,
    )
