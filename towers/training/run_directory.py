"""The directory of a training run: what is in it, who may write it, how it is opened again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract import stores
from pipeline.contract.files import checksum, did_you_mean_directory, held, write_atomically
from samplers.methods.full_softmax import SoftTargets
from towers.data.interactions import RetrievalData
from towers.model.saved import layers_of
from towers.model.two_tower import TwoTower
from towers.training.settings import RUNNING, TrainConfig

CONFIG = "config.json"  # the configuration, and the fingerprint of the data
TRAINING = "training.json"  # steps, seconds, history, and which weights to use
METRICS = "metrics.json"  # what `twotower evaluate` measured
VOCABULARIES = "vocabularies.npz"  # by dense id: fingerprints of each side, counts of candidates
FREQUENCY = "frequency.npz"  # what a method began with, see `towers.training.frequency`
BREAKDOWN = "breakdown.json"  # recall by popularity and activity, see `towers.evaluation`
HITS = "hits_by_query.parquet"  # of an evaluation, see `towers.evaluation.hits_by_query`
REPORT = "report.html"  # the page of all this, see `towers.report.pages`
DIVERGED = "diverged.parquet"  # the rows of the step whose loss was not finite
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # for TensorBoard
_LOCK = ".lock"

_PROGRESS = "progress/.ATTRIBUTES/py_state"  # of `checkpoints.Progress`, in a checkpoint

# What TensorFlow raises, depending on the place, for a checkpoint that is cut, damaged or gone, or
# of another model.
UNREADABLE = (tf.errors.OpError, ValueError, IndexError, RuntimeError, AssertionError)

_FREE = (*RUNNING, "epochs")  # what a run may go on with although it is not what it began with


def claim(config: TrainConfig, data: RetrievalData) -> None:
    """Makes the directory of a new run; a ValueError where it holds another run."""
    run = Path(config.run)
    if config.overwrite:
        for name in (CHECKPOINTS, LOGS):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in (CONFIG, TRAINING, VOCABULARIES, DIVERGED, METRICS, BREAKDOWN, HITS, REPORT):
            (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    record_settings(run / CONFIG, config, data, "run", "a new --run", _FREE)


def record_settings(
    path: Path,
    config: TrainConfig,
    data: RetrievalData,
    what: str,
    remedy: str,
    free: Sequence[str],
) -> None:
    """Writes the settings of a run or a study, and what tells its data and teacher, to a file.

    A ValueError where it holds others, and not only fields that are `free`, or more epochs, differ.
    """
    content = {"data": data.fingerprint}
    if config.teacher:
        teacher = stores.local_copy(config.teacher)
        read_run(teacher)  # refuses a directory without a trained run
        content["teacher"] = checksum(teacher / TRAINING)
    if path.exists():
        record = read_json(path)
        before = record["configuration"]
        differing = _differing(before, config, free)
        for name, fingerprint in content.items():
            if record.get(f"{name}_fingerprint", fingerprint) != fingerprint:
                differing.append(f"the content of the {name}")
        if "epochs" in free and config.epochs < before["epochs"]:
            differing.append(f"epochs {before['epochs']} → {config.epochs}")
        if differing:
            raise ValueError(
                f"{path.parent} holds a {what} with another configuration: "
                f"{', '.join(differing)}. Give {remedy}, or --overwrite to delete it."
            )
    fingerprints = {f"{name}_fingerprint": fingerprint for name, fingerprint in content.items()}
    write_json(path, {"configuration": dataclasses.asdict(config)} | fingerprints)


def fixed_settings(config: TrainConfig, free: Sequence[str] = _FREE) -> dict[str, Any]:
    """What a run keeps from its first step to its last, and with it each of its checkpoints."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in fields.items() if name not in free}


def default_settings() -> dict[str, Any]:
    """The defaults of training, as a record gives them back."""
    values = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return json.loads(json.dumps(values))


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """What is not the default."""
    defaults = default_settings()
    return {k: value for k, value in fixed_settings(config, ()).items() if value != defaults[k]}


def _differing(
    before: dict[str, Any], config: TrainConfig, free: Sequence[str] = _FREE
) -> list[str]:
    """The settings that are not those of before; a setting that is new since had its default."""
    before, now = default_settings() | before, fixed_settings(config, free)
    return [f"{n} {before.get(n)!r} → {now[n]!r}" for n in now if before.get(n) != now[n]]


