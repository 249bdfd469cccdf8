"""Recommendations of a few queries beside what each chose before, for people to judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.contract import schema
from towers.data.interactions import RetrievalData
from towers.metrics.held_out import HeldOut, Ranking

_SHOWN = 10  # rows of each list


def examples(
    data: RetrievalData, split: str, held_out: HeldOut, ranking: Ranking, titles: Sequence[Any]
) -> list[dict[str, Any]]:
    """Of each quarter of the queries, by train rows, the one in the middle.

    Args:
      data, split: what `held_out` was made of.
      ranking: of `held_out`, by a model.
      titles: of candidates, see `candidate_titles`.

    Returns:
      A dict a query: `query_id`; `chosen`, the last candidates before the split, the latest first,
      and `num_chosen`; `held_out` and `num_held_out`; `recommended`, the best first. A candidate
      has `id` and `title`, which may be None, and if it is recommended `hit`: it is held out.
    """
    by_rows = np.argsort(held_out.train_rows, kind="stable")
    rows = by_rows[np.unique(len(by_rows) * np.array([1, 3, 5, 7]) // 8)]
    queries = held_out.query_ids[rows]
    frames = []
    for columns in map(data.arrays, schema.SPLITS[: schema.SPLITS.index(split)]):
        rows_of = np.flatnonzero(np.isin(columns[schema.QUERY_ID], queries))
        frames.append(pd.DataFrame({name: column[rows_of] for name, column in columns.items()}))
    before = pd.concat(frames)
    if schema.TIMESTAMP in before:
        before = before.sort_values(schema.TIMESTAMP, ascending=False, kind="stable")

    def named(ids: Iterable[int]) -> list[dict[str, Any]]:
        names = data.candidate_vocabulary.raw_ids.take(pa.array(ids, pa.int64())).to_pylist()
        known = [titles[row] if row < len(titles) else None for row in ids]
        return [{"id": n, "title": title} for n, title in zip(names, known, strict=True)]

    results = []
    for row, query in zip(rows, queries, strict=True):
        chosen = before.loc[before[schema.QUERY_ID] == query, schema.CANDIDATE_ID]
        wanted = held_out.pairs[1][held_out.pairs[0] == row]
        ranked = ranking.candidates[row, :_SHOWN]
        pairs = zip(named(ranked[ranked >= 0]), ranking.hits[row].tolist(), strict=False)
        result = {"query_id": data.query_vocabulary.raw_ids[int(query)].as_py()}
        result |= {"chosen": named(chosen[:_SHOWN]), "num_chosen": len(chosen)}
        result |= {"held_out": named(wanted[:_SHOWN]), "num_held_out": len(wanted)}
        results.append(result | {"recommended": [item | {"hit": hit} for item, hit in pairs]})
    return results
