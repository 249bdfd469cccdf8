"""Recommendations of a few queries beside what each chose before, for people to judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.contract import schema
from towers.data.interactions import RetrievalData
from towers.metrics.held_out import HeldOut, Ranking

_SHOWN = 10  # rows of each list


def examples(
    data: RetrievalData, split: str, held_out: HeldOut, ranking: Ranking, titles: Sequence[Any]
) -> list[dict[str, Any]]:
    """Of each quarter of the queries, by train rows, the one in the middle.

    Args:
      data: of which `held_out` is the split.
      split: test or validation.
      held_out: what the queries chose there.
      ranking: what a model puts first for them.
      titles: of candidates, see `candidate_titles`.

    Returns:
      A dict a query: `query_id`; `chosen`, the last candidates before the split, the latest first,
      and `num_chosen`; `held_out` and `num_held_out`; `recommended`, the best first. A candidate
      has `id` and `title`, which may be None; one that is recommended `hit`, True if held out.
    """
    by_rows = np.argsort(held_out.train_rows, kind="stable")
    rows = by_rows[np.unique(len(by_rows) * np.array([1, 3, 5, 7]) // 8)]
    queries = held_out.query_ids[rows]
    frames = []
    for name in schema.SPLITS[: schema.SPLITS.index(split)]:
        columns = data.arrays(name)
        theirs = np.isin(columns[schema.QUERY_ID], queries)
        frames.append(pd.DataFrame({name: values[theirs] for name, values in columns.items()}))
    before = pd.concat(frames)
    if schema.TIMESTAMP in before:
        before = before.sort_values(schema.TIMESTAMP, ascending=False, kind="stable")

    def named(ids: Iterable[int]) -> list[dict[str, Any]]:
        raw_ids = data.candidate_vocabulary.raw_ids
        return [
            {"id": raw_ids[int(i)].as_py(), "title": titles[i] if i < len(titles) else None}
            for i in ids
        ]

    results = []
    for row, query in zip(rows, queries, strict=True):
        chosen = before.loc[before[schema.QUERY_ID] == query, schema.CANDIDATE_ID]
        wanted = held_out.pairs[1][held_out.pairs[0] == row]
        ranked = ranking.candidates[row, :_SHOWN]
        recommended = [
            candidate | {"hit": bool(hit)}
            for candidate, hit in zip(named(ranked[ranked >= 0]), ranking.hits[row], strict=False)
        ]
        results.append(
            {
                "query_id": data.query_vocabulary.raw_ids[int(query)].as_py(),
                "chosen": named(chosen[:_SHOWN]),
                "num_chosen": len(chosen),
                "held_out": named(wanted[:_SHOWN]),
                "num_held_out": len(wanted),
                "recommended": recommended,
            }
        )
    return results
