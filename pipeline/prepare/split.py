"""Which rows are for training, validation and test: a rule per query, no draw."""

from __future__ import annotations

import numpy as np

from pipeline.contract import hashing
from pipeline.contract.settings import utc_seconds
from pipeline.prepare.settings import PrepareConfig


def assign_splits(rows: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Sets `split`, and `order` to the row's place in the output, on all rows of some queries.

    `random` orders each query's rows by hash, `time` by time and source order; the first
    `train_ratio` of them are train. `global_time` leaves all rows at `test_from` or later for test.
    `leave_last_out` leaves the last row by time for test (and the one before it for validation
    where `validation_ratio` is above 0), never a query's only training row. `given` keeps what the
    source says.

    ROW [n] with fingerprints, every row of each query that occurs in it → a copy in this order.
    """
    rows = rows.copy()
    ratios = {"train_ratio": config.train_ratio, "validation_ratio": config.validation_ratio}
    if config.split == "random":
        key = hashing.row_hash(config.seed, "split", rows["query"], rows["candidate"])
        rows["split"] = hashing.split_codes(rows["query"], key, **ratios)
    elif config.split == "time":
        order = rows["timestamp"], rows["order"]
        rows["split"] = hashing.split_codes(rows["query"], *order, **ratios)
    elif config.split == "global_time":
        rows["split"] = hashing.global_time_codes(
            *(rows[name] for name in ("query", "timestamp", "order")),
            test_from=utc_seconds("test_from", config.test_from),
            validation_ratio=config.validation_ratio,
        )
    elif config.split == "leave_last_out":
        rows["split"] = _leave_last_out(rows, config.validation_ratio > 0)
    rows["order"] = hashing.row_hash(config.seed, "order", rows["query"], rows["candidate"])
    return rows


def _leave_last_out(rows: np.ndarray, validation: bool) -> np.ndarray:
    by_time = np.lexsort((rows["order"], rows["timestamp"], rows["query"]))
    queries = rows["query"][by_time]
    end = np.searchsorted(queries, queries, "right")
    size, from_end = end - np.searchsorted(queries, queries), end - np.arange(len(queries))
    codes = np.zeros(len(rows), np.int8)
    codes[by_time[(from_end == 2) & (size >= 3) & validation]] = 1
    codes[by_time[(from_end == 1) & (size >= 2)]] = 2
    return codes
