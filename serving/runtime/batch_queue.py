"""Joins requests for the same function into batches, with the knobs of TensorFlow Serving.

A request runs at once while its function is idle; a row of a quick function, in the event loop
itself where that has no other request. While a batch runs, requests gather until they fill a
batch, the first of them has waited for the timeout, or the running batch ends; the next free
thread then takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from serving.errors import DeadlineExceeded, Overloaded, ServiceError, Unavailable

_IDLE_SECONDS = 0.001  # between two looks at whether a function is idle
_QUICK_SECONDS = 0.002  # that the event loop may spend on a row; a thread costs some tenths of it
_log = logging.getLogger(__name__)


class BatchOptions(NamedTuple):
    """The knobs; see `ServeConfig`."""

    max_batch_size: int = 64
    timeout_seconds: float = 0.002
    max_enqueued_batches: int = 100


class _Result(asyncio.Future):
    """A result to be; a request that is cancelled while it waits makes room at once."""

    forget: Callable[[], None] | None = None  # while it waits: with its entry it is a cycle

    def cancel(self, msg: Any = None) -> bool:
        forget = self.forget  # a thread that takes the entry drops it, at any time
        if forget is not None:
            forget()
        return super().cancel(msg)


@dataclasses.dataclass(eq=False)
class _Entry:
    """One request that waits; its future belongs to the event loop that it came from."""

    item: Any
    rows: int
    key: Hashable
    deadline: float
    since: float
    future: _Result


@dataclasses.dataclass(eq=False)
class Batcher:
    """The queue of one function. Its threads may be shared with other batchers.

    Attributes:
      run_all: items → results in their order; a result that is an exception is raised for its
        item. Where it raises itself for several items, each is run alone, so that only the one
        at fault is refused.
      options: a `max_batch_size` of 1 runs every request alone.
      on_batch: called after a batch with the seconds that each request waited, its number of
        rows, and the seconds that it ran.
      max_running: batches that run at the same time; the other threads are for other batchers.
      may_be_quick: whether the function waits for nothing but its own arithmetic, so that a row
        may run in the event loop, as long as the last one was quick.
      waiting_rows: rows that wait now; it and `running` change under the lock of the threads.
    """

    threads: BatchThreads
    run_all: Callable[[Sequence[Any]], Sequence[Any]]
    options: BatchOptions = BatchOptions()  # noqa: RUF009 - a NamedTuple does not change
    on_batch: Callable[[Sequence[float], int, float], None] = lambda *_: None
    max_running: int = 1 << 30
    may_be_quick: bool = False
    waiting_rows: int = 0
    running: int = 0
    _row_seconds: float = math.inf  # of the last batch of one row
    _waiting: OrderedDict[_Entry, None] = dataclasses.field(default_factory=OrderedDict)

    @property
    def capacity(self) -> int:
        return self.options.max_batch_size * self.options.max_enqueued_batches

    def submit(
        self,
        item: Any,
        rows: int,
        *,
        key: Hashable = None,
        deadline: float = math.inf,
        alone: bool = False,
    ) -> asyncio.Future[Any]:
        """Puts a request into the queue; call it in an event loop.

        A request whose future is cancelled while it waits is not run, nor one that still waits at
        its deadline, in `time.monotonic()` seconds. Only items of equal keys are joined.
        `alone` says that the event loop has no other request.

        Raises:
          Overloaded: too much is waiting.
          Unavailable: the threads have ended.
        """
        future, rows = _Result(loop=asyncio.get_running_loop()), max(rows, 1)
        entry = _Entry(item, rows, key, deadline, time.monotonic(), future)
        with self.threads.changed:
            if self.threads.closed:
                raise Unavailable("The service is shutting down.")
            if self.waiting_rows + rows > self.capacity:
                raise Overloaded(
                    f"{self.waiting_rows} rows wait already, at most {self.capacity} may: "
                    "try again later."
                )
            future.forget = functools.partial(self._forget, entry)
            self._waiting[entry] = None
            self.waiting_rows += rows
            is_quick = self.may_be_quick and self._row_seconds < _QUICK_SECONDS
            if alone and is_quick and not self.running and self.waiting_rows == 1:
                future.get_loop().call_soon(self._run_here, entry)  # others may come before
            else:
                self.threads.announce(self)
        return future

    def _run_here(self, entry: _Entry) -> None:
        """Runs a request in its event loop unless it has gone, or others have come meanwhile."""
        with self.threads.changed:
            if entry not in self._waiting:
                return
            if self.threads.closed:
                return self.refuse_all(Unavailable("The service is shutting down."))
            if self.waiting_rows > 1 or self.running:
                return self.threads.announce(self)
            batch = self.take(time.monotonic())
            self.running += 1
        try:
            if batch:
                self.run(batch, _set)
        finally:
            with self.threads.changed:
                self.running -= 1
                if self._waiting:  # they came from another event loop
                    self.threads.changed.notify()

    def wait_until_idle(self) -> None:
        """Waits for the batches that run, also those whose requests have all gone away."""
        while self.running:
            time.sleep(_IDLE_SECONDS)

    # The methods below are for BatchThreads.

    def due(self) -> float:
        """When the first entry is to be run, by the clock of `time.monotonic`; inf: not yet."""
        if self.running >= self.max_running:
            return math.inf  # the thread that ends looks again
        full = self.waiting_rows >= self.options.max_batch_size
        if full or not self.running or not self._waiting or self.threads.closed:
            return 0.0
        return next(iter(self._waiting)).since + self.options.timeout_seconds

    def take(self, now: float) -> list[_Entry]:
        """Removes the next batch from the queue, without what nobody waits for any more."""
        batch: list[_Entry] = []
        rows = 0
        while self._waiting:
            entry = next(iter(self._waiting))
            gone = entry.future.done() or entry.deadline <= now
            fits = rows + entry.rows <= self.options.max_batch_size
            if not gone and batch and not (fits and entry.key == batch[0].key):
                break
            self._remove(entry)
            if not gone:
                batch.append(entry)
                rows += entry.rows
            elif not entry.future.done():
                error = DeadlineExceeded("The deadline passed while the request was waiting.")
                _settle([(entry, error)])
        return batch

    def run(
        self, batch: list[_Entry], settle: Callable[[Sequence[_Outcome]], None] | None = None
    ) -> None:
        """Runs a batch and hands out its results."""
        start = time.monotonic()
        outcomes = self._outcomes(batch)
        seconds = time.monotonic() - start
        (settle or _settle)(outcomes)
        waits, rows = [start - entry.since for entry in batch], sum(entry.rows for entry in batch)
        if rows == 1:
            self._row_seconds = seconds
        try:
            self.on_batch(waits, rows, seconds)
        except Exception:  # the results are on their way
            _log.exception("A batch could not be measured.")

    def _outcomes(self, batch: list[_Entry]) -> list[_Outcome]:
        try:
            return list(zip(batch, self.run_all([entry.item for entry in batch]), strict=True))
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], error)]
        return [outcome for entry in batch for outcome in self._outcomes([entry])]

    def _forget(self, entry: _Entry) -> None:
        with self.threads.changed:
            if entry in self._waiting:
                self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        del self._waiting[entry]
        self.waiting_rows -= entry.rows
        entry.future.forget = None

    def refuse_all(self, error: ServiceError) -> None:
        """Empties the queue; each request gets the error."""
        outcomes = [(entry, error) for entry in self._waiting]
        for entry, _ in outcomes:
            self._remove(entry)
        _settle(outcomes)


_Outcome = tuple[_Entry, Any]  # an Exception is raised for the request


class BatchThreads:
    """The threads that run batches, and the turns of the batchers that share them."""

    def __init__(self, num_threads: int = 2) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self._turns: deque[Batcher] = deque()  # those with entries; the first has its turn next
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting_rows(self) -> int:
        with self.changed:
            return sum(batcher.waiting_rows for batcher in self._turns)

    def announce(self, batcher: Batcher) -> None:
        """Notes that a batcher got an entry; call it with `changed` held."""
        is_first = batcher not in self._turns
        if is_first:
            self._turns.append(batcher)
        if is_first or batcher.due() == 0.0:  # otherwise a thread already knows when it is due
            self.changed.notify()

    def close(self) -> None:
        """Refuses what waits, and ends the threads when what they run is done."""
        with self.changed:
            self.closed = True
            for batcher in self._turns:
                batcher.refuse_all(Unavailable("The service is shutting down."))
            self._turns.clear()
            self.changed.notify_all()
        for thread in self._threads:
            if thread.ident:  # it was started
                thread.join()

    def _work(self) -> None:
        while taken := self._take():
            batcher, batch = taken
            try:
                batcher.run(batch)
            finally:
                with self.changed:
                    batcher.running -= 1
                    if len(self._turns) > 1:  # another batcher may have its turn before it
                        self.changed.notify()
            del taken, batcher, batch  # while it waits, a thread holds on to no version

    def _take(self) -> tuple[Batcher, list[_Entry]] | None:
        with self.changed:
            while not self.closed:
                now = time.monotonic()
                earliest = None
                for _ in range(len(self._turns)):
                    batcher = self._turns.popleft()
                    due = batcher.due()
                    batch = batcher.take(now) if due <= now else []
                    if batcher.waiting_rows:
                        self._turns.append(batcher)
                    if batch:
                        batcher.running += 1
                        return batcher, batch
                    if now < due < math.inf:
                        earliest = min(due, earliest or due)
                self.changed.wait(None if earliest is None else earliest - now)
        return None


def _settle(outcomes: Sequence[_Outcome]) -> None:
    """Gives each future its outcome, one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome[0].future.get_loop(), []).append(outcome)
    for loop, its_outcomes in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_set, its_outcomes)


def _set(outcomes: Sequence[_Outcome]) -> None:
    for entry, outcome in outcomes:
        if entry.future.done():
            continue
        if isinstance(outcome, Exception):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)