def check_checkpoint(path: str, config: TrainConfig) -> None:
    """Raises ValueError for a checkpoint of a run of another configuration."""
    progress = json.loads(tf.train.load_checkpoint(path).get_tensor(_PROGRESS))
    if differing := _differing(progress["configuration"], config):
        raise ValueError(f"it is of another configuration: {', '.join(differing)}")


def only_writer(directory: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Makes a directory, in which no other process may train; a ValueError while one does."""
    busy = f"another process is training in {directory}: wait for it, or give a new --run."
    return held(Path(directory) / _LOCK, busy)


def make_model(
    config: TrainConfig, data: RetrievalData, targets: SoftTargets | None = None
) -> TwoTower:
    """The untrained model of a configuration; its teacher's `targets`, if it is to be trained."""
    names = "dim method normalize temperature seed init_stddev reduction jit_compile"
    names += " exclude_seen_negatives"
    settings: dict[str, Any] = {name: getattr(config, name) for name in names.split()}
    options: dict[str, Any] = {**config.method_options}
    policy = "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
    with layers_of(policy):
        return TwoTower(data, targets=targets, **settings, **config.tower_settings, **options)


def read_run(run: str | os.PathLike[str]) -> tuple[TrainConfig, str]:
    """The settings of a run and the fingerprint of its data; a ValueError without a checkpoint."""
    root = Path(run)
    if not (root / TRAINING).is_file():
        raise ValueError(
            f"{run} holds no trained run: there is no {TRAINING} in it. "
            f"Make it with `twotower train`.{did_you_mean_directory(root, TRAINING)}"
        )
    record = read_json(root / CONFIG)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in record["configuration"].items() if name in known}
    return TrainConfig(**fields), record["data_fingerprint"]


def open_run(run: str | os.PathLike[str], data: RetrievalData) -> tuple[TwoTower, TrainConfig]:
    """The trained model of a run, with the weights that the run chose.

    A ValueError where there is no run, it has no checkpoint yet or one of another configuration,
    or it was trained on other data.
    """
    config, fingerprint = read_run(run)
    if fingerprint != data.fingerprint:
        raise ValueError(
            f"{run} was trained on other data than what was given: check --data, or train again."
        )
    data = data.all_as_train() if config.refit else data
    counts = counts_of_run(run, config)
    model = make_model(config, data if counts is None else data.with_counts(counts))
    with weights_of_run(run, config) as weights:
        status = tf.train.Checkpoint(model=model).read(weights).expect_partial()
        status.assert_existing_objects_matched()
    return model, config


def counts_of_run(run: str | os.PathLike[str], config: TrainConfig) -> np.ndarray | None:
    """The counts of candidates that a run began with, [N]; None for those of its train rows."""
    frequency = Path(run) / FREQUENCY
    if config.frequency == "counts":
        return None
    if not frequency.is_file():
        raise ValueError(f"{frequency} is missing: put it back, or train again with --overwrite.")
    with np.load(frequency) as kept:
        return kept.get("counts")


@contextlib.contextmanager
def weights_of_run(run: str | os.PathLike[str], config: TrainConfig) -> Iterator[str]:
    """A context in which the checkpoint that a run chose is read; a ValueError if it cannot be."""
    root = Path(run)
    weights = root / CHECKPOINTS / read_json(root / TRAINING)["weights"]
    try:
        check_checkpoint(str(weights), config)
        yield str(weights)
    except UNREADABLE as error:
        raise ValueError(
            f"{weights} cannot be read into the run of {root / CONFIG} "
            f"({str(error).splitlines()[0]}): put the checkpoints of this run back, or train it "
            "again with --overwrite."
        ) from error


def refit_settings(config: TrainConfig) -> TrainConfig:
    """The settings and epochs that the run `config.refit` chose, to train on all rows.

    A ValueError where it is not finished, or `config` has other settings than those of running it.
    """
    run = stores.local_copy(config.refit)
    chosen, _ = read_run(run)
    training = read_json(run / TRAINING)
    if not training["finished"]:
        raise ValueError(f"{config.refit} is not finished: train it to its end, then refit it.")
    own = {name: getattr(config, name) for name in (*_FREE, "deterministic", "refit")}
    own |= {"epochs": training["best_epoch"] or training["epochs"], "patience": 0}
    given = changed_settings(config)
    if other := [name for name in given if name not in own or name in ("epochs", "patience")]:
        raise ValueError(
            f"refit takes the settings and epochs of {config.refit}: leave out "
            f"{', '.join(f'--{name}' for name in other)}."
        )
    return dataclasses.replace(chosen, **own)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a record."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a record in one step."""
    write_atomically(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """A record as the text of its file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
