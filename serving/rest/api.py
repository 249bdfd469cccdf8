"""The REST API: TensorFlow Serving's routes, `:retrieve`, health and metrics.

Every route reads its own body, so that FastAPI does not parse it a second time; what the
OpenAPI description says of bodies stands in `rest_openapi`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from serving.rest import codec as rest_codec
from serving.rest import explorer
from serving.rest import openapi as rest_openapi
from serving.rest.guard import Guard, read_body, unless_gone
from serving.rest.messages import encode_retrieve, parse_retrieve
from serving.rest.routes import (
    CHOICES,
    add,
    as_json,
    http_error,
)
from serving.retrieval.requests import RetrieveResponse
from serving.runtime.batched_version import PREDICT, RETRIEVE
from serving.runtime.client_call import counted
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import (
    DEFAULT_SIGNATURE,
    Inputs,
    Prediction,
    Service,
)
from serving.runtime.signature import Signature
from serving.settings import ServeConfig

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def build(service: Service, config: ServeConfig) -> ASGIApp:
    """The application that uvicorn runs."""
    app = FastAPI(
        title="twotower", docs_url=None, redoc_url=None, description=rest_openapi.DESCRIPTION
    )
    app.add_exception_handler(HTTPException, http_error)
    RestApi(service).add_to(app)
    explorer.Explorer(service).add_to(app)
    return Guard(app, service, config)


class RestApi:
    """The routes on models, and those on the service itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Adds all routes, those on models with every way to choose a version."""
        add_route = functools.partial(add, app)
        add_route("GET", "/v1/models", self._models, rest_openapi.MODELS)
        for choice in CHOICES:
            model = "/v1/models/{model:name}" + choice
            add_route("GET", model, self._status, rest_openapi.STATUS)
            add_route("GET", model + "/metadata", self._metadata, rest_openapi.METADATA)
            add_route("POST", model + ":predict", self._predict, rest_openapi.PREDICT)
            add_route("POST", model + ":retrieve", self._retrieve, rest_openapi.RETRIEVE)
        add_route("GET", "/healthz", self._alive, rest_openapi.ALIVE)
        add_route("GET", "/readyz", self._ready, rest_openapi.READY)
        add_route("GET", "/monitoring/prometheus/metrics", self._metrics, rest_openapi.METRICS)

    async def _models(self, request: Request) -> Response:
        return as_json(to_json({"models": self._service.models}))

    async def _status(self, request: Request) -> Response:
        asked = request.path_params
        with counted(self._service, request.state.call, "status", asked["model"]):
            return as_json(rest_codec.encode_status(self._service.status(**asked)))

    async def _metadata(self, request: Request) -> Response:
        asked = request.path_params
        with counted(self._service, request.state.call, "metadata", asked["model"]):
            version, signatures = self._service.metadata(**asked)
        return as_json(rest_codec.encode_metadata(asked["model"], version, signatures))

    async def _predict(self, request: Request) -> Response:
        call, asked = request.state.call, request.path_params
        with counted(self._service, call, PREDICT, asked["model"]):
            content = await read_body(request)
            size = len(content) // BYTES_A_VALUE
            body = await aside(size, lambda: rest_codec.parse_predict(content))

        async def decode(signature: Signature) -> Inputs:
            with self._timed("decode", asked["model"], PREDICT):
                most = self._service.config.max_rows
                return await aside(size, lambda: rest_codec.decode_inputs(body, signature, most))

        async def encode(prediction: Prediction, deadline: float) -> bytes:
            outputs = prediction.outputs
            with self._timed("encode", asked["model"], PREDICT):
                return await aside(
                    sum(array.size for array in outputs.values()),
                    lambda: rest_codec.encode_outputs(outputs, body.by_row, deadline),
                )

        name = body.signature or DEFAULT_SIGNATURE
        work = self._service.predict(
            inputs=decode, encode=encode, signature=name, **asked, **call._asdict()
        )
        return as_json(await unless_gone(request, work))

    async def _retrieve(self, request: Request) -> Response:
        call, asked = request.state.call, request.path_params
        with counted(self._service, call, RETRIEVE, asked["model"]):
            body = await read_body(request)
            most = self._service.config.max_rows
            question = await aside(len(body) // BYTES_A_VALUE, lambda: parse_retrieve(body, most))

        async def encode(response: RetrieveResponse, deadline: float) -> bytes:
            with self._timed("encode", asked["model"], RETRIEVE):
                return await aside(
                    2 * sum(len(one.scores) for one in response.results),
                    lambda: encode_retrieve(asked["model"], response, deadline),
                )

        work = self._service.retrieve(request=question, encode=encode, **asked, **call._asdict())
        return as_json(await unless_gone(request, work))

    async def _alive(self, request: Request) -> Response:
        return _health(self._service.alive)

    async def _ready(self, request: Request) -> Response:
        return _health(self._service.ready)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.exposition(), media_type=PROMETHEUS)

    @contextlib.contextmanager
    def _timed(self, stage: str, model: str, api: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._service.metrics.stage(stage, time.perf_counter() - start, model, api)


def _health(is_well: bool) -> Response:
    return Response("ok\n" if is_well else "no\n", 200 if is_well else 503, media_type="text/plain")
