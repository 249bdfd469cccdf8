"""A model in a directory: settings, weights with the states of method and optimizer, its data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import check_files, describe_files, made_aside, replace_directory
from towers.data.interactions import RetrievalData, data_in
from towers.legacy_keras import tf_keras
from towers.model.optimizers import OPTIMIZERS
from towers.model.two_tower import TwoTower

_KIND = "model"
_WEIGHTS = "weights"
_KEPT = ("train", "validation")  # what a query has seen; nobody needs the test rows
_log = logging.getLogger(__name__)


def save(model: TwoTower, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes a directory that `load` reads; see `TwoTower.save`."""
    place = Path(path)
    if place.suffix in (".keras", ".h5", ".hdf5"):
        raise ValueError(
            f"a TwoTower is saved as a directory, got {str(place)!r}: "
            f"model.save({place.stem!r}), then towers.load({place.stem!r})."
        )
    ours = (place / schema.MANIFEST).is_file() and (place / f"{_WEIGHTS}.index").is_file()
    if place.exists() and not (overwrite and ours):
        remedy = "give overwrite=True" if ours else "it is not a saved model, choose another path"
        raise ValueError(f"{place} exists: {remedy}.")
    optimizer = getattr(model, "optimizer", None)
    config = optimizer and tf_keras.optimizers.serialize(optimizer)
    details = {
        "settings": json.loads(model.settings),
        "policy": model.query_tower.dtype_policy.name,
        "optimizer": json.loads(json.dumps(config, default=lambda number: number.item())),
    }
    with made_aside(place.absolute()) as aside:
        details |= _write_data(model.data, aside)
        tf.train.Checkpoint(model=model).write(str(aside / _WEIGHTS))
        files = describe_files(aside)
        schema.Manifest(_KIND, model.data.source, {}, {}, files, details).write(aside)
        replace_directory(aside, place.absolute())


def load(path: str | os.PathLike[str]) -> TwoTower:
    """A model that `TwoTower.save` wrote: it recommends, is exported and trained on as before.

    >>> import tempfile, pandas as pd, towers
    >>> log = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "milk", "tea"]})
    >>> model = TwoTower(towers.from_dataframe(log, user="user", item="item"), dim=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model")
    ...     load(f"{folder}/model").data.num_candidates
    2

    Training goes on with `fit`: the optimizer and the method have their state. `model.data` holds
    the train and validation rows, to be trained on; `towers.evaluate` needs the data with their
    test rows.

    Raises:
      ValueError: there is no saved model, or its files were changed.
    """
    root = Path(path)
    manifest = schema.read_manifest(root, _KIND)
    details = manifest.details
    with layers_of(details["policy"]):
        model = TwoTower(_read_data(root, manifest), **details["settings"])
    if details["optimizer"]:
        known = {kind.__name__: kind for kind in OPTIMIZERS.values()}
        try:
            optimizer = tf_keras.optimizers.deserialize(details["optimizer"], custom_objects=known)
        except (TypeError, ValueError):
            _log.warning("The optimizer of %s is not known here: compile the model to fit.", root)
        else:
            model.compile(optimizer=optimizer)
            model.optimizer.build(model.trainable_variables)
    status = tf.train.Checkpoint(model=model).read(str(root / _WEIGHTS)).expect_partial()
    status.assert_existing_objects_matched()
    return model


@contextlib.contextmanager
def layers_of(policy: str) -> Iterator[None]:
    """Layers that are made in the block have a policy of mixed precision."""
    before = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf_keras.mixed_precision.set_global_policy(before)


def _write_data(data: RetrievalData, directory: Path) -> dict[str, Any]:
    """Writes vocabularies, counts, train and validation rows and attributes; details of them."""
    columns: dict[str, Any] = {}
    for side in schema.SIDES:
        vocabulary, features = getattr(data, f"{side}_vocabulary"), data.features(side)
        fields = (schema.RAW_ID, schema.FINGERPRINT, schema.COUNT)
        parts = (vocabulary.raw_ids, vocabulary.fingerprints, vocabulary.counts)
        table = pa.table(dict(zip(fields, parts, strict=True)))
        pq.write_table(table, directory / schema.vocabulary_name(side))
        if features.specs:
            pq.write_table(features.table, directory / schema.features_name(side))
            pq.write_table(features.cold, directory / schema.cold_features_name(side))
            columns[side] = {"columns": [dataclasses.asdict(spec) for spec in features.specs]}
        for spec in features.specs:
            if spec.vocabulary:
                values = pa.table({schema.VALUE: features.values[spec.name]})
                pq.write_table(values, directory / spec.vocabulary)
    counts = pa.table({schema.COUNT: data.train_counts})
    pq.write_table(counts, directory / schema.train_counts_name())
    for split in _KEPT:
        rows = pa.table({name: np.asarray(v) for name, v in data.arrays(split).items()})
        pq.write_table(rows, directory / f"{split}.parquet")
    return {schema.FEATURES: columns, "data_fingerprint": data.fingerprint}


def _read_data(root: Path, manifest: schema.Manifest) -> RetrievalData:
    """What `_write_data` wrote; a ValueError where a file of it is missing or was changed."""
    check_files(root, manifest.files)
    kept = {}
    for split in _KEPT:
        table = pq.read_table(root / f"{split}.parquet")
        kept[split] = {name: table[name].to_numpy() for name in table.column_names}
    kept["test"] = {name: values[:0] for name, values in kept["train"].items()}
    data = data_in(root, manifest, kept.__getitem__)
    for side in schema.SIDES:
        data.features(side)  # read now: the directory may be removed
    return data
