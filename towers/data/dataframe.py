"""Interactions from a pandas DataFrame: the rules of `twotower prepare`, in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.contract import hashing, schema
from towers.data.interactions import RetrievalData, Vocabulary

if TYPE_CHECKING:
    import pandas as pd


def from_dataframe(
    df: pd.DataFrame,
    *,
    user: str,
    item: str,
    timestamp: str | None = None,
    weight: str | None = None,
    train_ratio: float = 0.8,
    validation_ratio: float = 0.0,
    seed: int = 10,
) -> RetrievalData:
    """Splits a DataFrame of interactions as `twotower prepare --split random` does.

    Of equal (user, item) pairs the earliest stays. Dense ids go by descending count over all
    splits, then by raw id. Each user's rows are put in order by a hash of (seed, user, item)
    and cut at the ratios, see `pipeline.contract.hashing.split_codes`.

    Args:
      df: one row an interaction.
      user: the column of raw query ids, text or integers.
      item: the column of raw candidate ids, text or integers.
      timestamp: a column of times or integers, which decides who is earliest; without it, the
        order of the rows does.
      weight: a column of weights of the rows in the loss.
      train_ratio: share of each user's rows that are not test, in (0, 1].
      validation_ratio: share of those that are validation, in [0, 1).
      seed: of the split.

    Raises:
      ValueError: a column is missing, or ids are missing or not text or integers.
    """
    for column in (user, item, timestamp, weight):
        if column is not None and column not in df.columns:
            known = list(df.columns)
            raise ValueError(f"the DataFrame must have a column {column!r}, got {known}.")
    if len(df) == 0:
        raise ValueError("the DataFrame must have rows, got none.")
    columns = _distinct_pairs(df, user, item, timestamp, weight)
    queries, columns[schema.QUERY_ID] = _rank(*columns[schema.QUERY_ID])
    candidates, columns[schema.CANDIDATE_ID] = _rank(*columns[schema.CANDIDATE_ID])
    prints = (
        queries.fingerprints[columns[schema.QUERY_ID]],
        candidates.fingerprints[columns[schema.CANDIDATE_ID]],
    )
    order = np.argsort(hashing.row_hash(seed, "order", *prints), kind="stable")
    codes = hashing.split_codes(
        prints[0],
        hashing.row_hash(seed, "split", *prints),
        train_ratio=train_ratio,
        validation_ratio=validation_ratio,
    )[order]
    columns = {name: values[order] for name, values in columns.items()}
    splits = {
        split: {name: values[codes == code] for name, values in columns.items()}
        for code, split in enumerate(schema.SPLITS)
    }
    train_counts = np.bincount(splits["train"][schema.CANDIDATE_ID], minlength=len(candidates))
    return RetrievalData(
        queries,
        candidates,
        train_counts,
        splits.__getitem__,
        fingerprint=_fingerprint(queries, candidates, splits),
        source="DataFrame",
    )


def _distinct_pairs(
    df: pd.DataFrame, user: str, item: str, timestamp: str | None, weight: str | None
) -> dict[str, Any]:
    """Drops repeated pairs; ids become (codes [n], texts [V]), the other columns arrays [n]."""
    queries, query_texts = _codes_and_texts(df[user], user)
    candidates, candidate_texts = _codes_and_texts(df[item], item)
    times = np.zeros(len(df), np.int64) if timestamp is None else _seconds(df[timestamp])
    by_time = np.lexsort((times, candidates, queries))
    pairs = queries[by_time] * len(candidate_texts) + candidates[by_time]
    first = np.sort(by_time[np.r_[True, pairs[1:] != pairs[:-1]]])
    columns: dict[str, Any] = {
        schema.QUERY_ID: (queries[first], query_texts),
        schema.CANDIDATE_ID: (candidates[first], candidate_texts),
    }
    if timestamp is not None:
        columns[schema.TIMESTAMP] = times[first]
    if weight is not None:
        columns[schema.WEIGHT] = df[weight].to_numpy(np.float32)[first]
    return columns


def _codes_and_texts(values: pd.Series, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids as (int64 codes [n], distinct texts [V])."""
    import pandas as pd

    codes, distinct = pd.factorize(values)
    _check_whole(codes < 0, column, "an id")
    for value in distinct:
        if not isinstance(value, (str, int, np.integer)) or isinstance(value, bool):
            raise ValueError(
                f"column {column!r} must hold text or integers, got {value!r}: convert it first."
            )
    names = [str(value) for value in distinct]
    texts, merged = np.unique(np.array(names, object), return_inverse=True)
    return merged[codes].astype(np.int64), texts


def _seconds(times: pd.Series) -> np.ndarray:
    """int64 [n]: seconds since 1970 for times, integers as they are."""
    _check_whole(times.isna(), times.name, "a time")
    if times.dtype.kind == "M" or hasattr(times.dtype, "tz"):
        return times.to_numpy("datetime64[s]").astype(np.int64)
    return times.to_numpy(np.int64)


def _check_whole(missing: Any, column: Any, what: str) -> None:
    if missing.any():
        raise ValueError(
            f"column {column!r} must have {what} in every row, got {missing.sum()} rows without "
            "one: drop them first."
        )


def _rank(codes: np.ndarray, texts: np.ndarray) -> tuple[Vocabulary, np.ndarray]:
    """Texts in ascending order → the vocabulary by descending count, and dense ids [n]."""
    counts = np.bincount(codes, minlength=len(texts))
    by_count = np.argsort(-counts, kind="stable")
    dense = np.empty(len(texts), np.int64)
    dense[by_count] = np.arange(len(texts))
    prints = hashing.fingerprints(text.encode() for text in texts[by_count])
    if len(np.unique(prints)) != len(prints):
        raise ValueError("two ids have the same 64-bit fingerprint: rename one of them.")
    raw_ids = pa.array(texts[by_count], pa.string())
    return Vocabulary(raw_ids, prints, counts[by_count]), dense[codes]


def _fingerprint(
    queries: Vocabulary, candidates: Vocabulary, splits: dict[str, dict[str, np.ndarray]]
) -> str:
    arrays = [queries.fingerprints, candidates.fingerprints]
    arrays += [values for columns in splits.values() for values in columns.values()]
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
