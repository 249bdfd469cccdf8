import asyncio
import gc
import sys
import threading

import pytest

from serving.runtime.process import aside, settle


def test_settling_leaves_what_is_imported_out_of_collections():
    seconds = sys.getswitchinterval()
    before = len(gc.get_objects())
    try:
        settle()
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < before / 2
        assert gc.isenabled()
        assert sys.getswitchinterval() == pytest.approx(0.001)
    finally:
        gc.unfreeze()
        sys.setswitchinterval(seconds)


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
