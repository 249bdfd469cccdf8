"""Top-k retrieval from a model version, with filters and history; knows no network."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from serving.errors import InvalidRequest, ServiceError
from serving.retrieval.corpus import Corpus
from serving.retrieval.filters import Filters
from serving.retrieval.requests import (
    RetrieveRequest,
    RetrieveResponse,
    RetrieveResult,
    given_embeddings,
)
from serving.retrieval.search import CheckedQueries, EmbeddedQueries, Hits, IndexSearch, results
from serving.version import served_model
from serving.version.index import import_scann
from serving.version.versions import RETRIEVAL, Version, find_version

_log = logging.getLogger(__name__)
tf.config.experimental.enable_tensor_float_32_execution(False)  # scores of a GPU are exact, too

Outcome = RetrieveResponse | ServiceError


class Retriever:
    """Answers queries from one model version; may be shared by threads.

    Attributes:
      version: the version that answers, with its manifest.
      k: K, results of its indexes; see `RetrieveRequest` for more.
      input: what it takes, "query_id" or, of a version without a query model, "embedding".
      corpus: its candidates, and what the queries have seen.
    """

    def __init__(self, version: Version, index: str = "default") -> None:
        """Loads the SavedModel with exact search; ScaNN is loaded when first asked for.

        Requests for the default index get `index`, and exact search where there is no ScaNN.
        """
        self.version = version
        self._wanted_index = index
        self.k: int = version.manifest.details["k"]
        self.input: str = version.manifest.details["input"]
        self.corpus = Corpus(version.path / RETRIEVAL)
        self._loading = threading.Lock()
        self._indexes: dict[str, IndexSearch] = {}
        self._encoder = self.model("exact").signatures[served_model.QUERY_EMBEDDING]

    @classmethod
    def load(cls, models: str | Path, name: str = "twotower", version: int = 0) -> Retriever:
        """Opens a version, the newest where `version` is 0; ValueError as of `find_version`."""
        return cls(find_version(models, name, version))

    @property
    def num_candidates(self) -> int:
        """N, the size of the corpus."""
        return self.corpus.num_candidates

    @cached_property
    def default_index(self) -> str:
        """What index="default" stands for here: "exact" or "scann", if that can be used."""
        wanted, path = self._wanted_index, self.version.path
        wanted = self.version.manifest.details["default_index"] if wanted == "default" else wanted
        if wanted in self.usable_indexes:
            return wanted
        _log.warning("%s has no ScaNN index, or scann is missing: it answers exactly.", path)
        return "exact"

    @cached_property
    def usable_indexes(self) -> tuple[str, ...]:
        """The indexes that requests may name."""
        has_scann = self.version.has_scann and import_scann() is not None
        return ("exact", "scann") if has_scann else ("exact",)

    def model(self, index: str = "default") -> Any:
        """The loaded SavedModel of an index; ValueError where it has none that can be used here."""
        return self._index(index).model

    def top_k(
        self, query_ids: Sequence[str], k: int, *, unknown_queries: str = "empty", **filters: Any
    ) -> list[RetrieveResult]:
        """The k best candidates of each query that no filter removes.

        Example:
          retriever.top_k(["ann", "bob"], k=10, exclude_seen=True)

        Args:
          query_ids: raw ids.
          k: results for each of them.
          unknown_queries: "popular", "empty" or "error".
          **filters: and the index, see `RetrieveRequest`.

        Returns:
          One result a query, in their order. Where `known` is False there are no candidates, or
          with unknown_queries="popular" the most popular ones.
        """
        request = RetrieveRequest(query_ids, k=k, unknown_queries=unknown_queries, **filters)
        return self.answer(request).results

    def answer(
        self, request: RetrieveRequest, *, unknown_queries: str = "empty"
    ) -> RetrieveResponse:
        """Answers one request; see `answer_all`.

        Raises:
          InvalidRequest: the version cannot do what the request asks for.
          UnknownQuery: it does not know a query, and that was to be an error.
        """
        [outcome] = self.answer_all([self.check(request)], unknown_queries=unknown_queries)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def answer_all(
        self, requests: Sequence[CheckedQueries], *, unknown_queries: str = "empty"
    ) -> list[Outcome]:
        """Answers requests, or parts of them, with one search of an index for all their queries.

        A known query gets k results wherever so many candidates pass its filters.

        Args:
          requests: any mixture, checked.
          unknown_queries: "popular", "empty" or "error", where a request does not say it.

        Returns:
          For each request its response, or the error that it alone gets.
        """
        embedded = self._embed(requests)
        hits = self._search(embedded)
        return [
            self._respond(queries, of_index, unknown_queries)
            for queries, of_index in zip(embedded, hits, strict=True)
        ]

    def check(self, request: RetrieveRequest) -> CheckedQueries:
        """Checks a request and looks up its filters, once for all of its queries.

        Raises:
          InvalidRequest: this version cannot do what the request asks for.
        """
        if request.features is not None and self.input != served_model.EMBEDDING:
            raise InvalidRequest(f"Version {self.version.number} takes query_ids, not features.")
        if request.query_ids is not None and self.input != served_model.QUERY_ID:
            raise InvalidRequest(
                f"Version {self.version.number} was published without a query model, so query ids "
                'mean nothing to it: ask with features {"embedding": [...]}.'
            )
        if request.exclude_seen and not (request.query_ids is not None and self.corpus.has_seen):
            raise InvalidRequest(
                f"exclude_seen needs seen lists, but version {self.version.number} was published "
                "without: pass `exclude`, or export again with them."
            )
        if request.unknown_queries == "popular":
            self.corpus.check_popularity()
        self._index(request.index)
        ids: Sequence[str] = request.query_ids or []
        "".join(ids).encode()  # TensorFlow takes no half of a surrogate pair
        embeddings = None
        if request.features is not None:
            embeddings = given_embeddings(request.features, self.corpus.vectors.shape[1])
            ids = [""] * len(embeddings)
        return CheckedQueries(request, ids, embeddings, self.corpus.filter_rows(request))

    def scores_all(self, request: RetrieveRequest) -> bool:
        """Whether all candidates must be scored, as an index cannot answer."""
        index = self._index(request.index)
        return index.kind == "exact" or request.k > max(index.k, index.widest)

    def history(self, query_id: str) -> list[str]:
        """Raw ids of the candidates that a query had in training; [] where it had none."""
        return self.corpus.names(self.corpus.seen_rows(query_id))

    def query_ids(self, limit: int = 10) -> list[str]:
        """Some queries that have a history, the first ones; [] without seen lists."""
        return self.corpus.query_ids(limit)

    def warm_up(self) -> None:
        """Loads all indexes and tables, so that no request waits for them."""
        self.corpus.load()
        embedding = np.asarray(self.corpus.vectors[:1])
        for index in map(self._index, self.usable_indexes):
            index.search(embedding)
            if index.widest:
                index.search_wider(embedding, index.widest)

    @property
    def models(self) -> list[Any]:
        """The SavedModels that have been loaded."""
        return [index.model for index in self._indexes.values()]

    def close(self) -> None:
        """Frees what a loaded ScaNN index holds outside Python; call it after the last query."""
        with self._loading:
            if (index := self._indexes.pop("scann", None)) is not None:
                index.model.release()

    def _index(self, name: str) -> IndexSearch:
        name = self.default_index if name == "default" else name
        with self._loading:
            if name not in self._indexes:
                model = self.version.load(name)
                self._indexes[name] = IndexSearch(model, name, self.k, self.num_candidates)
            return self._indexes[name]

    def _embed(self, requests: Sequence[CheckedQueries]) -> list[EmbeddedQueries]:
        """The embeddings of all queries by one call, cut into those of each request."""
        if self.input == served_model.EMBEDDING:
            parts = [queries.embeddings for queries in requests if queries.embeddings is not None]
            knowns = [np.ones(len(part), bool) for part in parts]
        else:
            ids = [query_id for queries in requests for query_id in queries.query_ids]
            outputs = self._encoder(**{served_model.QUERY_ID: tf.constant(ids, tf.string)})
            ends = _ends([queries.query_ids for queries in requests])
            parts = np.split(outputs[served_model.EMBEDDING].numpy(), ends)
            knowns = np.split(outputs[served_model.KNOWN].numpy(), ends)
        embedded = []
        # Of no requests at all there is one empty part.
        for queries, part, known in zip(requests, parts, knowns, strict=False):
            request, names, _, (excluded, allowed, unknown_ids) = queries
            asked = names if request.exclude_seen else []
            seen = [*map(self.corpus.seen_rows, asked)] or [np.empty(0, np.int64)] * len(names)
            filters = Filters(self.num_candidates, excluded, allowed, seen, request.min_score)
            embedded.append(EmbeddedQueries(request, names, part, known, filters, unknown_ids))
        return embedded

    def _search(self, requests: Sequence[EmbeddedQueries]) -> list[Hits | None]:
        """The K results of the index that each request names, one search for each index."""
        hits: list[Hits | None] = [None] * len(requests)
        places: dict[IndexSearch, list[int]] = {}
        for place, queries in enumerate(requests):
            if queries.asks_index(self.k):
                places.setdefault(self._index(queries.request.index), []).append(place)
        for index, of_index in places.items():
            embeddings = [requests[place].embeddings for place in of_index]
            rows, scores = index.search(np.concatenate(embeddings))
            ends = _ends(embeddings)
            parts = map(Hits, np.split(rows, ends), np.split(scores, ends))
            for place, part in zip(of_index, parts, strict=True):
                hits[place] = part
        return hits

    def _respond(self, queries: EmbeddedQueries, hits: Hits | None, unknown: str) -> Outcome:
        index = self._index(queries.request.index)
        choice = queries.request.unknown_queries or unknown
        try:
            answers = results(queries, index, hits, self.corpus, choice)
        except ServiceError as error:
            return error
        return RetrieveResponse(self.version.number, index.kind, answers, queries.unknown_ids)


def _ends(parts: Sequence[Sized]) -> np.ndarray:
    """Where each part but the last ends when they are joined."""
    return np.cumsum([len(part) for part in parts], dtype=int)[:-1]
