"""Which candidates each query of a request may get, as sorted arrays of rows.

What is shared by the queries is one array or one mask, what each query has of its own is one array
of keys, query · N + row, so that one search answers for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np


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
        """Joins the filters of a request.

        Args:
          num_candidates: N.
          excluded, allowed: as in `FilterRows`, rows each once.
          seen: rows that each query does not get, one array a query, in any order.
          min_score: the lowest score that is good enough, None for no limit.
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
        """Which rows of results the queries may get, whatever their scores: bool [b, n].

        Args:
          rows: [b, n], -1 for no result.
          queries: int [b], which of the B queries they are of; None for all in order.
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
