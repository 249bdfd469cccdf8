"""The REST API: TensorFlow Serving's routes, `:retrieve`, what the explorer asks, and health.

What the OpenAPI description says of them stands in `templates/openapi.yaml`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pipeline.contract.pages import render
from serving.errors import InvalidRequest
from serving.rest import codec
from serving.rest.guard import Bodies, error_answer, guarded, refusal, unless_gone, whole_number
from serving.rest.messages import encode_retrieve, parse_retrieve
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse
from serving.retrieval.retriever import Retriever
from serving.runtime.batched_version import PREDICT, RETRIEVE
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import DEFAULT_SIGNATURE, Call, Inputs, Prediction, Service
from serving.runtime.signature import Signature

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
CHOICES = ("", "/versions/{version:number}", "/labels/{label:name}")  # of the version that answers
PAGES = {"/": "explorer.html", "/docs": "openapi.html"}  # templates

_TEMPLATES = Path(__file__).with_name("templates")
_MAX_LISTED = 1000  # ids in one answer
Endpoint = Callable[[Request], Awaitable[Response]]
_Body = TypeVar("_Body")


class _Name(StringConvertor):
    """A model or a label; without a colon, after which the verb stands."""

    regex = "[^/:]{1,200}"


class _Number(IntegerConvertor):
    """A version; the service says whether it can be one."""

    regex = "[0-9]{1,200}"


register_url_convertor("name", _Name())
register_url_convertor("number", _Number())


def build(service: Service) -> ASGIApp:
    """The application that uvicorn runs: all routes, those on models with every `CHOICES`."""
    api, described = _RestApi(service), json.dumps(description()).encode()

    async def openapi(request: Request) -> Response:
        return _json(described)

    routes = [_route("GET", path, _page(name)) for path, name in PAGES.items()]
    routes += [_route("GET", "/openapi.json", openapi), _route("GET", "/v1/models", api.models)]
    for choice in CHOICES:
        model = "/v1/models/{model:name}" + choice
        routes += [
            _route("GET", model, api.status),
            _route("GET", model + "/metadata", api.metadata),
            _route("POST", model + ":predict", api.predict),
            _route("POST", model + ":retrieve", api.retrieve),
            _route("GET", model + ":sample_queries", api.samples),
            _route("GET", model + ":history", api.history),
        ]
    routes += [
        _route("GET", "/healthz", api.alive),
        _route("GET", "/readyz", api.ready),
        _route("GET", "/monitoring/prometheus/metrics", api.metrics),
    ]
    return guarded(
        Starlette(routes=routes, exception_handlers={HTTPException: _http_error}), service
    )


def description() -> dict[str, Any]:
    """The OpenAPI description of all routes."""
    request = json.dumps(RetrieveRequest.model_json_schema())
    text = (_TEMPLATES / "openapi.yaml").read_text().replace("RETRIEVE_REQUEST", request)
    described: dict[str, Any] = yaml.safe_load(text)
    parameters, paths = described.pop("components")["parameters"], {}
    for path, methods in described["paths"].items():
        for choice in CHOICES if "{model}" in path else ("",):
            chosen = re.sub("{([a-z]+):[a-z]+}", r"{\1}", choice)
            place = path.replace("{model}", "{model}" + chosen)
            more = [parameters[name] for name in ("version", "label") if f"{{{name}}}" in chosen]
            paths[place] = {
                method: operation
                | {"operationId": f"{method} {place}"}
                | {"parameters": operation.get("parameters", []) + more}
                for method, operation in methods.items()
            }
    return described | {"paths": paths}


def _route(method: str, path: str, work: Endpoint) -> Route:
    """A route in which an exception becomes a status code and one line of text."""

    async def endpoint(request: Request) -> Response:
        try:
            return await work(request)
        except ClientDisconnect:
            raise
        except Exception as error:
            return refusal(error, request.state.call.request_id)

    return Route(path, endpoint, methods=[method])


class _RestApi:
    """What the routes do; `path_params` are the model, and its version or label."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service.config.max_body_mb << 20)

    async def models(self, request: Request) -> Response:
        return _json(codec.dump({"models": self._service.models}))

    async def status(self, request: Request) -> Response:
        call = _call(request)
        with self._service.counted(call, "status"):
            return _json(codec.encode_status(self._service.status(call)))

    async def metadata(self, request: Request) -> Response:
        call = _call(request)
        with self._service.counted(call, "metadata"):
            number, signatures = self._service.metadata(call)
        return _json(codec.encode_metadata(call.model, number, signatures))

    async def predict(self, request: Request) -> Response:
        call, max_rows = _call(request), self._service.config.max_rows
        size, body = await self._read(request, PREDICT, codec.parse_predict)

        async def decode(signature: Signature) -> Inputs:
            return await aside(size, lambda: codec.decode_inputs(body, signature, max_rows))

        async def encode(prediction: Prediction, deadline: float) -> bytes:
            write = partial(codec.encode_outputs, prediction.outputs, body.by_row, deadline)
            return await aside(prediction.num_written, partial(write, prediction.ids))

        name = body.signature or DEFAULT_SIGNATURE
        work = self._service.predict(call, decode, encode=encode, signature=name)
        return _json(await unless_gone(request, work))

    async def retrieve(self, request: Request) -> Response:
        call = _call(request)
        parse = partial(parse_retrieve, max_rows=self._service.config.max_rows)
        _, question = await self._read(request, RETRIEVE, parse)

        async def encode(response: RetrieveResponse, deadline: float) -> bytes:
            values = 2 * sum(len(result.scores) for result in response.results)
            return await aside(values, lambda: encode_retrieve(call.model, response, deadline))

        work = self._service.retrieve(call, question, encode=encode)
        return _json(await unless_gone(request, work))

    async def samples(self, request: Request) -> Response:
        limit = _limit(request)
        return self._about(
            request,
            "sample_queries",
            lambda retriever: {
                "input": retriever.input,
                "inputs": retriever.query_inputs.kinds(),
                "attributes": retriever.corpus.attributes.kinds(),
                "k": retriever.k,
                "default_index": retriever.default_index,
                "num_candidates": retriever.num_candidates,
                "query_ids": retriever.corpus.query_ids(limit),
            },
        )

    async def history(self, request: Request) -> Response:
        limit, query_id = _limit(request), request.query_params.get("query_id")

        def history(retriever: Retriever) -> dict[str, Any]:
            if query_id is None:
                raise InvalidRequest("The query parameter query_id is missing.")
            seen = retriever.history(query_id)
            titles = retriever.corpus.titles_of(seen[:limit])
            answer = {"query_id": query_id, "total": len(seen), "candidate_ids": seen[:limit]}
            return answer | ({"titles": titles} if titles else {})

        return self._about(request, "history", history)

    async def _read(
        self, request: Request, api: str, parse: Callable[[bytearray], _Body]
    ) -> tuple[int, _Body]:
        """The values that a body may have, and what it says; a refusal of it is counted."""
        with self._service.counted(_call(request), api):
            content = await self._bodies.read(request)
            size = len(content) // BYTES_A_VALUE
            return size, await aside(size, lambda: parse(content))

    def _about(
        self, request: Request, api: str, describe: Callable[[Retriever], dict[str, Any]]
    ) -> Response:
        """What the retriever of a version knows without a search, as JSON."""
        call = _call(request)
        with self._service.counted(call, api), self._service.retriever(call) as retriever:
            content = {"model": call.model, "version": retriever.version.number}
            return _json(codec.dump({**content, **describe(retriever)}))

    async def alive(self, request: Request) -> Response:
        return _health(self._service.alive)

    async def ready(self, request: Request) -> Response:
        return _health(self._service.ready)

    async def metrics(self, request: Request) -> Response:
        content = await asyncio.to_thread(self._service.metrics.exposition)
        return Response(content, media_type=PROMETHEUS)


def _call(request: Request) -> Call:
    """The call of `guarded`, with the model and the version or label of the path."""
    return request.state.call._replace(**request.path_params)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette says of a path or a method that is not there; 400 as in TensorFlow Serving."""
    assert isinstance(error, HTTPException)
    message = f"Malformed request: {request.method} {request.url.path[:200]}: {error.detail}."
    status = 400 if request.url.path.startswith("/v1/") else error.status_code
    return error_answer(status, message, error.headers)


def _health(is_well: bool) -> Response:
    return Response("ok\n" if is_well else "no\n", 200 if is_well else 503, media_type="text/plain")


def _limit(request: Request) -> int:
    limit = whole_number(request.query_params.get("limit", "100"), _MAX_LISTED)
    if not limit:
        raise InvalidRequest(f"The query parameter limit must be 1 to {_MAX_LISTED}.")
    return limit


def _page(name: str) -> Endpoint:
    """A page for people; it shows nothing of the models without the routes that it asks.

    Its policy lets it run its own script and style, and ask its own server.
    """
    page = render(_TEMPLATES / name)
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [hashlib.sha256(content.encode()).digest() for content in contents]
        allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
        rules.append(f"{tag}-src {allowed}")
    headers = {
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def show(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return show
