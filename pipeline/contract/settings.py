"""Checks of settings: one form of error, and the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def require(holds: bool, name: str, rule: str, got: Any) -> None:
    """Checks one rule of a setting.

    Example:
      require(batch_size >= 2, "batch_size", "must be at least 2", batch_size)

    Raises:
      ValueError: the rule does not hold; the message names rule, value and flag.
    """
    if not holds:
        raise ValueError(f"{name} {rule}, got {got!r}; change --{name}.")


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the nearest known one, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise
