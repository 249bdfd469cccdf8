"""Top-k retrieval from a model version, with filters and history; knows no network."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from serving.retrieval import answers
from serving.retrieval.answers import Asked, Question
from serving.retrieval.embedding_input import given_embeddings
from serving.retrieval.index_search import Found, IndexSearch
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse, UnknownQuery
from serving.retrieval.tables import RetrievalTables
from serving.version import served_model
from serving.version.index import import_scann
from serving.version.versions import RETRIEVAL, Version, find_version

_log = logging.getLogger(__name__)
tf.config.experimental.enable_tensor_float_32_execution(False)  # scores of a GPU are exact, too

Outcome = RetrieveResponse | ValueError | UnknownQuery


class Result(NamedTuple):
    """The answer to one query, best candidate first; empty where the query is unknown."""

    query_id: str
    known: bool
    candidate_ids: list[str]
    scores: list[float]


class Retriever:
    """Answers queries from one model version; may be shared by threads.

    Attributes:
      version: the version that answers, with its manifest.
      k: K, results of its indexes; see `RetrieveRequest` for more.
      input: what it takes, "query_id" or, of a version without a query model, "embedding".
    """

    def __init__(self, version: Version, index: str = "default") -> None:
        """Loads the SavedModel with exact search; ScaNN is loaded when first asked for.

        Args:
          version: the version that answers.
          index: what requests for the default index get; exact search where there is no ScaNN.
        """
        self.version = version
        self._wanted_index = index
        self.k: int = version.manifest.details["k"]
        self.input: str = version.manifest.details["input"]
        self._tables = RetrievalTables(version.path / RETRIEVAL)
        self._loading = threading.Lock()
        self._indexes: dict[str, IndexSearch] = {}
        self._encoder = self.model("exact").signatures[served_model.QUERY_EMBEDDING]

    @classmethod
    def load(cls, models: str | Path, name: str = "twotower", version: int = 0) -> Retriever:
        """Opens a version: the newest where `version` is 0.

        Raises:
          ValueError: there is no such version, or it cannot be used; see `find_version`.
        """
        return cls(find_version(models, name, version))

    @property
    def num_candidates(self) -> int:
        """N, the size of the corpus."""
        return self._tables.num_candidates

    @property
    def has_popularity(self) -> bool:
        """Whether it can answer unknown queries with popular candidates."""
        return self._tables.has_popularity

    @cached_property
    def default_index(self) -> str:
        """What index="default" stands for here: "exact" or "scann", as far as there is one."""
        wanted = self._wanted_index
        wanted = self.version.manifest.details["default_index"] if wanted == "default" else wanted
        if wanted == "scann" and wanted not in self.usable_indexes:
            path = self.version.path
            _log.warning("%s has no ScaNN index, or scann is missing: it answers exactly.", path)
            return "exact"
        return wanted

    @cached_property
    def usable_indexes(self) -> tuple[str, ...]:
        """The indexes that requests may name."""
        has_scann = self.version.has_scann and import_scann() is not None
        return ("exact", "scann") if has_scann else ("exact",)

    def model(self, index: str = "default") -> Any:
        """The loaded SavedModel of an index, for its signatures.

        Raises:
          ValueError: the version has no such index, or it cannot be used here.
        """
        return self._index(index).model

    def top_k(
        self,
        query_ids: Sequence[str],
        k: int,
        *,
        index: str = "default",
        exclude_seen: bool = False,
        exclude: Sequence[str] = (),
        allow: Sequence[str] | None = None,
        min_score: float | None = None,
        unknown_queries: str = "empty",
    ) -> list[Result]:
        """The k best candidates of each query that no filter removes; see `RetrieveRequest`.

        Returns:
          One result a query, in their order. Where `known` is False there are no candidates, or
          with unknown_queries="popular" the most popular ones.

        Raises:
          ValueError: an argument is not valid, or the version cannot do what it asks for.
          UnknownQuery: one is unknown and unknown_queries is "error".
        """
        request = RetrieveRequest(
            query_ids,
            k=k,
            exclude_seen=exclude_seen,
            exclude=exclude,
            allow=allow,
            min_score=min_score,
            index=index,
            unknown_queries=unknown_queries,
        )
        results = self.answer(request).results
        return [Result(one.query_id, one.known, one.candidate_ids, one.scores) for one in results]

    def answer(
        self, request: RetrieveRequest, *, unknown_queries: str = "empty"
    ) -> RetrieveResponse:
        """Answers one request; see `answer_all`.

        Raises:
          ValueError: the version cannot do what the request asks for.
          UnknownQuery: it does not know a query, and that was to be an error.
        """
        [outcome] = self.answer_all([request], unknown_queries=unknown_queries)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def answer_all(
        self, requests: Sequence[RetrieveRequest], *, unknown_queries: str = "empty"
    ) -> list[Outcome]:
        """Answers many requests, with one search of an index for all of their queries.

        A known query gets k results wherever so many candidates pass its filters. Where the K
        results of the index leave fewer, ScaNN is asked for more than K, and what is then still
        missing is searched exactly among all that the query may get.

        Args:
          requests: any mixture.
          unknown_queries: "popular", "empty" or "error", where a request does not say it.

        Returns:
          For each request its response, or the error that it alone gets.
        """
        questions = [self._question(request) for request in requests]
        return self.answer_questions(questions, unknown_queries=unknown_queries)

    def answer_questions(
        self, questions: Sequence[Question | ValueError], *, unknown_queries: str = "empty"
    ) -> list[Outcome]:
        """As `answer_all`, for requests that are checked, or parts of them."""
        outcomes: list[Outcome | None] = [
            one if isinstance(one, ValueError) else None for one in questions
        ]
        asked = self._embed([one for one in questions if isinstance(one, Question)])
        found = self._search(asked)
        answered = zip(asked, found, strict=True)
        for place, refused in enumerate(outcomes):
            if not refused:
                outcomes[place] = self._respond(*next(answered), unknown_queries)
        return outcomes  # type: ignore[return-value]

    def question(self, request: RetrieveRequest) -> Question:
        """Checks a request and looks up its filters, once for all of its queries.

        Raises:
          ValueError: this version cannot do what the request asks for.
        """
        if request.features is not None and self.input != served_model.EMBEDDING:
            raise ValueError(f"Version {self.version.number} takes query_ids, not features.")
        if request.query_ids is not None and self.input != served_model.QUERY_ID:
            raise ValueError(
                f"Version {self.version.number} was published without a query model, so query ids "
                'mean nothing to it: ask with features {"embedding": [...]}.'
            )
        if request.exclude_seen and not (request.query_ids is not None and self._tables.has_seen):
            raise ValueError(
                f"exclude_seen needs seen lists, but version {self.version.number} was published "
                "without: pass `exclude`, or export again with them."
            )
        if request.unknown_queries == "popular":
            self._tables.check_popularity()
        self._index(request.index)
        ids: Sequence[str] = request.query_ids or []
        "".join(ids).encode()  # TensorFlow takes no half of a surrogate pair
        embeddings = None
        if request.features is not None:
            embeddings = given_embeddings(request.features, self._tables.vectors.shape[1])
            ids = [""] * len(embeddings)
        return Question(request, ids, embeddings, self._tables.filter_rows(request))

    def scores_all(self, question: Question) -> bool:
        """Whether all candidates must be scored, as an index cannot answer."""
        index = self._index(question.request.index)
        return index.kind == "exact" or question.request.k > max(index.k, index.widest)

    def history(self, query_id: str) -> list[str]:
        """Raw ids of the candidates that a query had in training; [] where it had none."""
        return self._tables.names(self._tables.seen_rows(query_id))

    def query_ids(self, limit: int = 10) -> list[str]:
        """Some queries that have a history, the first ones; [] without seen lists."""
        return self._tables.query_ids(limit)

    def warm_up(self) -> None:
        """Loads all indexes and tables, so that no request waits for them."""
        self._tables.load()
        some = np.asarray(self._tables.vectors[:1])
        for index in map(self._index, self.usable_indexes):
            index.search(some)
            if index.widest:
                index.search_wider(some, index.widest)

    def close(self) -> None:
        """Frees what a loaded ScaNN index holds outside Python; call it after the last query."""
        with self._loading:
            index = self._indexes.pop("scann", None)
            if index is not None:
                index.model.release()

    def _index(self, name: str) -> IndexSearch:
        name = self.default_index if name == "default" else name
        with self._loading:
            if name not in self._indexes:
                model = self.version.load(name)
                self._indexes[name] = IndexSearch(model, name, self.k, self.num_candidates)
            return self._indexes[name]

    def _question(self, request: RetrieveRequest) -> Question | ValueError:
        try:
            return self.question(request)
        except ValueError as error:
            return error

    def _embed(self, questions: Sequence[Question]) -> list[Asked]:
        """The embeddings of all queries by one call, cut into those of each question."""
        if self.input == served_model.EMBEDDING:
            parts = [one.embeddings for one in questions if one.embeddings is not None]
            knowns = [np.ones(len(part), bool) for part in parts]
        else:
            joined = [query_id for one in questions for query_id in one.query_ids]
            outputs = self._encoder(**{served_model.QUERY_ID: tf.constant(joined, tf.string)})
            ends = np.cumsum([len(one.query_ids) for one in questions], dtype=int)[:-1]
            parts = np.split(outputs[served_model.EMBEDDING].numpy(), ends)
            knowns = np.split(outputs[served_model.KNOWN].numpy(), ends)
        return [  # of no questions at all there is one empty part
            Asked(
                one.request,
                one.query_ids,
                part,
                known,
                self._tables.filters(one.request, one.filter_rows, one.query_ids),
                one.filter_rows.unknown_ids,
            )
            for one, part, known in zip(questions, parts, knowns, strict=False)
        ]

    def _search(self, asked: Sequence[Asked]) -> list[Found | None]:
        """The K results of the index that each request names, one search for each index."""
        found: list[Found | None] = [None] * len(asked)
        places: dict[IndexSearch, list[int]] = {}
        for place, one in enumerate(asked):
            if answers.asks_index(one, self.k):
                places.setdefault(self._index(one.request.index), []).append(place)
        for index, those in places.items():
            rows, scores = index.search(np.concatenate([asked[at].embeddings for at in those]))
            ends = np.cumsum([len(asked[at].known) for at in those])[:-1]
            parts = zip(np.split(rows, ends), np.split(scores, ends), strict=True)
            for place, part in zip(those, parts, strict=True):
                found[place] = Found(*part)
        return found

    def _respond(self, asked: Asked, found: Found | None, unknown_queries: str) -> Outcome:
        request = asked.request
        index = self._index(request.index)
        choice = request.unknown_queries or unknown_queries
        try:
            results = answers.results(asked, index, found, self._tables, choice)
        except (ValueError, UnknownQuery) as error:
            return error
        return RetrieveResponse(self.version.number, index.kind, results, asked.unknown_ids)
