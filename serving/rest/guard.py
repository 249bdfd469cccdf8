"""Around the REST API: ids, the token, limits of bodies and of time, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import zlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import OutOfMemory, Refused, ServiceError
from serving.rest.codec import dump
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import REQUEST_ID, Call, Service, request_id
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


def guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """The routes, where a request has its `Call` and the token, and a refusal its answer."""
    longest = service.config.deadline_ms / 1000.0

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start = time.monotonic()
        headers = dict(scope["headers"])
        name = request_id(headers.get(REQUEST_ID.encode(), b"").decode("latin-1"))
        call = Call(deadline=start + longest, entrypoint=ENTRYPOINT, request_id=name)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                took = b"total;dur=%.2f" % (1000.0 * (time.monotonic() - start))
                added = ((REQUEST_ID.encode(), name.encode()), (b"server-timing", took))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            with suppress(ClientDisconnect), service.counted(call, ""), ExitStack() as ending:
                call = call._replace(deadline=start + min(longest, _client_seconds(headers)))
                _check_token(scope["path"], headers, service.config)
                # uvicorn leaves the body out of the answer to HEAD
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                state = {"call": call, "ending": ending}
                await app({**scope, "method": method, "state": state}, receive, named)
        except Exception as error:
            await refusal(error, name)(scope, receive, named)

    return layer


def _check_token(path: str, headers: dict[bytes, bytes], config: ServeConfig) -> None:
    given, admin = headers.get(b"authorization", b""), path.endswith(ADMIN_VERBS)
    if path not in OPEN_PATHS and not config.accepts(given, admin=admin):
        text = "The header Authorization must be 'Bearer TOKEN'."
        raise Refused(401, text, "UNAUTHENTICATED")


def _client_seconds(headers: dict[bytes, bytes]) -> float:
    """The client's own limit, X-Timeout-Ms; infinity if the header is missing."""
    given = headers.get(b"x-timeout-ms")
    if given is None:
        return math.inf
    milliseconds = whole_number(given.decode("latin-1"), _MAX_MILLISECONDS)
    if not milliseconds:
        raise Refused(400, "The header X-Timeout-Ms must be a positive number.")
    return milliseconds / 1000.0


class Bodies:
    """Reads the bodies of requests; refuses what is too large, and what others leave no room for.

    Attributes:
      held: bytes of each large body that a request holds now.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held: dict[object, int] = {}

    async def read(self, request: Request) -> bytearray:
        """The whole body, unpacked, as long as it comes before the deadline of the request."""
        try:
            async with asyncio.timeout(request.state.call.deadline - time.monotonic()):
                return await self._whole(request)
        except TimeoutError as error:
            text = "The body did not arrive before the deadline."
            raise Refused(408, text, "DEADLINE_EXCEEDED") from error

    async def _whole(self, request: Request) -> bytearray:
        headers, pieces, key = request.headers, request.stream(), object()
        request.state.ending.callback(self.held.pop, key, None)
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):
            raise Refused(415, "A body must be plain, or have the Content-Encoding gzip.")
        unpacking = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding == "gzip" else None
        most = _THROWN_AWAY * self._max_bytes
        claimed = whole_number(headers.get("content-length", "0"), most)
        if claimed is None or claimed > self._max_bytes:
            await self._refuse(pieces, 0 if claimed is None else most)
        body = bytearray()  # `request.body()` would keep it until there is an answer
        async for piece in pieces:
            body += await self._unpacked(piece, unpacking, len(body)) if unpacking else piece
            if len(body) > self._max_bytes:
                await self._refuse(pieces, most)
            if len(body) > _SMALL_BODY:
                self.held[key] = len(body)
                if sum(self.held.values()) > _HELD * self._max_bytes:
                    raise OutOfMemory("Too many large bodies are here already: try again later.")
        if unpacking and not unpacking.eof:
            raise Refused(400, "The body is not gzip: its end is missing.")
        return body

    async def _unpacked(self, piece: bytes, unpacking: Any, size: int) -> bytes:
        """A piece of a body that has a size already, to at most one byte above the limit."""
        most = min(self._max_bytes, _MAX_INFLATION * len(piece)) // BYTES_A_VALUE
        left = self._max_bytes + 1 - size
        try:
            unpacked = await aside(most, lambda: unpacking.decompress(piece, left))
        except zlib.error as error:
            raise Refused(400, f"The body is not gzip: {error}.") from error
        if unpacking.unused_data:  # which would be held, and is not in the body
            raise Refused(400, "The body is more than one gzip stream: compress it as one.")
        return unpacked

    async def _refuse(self, pieces: AsyncGenerator[bytes, None], left: int) -> NoReturn:
        """Throws away what still comes, at most `left` bytes of it.

        A client that still sends when the connection is closed does not see the answer.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_THROWING_SECONDS):
                while left > 0 and (piece := await anext(pieces, None)) is not None:
                    left -= len(piece)
        text = f"The body must be at most {self._max_bytes >> 20} MB (max_body_mb)."
        raise Refused(413, text, "RESOURCE_EXHAUSTED")


def whole_number(text: str, most: int) -> int | None:
    """What the digits say where it is at most `most`; None for anything else.

    >>> whole_number("0042", 100), whole_number("9" * 5000, 100), whole_number("-1", 100)
    (42, None, None)
    """
    digits = text.lstrip("0") or text[:1]
    is_short = re.fullmatch("[0-9]{1,18}", digits)  # Python refuses to read thousands
    return int(digits) if is_short and int(digits) <= most else None


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
