"""The REST API: TensorFlow Serving's routes, `:retrieve`, what the explorer asks, and health.

Every route reads its own body, so that FastAPI does not parse it a second time; what the
OpenAPI description says of bodies stands in `openapi`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.convertors import IntegerConvertor, StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from serving.errors import InvalidRequest, ServiceError
from serving.rest import codec, openapi
from serving.rest.guard import guarded, read_body, unless_gone
from serving.rest.messages import encode_retrieve, parse_retrieve
from serving.rest.pages import Page
from serving.retrieval.requests import RetrieveResponse
from serving.retrieval.retriever import Retriever
from serving.runtime.batched_version import PREDICT, RETRIEVE
from serving.runtime.client_call import counted, whole_number
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import DEFAULT_SIGNATURE, Inputs, Prediction, Service
from serving.runtime.signature import Signature

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
CHOICES = ("", "/versions/{version:number}", "/labels/{label:name}")  # of the version that answers
PAGES = {"/": "explorer.html", "/docs": "openapi.html"}

_MAX_LISTED = 1000  # ids in one answer
_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class _Name(StringConvertor):
    """A model or a label; without a colon, after which the verb stands."""

    regex = "[^/:]{1,200}"


class _Number(IntegerConvertor):
    """A version; `Catalogue` says whether it can be one."""

    regex = "[0-9]{1,200}"


register_url_convertor("name", _Name())
register_url_convertor("number", _Number())


def build(service: Service) -> ASGIApp:
    """The application that uvicorn runs."""
    app = FastAPI(title="twotower", docs_url=None, redoc_url=None, description=openapi.DESCRIPTION)
    app.add_exception_handler(HTTPException, _http_error)
    _RestApi(service).add_to(app)
    return guarded(app, service)


class _RestApi:
    """The routes on models, and those on the service itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Adds all routes, those on models with every way to choose a version."""
        for path, name in PAGES.items():
            _add(app, "GET", path, Page(name).show, openapi.PAGE)
        _add(app, "GET", "/v1/models", self._models, openapi.MODELS)
        for choice in CHOICES:
            model = "/v1/models/{model:name}" + choice
            _add(app, "GET", model, self._status, openapi.STATUS)
            _add(app, "GET", model + "/metadata", self._metadata, openapi.METADATA)
            _add(app, "POST", model + ":predict", self._predict, openapi.PREDICT)
            _add(app, "POST", model + ":retrieve", self._retrieve, openapi.RETRIEVE)
            _add(app, "GET", model + ":sample_queries", self._samples, openapi.SAMPLES)
            _add(app, "GET", model + ":history", self._history, openapi.HISTORY)
        _add(app, "GET", "/healthz", self._alive, openapi.ALIVE)
        _add(app, "GET", "/readyz", self._ready, openapi.READY)
        _add(app, "GET", "/monitoring/prometheus/metrics", self._metrics, openapi.METRICS)

    async def _models(self, request: Request) -> Response:
        return _json(codec.dump({"models": self._service.models}))

    async def _status(self, request: Request) -> Response:
        version = request.path_params  # model, and version or label
        with counted(self._service, request.state.call, "status", version["model"]):
            return _json(codec.encode_status(self._service.status(**version)))

    async def _metadata(self, request: Request) -> Response:
        version = request.path_params
        with counted(self._service, request.state.call, "metadata", version["model"]):
            number, signatures = self._service.metadata(**version)
        return _json(codec.encode_metadata(version["model"], number, signatures))

    async def _predict(self, request: Request) -> Response:
        call, version = request.state.call, request.path_params
        with counted(self._service, call, PREDICT, version["model"]):
            content = await read_body(request)
            size = len(content) // BYTES_A_VALUE
            body = await aside(size, lambda: codec.parse_predict(content))

        async def decode(signature: Signature) -> Inputs:
            with self._service.metrics.timed("decode", version["model"], PREDICT):
                max_rows = self._service.config.max_rows
                return await aside(size, lambda: codec.decode_inputs(body, signature, max_rows))

        async def encode(prediction: Prediction, deadline: float) -> bytes:
            outputs = prediction.outputs
            with self._service.metrics.timed("encode", version["model"], PREDICT):
                return await aside(
                    sum(array.size for array in outputs.values()),
                    lambda: codec.encode_outputs(outputs, body.by_row, deadline),
                )

        name = body.signature or DEFAULT_SIGNATURE
        work = self._service.predict(
            inputs=decode, encode=encode, signature=name, **version, **call._asdict()
        )
        return _json(await unless_gone(request, work))

    async def _retrieve(self, request: Request) -> Response:
        call, version = request.state.call, request.path_params
        with counted(self._service, call, RETRIEVE, version["model"]):
            body = await read_body(request)
            max_rows = self._service.config.max_rows
            question = await aside(
                len(body) // BYTES_A_VALUE, lambda: parse_retrieve(body, max_rows)
            )

        async def encode(response: RetrieveResponse, deadline: float) -> bytes:
            with self._service.metrics.timed("encode", version["model"], RETRIEVE):
                return await aside(
                    2 * sum(len(result.scores) for result in response.results),
                    lambda: encode_retrieve(version["model"], response, deadline),
                )

        work = self._service.retrieve(request=question, encode=encode, **version, **call._asdict())
        return _json(await unless_gone(request, work))

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
        self, request: Request, api: str, describe: Callable[[Retriever], dict[str, Any]]
    ) -> Response:
        """What the retriever of a version knows without a search, as JSON."""
        version = request.path_params
        with (
            counted(self._service, request.state.call, api, version["model"]),
            self._service.retriever(**version) as retriever,
        ):
            content = {"model": version["model"], "version": retriever.version.number}
            return _json(codec.dump({**content, **describe(retriever)}))

    async def _alive(self, request: Request) -> Response:
        return _health(self._service.alive)

    async def _ready(self, request: Request) -> Response:
        return _health(self._service.ready)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.exposition(), media_type=PROMETHEUS)


def _add(app: FastAPI, method: str, path: str, work: Endpoint, description: dict[str, Any]) -> None:
    """Adds a route; an exception in it becomes a status code and one line of text."""

    async def endpoint(request: Request) -> Response:
        try:
            return await work(request)
        except ClientDisconnect:
            raise
        except ServiceError as error:
            return _error(error.http, str(error))
        except Exception:
            name = request.state.call.request_id
            _log.exception("Request %s failed.", name)
            return _error(500, f"The service failed, request {name}; its log says why.")

    app.add_api_route(path, endpoint, methods=[method], **openapi.operation(path, description))


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal, in TensorFlow Serving's shape."""
    if status in (429, 503):
        headers = {"retry-after": "1"}
    return Response(codec.dump({"error": message}), status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """What FastAPI says of a path or a method that is not there; 400 as in TensorFlow Serving."""
    assert isinstance(error, HTTPException)
    message = f"Malformed request: {request.method} {request.url.path[:200]}"
    status = 400 if request.url.path.startswith("/v1/") else error.status_code
    return _error(status, f"{message}: {error.detail}.", error.headers)


def _health(is_well: bool) -> Response:
    return Response("ok\n" if is_well else "no\n", 200 if is_well else 503, media_type="text/plain")


def _limit(request: Request) -> int:
    """The query parameter `limit`."""
    limit = whole_number(request.query_params.get("limit", "100"), _MAX_LISTED)
    if not limit:
        raise InvalidRequest(f"The query parameter limit must be 1 to {_MAX_LISTED}.")
    return limit
