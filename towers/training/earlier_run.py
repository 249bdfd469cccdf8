"""What a run takes from an earlier one: its vectors by raw id."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract import schema, stores
from pipeline.contract.files import written_aside
from towers.data.interactions import RetrievalData, find_ids
from towers.encoders.tower_config import SUMS
from towers.model.two_tower import TwoTower
from towers.training.run_directory import (
    CHECKPOINTS,
    TRAINING,
    VOCABULARIES,
    counts_of_run,
    make_model,
    open_run,
    read_json,
    read_run,
    weights_of_run,
)
from towers.training.settings import TrainConfig

log = logging.getLogger(__name__)

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # what TensorFlow appends to the path of a variable
_TRAINED = ("query_tower", "candidate_tower", "propagation")
_ITEMS = "query_tower/items"
# Side that the rows are ids of, table, and the one that it may be shared with, under whose name it
# is then saved.
_TABLES = (
    ("query", "query_tower/table", "query_tower/table"),
    ("candidate", _ITEMS, "candidate_tower/table"),
    ("candidate", "candidate_tower/table", _ITEMS),
)


def keep_vocabularies(run: str | os.PathLike[str], data: RetrievalData) -> None:
    """Writes which row of the tables is which id, and its train rows, for what takes this run."""
    if (Path(run) / VOCABULARIES).exists():
        return
    with written_aside(Path(run) / VOCABULARIES) as aside, open(aside, "wb") as file:
        prints: dict[str, Any] = {side: _fingerprints(data, side) for side in schema.SIDES}
        np.savez(file, counts=data.train_counts, **prints)


def start_from_run(config: TrainConfig, model: TwoTower, data: RetrievalData) -> None:
    """Gives a new model the weights of the run `config.init_from`.

    Ids are joined by the fingerprints of their raw ids; those that the earlier run did not know
    keep their initial draw. What belongs to no id is taken as it is. Rows for queries that the
    earlier run made of what they chose start as it embeds them. The states of the optimizer and of
    the method start anew. A ValueError where there is no trained run, it has no ids in common with
    the data or vectors of another size, or the towers embed more than ids, or differ where those of
    the earlier run are more than rows of tables.
    """
    root = stores.local_copy(config.init_from)
    for name in (TRAINING, VOCABULARIES):
        if not (root / name).is_file():
            raise ValueError(
                f"{root} holds no trained run: there is no {name} in it; change --init_from."
            )
    earlier, fingerprint = read_run(root)
    check_held_out("init_from", config, earlier, same_data=fingerprint == data.fingerprint)
    if "features" in (config.tower, earlier.tower):
        raise ValueError(
            "init_from starts from vectors of ids, and --tower features makes them of attributes, "
            "whose codes are those of one preparation: leave out --init_from."
        )
    if earlier.tower not in ("id", *SUMS) and earlier.tower != config.tower:
        raise ValueError(
            f"tower must be {earlier.tower} as in {root}, whose vectors are more than rows of its "
            f"tables, got {config.tower}: change --tower, or leave out --init_from."
        )
    drawn = None
    if earlier.tower in SUMS and config.tower not in SUMS:
        drawn = tf.identity(model.query_tower.table)
    _take_weights(root, root / CHECKPOINTS / read_json(root / TRAINING)["weights"], model, data)
    if drawn is None:
        return
    if fingerprint != data.fingerprint:
        log.warning("train: queries start anew: %s made theirs of the rows of other data", root)
        model.query_tower.table.assign(drawn)
        return
    trained, _ = open_run(root, data)
    model.query_tower.table.assign(trained.query_embeddings() * trained.temperature)


def check_held_out(
    name: str, config: TrainConfig, earlier: TrainConfig, *, same_data: bool
) -> None:
    """Whether a run that another takes something from, its `name`, may know held-out rows.

    A ValueError where it surely does: a measure of the other would be none. Where it is of other
    data nobody can say, and a log tells.
    """
    if config.refit:  # nothing is held out
        return
    place = getattr(config, name)
    if not same_data:
        text = "train: %s is of other data: if it knows rows that are held out now, which a split "
        log.warning(text + "by time avoids, validation and test say too much", place)
    elif earlier.refit:
        raise ValueError(
            f"{name} must not be a refit of the same data, got {place}, which knows the rows that "
            f"are held out: give {earlier.refit}."
        )


def open_to_serve(
    run: str | os.PathLike[str], data: RetrievalData
) -> tuple[TwoTower, TrainConfig, RetrievalData]:
    """The trained model of a run with the data to serve it with, which may be a later preparation.

    Of a later one the ids that the run does not know are left out, and a log says how many. The
    data of a refit have the rows of all splits in train. A ValueError where there is no trained
    run, it cannot be read, its towers read attributes of another preparation, or it knows no ids of
    a side.
    """
    config, fingerprint = read_run(run)
    rows = data.all_as_train() if config.refit else data
    if fingerprint == data.fingerprint:
        return *open_run(run, data), rows
    vocabularies = Path(run) / VOCABULARIES
    if config.tower == "features" or not vocabularies.is_file():
        raise ValueError(
            f"{run} was trained on other data than what was given, and not on ids alone, which can "
            "be joined: give those as --data and add new items by `twotower items`, or train again."
        )
    counts, kept = counts_of_run(run, config), []
    with np.load(vocabularies) as known:
        counts = known.get("counts") if counts is None else counts  # older runs have none
        for side in schema.SIDES:
            places, there = find_ids(_fingerprints(data, side), known[side])
            if not there.any():
                raise ValueError(
                    f"none of the {len(there)} ids of the {side} side of the data is in {run}: "
                    "check --data, or train again."
                )
            text = "%s does not know %d of %d %s ids of the data, such as %r: they are left out"
            if not there.all():
                new = getattr(data, f"{side}_vocabulary").raw_ids[int(np.argmin(there))].as_py()
                log.warning(text, run, np.count_nonzero(~there), len(there), side, new)
            kept.append(there)
    rows = rows.restricted(*kept)
    counted = rows if counts is None else rows.with_counts(counts[places[there]])
    model = make_model(config, counted)
    with weights_of_run(run, config) as weights:
        _take_weights(Path(run), Path(weights), model, rows)
    return model, config, rows


def _take_weights(root: Path, checkpoint: Path, model: TwoTower, data: RetrievalData) -> None:
    """Assigns the variables of a checkpoint: rows of ids by fingerprint, the others as they are."""
    reader = tf.train.load_checkpoint(str(checkpoint))
    keys = {  # by the path of a variable in the model
        key.removesuffix(_VALUE).removeprefix("model/"): key
        for key in reader.get_variable_to_shape_map()
        if key.startswith(tuple(f"model/{part}/" for part in _TRAINED))
    }
    with np.load(root / VOCABULARIES) as known:
        for side, path, other in _TABLES:
            table, key = _variable(model, path), keys.get(path, keys.get(other))
            if table is None or key is None:
                continue
            old = reader.get_tensor(key)
            if old.shape[1] != table.shape[1]:
                raise ValueError(
                    f"dim must be {old.shape[1]} as in {root}, got {table.shape[1]}; change dim."
                )
            table.assign(_joined(table.numpy(), _fingerprints(data, side), old, known[side], root))
    for path, key in keys.items():
        variable = _variable(model, path)
        if path.split("/")[1] not in ("table", "items") and variable is not None:
            variable.assign(reader.get_tensor(key))


def _variable(model: Any, path: str) -> Any:
    """The variable of a path in a checkpoint; None where the model has nothing there."""
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("/"), model)


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
    if not known.all():
        log.info("train: %d of %d rows of a table are those of %s", known.sum(), len(known), root)
    return np.where(known[:, None], old[places], new)
