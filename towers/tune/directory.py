"""The directory of a study: what is in it, who may work on it, how it is opened again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from towers.training.run_directory import only_writer, read_json, write_json
from towers.tune.report import REPORTS
from towers.tune.settings import TuneConfig

STUDY = "study.json"  # the configuration, and the fingerprint of the data
STORAGE = "study.sqlite3"  # Optuna's record of the trials
TRIALS = "trials"  # run directories: that of the best trial, and of one that is not finished

# What a study may go on with although it is not what it began with.
_FREE = (
    *("data", "output", "run", "trials", "timeout", "overwrite"),
    *("checkpoint_minutes", "jit_compile", "strategy", "devices"),
)


def only_one(output: str) -> AbstractContextManager[None]:
    """Keeps other processes from the study; a killed one lets go of it."""
    return only_writer(
        output, f"another process tunes in {output}: wait for it, or give another --output."
    )


def claim(config: TuneConfig, fingerprint: str) -> None:
    """Begins a study, or checks that the one that is there is the same."""
    output = Path(config.output)
    if config.overwrite or not (output / STUDY).exists():
        shutil.rmtree(output / TRIALS, ignore_errors=True)
        for name in (STUDY, STORAGE, *REPORTS):
            (output / name).unlink(missing_ok=True)
    record = {"configuration": _settings(config), "data_fingerprint": fingerprint}
    if (output / STUDY).exists():
        _check_same(config, record, read_json(output / STUDY))
    write_json(output / STUDY, record)


def _settings(config: TuneConfig) -> dict[str, Any]:
    """The fields as JSON has them."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return fields


def _check_same(config: TuneConfig, now: dict[str, Any], before: dict[str, Any]) -> None:
    differing = [
        f"{name} {before['configuration'].get(name)!r} → {value!r}"
        for name, value in now["configuration"].items()
        if name not in _FREE and before["configuration"].get(name) != value
    ]
    if now["data_fingerprint"] != before["data_fingerprint"]:
        differing.append("the content of the data")
    if differing:
        raise ValueError(
            f"{config.output} holds a study with another configuration: {', '.join(differing)}. "
            "Give another --output, or --overwrite to delete it."
        )


def check_data(config: TuneConfig) -> None:
    """Raises ValueError where the data are no longer those that the study began with."""
    before = read_json(Path(config.output) / STUDY)["data_fingerprint"]
    if schema.read_manifest(config.data, "prepared").fingerprint != before:
        raise ValueError(
            f"{config.data} was changed while a study ran on it: put the former data back and give "
            "the same command again, or begin anew with another --output."
        )


def remove_runs(config: TuneConfig, result: dict[str, Any]) -> None:
    """Removes the run directories of finished trials, but for the best one."""
    kept = {f"{one['number']:04d}" for one in result["trials"] if one["state"] == "running"}
    if "best" in result:
        kept.add(f"{result['best']['number']:04d}")
    for path in (Path(config.output) / TRIALS).glob("*"):
        if path.name not in kept:
            shutil.rmtree(path)
