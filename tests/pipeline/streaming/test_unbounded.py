"""The unbounded transform against the paper's loop: out of order, late, and more than once."""

import uuid

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream as live
from apache_beam.transforms.window import TimestampedValue
from streaming_events import SIZES, keep, kept, make_events, paper_of, save

from pipeline.streaming.estimator import Estimator, assemble
from pipeline.streaming.unbounded import EstimateStream, StepClock

ORIGIN = 100  # step 1 is the period [1000, 1010)
CLOCK = {"seconds": 10, "origin": ORIGIN}
# FnApiRunner knows no TestStream; this one stands behind DirectRunner, which would look for a
# binary to download. Without --streaming it groups all that ever comes, whatever the watermark.
LIVE = "BundleBasedDirectRunner"


def stream(tmp_path, source, estimator, clock, runner=LIVE):
    """What the transform gives for a source: [(last step, Buckets)] in order, late pairs."""
    out, late = tmp_path / uuid.uuid4().hex, tmp_path / uuid.uuid4().hex
    out.mkdir()
    late.mkdir()
    flags = [f"--runner={runner}", *(["--streaming"] if runner == LIVE else [])]
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        found = pipeline | source | EstimateStream(estimator, clock)
        _ = found.snapshots | "Keep" >> beam.Map(keep, out)
        _ = found.late | "KeepLate" >> beam.Map(keep, late)
    pairs = [
        pair
        for block in kept(late)
        for pair in zip(block.steps.tolist(), block.fingerprints.tolist(), strict=True)
    ]
    return sorted(kept(out), key=lambda element: element[0]), sorted(pairs)


def events_at(*events):
    """A block of (step, fingerprint) events, each somewhere in its step."""
    seconds = [(ORIGIN + step - 1) * 10 + hash((step, f)) % 10 for step, f in events]
    prints = np.array([f for _, f in events], np.int64)
    return TimestampedValue((prints, np.array(seconds, np.int64)), min(seconds))


def end_of(step):
    return (ORIGIN + step) * 10


def states(estimator, found, upto):
    """The snapshot at the end of a window."""
    return assemble(estimator, [buckets for last, buckets in found if last <= upto])[0]


@pytest.mark.parametrize(("ranges", "window"), [(1, 1), (4, 7)])
def test_a_stream_out_of_order_with_repeats(tmp_path, ranges, window):
    """Every event comes up to two windows late, but before its window closes; some come twice."""
    events = make_events(num_events=40, num_steps=10)
    rng = np.random.default_rng(window)
    lateness = 2 * window * 10
    clock = StepClock(**CLOCK, window=window, allowed_lateness=lateness)
    source = live.TestStream().advance_watermark_to(0)
    delay = rng.integers(0, 2 * window * 10, len(events))
    arrivals = sorted(
        (end_of(step - 1) + int(d), (step, f)) for d, (step, f) in zip(delay, events, strict=True)
    )
    now = 0
    for number, (arrival, event) in enumerate(arrivals):
        if arrival > now:
            now = arrival
            source = source.advance_watermark_to(now)
        source = source.add_elements([events_at(event)] * (1 + number % 3 // 2))
        if number % 11 == 0 and number:  # an older event once more, from a step still open
            open_ones = [e for a, e in arrivals[:number] if e[0] >= event[0]]
            source = source.add_elements([events_at(e) for e in open_ones[-3:]])
    estimator = Estimator(**SIZES, ranges=ranges)
    found, late = stream(tmp_path, source.advance_watermark_to_infinity(), estimator, clock)
    assert late == []
    ends = sorted({last for last, _ in found})
    assert all(last % window == 0 for last in ends)
    for end in ends:  # every snapshot on the way, and the last one
        upto = [event for event in events if event[0] <= end]
        paper_of(upto).check(states(estimator, found, end))
    assert ends[-1] >= max(step for step, _ in events)


@pytest.mark.parametrize("ranges", [1, 23])
def test_late_events_are_told_apart(tmp_path, ranges):
    """Also where the range of the late event had none in time, in any hash array."""
    clock = StepClock(**CLOCK, allowed_lateness=5, first_step=2)
    source = (
        live.TestStream()
        .advance_watermark_to(0)
        .add_elements([events_at((1, 11), (2, 12)), events_at((3, 13))])
        .advance_watermark_to(end_of(2) + 4)
        .add_elements([events_at((2, 14))])  # 4 s late: in time
        .advance_watermark_to(end_of(2) + 5)
        .add_elements([events_at((2, 15), (4, 16)), events_at((2, 12))])  # step 2 is closed
        .advance_watermark_to(end_of(5) + 5)
        .add_elements([events_at((5, 17)), events_at((6, 18))])
        .advance_watermark_to_infinity()
    )
    estimator = Estimator(**SIZES, ranges=ranges)
    found, late = stream(tmp_path, source, estimator, clock)
    assert late == [(1, 11), (2, 12), (2, 15), (5, 17)]
    counted = [(2, 12), (2, 14), (3, 13), (4, 16), (6, 18)]
    paper_of(counted).check(states(estimator, found, 99))
    assert sum(b.rows for _, b in found if b.array == 0) == len(counted)


def test_a_window_emits_when_the_watermark_passes_it_and_not_before(tmp_path):
    """Both windows hold events when the first closes; only its steps are in the snapshot."""
    clock = StepClock(**CLOCK, window=3)
    events = [(1, 5), (3, 5), (4, 5), (5, 6), (12, 6)]
    source = live.TestStream().advance_watermark_to(0).add_elements([events_at(*events)])
    source = source.advance_watermark_to(end_of(3)).advance_watermark_to_infinity()
    estimator = Estimator(**SIZES, ranges=1)
    found, _ = stream(tmp_path, source, estimator, clock)
    assert [(last, b.array) for last, b in found if b.array == 0] == [(3, 0), (6, 0), (12, 0)]
    for end in (3, 6, 12):
        upto = [event for event in events if event[0] <= end]
        paper_of(upto).check(states(estimator, found, end))


def test_a_stream_goes_on_from_a_snapshot(tmp_path):
    events = sorted(make_events(num_events=60, num_steps=12))
    half = events[len(events) // 2][0]
    before = [event for event in events if event[0] <= half]
    paper = paper_of(before)
    previous = save(tmp_path / "previous", vars(paper))
    source = live.TestStream().advance_watermark_to(0)
    for event in events[len(before) - 5 :]:  # the first five once more, in the step of the cut
        source = source.add_elements([events_at(event)])
    estimator = Estimator(**SIZES, ranges=3, previous=previous)
    clock = StepClock(**CLOCK, first_step=half)
    found, late = stream(tmp_path, source.advance_watermark_to_infinity(), estimator, clock)
    paper_of(events).check(states(estimator, found, 10**6))
    assert all(step < half for step, _ in late)


def test_the_unbounded_transform_on_a_bounded_log(tmp_path):
    events = make_events(num_events=100, num_steps=15)
    blocks = [events_at(*events[i::3]).value for i in range(3)]
    source = beam.Create(blocks) | beam.Map(
        lambda block: TimestampedValue(block, int(min(block[1])))
    )
    estimator, clock = Estimator(**SIZES, ranges=2), StepClock(**CLOCK, window=10)
    found, late = stream(tmp_path, source, estimator, clock, runner="FnApiRunner")
    assert late == []
    paper_of(events).check(states(estimator, found, 10**6))
