"""The unbounded transform against the paper's loop: out of order, and more than once."""

import uuid

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream as live
from apache_beam.transforms.window import TimestampedValue
from streaming_events import SIZES, as_block, keep, kept, make_events, paper_of

from pipeline.beam.accounting import AccountingError
from pipeline.streaming.estimator import Estimator, assemble
from pipeline.streaming.unbounded import End, EstimateStream, _InOrder

ORIGIN = 100  # step 1 is the period [1000, 1010)
# FnApiRunner knows no TestStream; this one stands behind DirectRunner, which would look for a
# binary to download. Without --streaming it groups all that ever comes, whatever the watermark.
LIVE = "BundleBasedDirectRunner"


def stream(tmp_path, source, estimator, window, runner=LIVE):
    """What the transform gives for a source: [(last step, Buckets)] in order."""
    out = tmp_path / uuid.uuid4().hex
    out.mkdir()
    flags = [f"--runner={runner}", *(["--streaming"] if runner == LIVE else [])]
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        changed = pipeline | source | EstimateStream(estimator, 10, window)
        _ = changed | "Keep" >> beam.Map(keep, out)
    found = [(end.step, buckets) for _, (end, buckets) in kept(out)]
    return sorted(found, key=lambda element: element[0])


def events_at(*events):
    """A block of (step, fingerprint) events."""
    earliest = min(step for step, _ in events)
    return TimestampedValue((ORIGIN, as_block(events)), (ORIGIN + earliest - 1) * 10)


def end_of(step):
    return (ORIGIN + step) * 10


def states(estimator, found, upto):
    """The snapshot at the end of a window."""
    return assemble(estimator, [buckets for last, buckets in found if last <= upto])[0]


@pytest.mark.parametrize(("ranges", "window"), [(1, 1), (4, 5)])
def test_a_stream_out_of_order_with_repeats(tmp_path, ranges, window):
    """Every event comes up to two windows late, but before its window closes; some come twice."""
    events = make_events(num_events=40, num_steps=10)
    rng = np.random.default_rng(window)
    lateness = 2 * window * 10
    source = live.TestStream().advance_watermark_to(0)
    delay = rng.integers(0, lateness, len(events))
    arrivals = sorted(
        (end_of(step - 1) + int(d), (step, f)) for d, (step, f) in zip(delay, events, strict=True)
    )
    now = 0
    for number, (arrival, event) in enumerate(arrivals):
        if arrival > now:
            now = arrival
            source = source.advance_watermark_to(now - lateness)
        source = source.add_elements([events_at(event)] * (1 + number % 3 // 2))
        if number % 11 == 0 and number:  # an older event once more, from a step still open
            open_ones = [e for a, e in arrivals[:number] if e[0] >= event[0]]
            source = source.add_elements([events_at(e) for e in open_ones[-3:]])
    estimator = Estimator(**SIZES, ranges=ranges)
    found = stream(tmp_path, source.advance_watermark_to_infinity(), estimator, window)
    ends = sorted({last for last, _ in found})
    assert all((ORIGIN + last) % window == 0 for last in ends)
    for end in ends:  # every snapshot on the way, and the last one
        upto = [event for event in events if event[0] <= end]
        paper_of(upto).check(states(estimator, found, end))
    assert ends[-1] >= max(step for step, _ in events)


def test_a_window_emits_when_the_watermark_passes_it_and_not_before(tmp_path):
    """Both windows hold events when the first closes; only its steps are in the snapshot."""
    events = [(1, 5), (2, 5), (3, 5), (5, 6), (11, 6)]
    source = live.TestStream().advance_watermark_to(0).add_elements([events_at(*events)])
    source = source.advance_watermark_to(end_of(2)).advance_watermark_to_infinity()
    estimator = Estimator(**SIZES, ranges=1)
    found = stream(tmp_path, source, estimator, 3)
    assert [(last, b.array) for last, b in found if b.array == 0] == [(2, 0), (5, 0), (11, 0)]
    for end in (2, 5, 11):
        upto = [event for event in events if event[0] <= end]
        paper_of(upto).check(states(estimator, found, end))


def test_the_unbounded_transform_on_a_bounded_log(tmp_path):
    events = make_events(num_events=100, num_steps=15)
    blocks = [events_at(*events[i::3]) for i in range(3)]
    source = beam.Create(blocks) | beam.Map(lambda block: block)
    estimator = Estimator(**SIZES, ranges=2)
    found = stream(tmp_path, source, estimator, 10, runner="FnApiRunner")
    paper_of(events).check(states(estimator, found, 10**6))


class State(list):
    """A state of Beam that holds one value."""

    def read(self):
        return self[0] if self else None


def test_what_comes_after_its_window_was_applied_is_an_error():
    """A runner whose timers did not wait for the watermark would else lose rows silently."""
    late = (0, (End(6, ORIGIN), None))
    with pytest.raises(AccountingError, match="step 6 came when step 7 was applied"):
        _InOrder(None, 10).process(late, State([End(7, ORIGIN)]))
