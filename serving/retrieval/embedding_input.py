"""Checks embeddings that a request brings, for versions without a query model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.version.served_model import EMBEDDING

LARGEST = 1e15  # of a number; scores stay finite with vectors of any sensible size


def given_embeddings(features: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """The embeddings of a request: float32 [B, D].

    Args:
      features: must be {"embedding": numbers [B, D]}, as lists or an array.
      dimensions: D.

    Raises:
      ValueError: they are not that.
    """
    wanted = f"features must be {{'{EMBEDDING}': numbers [B, {dimensions}]}}"
    if set(features) != {EMBEDDING}:
        raise ValueError(f"{wanted}, got the names {[str(name)[:40] for name in features][:5]}.")
    try:
        given = np.asarray(features[EMBEDDING], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{wanted}: they are not numbers in rows of one length.") from error
    if given.size == 0:
        given = given.reshape(0, dimensions)
    if given.ndim != 2 or given.shape[1] != dimensions:
        raise ValueError(f"{wanted}, got the shape {list(given.shape)}.")
    if not (np.abs(given) <= LARGEST).all():
        raise ValueError(f"{wanted} of at most {LARGEST:g}, got a larger one or NaN.")
    return given.astype(np.float32)
