"""The bodies of `:retrieve` and of errors, as they stand in the OpenAPI description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.contract.settings import did_you_mean
from serving.errors import InvalidRequest
from serving.rest.codec import PIECE_VALUES, check_lengths, dump, json_list, parse
from serving.rest.tensors import to_json_values
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse, RetrieveResult

_MAX_MISTAKES = 3  # that a message names
_MAX_FIELDS = 20  # of an object


class RetrieveBody(BaseModel):
    """A question: the best candidates of each query."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    query_ids: list[str] | None = Field(  # of wrong ids, one is told
        None, fail_fast=True, description="Raw ids of the queries.", examples=[["user 1"]]
    )
    queries: list[dict[str, Any]] | None = Field(
        None,
        fail_fast=True,
        description="In place of ids, what is known of each query now: query_id, history (ids of "
        "candidates, the oldest first), attributes by name; `request_embedding` in the metadata "
        "lists what the model takes. What a known id leaves out is what is stored of it.",
        examples=[[{"history": ["item 1", "item 2"], "town": "Ulm"}]],
    )
    features: dict[str, list[Any]] | None = Field(
        None,
        description="In place of ids, the inputs of a model without a query model: "
        '{"embedding": [[...], ...]}, one row for each query.',
    )
    k: int = Field(10, ge=1, description="Results for each query; the service has a limit.")
    exclude_seen: bool = Field(False, description="Leave out what a query had in training.")
    exclude: list[str] = Field([], fail_fast=True, description="Ids of candidates to leave out.")
    allow: list[str] | None = Field(
        None, fail_fast=True, description="Ids of the only candidates to choose from."
    )
    where: dict[str, Any] | None = Field(
        None,
        description="Conditions on attributes of candidates, all of which hold: texts, of which "
        "any is meant, true or false, numbers from min to max.",
        examples=[{"brand": ["a", "b"], "price": {"max": 20}, "in_stock": True}],
    )
    min_score: float | None = Field(None, description="Leave out candidates below it.")
    index: Literal["default", "exact", "scann"] = Field(
        "default", description="default is the faster one that keeps the promised recall."
    )
    unknown_queries: Literal["popular", "empty", "error"] | None = Field(
        None, description="What an unknown query gets; null for what the service is set to."
    )


class CandidateAnswer(BaseModel):
    """One result."""

    id: str
    score: float
    title: str | None = Field(None, description="Where the version has a title column.")


class ResultAnswer(BaseModel):
    """The answer to one query, best candidate first."""

    query_id: str
    known: bool = Field(description="Whether the model knows the query.")
    fallback: Literal["", "popular"] = Field(
        description="popular: these are popular candidates in place of an answer."
    )
    unknown_history: int = Field(description="Ids of its history that the model does not know.")
    candidates: list[CandidateAnswer]


class RetrieveAnswer(BaseModel):
    """The answers to all queries, in their order."""

    model: str
    version: int
    index: Literal["exact", "scann"]
    unknown_ids: int = Field(description="Ids of `exclude` and `allow` not in the corpus.")
    results: list[ResultAnswer]


class ErrorAnswer(BaseModel):
    """Why there is no answer."""

    error: str


def parse_retrieve(body: bytes | bytearray, max_rows: int) -> RetrieveRequest:
    """Reads a body of `:retrieve`; InvalidRequest names the fields that break a rule."""
    try:
        content = parse(body)
    except ValueError as error:
        raise InvalidRequest(f"body: Invalid JSON: {error}") from error
    if isinstance(content, dict):  # what is far too large is refused before its parts are read
        features = content.get("features")
        features = features if isinstance(features, dict) else {}
        where = content.get("where")
        conditions = len(where) if isinstance(where, dict) else 0
        rows = [content.get("query_ids"), content.get("queries"), *features.values()]
        check_lengths(rows, max_rows)
        if max(len(content), len(features), conditions) > _MAX_FIELDS:
            raise InvalidRequest(f"An object may have at most {_MAX_FIELDS} fields here.")
    try:
        return RetrieveRequest(**dict(RetrieveBody.model_validate(content)))
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        lines = []
        for mistake in mistakes[:_MAX_MISTAKES]:
            place = ".".join(str(part)[:40] for part in mistake["loc"]) or "body"
            text = mistake["msg"][:200]
            if mistake["type"] == "extra_forbidden":
                known = RetrieveBody.model_fields
                hint = did_you_mean(place, known, "")
                text = f"there is no such field, a body has {', '.join(known)}. {hint}".rstrip()
            lines.append(f"{place}: {text}")
        if len(mistakes) > _MAX_MISTAKES:
            lines.append(f"and {len(mistakes) - _MAX_MISTAKES} more")
        raise InvalidRequest("; ".join(lines)) from error


def encode_retrieve(model: str, response: RetrieveResponse, deadline: float = math.inf) -> bytes:
    """The body that answers `:retrieve`, a `RetrieveAnswer`; deadline as in `encode_outputs`."""
    results = response.results
    longest = max((len(result.scores) for result in results), default=0)
    size = max(1, PIECE_VALUES // (1 + longest))
    pieces = (_piece(results[start : start + size]) for start in range(0, len(results), size))
    fields = ("version", "index", "unknown_ids")
    head = {"model": model} | {field: getattr(response, field) for field in fields}
    return b'%s,"results":%s}' % (dump(head)[:-1], json_list(pieces, deadline))


def _piece(results: Sequence[RetrieveResult]) -> list[dict[str, Any]]:
    scores = iter(_shortest([score for result in results for score in result.scores]))
    return [
        {
            "query_id": result.query_id,
            "known": result.known,
            "fallback": result.fallback,
            "unknown_history": result.unknown_history,
            "candidates": [
                {"id": raw_id, "score": next(scores)} | ({"title": title} if title else {})
                for raw_id, title in zip_longest(result.candidate_ids, result.titles)
            ],
        }
        for result in results
    ]


def _shortest(scores: list[float]) -> Any:
    """The scores as float32 where that is what they are: with fewer digits in JSON."""
    wide = np.array(scores, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    is_same = np.array_equal(narrow, wide, equal_nan=True)  # counts may need more than 24 bits
    return to_json_values("score", narrow if is_same else wide)
