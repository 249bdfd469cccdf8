"""From what an index found to the answer of a request: filters, further search, fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from serving.retrieval.allowed_search import best_rows
from serving.retrieval.filters import Filters, first
from serving.retrieval.index_search import Found, IndexSearch
from serving.retrieval.requests import RetrieveRequest, RetrieveResult, UnknownQuery
from serving.retrieval.tables import FilterRows, RetrievalTables

_FEW_ALLOWED = 20_000  # so few rows are scored each; more are sought among an index's results

Best = tuple[np.ndarray, np.ndarray]  # rows and scores, best first


class Question(NamedTuple):
    """Queries of a request that is checked; its filters, as rows, are shared by all parts."""

    request: RetrieveRequest
    query_ids: Sequence[str]  # B, "" each where embeddings were given
    embeddings: np.ndarray | None  # float32 [B, D], None where the ids are still to be embedded
    filter_rows: FilterRows

    def parts(self, size: int) -> Iterator[Question]:
        """The question in pieces of at most `size` queries; one without queries stays one."""
        for start in range(0, len(self.query_ids) or 1, size):
            piece = slice(start, start + size)
            given = None if self.embeddings is None else self.embeddings[piece]
            yield self._replace(query_ids=self.query_ids[piece], embeddings=given)


class Asked(NamedTuple):
    """A question on its way, B queries with the same filters."""

    request: RetrieveRequest
    query_ids: Sequence[str]  # B
    embeddings: np.ndarray  # float32 [B, D]
    known: np.ndarray  # bool [B]
    filters: Filters
    unknown_ids: int

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
    below = np.zeros(len(left), bool)  # whose results go below the lowest score
    if found is not None:
        found = Found(found.rows[left], found.scores[left])
        taken = _take(asked, left, found, best)
        if index.kind == "exact":  # those that are not among the results are lower still
            taken |= _goes_below(found, filters.min_score)
        below = _goes_below(found, filters.min_score)[~taken]
        left = left[~taken]
    if found is not None or k > index.k:
        barred = tables.num_candidates - filters.num_left[left]
        wide = (k + barred <= index.widest) & (filters.base is None) & ~below
        if wide.any():
            # So many results cannot all be barred but k; if they are too few, leaves were.
            num_results = max(index.k, k + int(barred[wide].max()))
            wider = index.search_wider(asked.embeddings[left[wide]], num_results)
            taken = _take(asked, left[wide], wider, best)
            left = np.concatenate([left[~wide], left[wide][~taken]])
    exactly = best_rows(tables.vectors, asked.embeddings[left], filters, left, k)
    for query, of_query in zip(left, exactly, strict=True):
        best[query] = of_query
    return best


def _take(asked: Asked, queries: np.ndarray, found: Found, best: list[Best]) -> np.ndarray:
    """Sets the results that pass the filters; whether they are enough: bool, one a query."""
    filters, k = asked.filters, asked.request.k
    taken = first(filters.may_get(found.rows, queries) & (found.scores >= filters.min_score), k)
    counts = taken.sum(axis=1)
    ends = np.cumsum(counts)[:-1]
    parts = zip(np.split(found.rows[taken], ends), np.split(found.scores[taken], ends), strict=True)
    for query, part in zip(queries, parts, strict=False):  # of no queries there is one empty part
        best[query] = part
    return np.greater_equal(counts, np.minimum(k, filters.num_left[queries]))


def _goes_below(found: Found, min_score: float) -> np.ndarray:
    """Whether a query has results below the lowest score: bool [b]."""
    return np.logical_or.reduce((found.rows >= 0) & (found.scores < min_score), axis=1)
