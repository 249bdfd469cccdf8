"""Around the gRPC services: who may call, how much, what becomes of a refusal; and health."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving.errors import DeadlineExceeded, InvalidRequest, Refused, ServiceError
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import REQUEST_ID, Call, Service, request_id

ENTRYPOINT = "GRPC"
RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
MAX_CALLS = 1000  # at the same time, health apart

_SMALL_MESSAGE = 1 << 20  # bytes; larger ones wait for each other
_SERVICES = ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
_HEALTH_SECONDS = 0.1  # between two looks for who watches
_MAX_TEXT = 2000  # characters of a status, which travels in HTTP/2 headers, 8 kB in all
_log = logging.getLogger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Stands in front of every method but those of health, which shows nothing.

    To gRPC every call looks as if its client streamed, so that nothing is read, inflated or parsed
    before its token is seen. A method gets the message and, in place of a context, its `Call`;
    what it raises becomes a status code and one line of text.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._max_bytes = service.config.max_body_mb << 20
        self._seconds = service.config.deadline_ms / 1000.0  # for a message to arrive
        self._under_way = 0
        self._large = asyncio.Lock()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Puts `_handle` in front of a method, without parsers: gRPC hands over bytes."""
        handler, name = await continuation(handler_call_details), handler_call_details.method
        if handler is None or name.startswith(f"/{health.SERVICE_NAME}/"):
            return handler
        handle = functools.partial(self._handle, handler, name == RELOAD)
        return grpc.stream_unary_rpc_method_handler(handle)

    async def _handle(
        self,
        handler: grpc.RpcMethodHandler,
        is_admin: bool,
        messages: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext,
    ) -> bytes:
        remaining, metadata = context.time_remaining(), dict(context.invocation_metadata() or ())
        deadline = math.inf if remaining is None else time.monotonic() + remaining
        given = metadata.get(REQUEST_ID)
        name = request_id(given if isinstance(given, str) else None)
        call = Call(deadline=deadline, entrypoint=ENTRYPOINT, request_id=name)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        self._under_way += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                with self._service.counted(call, ""):
                    self._check(metadata.get("authorization", ""), is_admin)
                    request = await self._request(handler.request_deserializer, messages, stack)
                response = await handler.unary_unary(request, call)
                if isinstance(response, bytes):  # written already
                    return response
                return await aside(response.ByteSize() // BYTES_A_VALUE, response.SerializeToString)
        except ServiceError as error:
            code, text = grpc.StatusCode[error.grpc], str(error)
        except Exception:
            _log.exception("Request %s failed.", call.request_id)
            code, text = grpc.StatusCode.INTERNAL, f"the service failed, request {call.request_id}"
        finally:
            self._under_way -= 1
        await context.abort(code, text[:_MAX_TEXT])
        raise AssertionError("abort raises")

    def _check(self, authorization: str | bytes, is_admin: bool) -> None:
        if isinstance(authorization, str):
            authorization = authorization.encode()
        if not self._service.config.accepts(authorization, admin=is_admin):
            text = "metadata 'authorization' must be 'Bearer TOKEN'."
            raise Refused(401, text, "UNAUTHENTICATED")
        if self._under_way > MAX_CALLS:
            text = f"{MAX_CALLS} calls are under way already."
            raise Refused(429, text, "RESOURCE_EXHAUSTED")

    async def _request(
        self,
        parse: Callable[[bytes], Any],
        messages: AsyncIterator[bytes],
        stack: contextlib.AsyncExitStack,
    ) -> Any:
        """The message; large ones go one at a time, so that what they stand for is there once."""
        late = "The message did not arrive before the deadline."

        def is_large() -> bool:
            return len(_inflated(content, _SMALL_MESSAGE)) > _SMALL_MESSAGE

        def parsed() -> Any:
            plain = _inflated(content, self._max_bytes)
            if len(plain) > self._max_bytes:
                text = f"The message must be at most {self._max_bytes >> 20} MB (max_body_mb)."
                raise Refused(413, text, "RESOURCE_EXHAUSTED")
            return parse(plain)

        try:
            async with asyncio.timeout(self._seconds):
                content = await anext(aiter(messages), b"")
                is_compressed = _is_compressed(content)
                late = "Other large messages came first: split it."
                if await aside(_SMALL_MESSAGE * is_compressed // BYTES_A_VALUE, is_large):
                    await stack.enter_async_context(self._large)
            size = self._max_bytes if is_compressed else len(content)
            return await aside(size // BYTES_A_VALUE, parsed)
        except TimeoutError as error:
            raise DeadlineExceeded(late) from error
        except (DecodeError, zlib.error) as error:
            text = "The message is not one whole protocol buffer of the right type."
            raise InvalidRequest(text) from error


def _is_compressed(content: bytes) -> bool:
    """Whether it is gzip or deflate: as a protocol buffer these first bytes mean nothing here."""
    return content[:2] == b"\x1f\x8b" or (
        content[:1] == b"\x78" and int.from_bytes(content[:2], "big") % 31 == 0
    )


def _inflated(content: bytes, max_bytes: int) -> bytes:
    """What was compressed, and no more than one byte too much of it; a plain one as it is."""
    if not _is_compressed(content):
        return content
    inflating = zlib.decompressobj(zlib.MAX_WBITS | 32)  # by its header, gzip or deflate
    plain = inflating.decompress(content, max_bytes + 1)
    if len(plain) <= max_bytes and (inflating.unused_data or not inflating.eof):
        raise zlib.error("it is cut short, or something follows it")
    return plain


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1`: whether the service is ready, for each of its gRPC services alike.

    The servicer that grpcio-health-checking brings along is fed, not asked, and forgets all who
    watch a service once one of them leaves.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Check(  # noqa: N802 - names of the .proto
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return self._answer(request)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            if (answer := self._answer(request)) != last:
                yield answer
            last = answer
            await asyncio.sleep(_HEALTH_SECONDS)

    def _answer(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        status = "SERVING" if self._service.ready else "NOT_SERVING"
        known = request.service in _SERVICES
        return health_pb2.HealthCheckResponse(status=status if known else "SERVICE_UNKNOWN")
