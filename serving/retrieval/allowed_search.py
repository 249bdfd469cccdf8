"""Exact search over what filters leave of the corpus, where an index found too little."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from serving.retrieval.filters import Filters

_MOST_SCORES = 1 << 25  # scores that are held at a time: 128 MB
_FEW = 4  # an allowed share below 1 / _FEW of the corpus is copied out of it


def best_rows(
    vectors: np.ndarray, embeddings: np.ndarray, filters: Filters, queries: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The best candidates that each query may get.

    Args:
      vectors: float32 [N, D].
      embeddings: float32 [b, D].
      filters: of all queries of the request.
      queries: int [b], which of them these are.
      k: how many are wanted; a query gets what there is at or above its lowest score.

    Yields:
      For each query rows int64 and scores float32, best first; of equal scores the lower row.
    """
    base, gone = _split(filters, len(vectors))
    searched = vectors if base is None else vectors[base]  # [n, D]
    size = max(1, _MOST_SCORES // max(1, len(searched)))
    for start in range(0, len(queries), size):
        scores = embeddings[start : start + size] @ searched.T  # [size, n]
        for line, query in zip(scores, queries[start : start + size], strict=True):
            own = filters.own_rows(query)
            line[gone] = -np.inf
            line[own if base is None else np.searchsorted(base, own)] = -np.inf
            columns = _best(line, min(k, int(filters.num_left[query])))
            columns = columns[line[columns] >= filters.min_score]
            yield columns if base is None else base[columns], line[columns]


def _split(filters: Filters, num_candidates: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The few rows to search in; or None for all, and those that do not count."""
    if filters.base is None:
        return None, filters.excluded
    if _FEW * len(filters.base) < num_candidates:
        return filters.base, np.empty(0, np.int64)
    gone = np.ones(num_candidates, bool)
    gone[filters.base] = False
    return None, np.flatnonzero(gone)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k highest scores, best first; of equal ones the lower place."""
    if k == 0:
        return np.empty(0, np.int64)
    lowest = np.partition(scores, -k)[-k]  # one pass, then only the best are sorted
    places = np.flatnonzero(scores >= lowest)
    return places[np.argsort(-scores[places], kind="stable")][:k]
