"""Settings by name that were found together, as `--preset` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The towers and the loss, in a notebook: TwoTower(data, **PRESETS["best"]).
# docs/towers.md says why, docs/standard.md what else was tried.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "best": {
        "tower": "fism",
        "method": "ssl_pop",
        "dim": 64,
        "normalize": True,
        "temperature": 0.1,
        "popularity_power": 0.05,
        "init_stddev": 0.03,
    },
    # learns the ranking of a run of `best`, and what the graph of train rows says besides
    "student": {
        "tower": "fism",
        "share_items": False,
        "method": "full_softmax",
        "dim": 64,
        "normalize": True,
        "temperature": 0.05,
        "popularity_power": 0.05,
        "teacher_weight": 1.0,
        "teacher_temperature": 1.0,
    },
}
# How they are trained: further flags of `twotower train`; arguments of `compile` and `fit`.
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "best": {
        "optimizer": "adagrad",
        "learning_rate": 2.5,
        "learning_rate_decay": 0.87,
        "decay_epochs": 1,
        "l2": 0.0,
        "batch_size": 1024,
        "epochs": 18,
    },
    "student": {
        "teacher_graph": 0.1,
        "optimizer": "adam",
        "learning_rate": 0.005,
        "learning_rate_decay": 0.88,
        "decay_epochs": 1,
        "l2": 0.0,
        "batch_size": 512,
        "epochs": 14,
    },
}
_OPTIONS = "teacher_weight", "teacher_temperature"  # of a method, which are no flags


def _flags(name: str) -> dict[str, Any]:
    settings = {**PRESETS[name], **TRAINING[name]}
    options = {option: settings.pop(option) for option in _OPTIONS if option in settings}
    return settings | ({"options": options} if options else {})


FLAGS = {name: _flags(name) for name in PRESETS}
