"""Interactions and attributes from pandas: the rules of `twotower prepare`, in memory."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.contract import hashing, schema
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.split import assign_splits
from towers.data.attribute_frames import check_columns, features_of
from towers.data.attributes import Features
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
    rating: str | None = None,
    rating_threshold: float | None = None,
    split: str = "random",
    test_from: str | datetime.date = "",
    train_ratio: float = 0.8,
    validation_ratio: float = 0.0,
    seed: int = 10,
    user_features: pd.DataFrame | None = None,
    item_features: pd.DataFrame | None = None,
    user_feature_kinds: Mapping[str, str] | None = None,
    item_feature_kinds: Mapping[str, str] | None = None,
) -> RetrievalData:
    """Prepares a DataFrame of interactions as `twotower prepare` does, with the same split.

    >>> import pandas as pd
    >>> log = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "milk", "tea"]})
    >>> from_dataframe(log, user="user", item="item").decode_candidates([0, 1])
    ['tea', 'milk']

    Of equal (user, item) pairs the earliest stays. Dense ids go by descending count over all
    splits, then by raw id.

    Args:
      df: one row an interaction.
      user: the column of raw query ids, text or integers.
      item: the column of raw candidate ids, text or integers.
      timestamp: a column of times, or of integers: seconds since 1970. It decides who is earliest;
        without it, the order of the rows does.
      weight: a column of weights of the rows in the loss.
      rating, rating_threshold: rows whose number in that column is below the threshold are
        dropped: they are no positives.
      split: random, time (within each user), global_time or leave_last_out, see
        `pipeline.prepare.split`; all but random need times.
      test_from: of global_time: a moment, in UTC; rows from then on are test, all earlier ones
        are train.
      train_ratio: of random and time: share of each user's rows that are not test, in (0, 1].
      validation_ratio: share of those that are validation, in [0, 1).
      seed: of the random split and of the order of rows.
      user_features, item_features: attributes, a row an id, with a column of ids of the name that
        it has in `df`. Ids without interactions are known by their attributes.
      user_feature_kinds, item_feature_kinds: column → categorical, multi, numeric, text or skip,
        where its type does not say it: numbers with decimals and times are numeric, lists multi,
        all others categorical.

    Raises:
      ValueError: a column is missing, a cell cannot be read, a setting breaks its rule, or one
        side of a moment has no rows.
    """
    if (rating is None) != (rating_threshold is None):
        raise ValueError("rating and rating_threshold need each other: give both, or none.")
    for given in (user_feature_kinds, item_feature_kinds):
        if not isinstance(given, Mapping | None):
            got = f"got {given!r}: give a dict such as {{'title': 'text'}}"
            raise ValueError(f"feature_kinds must go by the names of columns, {got}.")
    kinds: dict[str, Any] = {
        f"{word}_feature_kinds": tuple(f"{name}={kind}" for name, kind in (given or {}).items())
        for word, given in (("user", user_feature_kinds), ("item", item_feature_kinds))
    }
    frames = {"query": (user, user_features), "candidate": (item, item_features)}
    config = PrepareConfig(
        source="DataFrame",
        output="memory",
        split=split,
        test_from=str(test_from),
        train_ratio=train_ratio,
        validation_ratio=validation_ratio,
        seed=seed,
        user_features="" if user_features is None else "DataFrame",
        item_features="" if item_features is None else "DataFrame",
        **kinds,
    )
    if config.keeps_split or (config.needs_timestamps and timestamp is None):
        remedy = "is for files" if config.keeps_split else "needs times: name their column"
        raise ValueError(f"split={split!r} {remedy}, or choose another split.")
    check_columns(df, "the DataFrame", user, item, timestamp, weight, rating)
    if rating is not None:
        ratings = df[rating]
        _check_whole(ratings.isna(), rating, "a rating")
        if ratings.dtype.kind not in "iufb":
            raise ValueError(f"column {rating!r} must hold numbers, got {ratings.dtype}.")
        df = df[ratings >= rating_threshold]
    if len(df) == 0:
        where = "" if rating is None else f" with {rating} of at least {rating_threshold}"
        raise ValueError(f"the DataFrame must have rows{where}, got none.")
    columns = _distinct_pairs(df, user, item, timestamp, weight)
    ids = {}
    for side in schema.SIDES:
        ids[side], columns[f"{side}_id"] = _rank(*columns[f"{side}_id"])
    splits = _split(columns, ids, config)
    train, features = {}, {}
    for side, (column, table) in frames.items():
        train[side] = np.bincount(splits["train"][f"{side}_id"], minlength=len(ids[side]))
        features[side] = Features()
        if table is not None:
            features[side] = features_of(table, column, side, ids[side], train[side] > 0, config)
    return RetrievalData(
        ids["query"],
        ids["candidate"],
        train["candidate"],
        splits.__getitem__,
        fingerprint=_fingerprint(ids, splits, features),
        source="DataFrame",
        features=features.__getitem__,
    )


def _split(
    columns: dict[str, Any], ids: Mapping[str, Vocabulary], config: PrepareConfig
) -> dict[str, dict[str, np.ndarray]]:
    """The columns of each split, in the order that preparation writes them in."""
    size = len(columns[schema.QUERY_ID])
    fields = [(name, "<i8") for name in ("query", "candidate", "timestamp")]
    rows = np.zeros(size, [*fields, ("order", "<u8"), ("split", "<i1")])
    for side in schema.SIDES:
        rows[side] = ids[side].fingerprints[columns[f"{side}_id"]]
    rows["timestamp"] = columns.get(schema.TIMESTAMP, 0)
    rows["order"] = np.arange(size)
    rows = assign_splits(rows, config)
    order = np.argsort(rows["order"], kind="stable")
    codes = rows["split"][order]
    columns = {name: values[order] for name, values in columns.items()}
    for code, side in ((0, "before"), (2, "at or after")):
        if config.test_from and not (codes == code).any():
            days = columns[schema.TIMESTAMP].astype("datetime64[s]").astype("datetime64[D]")
            raise ValueError(
                f"no row is {side} test_from {config.test_from}: the days are {days.min()} to "
                f"{days.max()}; choose a date between them."
            )
    return {
        split: {name: values[codes == code] for name, values in columns.items()}
        for code, split in enumerate(schema.SPLITS)
    }


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
        weights = df[weight].to_numpy(np.float32, na_value=np.nan)
        wrong = ~((weights >= 0) & np.isfinite(weights))
        _check_whole(wrong, weight, "a weight of 0 or more")
        columns[schema.WEIGHT] = weights[first]
    return columns


def _codes_and_texts(values: pd.Series, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids as (int64 codes [n], distinct texts [V])."""
    import pandas as pd

    codes, distinct = pd.factorize(values)
    _check_whole(codes < 0, column, "an id")
    for value in distinct:
        if not isinstance(value, (str, int, np.integer)) or isinstance(value, bool):
            raise ValueError(
                f"column {column!r} must hold text or integers, got {value!r}: convert it, as "
                "by .astype('int64')."
            )
    names = [str(value) for value in distinct]
    texts, merged = np.unique(np.array(names, object), return_inverse=True)
    return merged[codes].astype(np.int64), texts


def _seconds(times: pd.Series) -> np.ndarray:
    """int64 [n]: seconds since 1970 for times, integers as they are."""
    missing = times.isna()
    if times.dtype.kind == "f":
        missing |= np.isinf(times.to_numpy(np.float64, na_value=np.nan))
    _check_whole(missing, times.name, "a time")
    if times.dtype.kind == "M" or hasattr(times.dtype, "tz"):
        return times.to_numpy("datetime64[s]").astype(np.int64)
    if times.dtype.kind not in "iuf":
        raise ValueError(
            f"column {times.name!r} must hold times or seconds since 1970, got {times.dtype}: "
            "convert it by pd.to_datetime."
        )
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
    ids: Mapping[str, Vocabulary],
    splits: dict[str, dict[str, np.ndarray]],
    features: Mapping[str, Features],
) -> str:
    arrays = [vocabulary.fingerprints for vocabulary in ids.values()]
    arrays += [values for columns in splits.values() for values in columns.values()]
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    for side in features.values():
        vocabularies = [pa.table({schema.VALUE: values}) for values in side.values.values()]
        for table in (side.table, side.cold, *vocabularies):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            digest.update(sink.getvalue())
    return digest.hexdigest()
