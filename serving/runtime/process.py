"""The process of a service: its ports, memory and pauses, and work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from serving.settings import ServeConfig

BYTES_A_VALUE = 16  # that a value has in a message, about
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they end a service

_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 8 << 20  # a parameter of glibc's `mallopt`
_SWITCH_SECONDS = 0.001  # how long one thread may keep the others from Python
_SMALL = 1 << 13  # values, or bytes by the hundred; a millisecond or two
_LARGE = 1 << 17

_R = TypeVar("_R")
_threads = ThreadPoolExecutor(2, thread_name_prefix="aside")
_thread = ThreadPoolExecutor(1, thread_name_prefix="aside-large")


async def aside(size: int, work: Callable[[], _R]) -> _R:
    """Does work on `size` values of a request, in a thread where that leaves the event loop free.

    What is small is done at once: a thread would cost more. What is very large waits for one
    thread of its own, so that its memory is needed once, and ordinary requests do not wait for it.
    """
    if size <= _SMALL:
        return work()
    executor = _threads if size <= _LARGE else _thread
    return await asyncio.get_running_loop().run_in_executor(executor, work)


class Addresses(NamedTuple):
    """Where a server listens; a port that the system chose included."""

    rest: str
    grpc: str


Announce = Callable[[Addresses, list[str]], None]  # with the names of the models


def bind(config: ServeConfig, flag: str, port: int, *, is_shared: bool) -> socket.socket:
    """A TCP socket with an address, which processes that share it all may have.

    Raises:
      ValueError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where it reads TCP; it costs 40 ms an answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((config.host, port))
        if not is_shared:  # two that do not listen may have one address
            bound.listen()
    except OSError as error:
        bound.close()
        api = "REST" if flag == "rest_port" else "gRPC"
        raise ValueError(
            f"The {api} API cannot listen on {config.host}:{port} "
            f"({error.strerror or error}): choose another --{flag} or --host."
        ) from error
    return bound


def settle() -> None:
    """Keeps pauses short; call it once all is imported and before a version is loaded.

    What has been imported is left out of garbage collection from then on: a full collection, which
    stops every request, then takes a few hundredths of a second in place of tenths. Threads take
    turns more often, so that the event loop does not wait for a version that is being loaded.
    Large blocks, such as bodies, go back to the system when they are freed: after the first of
    them glibc would keep those that follow, as its threshold follows their size.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    sys.setswitchinterval(_SWITCH_SECONDS)
