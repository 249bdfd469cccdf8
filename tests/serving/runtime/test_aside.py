import asyncio
import threading

import pytest

from serving.runtime.aside import aside


@pytest.mark.parametrize(
    ("size", "thread"), [(1, "MainThread"), (10_000, "aside_"), (1_000_000, "aside-large_0")]
)
def test_what_is_large_is_done_in_another_thread(size, thread):
    name = asyncio.run(aside(size, lambda: threading.current_thread().name))
    assert name.startswith(thread)


def test_the_loop_goes_on_while_something_large_is_done():
    async def main():
        done = threading.Event()
        work = asyncio.create_task(aside(10_000, lambda: done.wait(60)))
        await asyncio.sleep(0)  # it has begun, and does not end before the next line is reached
        done.set()
        return await work

    assert asyncio.run(main())
