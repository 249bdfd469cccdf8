"""Searches a loaded SavedModel by embedding, in NumPy on both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from serving.version import served_model

_WIDEST = 8  # times K: what a wider search may be asked for


class Found(NamedTuple):
    """Results of B queries, best first; row -1 for no result."""

    rows: np.ndarray  # int32 [B, n]
    scores: np.ndarray  # float32 [B, n]


class IndexSearch:
    """One index of a version.

    Attributes:
      kind: "exact" or "scann".
      k: K, results of a search.
      widest: the most results of `search_wider`; 0 where the version has no such signature.
    """

    def __init__(self, model: Any, kind: str, k: int, num_candidates: int) -> None:
        self.model, self.kind, self.k = model, kind, k
        self._search = model.signatures[served_model.EMBEDDING_SEARCH]
        self._wide_search = model.signatures.get(served_model.WIDE_SEARCH)
        self.widest = 0 if self._wide_search is None else min(_WIDEST * k, num_candidates)
        self._takes_leaves = (
            served_model.LEAVES_TO_SEARCH in self._search.structured_input_signature[1]
        )

    def search(self, embeddings: np.ndarray) -> Found:
        """The K best of each query, as good as the index promises: float32 [B, D] → [B, K]."""
        tuned = {served_model.LEAVES_TO_SEARCH: tf.constant(0)} if self._takes_leaves else {}
        return self._find(self._search, embeddings, tuned)

    def search_wider(self, embeddings: np.ndarray, num_results: int) -> Found:
        """More than K results, at most `widest`: float32 [B, D] → [B, num_results]."""
        wanted = {served_model.NUM_RESULTS: tf.constant(num_results)}
        return self._find(self._wide_search, embeddings, wanted)

    def _find(self, search: Any, embeddings: np.ndarray, inputs: dict[str, Any]) -> Found:
        outputs = search(**{served_model.EMBEDDING: tf.constant(embeddings)}, **inputs)
        return Found(
            *(outputs[n].numpy() for n in (served_model.CANDIDATE_ROW, served_model.SCORE))
        )
