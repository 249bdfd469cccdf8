"""Streaming frequency estimation over an unbounded collection: event time decides the step.

Rows are held until the watermark says that their window of steps is complete. Whether a row is late
is decided once, where its file is read (`incoming`), and not in each hash array: so all arrays have
seen the same rows, in the same order, as in the plain recursion. State ends with its window, but
for the estimates themselves.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.coders import PickleCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import FixedWindows, GlobalWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from pipeline.beam.accounting import AccountingError
from pipeline.beam.blocks import partition, partition_of
from pipeline.counts.settings import FrequenciesConfig
from pipeline.streaming.estimator import (
    Block,
    Buckets,
    Estimator,
    advance_range,
    assemble,
    distinct,
)
from pipeline.streaming.snapshots import write_window


class End(NamedTuple):
    """The end of a window of steps."""

    step: int  # the last one
    origin: int  # the period of event time, counted from 1970, that is step 1


@dataclasses.dataclass
class EstimateStream(beam.PTransform):
    """Rows as they come → the buckets that changed, at the end of every window of steps.

    An element is (origin, Block): the period of so many seconds since 1970 that is step 1, the same
    in all elements, and rows by step; its timestamp is not later than their earliest step begins.
    The watermark must not have passed the end of their window: who reads rows tells apart which are
    late. The same candidate twice in a step changes nothing.

    State is kept for each range of buckets of a hash array, `estimator.ranges` of them. Gives
    (0, (End, Buckets)); a range without rows in a window gives nothing.
    """

    estimator: Estimator
    seconds: int  # of a step
    window: int = 1  # steps

    def expand(self, blocks: beam.PCollection) -> beam.PCollection:
        def advance(key: int, end: End, rows: list[np.ndarray], state: Any) -> tuple[Any, Any]:
            buckets = advance_range(key, rows, self.estimator, state)
            return buckets.state, (0, (end, buckets))

        by_window = beam.FlatMap(_by_window, self.estimator, self.seconds, self.window)
        return (
            blocks
            | "ByWindow" >> by_window
            | "Windows" >> beam.WindowInto(FixedWindows(self.window * self.seconds))
            | "Close" >> beam.GroupByKey()
            | "Hash" >> beam.FlatMap(_hash, self.estimator, self.seconds)
            | "AllWindows" >> beam.WindowInto(GlobalWindows())
            | "Advance"
            >> beam.ParDo(_InOrder(advance, self.seconds)).with_output_types(
                tuple[int, tuple[End, Buckets]]
            )
        )


def write_snapshots(
    changed: beam.PCollection, estimator: Estimator, config: FrequenciesConfig
) -> beam.PCollection:
    """What `EstimateStream` gives → a snapshot for each window, written by one worker in order.

    A window that comes again, as after a restart from a checkpoint, gives the same once more.
    """

    def write(key: int, end: End, changed: list[Buckets], state: Any) -> tuple[Any, str]:
        whole, rows = assemble(estimator, changed, state)
        return (whole, rows), write_window(end.step, end.origin, whole, int(rows[0]), config)

    # All ranges must have given what changed in a window: one tick after they do.
    in_order = _InOrder(write, config.step_seconds, after_ms=1)
    return changed | "OneWorker" >> beam.Reshuffle() | "Write" >> beam.ParDo(in_order)


def _by_window(
    element: tuple[int, Block], estimator: Estimator, seconds: int, window: int
) -> Iterator[Any]:
    """Rows → (range of fingerprints, (origin, Block)) by window."""
    origin, block = element
    columns = np.stack(block, axis=1)
    windows = (columns[:, 0] + origin - 1) // window
    names, codes = np.unique(windows, return_inverse=True)
    ranges = estimator.num_ranges
    parts = codes * ranges + partition_of(columns[:, 1].copy(), ranges)
    for part, rows in partition(columns, parts, len(names) * ranges):
        begins = (int(rows[:, 0].min()) + origin - 1) * seconds
        yield TimestampedValue((part % ranges, (origin, Block(*rows.T))), begins)


def _hash(
    element: tuple[int, Iterable[tuple[int, Block]]],
    estimator: Estimator,
    seconds: int,
    window: Any = beam.DoFn.WindowParam,
) -> Iterator[tuple[int, tuple[End, np.ndarray]]]:
    """The rows of a window → (array · ranges + range, (its end, occurrences))."""
    origins, blocks = zip(*element[1], strict=True)
    end = End(round(float(window.end)) // seconds - origins[0], origins[0])
    block = Block(*map(np.concatenate, zip(*blocks, strict=True)))
    for key, occurrences in estimator.by_range(distinct(block)):
        yield key, (end, occurrences)


class _InOrder(beam.DoFn):
    """Keeps a state for each key, and applies to it what comes, window by window.

    `apply` takes the key, the end of a window, what came for it, and the state or None; it gives
    the state after it, and an element.
    """

    _state = beam.DoFn.StateParam(ReadModifyWriteStateSpec("state", PickleCoder()))
    _done = beam.DoFn.StateParam(ReadModifyWriteStateSpec("done", PickleCoder()))  # End
    # (end of its window, value), and the earliest of those ends
    _waiting = beam.DoFn.StateParam(BagStateSpec("waiting", PickleCoder()))
    _due = beam.DoFn.StateParam(ReadModifyWriteStateSpec("due", PickleCoder()))
    _closes = TimerSpec("closes", TimeDomain.WATERMARK)
    _close = beam.DoFn.TimerParam(_closes)

    def __init__(self, apply: Callable[..., Any], seconds: int, after_ms: int = 0) -> None:
        self._apply, self._seconds, self._after_ms = apply, seconds, after_ms

    def process(
        self,
        element: tuple[int, tuple[End, Any]],
        done: Any = _done,
        waiting: Any = _waiting,
        due: Any = _due,
        close: Any = _close,
    ) -> None:
        end, last = element[1][0], done.read()
        if last is not None and end <= last:
            raise AccountingError(f"rows of step {end.step} came when step {last.step} was applied")
        waiting.add(element[1])
        if due.read() is None or end < due.read():
            self._wait_for(end, due, close)

    @on_timer(_closes)
    def apply(
        self,
        key: Any = beam.DoFn.KeyParam,
        fired: Any = beam.DoFn.TimestampParam,
        state: Any = _state,
        done: Any = _done,
        waiting: Any = _waiting,
        due: Any = _due,
        close: Any = _close,
    ) -> Iterator[Any]:
        """Applies the window that is due, and waits for the next one that has rows."""
        end, held = due.read(), list(waiting.read())
        if end is None or fired < self._closing(end):
            return  # a runner may also fire what was set before
        values = [value for when, value in held if when == end]
        after, output = self._apply(key, end, values, state.read())
        state.write(after)
        done.write(end)
        waiting.clear()
        later = [element for element in held if element[0] > end]
        for element in later:
            waiting.add(element)
        due.clear()
        if later:
            self._wait_for(min(when for when, _ in later), due, close)
        yield output

    def _wait_for(self, end: End, due: Any, close: Any) -> None:
        due.write(end)
        close.set(self._closing(end))

    def _closing(self, end: End) -> Timestamp:
        # At the end itself, one tick behind the timestamp of what comes from the window.
        ends = (end.origin + end.step) * self._seconds
        return Timestamp(micros=1_000_000 * ends + 1000 * self._after_ms)
