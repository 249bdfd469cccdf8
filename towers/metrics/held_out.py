"""A split that is held out, and how well a ranking of the whole corpus finds it, also by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.contract import schema
from towers.data.history import Before
from towers.data.interactions import Positives, RetrievalData
from towers.legacy_keras import tf_keras
from towers.metrics.definitions import METRICS, cut_offs, mean_metrics
from towers.metrics.ranking import (
    Embeddings,
    Known,
    find_hits,
    rank_by_popularity,
    rank_corpus,
    tie_order,
)

Means = tuple[dict[str, float], dict[str, float]]  # means and half-widths, see `mean_metrics`


class Ranking(NamedTuple):
    """What stands at the top for each query of a split, best first."""

    candidates: np.ndarray  # int64 [U, K], dense ids; -1 where no candidate is left
    hits: np.ndarray  # bool [U, K], whether it is a held-out positive of the query


class HeldOut:
    """What is held out of each query, and what was known before and must not be ranked.

    Before validation only train is known; before test, train and validation.

    With `history="live"` each of the R rows of the split is predicted by itself, U = R: its one
    positive is its candidate, and not ranked is what `Before` says that the query had chosen before
    it. Candidates of the same time or later are ranked. Metrics are means over the rows of each
    query, then over queries.

    Attributes:
      query_ids: int64 [U], the queries with something held out; live: the query of each row.
      before: live: what was chosen before each row.
      num_positives: int64 [U], how much that is, at least 1.
      pairs: rows in query_ids and candidates of all that is held out, int64 [n] each.
      train_rows: int64 [U], the train rows of these queries.
      train_counts: int64 [N], the train rows of the candidates.

    Raises:
      ValueError: the split is train or unknown, it has no rows, or live ones have no times.
    """

    before: Before | None = None

    def __init__(self, data: RetrievalData, split: str, *, history: str = "stale") -> None:
        if split not in ("validation", "test"):
            raise ValueError(f"split must be test or validation, got {split!r}.")
        if data.num_rows(split) == 0:
            raise ValueError(
                f"the data has no {split} rows: prepare it with validation_ratio above 0 for "
                "validation, or with train_ratio below 1 for test."
            )
        self._positives = data.positives(split)
        self._known: Known = data.positives(*schema.SPLITS[: schema.SPLITS.index(split)])
        self.query_ids = self._places = np.flatnonzero(self._positives.sizes)
        if history == "live":
            self._known = self.before = Before.rows_of(data, split)
            columns = data.arrays(split)
            self.query_ids = np.asarray(columns[schema.QUERY_ID])
            self._places = np.arange(len(self.query_ids))
            candidates = columns[schema.CANDIDATE_ID]
            self._positives = Positives(self._places, candidates, len(self._places))
        self.num_positives = self._positives.sizes[self._places]
        rows = np.repeat(np.arange(len(self.query_ids)), self.num_positives)
        self.pairs = rows, self._positives.candidate_ids
        self.train_rows = data.positives("train").sizes[self.query_ids]
        self.train_counts = data.train_counts
        self._order = tie_order(data.candidate_vocabulary.fingerprints)

    def rank(
        self, query_embeddings: Embeddings, candidate_embeddings: Embeddings, k: int
    ) -> Ranking:
        """The top k of a model: embeddings [Q, D] and [N, D] by dense id; live: [R, D] by row."""
        embeddings, queries = (query_embeddings, candidate_embeddings), (self._places, self._known)
        return self._with_hits(rank_corpus(*embeddings, *queries, k=k, order=self._order))

    def rank_by_popularity(self, k: int) -> Ranking:
        """The top k by train counts, the same for all queries but for what they know."""
        ranked = rank_by_popularity(
            self.train_counts, self._places, self._known, k=k, order=self._order
        )
        return self._with_hits(ranked)

    def means(
        self, ranking: Ranking, ks: Sequence[int], rows: np.ndarray | slice = slice(None)
    ) -> Means:
        """All metrics of a ranking at some cut-offs, of all rows or of those that are chosen."""
        owners = None if self.before is None else self.query_ids[rows]
        return mean_metrics(ranking.hits[rows], self.num_positives[rows], ks, owners)

    def measure(
        self, query_embeddings: Embeddings, candidate_embeddings: Embeddings, ks: Sequence[int]
    ) -> Means:
        """Metrics of a model: embeddings as in `rank`."""
        return self.means(self.rank(query_embeddings, candidate_embeddings, max(ks)), ks)

    def measure_popularity(self, ks: Sequence[int]) -> Means:
        """Metrics of the ranking by train counts, the same for all queries."""
        return self.means(self.rank_by_popularity(max(ks)), ks)

    def _with_hits(self, ranked: np.ndarray) -> Ranking:
        return Ranking(ranked, find_hits(ranked, self._places, self._positives))


class FullCorpusMetrics(tf_keras.callbacks.Callback):
    """Adds the metrics of a split to the logs of each epoch, such as val_recall@50.

    Callbacks that read them, as `EarlyStopping` does, come after it in the list.

    Args:
      data: the data that is trained on.
      split: "validation" or "test"; None: validation where there is one, else test.
      metrics: names in `towers.metrics.definitions.METRICS`.
      ks: the cut-offs.
    """

    def __init__(
        self,
        data: RetrievalData,
        split: str | None = None,
        *,
        metrics: Sequence[str] = ("recall", "ndcg"),
        ks: Sequence[int] = (10, 20, 50),
    ) -> None:
        super().__init__()
        unknown = set(metrics) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {sorted(unknown)}.")
        if split is None:
            split = "validation" if data.num_rows("validation") else "test"
        self._held_out = HeldOut(data, split)
        self._prefix = "val" if split == "validation" else split
        self._ks = cut_offs(ks)
        self._names = [f"{metric}@{k}" for metric in metrics for k in self._ks]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ranks, and writes into the logs."""
        embeddings = self.model.query_embeddings(), self.model.candidate_embeddings()
        means, _ = self._held_out.measure(*embeddings, self._ks)
        if logs is not None:
            logs.update({f"{self._prefix}_{name}": means[name] for name in self._names})
