"""One process that serves: the REST and the gRPC server over one service, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import uvicorn
from starlette.types import ASGIApp

from serving.rest import api as rest_api
from serving.rest.guard import TimedProtocol
from serving.rpc import api as grpc_api
from serving.runtime.process import SIGNALS, Addresses, Announce, bind, settle
from serving.runtime.service import Service
from serving.settings import ServeConfig

_BACKLOG = 2048  # of uvicorn, too
_CLOSING_SECONDS = 1.0  # for answers that are on their way once the service is drained
_FREEING_SECONDS = 5.0  # for what still runs or loads then, and cannot be interrupted
_UNREAD_SECONDS = 60
_POLL_SECONDS = 0.05
_log = logging.getLogger(__name__)


def run_until_signalled(
    config: ServeConfig, announce: Announce, others_ready: Callable[[], bool]
) -> bool:
    """As `run`, until SIGTERM or SIGINT, which the caller has blocked until there is a handler."""

    async def until_signalled() -> bool:
        stop: asyncio.Queue[int] = asyncio.Queue()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop.put_nowait, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return await run(config, stop, announce, others_ready)

    settle()
    return asyncio.run(until_signalled())


async def run(
    config: ServeConfig,
    stop: asyncio.Queue[int],
    announce: Announce,
    others_ready: Callable[[], bool] = lambda: True,
) -> bool:
    """Serves until there is a signal in `stop`, drains; a second one there ends the drain.

    Calls `announce` with the names of the models once every one can answer; a worker opens its
    ports only then, as others answer meanwhile. It is ready when `others_ready`, too. Returns
    whether all is freed; what could not be interrupted may still run in threads otherwise.

    Raises:
      ValueError: a port is taken or cannot be opened, or the configuration cannot be read.
    """
    first = asyncio.create_task(stop.get())
    host = f"[{config.host}]" if ":" in config.host else config.host
    with _listening(config) as rest_socket:
        service = Service(config)
        service.others_ready = others_ready
        grpc_server = grpc_api.build(service)
        if config.workers > 1:
            service.start()
            await _first(_until(lambda: service.loaded), first)
        port = _add_port(grpc_server, f"{host}:{config.grpc_port}", config)
        scheme = "https" if config.tls_certificate else "http"
        at = Addresses(f"{scheme}://{host}:{rest_socket.getsockname()[1]}", f"{host}:{port}")
        rest_server = uvicorn.Server(_rest_config(rest_api.build(service), config))
        rest_server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
        if config.workers == 1:
            service.start()
        await grpc_server.start()
        rest = asyncio.create_task(rest_server.serve([rest_socket]))
        _log.info("Listening at %s and %s; looking for versions in %s.", *at, config.models)

        async def announce_once_ready() -> None:
            await _until(lambda: service.loaded)
            announce(at, service.models)

        announcing = asyncio.create_task(announce_once_ready())
        await _first(rest, first)
        announcing.cancel()
        second = asyncio.create_task(stop.get())
        was_ready = service.ready  # otherwise nobody was sent here
        service.leave()
        if was_ready and first.done() and first.result() == signal.SIGTERM:
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


def _rest_config(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ssl_certfile=config.tls_certificate or None,
        ssl_keyfile=config.tls_key or None,
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        access_log=False,  # the service has its own log, with request ids
        server_header=False,
        timeout_keep_alive=75,  # longer than load balancers keep theirs: they, not we, close first
        timeout_graceful_shutdown=round(_CLOSING_SECONDS),
    )


def _listening(config: ServeConfig) -> socket.socket:
    """The socket of the REST API, opened first: a port that is taken is an error at once."""
    listener = bind(config, "rest_port", config.rest_port, is_shared=config.workers > 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # for clients that never read their answer
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
    if config.workers == 1:
        listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _add_port(server: grpc.aio.Server, address: str, config: ServeConfig) -> int:
    bind(config, "grpc_port", config.grpc_port, is_shared=config.workers > 1).close()
    if config.tls_certificate:
        return server.add_secure_port(address, _credentials(config))
    return server.add_insecure_port(address)


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
