"""How routes are added to the REST API: their paths, and what an exception in them becomes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.errors import ServiceError
from serving.rest import openapi as rest_openapi
from serving.rest.codec import encode_error

CHOICES = ("", "/versions/{version:number}", "/labels/{label:name}")  # of the version that answers

Endpoint = Callable[[Request], Awaitable[Response]]
_log = logging.getLogger(__name__)


class _Name(Convertor[str]):
    """A model or a label; without a colon, after which the verb stands."""

    regex = "[^/:]{1,200}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Number(Convertor[int]):
    """A version; `Catalogue` says whether it can be one."""

    regex = "[0-9]{1,200}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("name", _Name())
register_url_convertor("number", _Number())


def as_json(content: bytes) -> Response:
    """An answer."""
    return Response(content, media_type="application/json")


def add(app: FastAPI, method: str, path: str, work: Endpoint, description: dict[str, Any]) -> None:
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

    app.add_api_route(path, endpoint, methods=[method], **rest_openapi.operation(path, description))


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that is none, in TensorFlow Serving's shape."""
    if status in (429, 503):
        headers = {"retry-after": "1"}
    content = encode_error(message)
    return Response(content, status, headers, media_type="application/json")


async def http_error(request: Request, error: Exception) -> Response:
    """What FastAPI says of a path or a method that is not there; 400 as in TensorFlow Serving."""
    assert isinstance(error, HTTPException)
    message = f"Malformed request: {request.method} {request.url.path[:200]}"
    status = 400 if request.url.path.startswith("/v1/") else error.status_code
    return _error(status, f"{message}: {error.detail}.", error.headers)
