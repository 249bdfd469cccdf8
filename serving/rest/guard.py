"""Around the REST API: layers for request ids, the token and bodies; and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import OutOfMemory, Refused, ServiceError, TooLarge
from serving.rest.codec import dump
from serving.runtime.client_call import REQUEST_ID, Call, counted, request_id, whole_number
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import Service
from serving.settings import ServeConfig

ENTRYPOINT = "REST"
OPEN_PATHS = ("/", "/docs", "/healthz", "/readyz")  # without the token: nothing of the models
ADMIN_VERBS = (":history", ":sample_queries")  # they tell of users

_TIMEOUT = b"x-timeout-ms"
_MAX_MILLISECONDS = 10**9
_SMALL_BODY = 1 << 20  # bytes; larger ones wait for each other anyhow
_HELD = 2  # times the limit of a body, that all large bodies may hold together
_MAX_INFLATION = 1032  # times its size, that gzip becomes
_THROWN_AWAY = 4  # times the limit, of a body that is too large
_THROWING_SECONDS = 2.0
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """The routes, behind their limits on bodies, the token, and the id of each request."""
    config = service.config
    return _WithCall(_WithToken(_WithLimit(app, config), config), service)


class _WithCall:
    """Gives each request its `Call`, and answers where a layer inside refuses it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._seconds = service.config.deadline_ms / 1000.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, now = time.perf_counter(), time.monotonic()
        headers = dict(scope["headers"])
        name = request_id(headers.get(REQUEST_ID.encode(), b"").decode("latin-1"))
        call = Call(ENTRYPOINT, now + self._seconds, name)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                took = b"total;dur=%.2f" % (1000.0 * (time.perf_counter() - start))
                added = ((REQUEST_ID.encode(), name.encode()), (b"server-timing", took))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            with contextlib.suppress(ClientDisconnect), counted(self._service, call, ""):
                call = call._replace(deadline=now + self._timeout(headers))
                # uvicorn leaves the body out of the answer to HEAD
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                scope = {**scope, "method": method, "state": {"call": call}}
                await self._app(scope, receive, named)
        except ServiceError as refusal:
            await _send_error(named, refusal)
        except Exception:
            _log.exception("Request %s failed.", name)
            failure = f"The service failed, request {name}; its log says why."
            await _send_error(named, Refused(500, failure, "INTERNAL"))

    def _timeout(self, headers: dict[bytes, bytes]) -> float:
        """Seconds for a request: the client's header, at most the service's own deadline."""
        given = headers.get(_TIMEOUT)
        if given is None:
            return self._seconds
        milliseconds = whole_number(given.decode("latin-1"), _MAX_MILLISECONDS)
        if not milliseconds:
            raise Refused(400, "The header X-Timeout-Ms must be a positive number.")
        return min(self._seconds, milliseconds / 1000.0)


class _WithToken:
    """Refuses a request without the token, but for the paths that are open."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        given = dict(scope["headers"]).get(b"authorization", b"")
        is_open = path in OPEN_PATHS
        if not is_open and not self._config.accepts(given, admin=path.endswith(ADMIN_VERBS)):
            raise Refused(
                401, "The header Authorization must be 'Bearer TOKEN'.", "UNAUTHENTICATED"
            )
        await self._app(scope, receive, send)


class _WithLimit:
    """Refuses a body that is too large, and a large one where others hold the memory.

    Attributes:
      held: bytes that all large bodies hold now.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self.max_bytes = config.max_body_mb << 20
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
            await self._refuse(message)
        if self._read > _SMALL_BODY:
            self._limit.held += self._read - self.held
            self.held = self._read
            if self._limit.held > _HELD * self._max_bytes:
                raise OutOfMemory("Too many large bodies are here already: try again later.")
        return message

    async def check(self, headers: dict[bytes, bytes]) -> None:
        """Raises TooLarge where the claimed length is above the limit."""
        length = headers.get(b"content-length", b"0").decode("latin-1")
        if whole_number(length, self._max_bytes) is None:
            is_far_above = whole_number(length, _THROWN_AWAY * self._max_bytes) is None
            await self._refuse({"more_body": not is_far_above})

    def _inflated(self, message: Message) -> bytes:
        """A piece of a gzip body as it was before, as far as it is needed to see the limit."""
        assert self._inflating is not None
        left = self._max_bytes + 1 - self._read
        try:
            plain = self._inflating.decompress(message.get("body", b""), left)
        except zlib.error as error:
            raise Refused(400, f"The body is not gzip: {error}.") from error
        if len(plain) < left and not (self._inflating.eof or message.get("more_body")):
            raise Refused(400, "The body is not gzip: its end is missing.")
        return plain

    async def _refuse(self, message: Message) -> NoReturn:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_THROWING_SECONDS):
                while message.get("more_body") and self._read <= _THROWN_AWAY * self._max_bytes:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
        raise TooLarge(f"The body must be at most {self._max_bytes >> 20} MB (max_body_mb).")


async def read_body(request: Request) -> bytearray:
    """The whole body, as long as it comes before the deadline of the request."""
    try:
        async with asyncio.timeout(request.state.call.deadline - time.monotonic()):
            body = bytearray()  # `request.body()` would keep it until there is an answer
            async for piece in request.stream():
                body += piece
            return body
    except TimeoutError as error:
        raise Refused(
            408, "The body did not arrive before the deadline.", "DEADLINE_EXCEEDED"
        ) from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Does the work of a request whose body is read, and drops it once the client is gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_goodbye(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        del working, leaving  # with what they raise they make a cycle, which holds the body


async def _goodbye(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_error(send: Send, refusal: ServiceError) -> None:
    body = dump({"error": str(refusal)})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refusal.http == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.http, "headers": headers})
    await send({"type": "http.response.body", "body": body})
