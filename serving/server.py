"""`twotower serve`: the REST and the gRPC server over one service, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import uvicorn
from starlette.types import ASGIApp

from serving.monitoring import logs
from serving.rest import api as rest_api
from serving.rest.guard import TimedProtocol
from serving.rpc import api as grpc_api
from serving.runtime.process import settle
from serving.runtime.service import Service
from serving.settings import ServeConfig

_BACKLOG = 2048  # of uvicorn, too
_CLOSING_SECONDS = 1.0  # for answers that are on their way once the service is drained
_FREEING_SECONDS = 5.0  # for what still runs or loads then, and cannot be interrupted
_UNREAD_SECONDS = 60
_POLL_SECONDS = 0.05
_log = logging.getLogger(__name__)


class Addresses(NamedTuple):
    """Where a server listens; a port that the system chose included."""

    rest: str
    grpc: str


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT, then ends what is running; a second signal does not wait.

    SIGTERM leaves clients time to go elsewhere first, SIGINT comes from a terminal and does not.
    Prints one line once every model can answer. Returns 0.

    Raises:
      ValueError: a port is taken or cannot be opened, or the configuration cannot be read.
    """
    start = time.monotonic()

    def announce(at: Addresses, models: list[str]) -> None:
        seconds = time.monotonic() - start
        print(
            f"Serving {', '.join(models)} of {config.models} after {seconds:.1f} s: "
            f"REST {at.rest}, gRPC {at.grpc}.",
            flush=True,
        )

    async def until_signalled() -> bool:
        stop: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.put_nowait, number)
        return await run(config, stop, announce)

    log_writer = logs.install()
    settle()
    is_freed = asyncio.run(until_signalled())
    log_writer.stop()
    if not is_freed:
        sys.stdout.flush()
        os._exit(0)  # no thread is waited for that loads a version or runs a batch
    return 0


async def run(
    config: ServeConfig, stop: asyncio.Queue[int], announce: Callable[[Addresses, list[str]], None]
) -> bool:
    """Serves until there is a signal in `stop`, drains; a second one there ends the drain.

    Calls `announce` with the names of the models once every one can answer. Returns whether all is
    freed; what could not be interrupted may still run in threads otherwise.
    """
    host = f"[{config.host}]" if ":" in config.host else config.host
    with _listening(config) as rest_socket:
        service = Service(config)
        grpc_server = grpc_api.build(service)
        port = _add_port(grpc_server, f"{host}:{config.grpc_port}", config)
        scheme = "https" if config.tls_certificate else "http"
        at = Addresses(f"{scheme}://{host}:{rest_socket.getsockname()[1]}", f"{host}:{port}")
        if not config.token and not config.host.startswith(("127.", "::1", "localhost")):
            _log.warning("Whoever reaches %s is answered: set $TWOTOWER_TOKEN.", config.host)
        rest_server = _RestServer(_rest_config(rest_api.build(service), config))
        service.start()
        await grpc_server.start()
        rest = asyncio.create_task(rest_server.serve([rest_socket]))
        _log.info("Listening at %s and %s; looking for versions in %s.", *at, config.models)

        async def announce_once_ready() -> None:
            await _until(lambda: service.ready)
            announce(at, service.models)

        announcing = asyncio.create_task(announce_once_ready())
        first = asyncio.create_task(stop.get())
        await _first(rest, first)
        announcing.cancel()
        second = asyncio.create_task(stop.get())
        service.leave()
        if first.done() and first.result() == signal.SIGTERM:
            _log.info("Not ready any more: answering for %g s.", config.lame_duck_seconds)
            await _first(asyncio.sleep(config.lame_duck_seconds), second)
        _log.info("Stopping: requests under way have %g s to end.", config.drain_seconds)
        await _first(service.drain(config.drain_seconds), second)
        rest_server.should_exit = True
        await asyncio.gather(rest, grpc_server.stop(_CLOSING_SECONDS))
        closing = threading.Thread(target=service.close, name="closing", daemon=True)
        closing.start()
        ended = _until(lambda: not closing.is_alive())
        await _first(ended, asyncio.sleep(_FREEING_SECONDS), second)
        second.cancel()
        return not closing.is_alive()


async def _first(*awaitables: Awaitable[Any]) -> None:
    """Waits for one of them; those that are not tasks of somebody else are cancelled then."""
    tasks = {asyncio.ensure_future(awaitable) for awaitable in awaitables}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks.difference(awaitables):
        task.cancel()


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(_POLL_SECONDS)


class _RestServer(uvicorn.Server):
    """Leaves the signals to us: both servers and the service end together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _rest_config(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ssl_certfile=config.tls_certificate or None,
        ssl_keyfile=config.tls_key or None,
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # the service has its own log, with request ids
        server_header=False,
        timeout_keep_alive=75,  # longer than load balancers keep theirs: they, not we, close first
        timeout_graceful_shutdown=round(_CLOSING_SECONDS),
    )


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """The socket of the REST API, opened first: a port that is taken is an error at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where it reads TCP; it costs 40 ms an answer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # for clients that never read their answer
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
        try:
            listener.bind((config.host, config.rest_port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ValueError(
                f"The REST API cannot listen on {config.host}:{config.rest_port} "
                f"({error.strerror or error}): choose another --rest_port or --host."
            ) from error
        listener.setblocking(False)
        yield listener


def _add_port(server: grpc.aio.Server, address: str, config: ServeConfig) -> int:
    try:
        if config.tls_certificate:
            port = server.add_secure_port(address, _credentials(config))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise ValueError(
            f"The gRPC API cannot listen on {address}: choose another --grpc_port or --host."
        )
    return port


def _credentials(config: ServeConfig) -> grpc.ServerCredentials:
    """Certificate and key, read before anything listens."""
    certificate, key = Path(config.tls_certificate), Path(config.tls_key)
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key, password="")  # nobody is asked for one
        return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:  # what ssl raises is one, too
        raise ValueError(
            f"tls_certificate {certificate} and tls_key {key} must be PEM files that belong "
            f"together, the key without a password: {error}."
        ) from error
