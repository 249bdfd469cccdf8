import asyncio
import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, Overloaded, Unavailable
from serving.runtime.batch_queue import Batcher, BatchOptions, BatchThreads

NEVER = 3600.0  # seconds; a test that waits for it hangs, whatever the machine


class Recorder:
    """Runs batches of numbers: doubles them, and can be held up."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.gate.set()

    def __call__(self, items):
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(30)
        return [2 * item for item in items]


@pytest.fixture
def threads():
    made = []

    def make(num_threads=1):
        made.append(BatchThreads(num_threads))
        made[-1].start()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


async def entered(recorder):
    """Waits until a batch runs."""
    assert await asyncio.to_thread(recorder.entered.acquire, timeout=30)


async def held_up(batcher, recorder, item=0, rows=1):
    """A request whose batch runs until the gate of the recorder is set."""
    recorder.gate.clear()
    future = batcher.submit(item, rows)
    await entered(recorder)
    return future


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_an_idle_function_runs_at_once_whatever_the_timeout(threads):
    batcher = Batcher(threads(), Recorder(), BatchOptions(64, NEVER, 10))

    async def main():
        return [await batcher.submit(3, 1), await batcher.submit(4, 1)]

    assert run(main()) == [6, 8]


def test_what_comes_while_a_batch_runs_is_joined_in_order(threads):
    recorder = Recorder()
    batcher = Batcher(threads(), recorder, BatchOptions(64, NEVER, 10))

    async def main():
        futures = [await held_up(batcher, recorder)]
        futures += [batcher.submit(item, 1) for item in range(1, 6)]
        assert batcher.waiting_rows == 5
        recorder.gate.set()
        return await asyncio.gather(*futures)

    assert run(main()) == [0, 2, 4, 6, 8, 10]
    assert recorder.batches == [[0], [1, 2, 3, 4, 5]]
    assert batcher.waiting_rows == 0


def test_a_batch_is_no_larger_than_allowed_and_of_one_kind(threads):
    recorder = Recorder()
    batcher = Batcher(threads(), recorder, BatchOptions(8, NEVER, 10))

    async def main():
        futures = [await held_up(batcher, recorder)]
        kinds = [(1, 3, "a"), (2, 4, "a"), (3, 2, "a"), (4, 1, "b"), (5, 1, "b"), (6, 20, "b")]
        futures += [batcher.submit(item, rows, key=key) for item, rows, key in kinds]
        recorder.gate.set()
        await asyncio.gather(*futures)

    run(main())
    assert recorder.batches == [[0], [1, 2], [3], [4, 5], [6]]


def test_a_full_batch_does_not_wait_for_the_one_that_runs(threads):
    recorder = Recorder()
    batcher = Batcher(threads(2), recorder, BatchOptions(3, NEVER, 10))

    async def main():
        futures = [await held_up(batcher, recorder)]
        futures += [batcher.submit(item, 1) for item in (1, 2)]
        assert recorder.batches == [[0]]
        futures += [batcher.submit(3, 1)]
        await entered(recorder)
        assert recorder.batches == [[0], [1, 2, 3]]
        recorder.gate.set()
        await asyncio.gather(*futures)

    run(main())


def test_after_the_timeout_a_batch_runs_beside_another(threads):
    recorder = Recorder()
    batcher = Batcher(threads(2), recorder, BatchOptions(64, 0.001, 10))

    async def main():
        futures = [await held_up(batcher, recorder)]
        futures += [batcher.submit(1, 1)]
        await entered(recorder)  # although the first one has not ended
        recorder.gate.set()
        return await asyncio.gather(*futures)

    assert run(main()) == [0, 2]
    assert recorder.batches == [[0], [1]]


def test_past_the_limit_a_request_is_refused_at_once(threads):
    recorder = Recorder()
    batcher = Batcher(threads(), recorder, BatchOptions(2, NEVER, 3))

    async def main():
        running = await held_up(batcher, recorder)
        waiting = [batcher.submit(item, 2) for item in (1, 2, 3)]
        with pytest.raises(Overloaded, match="6 rows wait already, at most 6 may"):
            batcher.submit(4, 1)
        waiting[1].cancel()  # nobody waits for it any more: it makes room
        assert batcher.waiting_rows == 4
        last = batcher.submit(5, 2)
        recorder.gate.set()
        return await asyncio.gather(running, waiting[0], waiting[2], last)

    assert run(main()) == [0, 2, 6, 10]
    assert recorder.batches == [[0], [1], [3], [5]]


def test_what_is_cancelled_or_too_late_is_not_run(threads):
    recorder = Recorder()
    batcher = Batcher(threads(), recorder, BatchOptions(64, NEVER, 10))

    async def main():
        running = await held_up(batcher, recorder)
        late = batcher.submit(1, 1, deadline=time.monotonic())
        cancelled = batcher.submit(2, 1)
        good = batcher.submit(3, 1, deadline=time.monotonic() + NEVER)
        cancelled.cancel()
        recorder.gate.set()
        with pytest.raises(DeadlineExceeded, match="deadline passed while the request was waiting"):
            await late
        return await asyncio.gather(running, good)

    assert run(main()) == [0, 6]
    assert recorder.batches == [[0], [3]]


@pytest.mark.parametrize("steps", range(4))
def test_what_is_cancelled_may_be_taken_by_a_thread_meanwhile(threads, steps):
    """The thread takes the request after so many lines of its `cancel`."""
    recorder = Recorder()
    batcher = Batcher(threads(), recorder, BatchOptions(64, NEVER, 10))

    async def main():
        first = await held_up(batcher, recorder, 1)
        future = batcher.submit(2, 1)
        events = iter(range(4))

        def step(frame, event, _):
            if frame.f_code.co_name != "cancel":
                return None
            if event in ("call", "line") and next(events, None) == steps:
                recorder.gate.set()
                assert recorder.entered.acquire(timeout=30)
            return step

        sys.settrace(step)
        try:
            assert future.cancel()
        finally:
            sys.settrace(None)
        recorder.gate.set()
        return await first

    assert run(main()) == 2


def test_an_error_hits_only_the_request_at_fault(threads):
    batches = []

    def divide(items):
        batches.append(list(items))
        return [12 // item for item in items]

    batcher = Batcher(threads(), divide, BatchOptions(64, NEVER, 10))

    async def main():
        gate = threading.Event()
        blocked = Batcher(batcher.threads, lambda items: gate.wait(30) and items)
        first = blocked.submit(0, 1)  # the only thread is busy until all others wait
        futures = [batcher.submit(item, 1) for item in (3, 0, 4)]
        gate.set()
        await first
        return await asyncio.gather(*futures, return_exceptions=True)

    three, zero, four = run(main())
    assert (three, four) == (4, 3)
    assert isinstance(zero, ZeroDivisionError)
    assert batches == [[3, 0, 4], [3], [0], [4]]


def test_a_result_that_is_an_error_is_raised_for_its_request(threads):
    batcher = Batcher(threads(), lambda items: [Overloaded("no") for _ in items])

    async def main():
        with pytest.raises(Overloaded, match="no"):
            await batcher.submit(1, 1)

    run(main())


def test_functions_that_share_a_thread_take_turns(threads):
    shared, order = threads(), []
    gate = threading.Event()

    def named(name):
        return lambda items: [order.append(name) or name for _ in items]

    options = BatchOptions(1, NEVER, 10)
    first, second = (Batcher(shared, named(name), options) for name in ("first", "second"))
    holding = Batcher(shared, lambda items: gate.wait(30) and items)

    async def main():
        held = holding.submit(0, 1)
        futures = [first.submit(0, 1) for _ in range(3)] + [second.submit(0, 1) for _ in range(3)]
        gate.set()
        await asyncio.gather(held, *futures)

    run(main())
    assert order == ["first", "second"] * 3


def test_results_reach_the_event_loop_that_asked(threads):
    batcher = Batcher(threads(2), lambda items: [item + 1 for item in items])
    results = {}

    def client(start):
        async def main():
            futures = [batcher.submit(start + step, 1) for step in range(50)]
            return await asyncio.gather(*futures)

        results[start] = asyncio.run(main())

    clients = [threading.Thread(target=client, args=(start,)) for start in (0, 1000, 2000)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    assert results == {start: list(range(start + 1, start + 51)) for start in (0, 1000, 2000)}


def test_a_loop_that_is_gone_does_not_stop_the_thread(threads):
    recorder = Recorder()
    shared = threads()
    batcher = Batcher(shared, recorder)
    recorder.gate.clear()

    async def leave():
        batcher.submit(1, 1)
        await entered(recorder)

    asyncio.run(leave())
    recorder.gate.set()

    async def stay():
        return await batcher.submit(2, 1)

    assert run(stay()) == 4
    assert shared.alive


def test_closing_refuses_what_waits_and_ends_the_threads(threads):
    recorder = Recorder()
    shared = threads()
    batcher = Batcher(shared, recorder, BatchOptions(64, NEVER, 10))

    async def main():
        running = await held_up(batcher, recorder)
        waiting = batcher.submit(1, 1)
        closing = asyncio.create_task(asyncio.to_thread(shared.close))
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        assert shared.alive  # what runs is not cut off
        recorder.gate.set()
        await closing
        with pytest.raises(Unavailable, match="shutting down"):
            batcher.submit(2, 1)
        return await running

    assert run(main()) == 0
    assert not shared.alive


def test_a_batch_is_measured(threads):
    seen = []
    recorder = Recorder()
    batcher = Batcher(
        threads(), recorder, BatchOptions(64, NEVER, 10), on_batch=lambda *call: seen.append(call)
    )

    async def main():
        futures = [await held_up(batcher, recorder, rows=2)]
        futures += [batcher.submit(item, 3) for item in (1, 2)]
        recorder.gate.set()
        await asyncio.gather(*futures)
        await batcher.submit(3, 1)  # the second batch has been measured before this one runs

    run(main())
    waits, rows, seconds = seen[1]
    assert len(waits) == 2
    assert rows == 6
    assert min(waits) >= 0 <= seconds


@pytest.mark.parametrize("seed", range(3))
def test_everyone_gets_their_own_result_under_load(threads, seed):
    rng = np.random.default_rng(seed)
    sizes, gate = [], threading.Event()

    def double(items):
        assert gate.wait(30)
        sizes.append(len(items))
        return [2 * item for item in items]

    batcher = Batcher(threads(3), double, BatchOptions(16, 0.0005, 1000))

    async def client(number):
        for step in range(20):
            item = 1000 * number + step
            if rng.random() < 0.1:
                batcher.submit(-1, 1).cancel()
            assert await batcher.submit(item, int(rng.integers(1, 5)), key=number // 14) == 2 * item

    async def main():
        clients = [asyncio.ensure_future(client(number)) for number in range(40)]
        await asyncio.sleep(0)  # each has sent its first request, three batches at most have begun
        gate.set()
        await asyncio.gather(*clients)
        while batcher.waiting_rows:  # what was cancelled last is swept out, too
            await asyncio.sleep(0.001)

    run(main())
    assert max(sizes) > 1


def test_one_kind_of_work_leaves_a_thread_to_others(threads):
    both = threads(2)
    slow, other = Recorder(), Recorder()
    quota = Batcher(both, slow, BatchOptions(1, NEVER, 10), max_running=1)
    usual = Batcher(both, other, BatchOptions(1, NEVER, 10))

    async def main():
        slow.gate.clear()
        futures = [quota.submit(item, 1) for item in range(3)]
        await entered(slow)
        assert await usual.submit(7, 1) == 14
        assert slow.batches == [[0]]
        slow.gate.set()
        return await asyncio.gather(*futures)

    assert run(main()) == [0, 2, 4]


def test_a_request_goes_with_its_answer(threads):
    """No cycle keeps the arrays of a request until a garbage collection."""
    batcher, gone = Batcher(threads(), lambda items: [0 for _ in items]), []

    async def main():
        for number in range(2):
            item = np.zeros(number)
            weakref.finalize(item, gone.append, number)
            future = batcher.submit(item, 1)
            del item
            if number:
                future.cancel()
            else:
                await future
            del future
        await batcher.submit(None, 1)
        await asyncio.sleep(0)

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()
    assert sorted(gone) == [0, 1]


def test_a_row_that_comes_alone_runs_in_the_event_loop(threads):
    ran_in = []

    def work(items):
        ran_in.append(threading.current_thread())
        return items

    options = BatchOptions(64, NEVER, 10)
    quick, other = (Batcher(threads(), work, options, may_be_quick=may) for may in (True, False))

    async def main():
        for batcher in (quick, other):
            batcher._row_seconds = 0.0
            assert await batcher.submit(1, 1, alone=True) == 1
        assert await quick.submit(2, 2, alone=True) == 2
        quick._row_seconds = 0.0
        assert await asyncio.gather(quick.submit(3, 1, alone=True), quick.submit(4, 1)) == [3, 4]
        quick._row_seconds = 1.0
        assert await quick.submit(5, 1, alone=True) == 5
        quick._row_seconds = 0.0
        assert await quick.submit(6, 1) == 6

    run(main())
    here, *aside = [thread is threading.current_thread() for thread in ran_in]
    assert here
    assert len(aside) == 5  # the two that came together are one batch
    assert not any(aside)
    quick.wait_until_idle()  # a result is there before its thread has ended the batch
    assert not quick.running


def test_a_row_for_the_event_loop_may_leave_or_come_too_late(threads):
    recorder = Recorder()
    pool = threads()
    batcher = Batcher(pool, recorder, BatchOptions(64, NEVER, 10), may_be_quick=True)
    batcher._row_seconds = 0.0

    async def main():
        batcher.submit(1, 1, alone=True).cancel()
        late = batcher.submit(2, 1, alone=True, deadline=time.monotonic())
        with pytest.raises(DeadlineExceeded):
            await late
        stopped = batcher.submit(3, 1, alone=True)
        pool.close()
        with pytest.raises(Unavailable):
            await stopped

    run(main())
    assert not recorder.batches
    assert batcher.waiting_rows == batcher.running == 0


@pytest.mark.parametrize("alone", [False, True])
def test_a_batch_that_cannot_be_measured_holds_nothing_up(alone, threads, caplog):
    def measure(*_):
        raise ValueError("no such bucket")

    options = BatchOptions(64, NEVER, 10)
    quick = {"max_running": 1, "may_be_quick": True, "_row_seconds": 0.0}
    batcher = Batcher(threads(), Recorder(), options, on_batch=measure, **quick)

    async def main():
        for item in (1, 2, 3):
            assert await batcher.submit(item, 1, alone=alone) == 2 * item
            batcher._row_seconds = 0.0

    run(main())
    assert "no such bucket" in caplog.text
