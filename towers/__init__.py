"""Two-tower models: data, training, evaluation, export."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when tf.keras is first used; TFRS needs Keras 2

if TYPE_CHECKING:
    from towers.data import RetrievalData, open_data
    from towers.dataframe import from_dataframe
    from towers.full_corpus_metrics import FullCorpusMetrics
    from towers.held_out import HeldOut
    from towers.optimizers import CoupledAdam, staircase_decay
    from towers.retrieval_task import RetrievalTask
    from towers.teacher import soft_targets
    from towers.two_tower import TwoTower

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
    "CoupledAdam": "towers.optimizers",
    "FullCorpusMetrics": "towers.full_corpus_metrics",
    "HeldOut": "towers.held_out",
    "RetrievalData": "towers.data",
    "RetrievalTask": "towers.retrieval_task",
    "TwoTower": "towers.two_tower",
    "from_dataframe": "towers.dataframe",
    "open_data": "towers.data",
    "soft_targets": "towers.teacher",
    "staircase_decay": "towers.optimizers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'towers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
