"""What a retriever is asked and what it answers; knows no network."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.retrieval.settings import INDEXES, UNKNOWN_QUERIES
from serving.version.served_model import EMBEDDING

MAX_NUMBER = 1e15  # of an embedding; scores stay finite with vectors of any sensible size


class UnknownQuery(LookupError):  # noqa: N818 - it names what happened, not a fault
    """The version does not know a query, and was asked to say so."""


@dataclasses.dataclass(frozen=True)
class RetrieveRequest:
    """One or several queries with the filters that hold for all of them.

    Attributes:
      query_ids: raw ids, B of them; None where `features` are given.
      features: inputs of the model by name, B rows each, in place of ids. A version without a
        query model takes {"embedding": float32 [B, D]}; those with one take ids only.
      k: results for each query; above the K of the version is legal: an index with a wide search
        is asked for up to eight times as many, beyond that the search is exact.
      exclude_seen: leave out what a query had in training.
      exclude: raw ids of candidates to leave out.
      allow: raw ids of the only candidates to choose from; None for all. An empty list allows
        none. An id that is not in the corpus is left aside and counted, here and in `exclude`.
      min_score: leave out candidates below it, so that there may be fewer than k; None for no
        limit. Popular candidates in place of an answer have no such score and are not cut.
      index: "default", "exact" or "scann".
      unknown_queries: "popular", "empty" or "error"; None for what the service is set to.
    """

    query_ids: Sequence[str] | None = None
    features: Mapping[str, Any] | None = None
    k: int = 10
    exclude_seen: bool = False
    exclude: Sequence[str] = ()
    allow: Sequence[str] | None = None
    min_score: float | None = None
    index: str = "default"
    unknown_queries: str | None = None

    def __post_init__(self) -> None:
        if (self.query_ids is None) == (self.features is None):
            raise ValueError("a request must have query_ids or features, and not both.")
        for name in ("query_ids", "exclude", "allow"):
            _check_ids(name, getattr(self, name))
        if self.features is not None and not isinstance(self.features, Mapping):
            raise ValueError(f"features must map names to values, got {_shown(self.features)}.")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be at least 1, got {_shown(self.k)}.")
        if not isinstance(self.exclude_seen, bool):
            raise ValueError(
                f"exclude_seen must be true or false, got {_shown(self.exclude_seen)}."
            )
        _check_score(self.min_score)
        _check_choice("index", self.index, INDEXES)
        if self.unknown_queries is not None:
            _check_choice("unknown_queries", self.unknown_queries, UNKNOWN_QUERIES)


@dataclasses.dataclass(frozen=True)
class RetrieveResult:
    """The answer to one query, best candidate first.

    Attributes:
      query_id: as asked; "" where features were given.
      known: whether the model knows the query.
      fallback: "popular" where the candidates are the most popular ones in place of an answer;
        their scores are then counts of training rows. "" otherwise.
      candidate_ids: raw ids, at most k.
      scores: float, one for each candidate.
    """

    query_id: str
    known: bool
    fallback: str
    candidate_ids: list[str]
    scores: list[float]


@dataclasses.dataclass(frozen=True)
class RetrieveResponse:
    """The answer to a request.

    Attributes:
      version: number of the version that answered.
      index: which index it used where filters left enough of it, "exact" or "scann".
      results: one for each query, in their order.
      unknown_ids: how many different ids of `exclude` and `allow` are not in the corpus.
    """

    version: int
    index: str
    results: list[RetrieveResult]
    unknown_ids: int = 0


def given_embeddings(features: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """The embeddings that a request brings, for versions without a query model: float32 [B, D].

    Args:
      features: must be {"embedding": numbers [B, D]}, as lists or an array.
      dimensions: D.

    Raises:
      ValueError: they are not that.
    """
    rule = f"features must be {{'{EMBEDDING}': numbers [B, {dimensions}]}}"
    if set(features) != {EMBEDDING}:
        raise ValueError(f"{rule}, got the names {[str(name)[:40] for name in features][:5]}.")
    try:
        given = np.asarray(features[EMBEDDING], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{rule}: they are not numbers in rows of one length.") from error
    if given.size == 0:
        given = given.reshape(0, dimensions)
    if given.ndim != 2 or given.shape[1] != dimensions:
        raise ValueError(f"{rule}, got the shape {list(given.shape)}.")
    if not (np.abs(given) <= MAX_NUMBER).all():
        raise ValueError(f"{rule} of at most {MAX_NUMBER:g}, got a larger one or NaN.")
    return given.astype(np.float32)


def _check_choice(name: str, choice: Any, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_shown(choice)}.")


def _check_ids(name: str, ids: Any) -> None:
    if ids is None and name != "exclude":
        return
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise ValueError(f"{name} must be a sequence of strings, got {_shown(ids)}.")
    for raw_id in ids:
        if not isinstance(raw_id, str):
            raise ValueError(f"{name} must be a sequence of strings, got {_shown(raw_id)} in it.")


def _check_score(score: Any) -> None:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and math.isfinite(score)):
        raise ValueError(f"min_score must be a finite number, got {_shown(score)}.")


def _shown(value: Any) -> str:
    """A value for a message, cut short: a client may send megabytes."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
