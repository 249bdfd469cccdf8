"""The bodies of `:retrieve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.rest.codec import PIECE_VALUES, check_lengths, dump, json_list, parse
from serving.rest.tensors import shown, to_json_values
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse, RetrieveResult

_MAX_FIELDS = 20  # of an object


def parse_retrieve(body: bytes | bytearray, max_rows: int) -> RetrieveRequest:
    """Reads a body of `:retrieve`; InvalidRequest names the fields that break a rule."""
    try:
        content = parse(body)
    except ValueError as error:
        raise InvalidRequest(f"body: Invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {shown(content)}.")
    features, where = (
        part if isinstance(part := content.get(name), dict) else {}
        for name in ("features", "where")
    )
    check_lengths([content.get("query_ids"), content.get("queries"), *features.values()], max_rows)
    if max(map(len, (content, features, where))) > _MAX_FIELDS:  # before their parts are read
        raise InvalidRequest(f"An object may have at most {_MAX_FIELDS} fields here.")
    return RetrieveRequest(**content)


def encode_retrieve(model: str, response: RetrieveResponse, deadline: float = math.inf) -> bytes:
    """The body that answers `:retrieve`; deadline as in `encode_outputs`."""
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
