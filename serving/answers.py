"""From what an index found to the answer of a request: filters, further search, fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serving.allowed_search import best_rows
from serving.filters import Filters, first
from serving.index_search import Found, IndexSearch
from serving.requests import RetrieveRequest, RetrieveResult, UnknownQuery
from serving.tables import RetrievalTables

_FEW_ALLOWED = 20_000  # so few rows are scored each; more are sought among an index's results

Best = tuple[np.ndarray, np.ndarray]  # rows and scores, best first


class Asked(NamedTuple):
    """A request on its way, B queries with the same filters."""

    request: RetrieveRequest
    query_ids: Sequence[str]  # B
    embeddings: np.ndarray  # float32 [B, D]
    known: np.ndarray  # bool [B]
    filters: Filters

    @property
    def unknown_queries(self) -> list[int]:
        """Places of the queries that the model does not know."""
        return np.flatnonzero(~self.known).tolist()


def asks_index(asked: Asked, k: int) -> bool:
    """Whether the K results of an index are worth looking at first."""
    few = asked.filters.base is not None and len(asked.filters.base) <= _FEW_ALLOWED
    return asked.request.k <= k and not few


def results(
    asked: Asked,
    index: IndexSearch,
    found: Found | None,
    tables: RetrievalTables,
    unknown_queries: str,
) -> list[RetrieveResult]:
    """The results of a request, in the order of its queries.

    Args:
      asked: the request.
      index: searched again where its K results do not suffice.
      found: the K results of the index [B, K], None where `asks_index` is False.
      tables: of the version.
      unknown_queries: "popular", "empty" or "error", for queries that are not known.

    Raises:
      UnknownQuery: there is one, and that is to be an error.
      ValueError: there is one, and the version does not know what is popular.
    """
    _refuse_unknown(asked, unknown_queries)
    best = _known_results(asked, index, found, tables)
    popular = unknown_queries == "popular"
    if popular:
        for query in asked.unknown_queries:
            best[query] = tables.popular_rows(asked.filters, query, asked.request.k)
    return [
        RetrieveResult(
            query_id=query_id,
            known=bool(known),
            fallback="popular" if popular and not known else "",
            candidate_ids=tables.names(rows),
            scores=scores.astype(float).tolist(),
        )
        for query_id, known, (rows, scores) in zip(asked.query_ids, asked.known, best, strict=True)
    ]


def _refuse_unknown(asked: Asked, unknown_queries: str) -> None:
    if unknown_queries != "error" or asked.known.all():
        return
    unknown = asked.unknown_queries
    shown = ", ".join(repr(asked.query_ids[query][:80]) for query in unknown[:3])
    raise UnknownQuery(
        f"{len(unknown)} of {len(asked.known)} queries are not known to the model: {shown}"
        f"{', ...' if len(unknown) > 3 else ''}."
    )


def _known_results(
    asked: Asked, index: IndexSearch, found: Found | None, tables: RetrievalTables
) -> list[Best]:
    """Rows and scores for each query that is known, nothing for the others."""
    filters, k = asked.filters, asked.request.k
    best: list[Best] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(asked.known)
    left = np.flatnonzero(asked.known)
    if found is not None:
        left = _take(asked, left, Found(found.rows[left], found.scores[left]), best)
        barred = tables.num_candidates - filters.num_left[left]
        wide = (k + barred <= index.widest) & (filters.base is None)
        if wide.any():
            # So many results cannot all be barred but k; if they are too few, leaves were.
            num_results = k + int(barred[wide].max())
            wider = index.search_wider(asked.embeddings[left[wide]], num_results)
            left = np.concatenate([left[~wide], _take(asked, left[wide], wider, best)])
    exactly = best_rows(tables.vectors, asked.embeddings[left], filters, left, k)
    for query, of_query in zip(left, exactly, strict=True):
        best[query] = of_query
    return best


def _take(asked: Asked, queries: np.ndarray, found: Found, best: list[Best]) -> np.ndarray:
    """Sets the results of the queries that find enough; returns the other queries.

    Where results go below the lowest score, those that are not there would, too.
    """
    filters, k = asked.filters, asked.request.k
    good = found.scores >= filters.min_score
    taken = first(filters.may_get(found.rows, queries) & good, k)
    counts = taken.sum(axis=1)
    enough = counts >= np.minimum(k, filters.num_left[queries])
    enough |= ((found.rows >= 0) & ~good).any(axis=1)
    ends = np.cumsum(counts)[:-1]
    rows, scores = np.split(found.rows[taken], ends), np.split(found.scores[taken], ends)
    for place in np.flatnonzero(enough):
        best[queries[place]] = rows[place], scores[place]
    return queries[~enough]
