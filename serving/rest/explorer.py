"""The pages for people: the explorer with the two routes that it needs, and the API's own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json

from serving.errors import InvalidRequest
from serving.rest import openapi as rest_openapi
from serving.rest.routes import CHOICES, add, as_json
from serving.retrieval.retriever import Retriever
from serving.runtime.client_call import counted, whole_number
from serving.runtime.service import Service

PAGES = {"/": "explorer.html", "/docs": "openapi.html"}

_MOST_LISTED = 1000  # ids in one answer


class Page:
    """An HTML file beside this one; it shows nothing of the models without the routes behind."""

    def __init__(self, name: str) -> None:
        self._content = Path(__file__).with_name(name).read_bytes()
        self._headers = {
            "content-security-policy": _policy(self._content.decode()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    async def show(self, request: Request) -> Response:
        """Answers with the page."""
        return Response(self._content, headers=self._headers, media_type="text/html")


class Explorer:
    """Serves the pages and tells what the explorer asks about queries."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes."""
        for path, name in PAGES.items():
            add(app, "GET", path, Page(name).show, rest_openapi.PAGE)
        for choice in CHOICES:
            model = "/v1/models/{model:name}" + choice
            add(app, "GET", model + ":sample_queries", self._samples, rest_openapi.SAMPLES)
            add(app, "GET", model + ":history", self._history, rest_openapi.HISTORY)

    async def _samples(self, request: Request) -> Response:
        limit = _limit(request)
        return self._about(
            request,
            "sample_queries",
            lambda retriever: {
                "input": retriever.input,
                "k": retriever.k,
                "default_index": retriever.default_index,
                "num_candidates": retriever.num_candidates,
                "query_ids": retriever.query_ids(limit),
            },
        )

    async def _history(self, request: Request) -> Response:
        limit, query_id = _limit(request), request.query_params.get("query_id")

        def history(retriever: Retriever) -> dict[str, Any]:
            if query_id is None:
                raise InvalidRequest("The query parameter query_id is missing.")
            seen = retriever.history(query_id)
            return {"query_id": query_id, "total": len(seen), "candidate_ids": seen[:limit]}

        return self._about(request, "history", history)

    def _about(
        self, request: Request, api: str, tell: Callable[[Retriever], dict[str, Any]]
    ) -> Response:
        """What the retriever of a version tells, as JSON."""
        asked = request.path_params
        with (
            counted(self._service, request.state.call, api, asked["model"]),
            self._service.retriever(**asked) as retriever,
        ):
            content = {"model": asked["model"], "version": retriever.version.number}
            return as_json(to_json({**content, **tell(retriever)}))


def _limit(request: Request) -> int:
    """The query parameter `limit`."""
    limit = whole_number(request.query_params.get("limit", "100"), _MOST_LISTED)
    if not limit:
        raise InvalidRequest(f"The query parameter limit must be 1 to {_MOST_LISTED}.")
    return limit


def _policy(page: str) -> str:
    """A policy that lets the page run its own script and style, and ask its own server."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    for tag in ("script", "style"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [hashlib.sha256(one.encode()).digest() for one in content]
        allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
        rules.append(f"{tag}-src {allowed}")
    return "; ".join([*rules, "form-action 'none'", "frame-ancestors 'none'"])
