"""Around the gRPC services: who may call, what health says, and how a refusal is told."""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving.call import REQUEST_ID, Call, request_id
from serving.errors import InvalidRequest, ServiceError

ENTRYPOINT = "GRPC"

_SERVICES = ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
_HEALTH_SECONDS = 0.1  # between two looks for who watches
_LONGEST_MESSAGE = 2000  # a status travels in HTTP/2 headers, 8 kB in all
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_log = logging.getLogger(__name__)


async def answer(
    work: Callable[[_Request, Call], Awaitable[_Response]],
    request: _Request,
    context: grpc.aio.ServicerContext,
) -> _Response:
    """Does the work of a method; an exception becomes a status code and one line of text."""
    remaining = context.time_remaining()
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID)
    call = Call(
        ENTRYPOINT,
        None if remaining is None else time.monotonic() + remaining,
        request_id(given if isinstance(given, str) else None),
    )
    context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
    try:
        if isinstance(request, _Malformed):
            raise InvalidRequest("The message is no protocol buffer of the right type.")
        return await work(request, call)
    except ServiceError as error:
        code, message = grpc.StatusCode[error.grpc], str(error)
    except Exception:
        _log.exception("request %s failed", call.request_id)
        code, message = grpc.StatusCode.INTERNAL, f"the service failed, request {call.request_id}"
    await context.abort(code, message[:_LONGEST_MESSAGE])
    raise AssertionError("abort raises")


async def not_implemented(context: grpc.aio.ServicerContext, method: str) -> NoReturn:
    """Refuses a method of TensorFlow Serving that takes tf.Example."""
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"{method} is not implemented: a retrieval model has no such signature, call Predict.",
    )
    raise AssertionError("abort raises")


class _Malformed:
    """Stands for a message that could not be parsed."""


class Parsing(grpc.aio.ServerInterceptor):
    """Lets `answer` refuse what is no message; gRPC itself tells it as a fault of the server."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or _is_health(handler_call_details):
            return handler
        return handler._replace(
            request_deserializer=functools.partial(_parsed, handler.request_deserializer)
        )


def _parsed(parse: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return parse(content)
    except DecodeError:
        return _Malformed()


def _is_health(details: grpc.HandlerCallDetails) -> bool:
    return details.method.startswith(f"/{health.SERVICE_NAME}/")


class BearerToken(grpc.aio.ServerInterceptor):
    """Refuses calls without the token, but for health, which shows nothing."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(self._refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if _is_health(handler_call_details) or hmac.compare_digest(given, self._expected):
            return await continuation(handler_call_details)
        return self._refusal

    @staticmethod
    async def _refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "metadata 'authorization' must be 'Bearer TOKEN'."
        )


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1`: whether the service is ready, for each of its gRPC services alike."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    async def Check(  # noqa: N802 - names of the .proto
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            if (status := self._status(request.service)) != told:
                yield health_pb2.HealthCheckResponse(status=status)
            told = status
            await asyncio.sleep(_HEALTH_SECONDS)

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        status = health_pb2.HealthCheckResponse
        if name not in _SERVICES:
            return status.SERVICE_UNKNOWN
        return status.SERVING if self._is_ready() else status.NOT_SERVING
