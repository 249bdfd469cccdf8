"""Blocks of interactions: one NumPy structured array, the element that travels through Beam."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

# Ids are fingerprints of raw ids until the vocabularies are made, dense ids after that.
# `order` is the row's place in the source until the split, its place in the output after it.
ROW = np.dtype(
    [
        ("query", "<i8"),
        ("candidate", "<i8"),
        ("timestamp", "<i8"),  # s since 1970; 0 without a timestamp column
        ("order", "<u8"),
        ("weight", "<f4"),  # 1 without a weight column
        ("split", "<i1"),  # index into schema.SPLITS
    ]
)


def partition_of(ids: np.ndarray, partitions: int) -> np.ndarray:
    """The key range of each fingerprint: int64 [n] → int64 [n] in 0..partitions-1."""
    return (ids.view(np.uint64) % np.uint64(partitions)).astype(np.int64)


def partition(
    rows: np.ndarray, parts: np.ndarray, partitions: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a block by the part of each row, int [n]: (part, rows) for parts that have rows."""
    ends = np.cumsum(np.bincount(parts, minlength=partitions))
    for part, places in enumerate(np.split(np.argsort(parts, kind="stable"), ends[:-1])):
        if len(places):
            yield part, rows[places]


def by_range(ids: np.ndarray, partitions: int) -> Iterator[tuple[int, np.ndarray]]:
    """(key range, places of its ids), int64 [n] both, for ranges that have fingerprints."""
    return partition(np.arange(len(ids)), partition_of(ids, partitions), partitions)


def join(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """One block of many, ROW [n]; empty when there are none."""
    return np.concatenate([np.empty(0, ROW), *blocks])


def begins(*columns: np.ndarray) -> np.ndarray:
    """Which rows of sorted columns, [n] each, differ from the row before: bool [n]."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return new


def drop_duplicates(rows: np.ndarray, weights: str = "first") -> np.ndarray:
    """Keeps the earliest row of each (query, candidate), by split, time, then source order.

    The weight of a pair is the `first` of its rows in that split, or their `sum` or `max`; infinity
    where the sum is more than float32 holds.
    """
    by_pair = np.lexsort(
        (rows["order"], rows["timestamp"], rows["split"], rows["candidate"], rows["query"])
    )
    rows = rows[by_pair]
    new = begins(rows["query"], rows["candidate"])
    kept = rows[new]
    if weights != "first" and len(kept):
        same_split = rows["split"] == kept["split"][np.cumsum(new) - 1]
        known = np.where(same_split, rows["weight"].astype(np.float64), 0)  # no weight is below 0
        combine = np.add if weights == "sum" else np.maximum
        with np.errstate(over="ignore"):
            kept["weight"] = combine.reduceat(known, np.flatnonzero(new))
    return kept
