"""The directory of a training run: what is in it, who may write it, how it is opened again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.schema import write_atomically
from towers.config import TrainConfig
from towers.data import RetrievalData
from towers.two_tower import TwoTower

CONFIG = "config.json"  # the configuration, and the fingerprint of the data
TRAINING = "training.json"  # steps, seconds, history, and which weights to use
METRICS = "metrics.json"  # what `twotower evaluate` measured
VOCABULARIES = "vocabularies.npz"  # the fingerprints of the ids of each side, by dense id
DIVERGED = "diverged.parquet"  # the rows of the step whose loss was not finite
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # for TensorBoard
_LOCK = ".lock"

# What a run may go on with although it is not what it began with.
_FREE = ("data", "run", "epochs", "checkpoint_minutes", "overwrite", "jit_compile")


def claim(config: TrainConfig, data: RetrievalData) -> None:
    """Makes the directory of a new run, or checks that the run in it is the same.

    Raises:
      ValueError: the directory holds a run of another configuration or of other data.
    """
    run = Path(config.run)
    if config.overwrite:
        for name in (CHECKPOINTS, LOGS):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in (CONFIG, TRAINING, METRICS, VOCABULARIES, DIVERGED):
            (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    if (run / CONFIG).exists():
        _check_same(config, data, read_json(run / CONFIG))
    record = {"configuration": dataclasses.asdict(config), "data_fingerprint": data.fingerprint}
    write_json(run / CONFIG, record)


def _check_same(config: TrainConfig, data: RetrievalData, record: dict[str, Any]) -> None:
    before, now = record["configuration"], _as_json(dataclasses.asdict(config))
    differing = [
        f"{name} {before.get(name)!r} → {now[name]!r}"
        for name in now
        if name not in _FREE and before.get(name) != now[name]
    ]
    if record["data_fingerprint"] != data.fingerprint:
        differing.append("the content of the data")
    if config.epochs < before["epochs"]:
        differing.append(f"epochs {before['epochs']} → {config.epochs}")
    if differing:
        raise ValueError(
            f"{config.run} holds a run with another configuration: {', '.join(differing)}. "
            "Give a new --run, or --overwrite to delete it."
        )


@contextlib.contextmanager
def only_writer(run: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes from training in the same directory; a killed one lets go of it.

    Raises:
      ValueError: another process trains there.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run) / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is training in {run}: wait for it, or give a new --run."
            ) from None
        yield


def make_model(config: TrainConfig, data: RetrievalData) -> TwoTower:
    """The untrained model of a configuration.

    Raises:
      ValueError: the method or one of its options is unknown, or the data lack attributes.
    """
    return TwoTower(
        data,
        dim=config.dim,
        method=config.method,
        normalize=config.normalize,
        temperature=config.temperature,
        seed=config.seed,
        init_stddev=config.init_stddev,
        reduction=config.reduction,
        jit_compile=config.jit_compile,
        **config.tower_settings,
        **config.method_options,
    )


def open_run(run: str | os.PathLike[str], data: RetrievalData) -> tuple[TwoTower, TrainConfig]:
    """The trained model of a run, with the weights that the run chose.

    Raises:
      ValueError: there is no run, it has no checkpoint yet, or it was trained on other data.
    """
    root = Path(run)
    if not (root / TRAINING).is_file():
        raise ValueError(
            f"{run} holds no trained run: there is no {TRAINING} in it. "
            "Make it with `twotower train`."
        )
    record = read_json(root / CONFIG)
    if record["data_fingerprint"] != data.fingerprint:
        raise ValueError(
            f"{run} was trained on other data than what was given: check --data, or train again."
        )
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in record["configuration"].items() if name in known}
    config = TrainConfig(**fields)
    model = make_model(config, data)
    weights = root / CHECKPOINTS / read_json(root / TRAINING)["weights"]
    tf.train.Checkpoint(model=model).restore(str(weights)).expect_partial()
    return model, config


def read_json(path: Path) -> dict[str, Any]:
    """Reads a record."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a record in one step."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content))
