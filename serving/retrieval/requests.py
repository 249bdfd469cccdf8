"""What a retriever is asked and what it answers; knows no network."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from serving.errors import InvalidRequest, NotFound
from serving.retrieval.settings import INDEXES, UNKNOWN_QUERIES
from serving.version.served_model import EMBEDDING

MAX_NUMBER = 1e15  # of an embedding; scores stay finite with vectors of any sensible size


class UnknownQuery(NotFound, LookupError):  # noqa: N818 - the name of an answer
    """The version does not know a query, and was asked to say so."""


@dataclasses.dataclass(frozen=True)
class RetrieveRequest:
    """One or several queries with the filters that hold for all of them.

    Attributes:
      query_ids: raw ids, B of them; None where `queries` or `features` are given.
      queries: in place of ids, B mappings: query_id, history (raw ids of candidates, the oldest
        first) and attributes by name, each where it is known. What is left out of a known id is
        what the version has stored. The version says what it takes: see `Retriever.query_inputs`.
      features: inputs of the model by name, B rows each, in place of ids. A version without a
        query model takes {"embedding": float32 [B, D]}; those with one take ids only.
      k: results for each query; above the K of the version is legal: an index with a wide search
        is asked for up to eight times as many, beyond that the search is exact.
      exclude_seen: leave out what a query had in training.
      exclude: raw ids of candidates to leave out.
      allow: raw ids of the only candidates to choose from; None for all. An empty list allows
        none. An id that is not in the corpus is left aside and counted, here and in `exclude`.
      where: conditions on attributes of candidates, all of which hold: {"brand": ["a", "b"],
        "price": {"min": 1, "max": 20}, "in_stock": True}. Of texts any may be meant, and of a
        column of lists any value may be it. The version says what it has: `Corpus.attributes`.
      min_score: leave out candidates below it, so that there may be fewer than k; None for no
        limit. Popular candidates in place of an answer have no such score and are not cut.
      index: "default", "exact" or "scann".
      unknown_queries: "popular", "empty" or "error"; None for what the service is set to.
    """

    query_ids: Sequence[str] | None = None
    queries: Sequence[Mapping[str, Any]] | None = None
    features: Mapping[str, Any] | None = None
    k: int = 10
    exclude_seen: bool = False
    exclude: Sequence[str] = ()
    allow: Sequence[str] | None = None
    where: Mapping[str, Any] | None = None
    min_score: float | None = None
    index: str = "default"
    unknown_queries: str | None = None

    def __post_init__(self) -> None:
        if [self.query_ids, self.queries, self.features].count(None) != 2:
            raise InvalidRequest("a request must have one of query_ids, queries and features.")
        for name in ("query_ids", "exclude", "allow"):
            ids, rule = getattr(self, name), "be a sequence of strings"
            if ids is not None or name == "exclude":
                is_list = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
                _require(is_list, name, rule, ids)
                for raw_id in ids:
                    _require(isinstance(raw_id, str), name, rule, raw_id, " in it")
        is_list = isinstance(self.queries, Sequence) and not isinstance(self.queries, str | bytes)
        _require(self.queries is None or is_list, "queries", "be a list", self.queries)
        for query in self.queries or ():
            _require(isinstance(query, Mapping), "queries", "be mappings", query)
        for name in ("features", "where"):
            value = getattr(self, name)
            is_mapping = value is None or isinstance(value, Mapping)
            _require(is_mapping, name, "map names to values", value)
        _require(type(self.k) is int and self.k >= 1, "k", "be at least 1", self.k)
        is_bool = isinstance(self.exclude_seen, bool)
        _require(is_bool, "exclude_seen", "be true or false", self.exclude_seen)
        score = self.min_score
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        is_score = score is None or (is_number and math.isfinite(score))
        _require(is_score, "min_score", "be a finite number", score)
        _require(self.index in INDEXES, "index", f"be one of {', '.join(INDEXES)}", self.index)
        choice, rule = self.unknown_queries, f"be one of {', '.join(UNKNOWN_QUERIES)}"
        _require(choice is None or choice in UNKNOWN_QUERIES, "unknown_queries", rule, choice)


class RetrieveResult(NamedTuple):
    """The answer to one query, best candidate first."""

    query_id: str  # as asked; "" where features were given
    known: bool  # whether the model knows the query
    candidate_ids: list[str]  # raw ids, at most k
    scores: list[float]
    # "popular" where these are the most popular candidates in place of an answer; their scores
    # are then counts of training rows
    fallback: str = ""
    unknown_history: int = 0  # ids of the history in the request that the model does not know
    titles: Sequence[str] = ()  # of the candidates, where the version has a title column


@dataclasses.dataclass(frozen=True)
class RetrieveResponse:
    """The answer to a request."""

    version: int  # number of the version that answered
    index: str  # which index it used where filters left enough of it, "exact" or "scann"
    results: list[RetrieveResult]  # one for each query, in their order
    unknown_ids: int = 0  # how many different ids of `exclude` and `allow` are not in the corpus


def given_embeddings(features: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """The embeddings of a request, float32 [B, D]; InvalidRequest: they have another form."""
    rule = f"features must be {{'{EMBEDDING}': numbers [B, {dimensions}]}}"
    if set(features) != {EMBEDDING}:
        raise InvalidRequest(f"{rule}, got the names {[str(name)[:40] for name in features][:5]}.")
    try:
        given = np.asarray(features[EMBEDDING], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"{rule}: they are not numbers in rows of one length.") from error
    if given.size == 0:
        given = given.reshape(0, dimensions)
    if given.ndim != 2 or given.shape[1] != dimensions:
        raise InvalidRequest(f"{rule}, got the shape {list(given.shape)}.")
    if not (np.abs(given) <= MAX_NUMBER).all():
        raise InvalidRequest(f"{rule} of at most {MAX_NUMBER:g}, got a larger one or NaN.")
    return given.astype(np.float32)


def _require(is_so: bool, name: str, rule: str, value: Any, where: str = "") -> None:
    if not is_so:
        raise InvalidRequest(f"{name} must {rule}, got {shown(value)}{where}.")


def shown(value: Any) -> str:
    """A value for a message, cut short: a client may send megabytes."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
