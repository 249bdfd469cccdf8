"""Which candidates each query of a request may get, as sorted arrays of rows; the best of them.

What is shared by the queries is one array or one mask, what each query has of its own is one array
of keys, query · N + row, so that one search answers for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

MAX_SCORES = 1 << 25  # that are held at a time: 128 MB
_COLUMN = 32  # scores
_COPIED_SHARE = 4  # an allowed share below 1 / 4 of the corpus is copied out of it

Best = tuple[np.ndarray, np.ndarray]  # rows and scores, best first


class Filters:
    """The filters of B queries.

    Attributes:
      num_shared: how many candidates the queries may choose from, but for what each has seen.
      is_chosen: whether these are a choice, `base`, and not all but the `excluded` ones.
      excluded: rows that no query gets, int64, ascending; empty where `base` says it all.
      min_score: the lowest score that is good enough; -inf for no limit.
      num_left: int64 [B], how many candidates each query may get, whatever their scores.
    """

    def __init__(
        self,
        num_candidates: int,
        excluded: np.ndarray,
        allowed: np.ndarray | None,
        seen: Sequence[np.ndarray],
        min_score: float | None = None,
    ) -> None:
        """Joins the filters of a request over N candidates.

        `excluded` and `allowed` are those of `FilterRows`, rows each once; `seen` are rows that
        each query does not get, one array a query, in any order.
        """
        self.num_queries = len(seen)
        self.num_candidates = num_candidates
        self.min_score = -np.inf if min_score is None else min_score
        self.excluded, self.is_chosen = excluded, allowed is not None
        self._mask: np.ndarray | None = None  # bool [N]
        self.num_shared = num_candidates - len(excluded)
        if allowed is not None:
            self.excluded = np.empty(0, np.int64)
            if allowed.dtype == bool:
                if len(excluded):
                    allowed = allowed.copy()
                    allowed[excluded] = False
                self._mask, self.num_shared = allowed, int(np.count_nonzero(allowed))
            else:
                self.base = allowed[~among(allowed, excluded)]
                self.num_shared = len(self.base)
        owners = np.repeat(np.arange(len(seen)), [len(rows) for rows in seen])
        rows = np.concatenate([*seen, np.empty(0, np.int64)]).astype(np.int64)
        own = self._is_shared(rows)  # others are gone for all queries anyhow
        self._own_keys = np.unique(owners[own] * num_candidates + rows[own])
        own_counts = np.bincount(self._own_keys // num_candidates, minlength=len(seen))
        self.num_left = self.num_shared - own_counts

    @cached_property
    def base(self) -> np.ndarray:
        """Rows that all of the queries may choose from where `is_chosen`: int64, ascending."""
        assert self._mask is not None
        return np.flatnonzero(self._mask)

    def may_get(self, rows: np.ndarray, queries: np.ndarray | None = None) -> np.ndarray:
        """Which rows of results [b, n] the queries may get, whatever their scores: bool [b, n].

        `queries`, int [b], says which of the B queries they are of; None: all in order.
        """
        queries = np.arange(self.num_queries) if queries is None else queries
        keys = queries[:, None] * self.num_candidates + rows
        return (rows >= 0) & self._is_shared(rows) & ~among(keys, self._own_keys)

    def own_rows(self, query: int) -> np.ndarray:
        """What this query does not get and others may: rows, int64, ascending."""
        bounds = np.searchsorted(self._own_keys, np.array([query, query + 1]) * self.num_candidates)
        return self._own_keys[slice(*bounds)] - query * self.num_candidates

    def _is_shared(self, rows: np.ndarray) -> np.ndarray:
        """Whether the rows are among those that are shared by all queries."""
        if self._mask is not None:
            return self._mask[rows]
        if self.is_chosen:
            return among(rows, self.base)
        return ~among(rows, self.excluded)


def among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each value is in an ascending array: bool, in the shape of the values."""
    if not len(ascending):
        return np.zeros(values.shape, bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values


def first(keep: np.ndarray, k: int) -> np.ndarray:
    """The first k of each row that are True: bool, in the shape of `keep`, [b, n]."""
    return keep & (np.cumsum(keep, axis=1) <= k)


def best_rows(
    vectors: Sequence[np.ndarray],
    embeddings: np.ndarray,
    filters: Filters,
    queries: np.ndarray,
    k: int,
) -> Iterator[Best]:
    """Scores all candidates that queries may get; of each the best k at or above its lowest score.

    Args:
      vectors: float32 [N, D] in parts, which may be mapped from files.
      embeddings: float32 [b, D].
      queries: int [b], which of those of the filters these are.

    Yields:
      For each query rows int64 and scores float32, best first; of equal scores the lower row.
    """
    if not len(queries):  # the vectors of a choice are not copied for nothing
        return
    base, barred = filters.base if filters.is_chosen else None, filters.excluded
    ends = np.cumsum([len(part) for part in vectors])
    if base is not None and _COPIED_SHARE * len(base) >= ends[-1]:
        others = np.ones(ends[-1], bool)
        others[base] = False
        base, barred = None, np.flatnonzero(others)
    if base is not None:
        parts = np.split(base, np.searchsorted(base, ends[:-1]))
        starts = ends - [len(part) for part in vectors]
        places = zip(vectors, parts, starts, strict=True)
        vectors = [np.take(part, rows - start, axis=0) for part, rows, start in places]
        ends = np.cumsum([len(part) for part in vectors])
    size = max(1, MAX_SCORES // max(1, ends[-1]))
    for start in range(0, len(queries), size):
        block = embeddings[start : start + size]
        scores = np.empty((len(block), ends[-1]), np.float32)  # [size, n]
        for part, columns in zip(vectors, np.split(scores, ends[:-1], axis=1), strict=True):
            np.matmul(block, part.T, out=columns)
        for line, query in zip(scores, queries[start : start + size], strict=True):
            own = filters.own_rows(query)
            line[barred] = -np.inf
            line[own if base is None else np.searchsorted(base, own)] = -np.inf
            columns = _highest(line, min(k, int(filters.num_left[query])))
            columns = columns[line[columns] >= filters.min_score]
            yield columns if base is None else base[columns], line[columns]


def _highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k highest scores, best first; of equal ones the lower place."""
    if k == 0:
        return np.empty(0, np.int64)
    size = len(scores) // _COLUMN * _COLUMN
    highest = scores[:size].reshape(_COLUMN, -1).max(axis=0)  # of each column, a fast first pass
    if len(highest) < k or (lowest := np.partition(highest, -k)[-k]) == -np.inf:
        lowest = np.partition(scores, -k)[-k]
    places = np.flatnonzero(scores >= lowest)  # k or some more
    return places[np.argsort(-scores[places], kind="stable")][:k]
