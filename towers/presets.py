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
    }
}
# How they are trained: further flags of `twotower train`; arguments of `compile` and `fit`.
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "best": {
        "optimizer": "adagrad",
        "learning_rate": 2.5,
        "learning_rate_decay": 0.8,
        "decay_epochs": 1,
        "l2": 0.0,
        "batch_size": 1024,
        "epochs": 10,
    }
}
FLAGS = {name: {**model, **TRAINING[name]} for name, model in PRESETS.items()}
