"""Which rows are for training, validation and test: a rule per query, no draw."""

from __future__ import annotations

import numpy as np

from pipeline.contract import hashing
from pipeline.prepare.settings import PrepareConfig


def assign_splits(rows: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Sets `split`, and `order` to the row's place in the output, on all rows of some queries.

    `random` orders each query's rows by hash, `time` by time and source order; the first
    `train_ratio` of them are train. `leave_last_out` leaves the last row by time for test (and
    the one before it for validation where `validation_ratio` is above 0), never a query's only
    training row. `given` keeps what the source says.

    Args:
      rows: ROW [n] with fingerprints, every row of each query that occurs in it.
      config: the preparation's settings.

    Returns:
      A copy of the rows, in the same order.
    """
    rows = rows.copy()
    if config.split == "random":
        key = hashing.row_hash(config.seed, "split", rows["query"], rows["candidate"])
        rows["split"] = _cut(rows["query"], key, config=config)
    elif config.split == "time":
        rows["split"] = _cut(rows["query"], rows["timestamp"], rows["order"], config=config)
    elif config.split == "leave_last_out":
        rows["split"] = _leave_last_out(rows, config.validation_ratio > 0)
    rows["order"] = hashing.row_hash(config.seed, "order", rows["query"], rows["candidate"])
    return rows


def _cut(queries: np.ndarray, *order: np.ndarray, config: PrepareConfig) -> np.ndarray:
    return hashing.split_codes(
        queries, *order, train_ratio=config.train_ratio, validation_ratio=config.validation_ratio
    )


def _leave_last_out(rows: np.ndarray, validation: bool) -> np.ndarray:
    by_time = np.lexsort((rows["order"], rows["timestamp"], rows["query"]))
    queries = rows["query"][by_time]
    size = np.searchsorted(queries, queries, "right") - np.searchsorted(queries, queries)
    from_end = np.searchsorted(queries, queries, "right") - np.arange(len(queries))  # last: 1
    codes = np.zeros(len(rows), np.int8)
    test = (from_end == 1) & (size >= 2)
    held = (from_end == 2) & (size >= 3) & validation
    codes[by_time] = np.where(test, 2, np.where(held, 1, 0))
    return codes
