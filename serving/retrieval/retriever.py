"""Top-k retrieval from a model version, with filters and history; knows no network."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from serving.errors import InvalidRequest, ServiceError
from serving.retrieval.corpus import Base, Corpus
from serving.retrieval.filters import Filters
from serving.retrieval.query_inputs import Embedded, QueryInputs, arrays_of
from serving.retrieval.requests import (
    RetrieveRequest,
    RetrieveResponse,
    RetrieveResult,
    given_embeddings,
)
from serving.retrieval.search import (
    CheckedQueries,
    EmbeddedQueries,
    Hits,
    IndexSearch,
    best_of_known,
    destroy_tables,
    load_exact,
    results,
)
from serving.version import served_model
from serving.version.index import import_scann
from serving.version.versions import Version, find_version

_log = logging.getLogger(__name__)
tf.config.experimental.enable_tensor_float_32_execution(False)  # scores of a GPU are exact, too

Outcome = RetrieveResponse | ServiceError
_OUTPUTS = served_model.CANDIDATE_ID, served_model.SCORE


class Retriever:
    """Answers queries from one model version; may be shared by threads.

    Attributes:
      version: the version that answers, with its manifest.
      k: K, results of its indexes; see `RetrieveRequest` for more.
      input: what it takes, "query_id" or, of a version without a query model, "embedding".
      corpus: its candidates, and what the queries have seen.
      query_inputs: what `queries` of a request may say.
      joins: whether another version had loaded what it needs.
    """

    def __init__(self, version: Version, index: str = "default") -> None:
        """Loads the SavedModel with exact search; ScaNN is loaded when first asked for.

        Requests for the default index get `index`, and exact search where there is no ScaNN.
        """
        self.version = version
        self._wanted_index = index
        self.k: int = version.manifest.details["k"]
        self.input: str = version.manifest.details["input"]
        self._base = Base.of(version, self)
        self.joins = bool(self._base.models)
        self._indexes: dict[str, IndexSearch] = {}
        self._functions: dict[str, Any] = {}  # of signatures without a delta
        try:
            self.corpus = Corpus(self._base, version)
            self.query_inputs = QueryInputs(self.index("exact").model.signatures)
        except BaseException:
            self.close()  # a service tries a damaged version again and again
            raise

    @classmethod
    def load(cls, models: str | Path, name: str = "twotower", version: int = 0) -> Retriever:
        """Opens a version, the newest where `version` is 0; ValueError as of `find_version`."""
        return cls(find_version(models, name, version))

    @property
    def num_candidates(self) -> int:
        return self.corpus.num_candidates - len(self.corpus.removed)

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
        has_scann = self.version.has_scann and import_scann() is not None
        return ("exact", "scann") if has_scann else ("exact",)

    def top_k(
        self,
        query_ids: Sequence[str] | None = None,
        k: int = 10,
        *,
        queries: Sequence[Mapping[str, Any]] | None = None,
        unknown_queries: str = "empty",
        **filters: Any,
    ) -> list[RetrieveResult]:
        """The k best candidates of each query that no filter removes.

        Example:
          >>> Retriever.load("models", "twotower").top_k(queries=[{"history": ["chai"]}])[0].known
          True

        Args:
          query_ids: raw ids.
          queries: in place of ids, see `RetrieveRequest`: what is known of each now.
          k: results for each of them.
          unknown_queries: "popular", "empty" or "error".
          **filters: and the index, see `RetrieveRequest`.

        Returns:
          One result a query, in their order. Where `known` is False there are no candidates, or
          with unknown_queries="popular" the most popular ones.
        """
        filters |= {"queries": queries, "unknown_queries": unknown_queries}
        return self.answer(RetrieveRequest(query_ids, k=k, **filters)).results

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
        `unknown_queries` is for requests that do not say it. Each gets its response, or the error
        that it alone gets.
        """
        by_id = [part for part in requests if part.queries is None and part.embeddings is None]
        described = [part for part in requests if part.queries is not None]
        made = {False: self.query_inputs.embed(by_id), True: self.query_inputs.embed(described)}
        embedded = [self._embedded(part, made[part.queries is not None]) for part in requests]
        outcomes: list[Outcome] = []
        for queries, hits in zip(embedded, self._search(embedded), strict=True):
            request, index = queries.request, self.index(queries.request.index)
            unknown = request.unknown_queries or unknown_queries
            try:
                answers = results(queries, index, hits, self.corpus, unknown)
            except ServiceError as error:
                outcomes.append(error)
                continue
            response = RetrieveResponse(
                self.version.number, index.kind, answers, queries.unknown_ids
            )
            outcomes.append(response)
        return outcomes

    def check(self, request: RetrieveRequest) -> CheckedQueries:
        """Looks up the filters of a request; InvalidRequest: this version cannot answer it."""
        if request.features is not None and self.input != served_model.EMBEDDING:
            raise InvalidRequest(f"Version {self.version.number} takes query_ids, not features.")
        if request.features is None and self.input != served_model.QUERY_ID:
            raise InvalidRequest(
                f"Version {self.version.number} was published without a query model, so query ids "
                'mean nothing to it: ask with features {"embedding": [...]}.'
            )
        specs = self.query_inputs.specs
        brings_history = request.queries is not None and served_model.HISTORY in specs
        has_seen = request.features is None and self.corpus.has_seen
        if request.exclude_seen and not (brings_history or has_seen):
            raise InvalidRequest(
                f"exclude_seen needs seen lists, but version {self.version.number} was published "
                "without: pass `exclude`, or export again with them."
            )
        if request.unknown_queries == "popular":
            self.corpus.check_popularity()
        self.index(request.index)
        ids, queries, embeddings = request.query_ids or [], None, None
        if request.queries is not None:
            queries = self.query_inputs.check(request.queries)
            ids = [query.get(served_model.QUERY_ID, "") for query in queries]
        elif request.features is not None:
            embeddings = given_embeddings(request.features, self.corpus.vectors.shape[1])
            ids = [""] * len(embeddings)
        "".join(ids).encode()  # TensorFlow takes no half of a surrogate pair
        return CheckedQueries(request, ids, queries, embeddings, self.corpus.filter_rows(request))

    def scores_all(self, request: RetrieveRequest) -> bool:
        """Whether all candidates must be scored, as an index cannot answer."""
        index = self.index(request.index)
        return index.kind == "exact" or request.k > max(index.k, index.widest)

    def history(self, query_id: str) -> list[str]:
        """Raw ids of the candidates that a query had in training; [] where it had none."""
        return self.corpus.encoded_ids.names(self.corpus.seen_rows(query_id))

    def warm_up(self) -> None:
        """Loads all indexes and tables, so that no request waits for them."""
        self.corpus.load()
        embedding = np.asarray(self.corpus.vectors[:1])
        if self.input == served_model.QUERY_ID:
            self.query_inputs.encoder(**self.query_inputs.tensors([{}]))
        for index in map(self.index, self.usable_indexes):
            index.search(embedding, self.k)
            if index.widest:
                index.search_wider(embedding, index.widest)

    def run(self, signature: str, **inputs: tf.Tensor) -> dict[str, np.ndarray]:
        """What `serving_default` or `retrieve` give, with rows for ids, -1 for no result."""
        encoders, index = self.query_inputs, self.index()
        encoder = encoders.encoder if signature == served_model.RETRIEVE else encoders.id_encoder
        if not len(self.corpus.added) and not len(self.corpus.removed):
            if signature not in self._functions:
                self._functions[signature] = index.after(encoder)
            outputs = self._functions[signature](**inputs)
            return dict(zip(_OUTPUTS, (output.numpy() for output in outputs), strict=True))
        embedded = arrays_of(encoder(**inputs))
        size = len(embedded[0])
        names, nothing = [""] * size, [np.empty(0, np.int64)] * size
        filters = Filters(self.corpus.num_candidates, self.corpus.removed, None, nothing)
        request = RetrieveRequest(names, k=self.k)
        queries = EmbeddedQueries(request, names, *embedded, filters, 0)
        [hits] = self._search([queries])
        rows, scores = np.full((size, self.k), -1), np.zeros((size, self.k), np.float32)
        for place, best in enumerate(best_of_known(queries, index, hits, self.corpus)):
            rows[place, : len(best[0])], scores[place, : len(best[0])] = best
        return dict(zip(_OUTPUTS, (rows, scores), strict=True))

    def close(self) -> None:
        """Frees what its SavedModels hold outside Python, where nobody else uses them.

        Call it after the last query.
        """
        self._indexes, self._functions = {}, {}
        models = self._base.leave(self)
        for model in models.values():
            destroy_tables(model)
        if "scann" in models:
            with contextlib.suppress(tf.errors.OpError):  # it cannot be built, and was not
                models["scann"].release()

    def index(self, name: str = "default") -> IndexSearch:
        """An index, loaded when it is first asked for; ValueError where it cannot be used here."""
        name = self.default_index if name == "default" else name
        if (index := self._indexes.get(name)) is None:
            with self._base.loading:
                models = self._base.models
                if name not in models:
                    version, is_exact = self.version, name == "exact"
                    models[name] = load_exact(version.path) if is_exact else version.load(name)
                index = IndexSearch(models[name], name, self.k, self.corpus)
                index = self._indexes.setdefault(name, index)
        return index

    def _embedded(self, part: CheckedQueries, made: Iterator[Embedded]) -> EmbeddedQueries:
        """One request with its embeddings, its own or the next ones of its encoder."""
        request, names, queries, given, (excluded, allowed, unknown_ids) = part
        size = len(names)
        if given is not None:
            embedded = given, np.ones(size, bool), np.zeros(size, np.int32)
        else:
            embedded = next(made)
        seen = [np.empty(0, np.int64)] * size
        if request.exclude_seen:
            seen = [self.corpus.seen_rows(query_id) for query_id in names]
            for place, query in enumerate(queries or ()):
                chosen = self.corpus.candidate_rows(query.get(served_model.HISTORY, ()))
                seen[place] = np.concatenate([seen[place], chosen])
        filters = Filters(self.corpus.num_candidates, excluded, allowed, seen, request.min_score)
        return EmbeddedQueries(request, names, *embedded, filters, unknown_ids)

    def _search(self, requests: Sequence[EmbeddedQueries]) -> list[Hits | None]:
        """The K results of the index that each request names, one search for each index."""
        hits: list[Hits | None] = [None] * len(requests)
        places: dict[IndexSearch, list[int]] = {}
        for place, queries in enumerate(requests):
            if queries.asks_index(self.k):
                places.setdefault(self.index(queries.request.index), []).append(place)
        for index, of_index in places.items():
            parts = [requests[place] for place in of_index]
            embeddings = np.concatenate([part.embeddings for part in parts])
            joined = index.search(embeddings, max(part.request.k for part in parts))
            ends = np.cumsum([len(part.embeddings) for part in parts])[:-1]
            of_parts = map(Hits, *(np.split(array, ends) for array in joined))
            for place, part_hits in zip(of_index, of_parts, strict=True):
                hits[place] = part_hits
        return hits
