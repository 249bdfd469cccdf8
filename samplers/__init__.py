"""Samplers and losses in plain TensorFlow: which negatives a query is trained against."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samplers.candidates import Batch, Candidates, Encoders
    from samplers.methods.by_name import METHODS, build
    from samplers.proposals.popularity import log_pop
    from samplers.selection.seen import Seen

__all__ = ["METHODS", "Batch", "Candidates", "Encoders", "Seen", "build", "log_pop"]

_HOMES = {
    "METHODS": "samplers.methods.by_name",
    "Batch": "samplers.candidates",
    "Candidates": "samplers.candidates",
    "Encoders": "samplers.candidates",
    "Seen": "samplers.selection.seen",
    "build": "samplers.methods.by_name",
    "log_pop": "samplers.proposals.popularity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'samplers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
