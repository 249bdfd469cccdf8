"""Joins the inputs of several requests along their rows, and splits the outputs again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Arrays = Mapping[str, np.ndarray]


def join(parts: Sequence[Arrays]) -> Arrays:
    """One array a name, [sum of rows, ...]; a single part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(outputs: Arrays, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The rows of each part as views, without a copy.

    Args:
      outputs: [sum of rows, ...] each.
      rows: of each part.

    Returns:
      One dict a part.
    """
    parts, start = [], 0
    for count in rows:
        end = start + count
        parts.append({name: array[start:end] for name, array in outputs.items()})
        start = end
    return parts


def pieces(inputs: Arrays, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Views of at most `size` rows each, in order."""
    total = len(next(iter(inputs.values())))
    for start in range(0, total, size):
        yield {name: array[start : start + size] for name, array in inputs.items()}
