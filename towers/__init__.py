"""Two-tower models: data, training, evaluation, export.

Of the sub-packages, `training` and `output` stand above `model`, which stands on `encoders` and
`data`. A name below is loaded when it is first used, so that `--help` needs no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from towers.data.dataframe import from_dataframe as from_dataframe
    from towers.data.interactions import RetrievalData as RetrievalData
    from towers.data.interactions import open_data as open_data
    from towers.evaluation.evaluate import evaluate as evaluate
    from towers.metrics.held_out import FullCorpusMetrics as FullCorpusMetrics
    from towers.metrics.held_out import HeldOut as HeldOut
    from towers.model.method_layer import MethodLayer as MethodLayer
    from towers.model.optimizers import CoupledAdam as CoupledAdam
    from towers.model.optimizers import staircase_decay as staircase_decay
    from towers.model.retrieval_task import RetrievalTask as RetrievalTask
    from towers.model.saved import load as load
    from towers.model.two_tower import TwoTower as TwoTower
    from towers.presets import PRESETS as PRESETS
    from towers.training.teacher import soft_targets as soft_targets

_HOMES = {
    "CoupledAdam": "towers.model.optimizers",
    "FullCorpusMetrics": "towers.metrics.held_out",
    "HeldOut": "towers.metrics.held_out",
    "MethodLayer": "towers.model.method_layer",
    "PRESETS": "towers.presets",
    "RetrievalData": "towers.data.interactions",
    "RetrievalTask": "towers.model.retrieval_task",
    "TwoTower": "towers.model.two_tower",
    "evaluate": "towers.evaluation.evaluate",
    "export": "twotower_run:export_model",  # serving has a part in it: no module of ours may
    "from_dataframe": "towers.data.dataframe",
    "load": "towers.model.saved",
    "open_data": "towers.data.interactions",
    "soft_targets": "towers.training.teacher",
    "staircase_decay": "towers.model.optimizers",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'towers' has no attribute {name!r}")
    home, _, known_as = _HOMES[name].partition(":")
    return getattr(importlib.import_module(home), known_as or name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
