"""What a retriever is asked and what it answers; knows no network."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.contract.settings import did_you_mean
from serving.errors import InvalidRequest, NotFound
from serving.version.served_model import EMBEDDING

_MAX_MISTAKES = 3  # that a message names
MAX_NUMBER = 1e15  # of an embedding; scores stay finite with vectors of any sensible size


class UnknownQuery(NotFound, LookupError):  # noqa: N818 - the name of an answer
    """The version does not know a query, and was asked to say so."""


def _ids(default: Any, description: str, **extra: Any) -> Any:
    """A field of ids; an error names the first id that is not text."""
    return Field(default, fail_fast=True, strict=False, description=description, **extra)


class RetrieveRequest(BaseModel):
    """A question: the best candidates of each query, with filters that hold for all of them.

    Raises:
      InvalidRequest: a field breaks a rule; the message names it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    query_ids: list[str] | None = _ids(None, "Raw ids of the queries.", examples=[["user 1"]])
    queries: list[dict[str, Any]] | None = _ids(
        None,
        "In place of ids, what is known of each query now: query_id, history (ids of "
        "candidates, the oldest first), attributes by name; `request_embedding` in the metadata "
        "lists what the model takes. What a known id leaves out is what is stored of it.",
        examples=[[{"history": ["item 1", "item 2"], "town": "Ulm"}]],
    )
    features: dict[str, Any] | None = Field(
        None,
        description="In place of ids, the inputs of a model without a query model: "
        '{"embedding": [[...], ...]}, one row for each query.',
    )
    k: int = Field(
        10,
        ge=1,
        description="Results for each query; the service has a limit. Above the K of the version "
        "an index with a wide search is asked for up to eight times as many, then all are scored.",
    )
    exclude_seen: bool = Field(False, description="Leave out what a query had in training.")
    exclude: list[str] = _ids((), "Ids of candidates to leave out.")
    allow: list[str] | None = _ids(
        None,
        "Ids of the only candidates to choose from; an empty list allows none. What is not in "
        "the corpus is left aside and counted, here and in `exclude`.",
    )
    where: dict[str, Any] | None = Field(
        None,
        description="Conditions on attributes of candidates, all of which hold: texts, of which "
        "any is meant, true or false, numbers from min to max.",
        examples=[{"brand": ["a", "b"], "price": {"max": 20}, "in_stock": True}],
    )
    min_score: float | None = Field(
        None, description="Leave out candidates below it, but for popular ones of a fallback."
    )
    index: Literal["default", "exact", "scann"] = Field(
        "default", description="default is the faster one that keeps the promised recall."
    )
    unknown_queries: Literal["popular", "empty", "error"] | None = Field(
        None, description="What an unknown query gets; null for what the service is set to."
    )

    def __init__(self, /, query_ids: Sequence[str] | None = None, **fields: Any) -> None:
        try:
            super().__init__(query_ids=query_ids, **fields)
        except ValidationError as error:
            raise InvalidRequest(_described(error)) from error
        if [self.query_ids, self.queries, self.features].count(None) != 2:
            raise InvalidRequest("a request must have one of query_ids, queries and features.")


def _described(error: ValidationError) -> str:
    mistakes = error.errors(include_url=False, include_context=False)
    lines = []
    for mistake in mistakes[:_MAX_MISTAKES]:
        place = ".".join(str(part)[:40] for part in mistake["loc"])
        text = f"{mistake['msg'][:200]}, got {shown(mistake['input'])}"
        if mistake["type"] == "extra_forbidden":
            known = RetrieveRequest.model_fields
            hint = did_you_mean(place, known, "")
            text = f"there is no such field, a body has {', '.join(known)}. {hint}".rstrip()
        lines.append(f"{place}: {text}")
    if len(mistakes) > _MAX_MISTAKES:
        lines.append(f"and {len(mistakes) - _MAX_MISTAKES} more")
    return "; ".join(lines)


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


def shown(value: Any) -> str:
    """A value for a message, cut short: a client may send megabytes."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
