"""Streaming frequency estimation over an unbounded collection: event time decides the step.

Events are held until the watermark says that their window of steps is complete. Whether an event
is late is decided once, where it is grouped with those of its window, and not in each hash array:
so all arrays have seen the same events, in the same order, as in the plain recursion.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.coders import PickleCoder, VarIntCoder
from apache_beam.transforms import trigger
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import FixedWindows, GlobalWindows, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp
from apache_beam.utils.windowed_value import PaneInfoTiming

from pipeline.beam.blocks import partition, partition_of
from pipeline.streaming.estimator import Block, Buckets, Estimator, advance_range, distinct

LATE = "late"
_FOREVER = Duration(seconds=100 * 365 * 86_400)  # late events are told apart, never dropped


class Stream(NamedTuple):
    """What `EstimateStream` gives."""

    snapshots: beam.PCollection  # (last step of the window, Buckets that changed in it)
    late: beam.PCollection  # Block, events that came too late to count


@dataclasses.dataclass(frozen=True)
class StepClock:
    """How event time becomes steps, and when a step is complete."""

    seconds: int  # of a step
    origin: int  # number of the period of so many seconds since 1970 that is step 1
    first_step: int = 1  # earlier events are late; the step of the snapshot to go on from
    allowed_lateness: int = 0  # seconds that the watermark must be past a window
    window: int = 1  # steps of a window; each ends with a snapshot

    def steps(self, seconds: np.ndarray) -> np.ndarray:
        """The step of each event time, in seconds since 1970: int64 [n]."""
        return seconds // self.seconds - self.origin + 1

    def closes(self, step: int) -> int:
        """When the window that ends with a step is complete, in seconds since 1970."""
        return (self.origin + step) * self.seconds + self.allowed_lateness

    def last_step(self, closes: float) -> int:
        """The last step of the window that is complete at that time."""
        return (round(closes) - self.allowed_lateness) // self.seconds - self.origin


@dataclasses.dataclass
class EstimateStream(beam.PTransform):
    """Events as they come → the buckets that changed, at the end of every window of steps.

    An element is (fingerprints int64 [n], seconds int64 [n]): a block of events with their times,
    in seconds since 1970; its timestamp is not later than the earliest of them. An event counts
    if it comes before the watermark has passed the end of its window by the allowed lateness;
    else it goes to `late`. The same event twice in a step changes nothing.

    State is kept for each range of buckets of a hash array, `estimator.ranges` of them; with as
    many ranges as buckets, for each (array, bucket). A snapshot is made of the latest that every
    range gave: one without an event in a window gives nothing. Returns a `Stream`.
    """

    estimator: Estimator
    clock: StepClock

    def expand(self, events: beam.PCollection) -> Any:
        by_window = beam.FlatMap(_by_window, self.estimator, self.clock)
        windowed = events | "ByWindow" >> by_window.with_outputs(LATE, main="events")
        # Windows over event times that are moved by the allowed lateness.
        size = self.clock.window * self.clock.seconds
        windows = FixedWindows(size, offset=self.clock.closes(0) % size)
        hashed = beam.FlatMap(_hash, self.estimator, self.clock)
        closed = (
            windowed.events
            | "Windows"
            >> beam.WindowInto(
                windows,
                trigger=trigger.AfterWatermark(late=trigger.AfterCount(1)),
                accumulation_mode=trigger.AccumulationMode.DISCARDING,
                allowed_lateness=_FOREVER,
            )
            | "Close" >> beam.GroupByKey()
            | "Hash" >> hashed.with_outputs(LATE, main="hashed")
        )
        snapshots = (
            closed.hashed
            | "AllWindows" >> beam.WindowInto(GlobalWindows())
            | "Advance" >> beam.ParDo(_AdvanceInOrder(self.estimator, self.clock))
        )
        late = (
            windowed[LATE] | "AllEarly" >> beam.WindowInto(GlobalWindows()),
            closed[LATE] | "AllLate" >> beam.WindowInto(GlobalWindows()),
        ) | "Late" >> beam.Flatten()
        return Stream(snapshots, late)


def _by_window(
    element: tuple[np.ndarray, np.ndarray], estimator: Estimator, clock: StepClock
) -> Iterator[Any]:
    """Events → (range of fingerprints, Block) by window; before the first step: late."""
    prints, seconds = element
    steps = clock.steps(seconds)
    columns = np.stack([steps, prints, np.ones_like(steps), seconds], axis=1)
    early = steps < clock.first_step
    if early.any():
        yield beam.pvalue.TaggedOutput(LATE, Block(*columns[early].T[:3]))
    columns = columns[~early]
    windows = (columns[:, 0] - 1) // clock.window
    names, codes = np.unique(windows, return_inverse=True)
    ranges = estimator.num_ranges
    parts = codes * ranges + partition_of(columns[:, 1].copy(), ranges)
    for part, rows in partition(columns, parts, len(names) * ranges):
        time = int(rows[:, 3].min()) + clock.allowed_lateness
        yield TimestampedValue((part % ranges, Block(*rows.T[:3])), time)


def _hash(
    element: tuple[int, Iterable[Block]],
    estimator: Estimator,
    clock: StepClock,
    window: Any = beam.DoFn.WindowParam,
    pane: Any = beam.DoFn.PaneInfoParam,
) -> Iterator[Any]:
    """The events of a window → (array · ranges + range, (last step, occurrences)), or late."""
    block = Block(*map(np.concatenate, zip(*element[1], strict=True)))
    if pane.timing == PaneInfoTiming.LATE:
        yield beam.pvalue.TaggedOutput(LATE, block)
        return
    last_step = clock.last_step(float(window.end))
    for key, occurrences in estimator.by_range(distinct(block)):
        yield key, (last_step, occurrences)


class _AdvanceInOrder(beam.DoFn):
    """Keeps the state of a range of buckets and advances it window by window."""

    def __init__(self, estimator: Estimator, clock: StepClock) -> None:
        self._estimator, self._clock = estimator, clock

    _state = beam.DoFn.StateParam(ReadModifyWriteStateSpec("state", PickleCoder()))
    # (last step of its window, occurrences), and the earliest of those last steps
    _waiting = beam.DoFn.StateParam(BagStateSpec("waiting", PickleCoder()))
    _due = beam.DoFn.StateParam(ReadModifyWriteStateSpec("due", VarIntCoder()))
    _closes = TimerSpec("closes", TimeDomain.WATERMARK)
    _close = beam.DoFn.TimerParam(_closes)

    def process(
        self,
        element: tuple[int, tuple[int, np.ndarray]],
        waiting: Any = _waiting,
        due: Any = _due,
        close: Any = _close,
    ) -> None:
        last_step = element[1][0]
        waiting.add(element[1])
        if due.read() is None or last_step < due.read():
            self._wait_for(last_step, due, close)

    @on_timer(_closes)
    def advance(
        self,
        key: Any = beam.DoFn.KeyParam,
        state: Any = _state,
        waiting: Any = _waiting,
        due: Any = _due,
        close: Any = _close,
    ) -> Iterator[tuple[int, Buckets]]:
        """Applies the window that is due, and waits for the next one that has events."""
        last_step, held = due.read(), list(waiting.read())
        ready = [occurrences for step, occurrences in held if step <= last_step]
        buckets = advance_range(key, ready, self._estimator, state.read())
        state.write(buckets.state)
        waiting.clear()
        later = [element for element in held if element[0] > last_step]
        for element in later:
            waiting.add(element)
        due.clear()
        if later:
            self._wait_for(min(step for step, _ in later), due, close)
        yield last_step, buckets

    def _wait_for(self, last_step: int, due: Any, close: Any) -> None:
        due.write(last_step)
        # At the end itself, one tick behind the timestamp of what comes from the window.
        close.set(Timestamp(self._clock.closes(last_step)))
