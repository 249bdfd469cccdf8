"""Work that grows with a request, done in threads so that the event loop goes on.

What is small is done at once: a thread would cost more. What is very large waits for one thread of
its own, so that its memory is needed once, and ordinary requests do not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_SMALL = 1 << 13  # values, or bytes by the hundred; a millisecond or two
_LARGE = 1 << 17
BYTES_A_VALUE = 16  # that a value has in a message, about

_R = TypeVar("_R")
_threads = ThreadPoolExecutor(2, thread_name_prefix="aside")
_thread = ThreadPoolExecutor(1, thread_name_prefix="aside-large")


async def aside(size: int, work: Callable[[], _R]) -> _R:
    """Does the work, in a thread where `size`, the values that it goes through, is not small."""
    if size <= _SMALL:
        return work()
    executor = _threads if size <= _LARGE else _thread
    return await asyncio.get_running_loop().run_in_executor(executor, work)
