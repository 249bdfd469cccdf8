"""Around the gRPC services: who may call, what health says, and how a refusal is told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving.errors import InvalidRequest, ServiceError, TooLarge
from serving.runtime.client_call import REQUEST_ID, Call, request_id
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.settings import ServeConfig

ENTRYPOINT = "GRPC"
RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
MAX_CALLS = 1000  # at the same time, health apart

_SMALL_MESSAGE = 1 << 20  # bytes; larger ones wait for each other
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
        if isinstance(request, ServiceError):  # the message could not be read
            raise request
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


class Guard(grpc.aio.ServerInterceptor):
    """Before a call means anything: its token, how many there are, and how large its message is.

    To gRPC every call looks as if its client streamed, so that nothing is read, inflated or parsed
    before it may be. Health shows nothing and is left alone.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._most_bytes = config.max_body_mb << 20
        self._seconds = config.deadline_ms / 1000.0  # for a message to arrive
        self._under_way = 0
        self._large = asyncio.Lock()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Puts `_handle` in front of a method, without parsers: gRPC hands over bytes."""
        handler = await continuation(handler_call_details)
        if handler is None or _is_health(handler_call_details):
            return handler
        is_admin = handler_call_details.method == RELOAD
        return grpc.stream_unary_rpc_method_handler(
            functools.partial(self._handle, handler, is_admin)
        )

    async def _handle(
        self,
        handler: grpc.RpcMethodHandler,
        is_admin: bool,
        messages: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext,
    ) -> bytes:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if not self._config.accepts(given, admin=is_admin):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "metadata 'authorization' must be 'Bearer TOKEN'."
            )
        if self._under_way >= MAX_CALLS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are under way already."
            )
        self._under_way += 1
        try:
            content = await self._received(messages, context)
            async with contextlib.AsyncExitStack() as stack:
                size = _SMALL_MESSAGE if _is_compressed(content) else 0  # that is inflated
                if await aside(size // BYTES_A_VALUE, lambda: _is_large(content)):
                    await self._turn(context)
                    stack.callback(self._large.release)
                return await self._answered(handler, content, context)
        finally:
            self._under_way -= 1

    async def _received(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await anext(aiter(messages), b"")
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, "The message did not arrive before the deadline."
            )
        raise AssertionError("abort raises")

    async def _turn(self, context: grpc.aio.ServicerContext) -> None:
        """Large messages go one at a time, so that what they stand for is in memory once."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._large.acquire()
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, "Other large messages came first: split it."
            )

    async def _answered(
        self, handler: grpc.RpcMethodHandler, content: bytes, context: grpc.aio.ServicerContext
    ) -> bytes:
        size = self._most_bytes if _is_compressed(content) else len(content)
        request = await aside(
            size // BYTES_A_VALUE,
            lambda: _parsed(handler.request_deserializer, content, self._most_bytes),
        )
        response = await handler.unary_unary(request, context)
        return await aside(response.ByteSize() // BYTES_A_VALUE, response.SerializeToString)


def _is_large(content: bytes) -> bool:
    """Whether a message is, or inflates to, more than `_SMALL_MESSAGE` bytes."""
    if not _is_compressed(content):
        return len(content) > _SMALL_MESSAGE
    try:
        _inflated(content, _SMALL_MESSAGE)
    except zlib.error:
        return False
    except TooLarge:
        return True
    return False


def _parsed(parse: Callable[[bytes], Any], content: bytes, most_bytes: int) -> Any:
    """The message, or the error that `answer` raises in its place."""
    try:
        return parse(_inflated(content, most_bytes) if _is_compressed(content) else content)
    except (DecodeError, zlib.error):
        return InvalidRequest("The message is no protocol buffer of the right type.")
    except ServiceError as error:
        return error.with_traceback(None)  # which holds the message


def _is_compressed(content: bytes) -> bool:
    """Whether it is gzip or deflate: as a protocol buffer these first bytes mean nothing here."""
    return content[:2] == b"\x1f\x8b" or (
        content[:1] == b"\x78" and int.from_bytes(content[:2], "big") % 31 == 0
    )


def _inflated(content: bytes, most_bytes: int) -> bytes:
    inflating = zlib.decompressobj(zlib.MAX_WBITS | 32)  # by its header, gzip or deflate
    message = inflating.decompress(content, most_bytes + 1)
    if len(message) > most_bytes:
        raise TooLarge(f"The message must be at most {most_bytes >> 20} MB (max_body_mb).")
    return message


def _is_health(details: grpc.HandlerCallDetails) -> bool:
    return details.method.startswith(f"/{health.SERVICE_NAME}/")


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
