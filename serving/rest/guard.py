"""Around the REST API: ids, the token, limits of bodies and of time, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import zlib
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import OutOfMemory, Refused, ServiceError
from serving.rest.codec import dump
from serving.runtime.client_call import REQUEST_ID, Call, counted, request_id, whole_number
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import Service
from serving.settings import ServeConfig

ENTRYPOINT = "REST"
OPEN_PATHS = ("/", "/docs", "/healthz", "/readyz")  # without the token: nothing of the models
ADMIN_VERBS = (":history", ":sample_queries")  # they tell of users
HEAD_SECONDS = 10.0  # for the line and the headers of a request, and for what follows an answer

_MAX_MILLISECONDS = 10**9
_SMALL_BODY = 1 << 20  # bytes; larger ones wait for each other anyhow
_HELD = 2  # times the limit of a body, that all large bodies may hold together
_MAX_INFLATION = 1032  # times its size, that gzip becomes
_THROWN_AWAY = 4  # times the limit, of a body that is too large
_THROWING_SECONDS = 2.0
_AGAIN = {"retry-after": "1"}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: _AGAIN, 503: _AGAIN}  # of refusals
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """The routes, behind their limits on bodies, the token, and the id of each request."""
    config = service.config
    return _with_call(_with_token(_WithLimit(app, config.max_body_mb << 20), config), service)


def refusal(error: Exception, name: str) -> Response:
    """What an exception in a request becomes; one that is a fault of ours is logged."""
    if isinstance(error, ServiceError):
        return error_answer(error.http, str(error))
    _log.error("Request %s failed.", name, exc_info=error)
    return error_answer(500, f"The service failed, request {name}; its log says why.")


def error_answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """One line of text in TensorFlow Serving's shape."""
    headers = {**(headers or {}), **_HEADERS.get(status, {})}
    return Response(dump({"error": message}), status, headers, "application/json")


def _with_call(app: ASGIApp, service: Service) -> ASGIApp:
    """Gives each request its `Call`, and answers where a layer inside refuses it."""
    longest = service.config.deadline_ms / 1000.0

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start = time.monotonic()
        headers = dict(scope["headers"])
        name = request_id(headers.get(REQUEST_ID.encode(), b"").decode("latin-1"))
        call = Call(ENTRYPOINT, start + longest, name)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                took = b"total;dur=%.2f" % (1000.0 * (time.monotonic() - start))
                added = ((REQUEST_ID.encode(), name.encode()), (b"server-timing", took))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            with contextlib.suppress(ClientDisconnect), counted(service, call, ""):
                call = call._replace(deadline=start + min(longest, _client_seconds(headers)))
                # uvicorn leaves the body out of the answer to HEAD
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                scope = {**scope, "method": method, "state": {"call": call}}
                await app(scope, receive, named)
        except Exception as error:
            await refusal(error, name)(scope, receive, named)

    return layer


def _client_seconds(headers: dict[bytes, bytes]) -> float:
    """The client's own limit, X-Timeout-Ms; infinity if the header is missing."""
    given = headers.get(b"x-timeout-ms")
    if given is None:
        return math.inf
    milliseconds = whole_number(given.decode("latin-1"), _MAX_MILLISECONDS)
    if not milliseconds:
        raise Refused(400, "The header X-Timeout-Ms must be a positive number.")
    return milliseconds / 1000.0


def _with_token(app: ASGIApp, config: ServeConfig) -> ASGIApp:
    """Refuses a request without the token, but for the paths that are open."""

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        path, given = scope["path"], dict(scope["headers"]).get(b"authorization", b"")
        if path not in OPEN_PATHS and not config.accepts(given, admin=path.endswith(ADMIN_VERBS)):
            text = "The header Authorization must be 'Bearer TOKEN'."
            raise Refused(401, text, "UNAUTHENTICATED")
        await app(scope, receive, send)

    return layer


class _WithLimit:
    """Refuses a body that is too large, and a large one where others hold the memory.

    Attributes:
      held: bytes that all large bodies hold now.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self.max_bytes = max_bytes
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding not in (b"identity", b"gzip"):
            raise Refused(415, "A body must be plain, or have the Content-Encoding gzip.")
        body = _Body(receive, self, encoding == b"gzip")
        try:
            await body.check(headers)
            await self._app(scope, body, send)
        finally:
            self.held -= body.held


class _Body:
    """`receive` that gives up on a body that is too large, whatever length it claimed.

    What comes of a body that is not much too large is thrown away first: a client that still
    sends when the connection is closed does not see the answer.
    """

    def __init__(self, receive: Receive, limit: _WithLimit, is_gzip: bool) -> None:
        self._receive = receive
        self._inflating = zlib.decompressobj(16 + zlib.MAX_WBITS) if is_gzip else None
        self._limit = limit
        self._max_bytes = limit.max_bytes
        self._read = self.held = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if self._inflating and message["type"] == "http.request":
            most = min(self._max_bytes, _MAX_INFLATION * len(message.get("body", b"")))
            plain = await aside(most // BYTES_A_VALUE, lambda: self._inflated(message))
            message = {**message, "body": plain}
        self._read += len(message.get("body", b""))
        if self._read > self._max_bytes:
            await self._refuse(message.get("more_body"))
        if self._read > _SMALL_BODY:
            self._limit.held += self._read - self.held
            self.held = self._read
            if self._limit.held > _HELD * self._max_bytes:
                raise OutOfMemory("Too many large bodies are here already: try again later.")
        return message

    async def check(self, headers: dict[bytes, bytes]) -> None:
        """Refuses a claimed length above the limit."""
        length = headers.get(b"content-length", b"0").decode("latin-1")
        if whole_number(length, self._max_bytes) is None:
            await self._refuse(whole_number(length, _THROWN_AWAY * self._max_bytes) is not None)

    def _inflated(self, message: Message) -> bytes:
        """A piece of a gzip body, unpacked to at most one byte above the limit."""
        assert self._inflating is not None
        left = self._max_bytes + 1 - self._read
        try:
            plain = self._inflating.decompress(message.get("body", b""), left)
        except zlib.error as error:
            raise Refused(400, f"The body is not gzip: {error}.") from error
        if len(plain) < left and not (self._inflating.eof or message.get("more_body")):
            raise Refused(400, "The body is not gzip: its end is missing.")
        return plain

    async def _refuse(self, is_more: bool | None) -> NoReturn:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_THROWING_SECONDS):
                while is_more and self._read <= _THROWN_AWAY * self._max_bytes:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    is_more = message.get("more_body")
        text = f"The body must be at most {self._max_bytes >> 20} MB (max_body_mb)."
        raise Refused(413, text, "RESOURCE_EXHAUSTED")


async def read_body(request: Request) -> bytearray:
    """The whole body, as long as it comes before the deadline of the request."""
    body = bytearray()  # `request.body()` would keep it until there is an answer
    try:
        async with asyncio.timeout(request.state.call.deadline - time.monotonic()):
            async for piece in request.stream():
                body += piece
    except TimeoutError as error:
        text = "The body did not arrive before the deadline."
        raise Refused(408, text, "DEADLINE_EXCEEDED") from error
    return body


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Does the work of a request whose body is read, and drops it once the client is gone."""

    async def goodbye() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(goodbye())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        del working, leaving  # with what they raise they make a cycle, which holds the body


class TimedProtocol(H11Protocol):
    """Ends a connection on which no request is complete in time, however often a byte comes.

    The body of a request has the deadline of the request, and an idle connection uvicorn's limit.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
