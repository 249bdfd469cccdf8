"""A model in a directory: settings, weights with the states of method and optimizer, its data."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import describe_files, made_aside, replace_directory
from towers.data.saved import KIND, read_data, write_data
from towers.legacy_keras import tf_keras
from towers.model.optimizers import OPTIMIZERS
from towers.model.two_tower import TwoTower

_WEIGHTS = "weights"
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
        details |= write_data(model.data, aside)
        tf.train.Checkpoint(model=model).write(str(aside / _WEIGHTS))
        files = describe_files(aside)
        schema.Manifest(KIND, model.data.source, {}, {}, files, details).write(aside)
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
    manifest = schema.read_manifest(root, KIND)
    details = manifest.details
    with layers_of(details["policy"]):
        model = TwoTower(read_data(root, manifest), **details["settings"])
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
