"""Two-tower models: data, training, evaluation, export."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when tf.keras is first used; TFRS needs Keras 2

if TYPE_CHECKING:
    from towers.data.dataframe import from_dataframe
    from towers.data.interactions import RetrievalData, open_data
    from towers.metrics.full_corpus_metrics import FullCorpusMetrics
    from towers.metrics.held_out import HeldOut
    from towers.model.optimizers import CoupledAdam, staircase_decay
    from towers.model.retrieval_task import RetrievalTask
    from towers.model.two_tower import TwoTower
    from towers.training.teacher import soft_targets

__all__ = [
    "CoupledAdam",
    "FullCorpusMetrics",
    "HeldOut",
    "RetrievalData",
    "RetrievalTask",
    "TwoTower",
    "from_dataframe",
    "open_data",
    "soft_targets",
    "staircase_decay",
]

_HOMES = {
    "CoupledAdam": "towers.model.optimizers",
    "FullCorpusMetrics": "towers.metrics.full_corpus_metrics",
    "HeldOut": "towers.metrics.held_out",
    "RetrievalData": "towers.data.interactions",
    "RetrievalTask": "towers.model.retrieval_task",
    "TwoTower": "towers.model.two_tower",
    "from_dataframe": "towers.data.dataframe",
    "open_data": "towers.data.interactions",
    "soft_targets": "towers.training.teacher",
    "staircase_decay": "towers.model.optimizers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'towers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
