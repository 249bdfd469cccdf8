"""Streaming frequencies against the paper's loop, bit for bit, however the work is divided."""

import pickle
import uuid

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream as live
from apache_beam.transforms.window import TimestampedValue
from paper_recursion import Paper

from pipeline import schema
from pipeline.streaming_frequency import (
    STATE,
    Block,
    EstimateFrequencies,
    Estimator,
    advance,
    assemble,
    distinct,
)
from pipeline.unbounded_frequency import EstimateStream, StepClock

SIZES = {"num_buckets": 23, "num_hashes": 3, "alpha": 0.1}


def paper_of(events):
    return Paper.over(events, **SIZES)


def make_events(num_events=600, num_steps=60, num_ids=40, seed=0):
    """(step, fingerprint) pairs with popular and rare ids, repeats, and steps without any."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, 2 * num_steps), num_steps, replace=False))
    ids = rng.integers(-(2**63), 2**63, num_ids)
    return [
        (int(step), int(ids[int(num_ids * place**2)]))
        for step, place in zip(rng.choice(steps, num_events), rng.random(num_events), strict=True)
    ]


def as_block(events):
    steps, prints = np.array(events, np.int64).reshape(-1, 2).T
    return Block(steps, prints, np.ones(len(steps), np.int64))


def keep(element, directory):
    (directory / uuid.uuid4().hex).write_bytes(pickle.dumps(element))


def kept(directory):
    return [pickle.loads(path.read_bytes()) for path in directory.iterdir()]


def estimate(blocks, tmp_path, estimator, *flags):
    """The bounded transform over blocks: a, b, and the rows of each array."""
    out = tmp_path / uuid.uuid4().hex
    out.mkdir()
    options = PipelineOptions(["--runner=FnApiRunner", *flags])
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(blocks)
            | beam.Reshuffle()
            | EstimateFrequencies(estimator)
            | beam.Map(keep, out)
        )
    return assemble(estimator, kept(out))


# --- the recursion --------------------------------------------------------------------------


def test_worked_by_hand():
    """α = 1/2; bucket 0 in steps 1, 3, 4; bucket 1 never; bucket 2 in step 4."""
    state = np.array([(0, 1.0)] * 3, STATE)
    after = advance(state, np.array([0, 2, 0, 0]), np.array([4, 4, 3, 1]), 0.5)
    # b0: (1 + 1) / 2 = 1, (1 + 2) / 2 = 1.5, (1.5 + 1) / 2 = 1.25; b2: (1 + 4) / 2 = 2.5
    assert after.tolist() == [(4, 1.25), (0, 1.0), (4, 2.5)]
    assert state.tolist() == [(0, 1.0)] * 3  # what was given stays as it is


@pytest.mark.parametrize(
    ("num_buckets", "num_occurrences", "num_steps", "alpha"),
    [
        (3, 60, 20, 0.3),  # few buckets with many occurrences
        (1000, 3000, 40, 1e-4),  # many buckets at once
        (400, 6000, 250, 0.01),  # first the ones, then the others
        (150, 2000, 30, 1.0),  # the last interval alone counts
        (5, 0, 1, 0.1),
    ],
)
@pytest.mark.parametrize("cuts", [0, 3])
def test_bits_are_those_of_the_loop(num_buckets, num_occurrences, num_steps, alpha, cuts):
    rng = np.random.default_rng(num_buckets)
    buckets = (num_buckets * rng.random(num_occurrences) ** 4).astype(np.int64)
    steps = rng.integers(1, num_steps + 1, num_occurrences)
    last_step, interval = [0] * num_buckets, [1.0] * num_buckets
    for step, bucket in sorted(set(zip(steps.tolist(), buckets.tolist(), strict=True))):
        gap = step - last_step[bucket]
        interval[bucket] = (1 - alpha) * interval[bucket] + alpha * gap
        last_step[bucket] = step
    state = np.zeros(num_buckets, STATE)
    state["interval"] = 1
    # In one go, or in parts whose borders may lie inside a step.
    by_step = np.argsort(steps, kind="stable")
    for part in np.array_split(by_step, cuts + 1):
        state = advance(state, buckets[part], steps[part], alpha)
    assert state["last_step"].tolist() == last_step
    assert state["interval"].tolist() == interval


def test_a_step_before_the_last_one_is_an_error():
    state = np.array([(5, 2.0), (0, 1.0)], STATE)
    assert advance(state, np.array([0, 0]), np.array([5, 5]), 0.1).tolist() == state.tolist()
    with pytest.raises(ValueError, match="got 4 after 5: they were given out of order"):
        advance(state, np.array([1, 0]), np.array([9, 4]), 0.1)


def test_each_candidate_of_a_step_once():
    events = [(2, 7), (1, 7), (2, 7), (2, -3), (1, 7)]
    steps, prints, rows = distinct(as_block(events))
    found = sorted(zip(steps.tolist(), prints.tolist(), rows.tolist(), strict=True))
    assert found == [(1, 7, 2), (2, -3, 1), (2, 7, 2)]
    assert [len(column) for column in distinct(as_block([]))] == [0, 0, 0]


# --- the bounded transform ------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [4, 23])
def test_division_does_not_matter(tmp_path, ranges):
    """`ranges` 23 is one key for each (array, bucket)."""
    events = make_events()
    rng = np.random.default_rng(ranges)
    parts = np.array_split(rng.permutation(len(events)), ranges + 2)
    blocks = [as_block([events[i] for i in part]) for part in parts]
    *state, rows = estimate(blocks, tmp_path, Estimator(**SIZES, ranges=ranges))
    paper_of(events).check(*state)
    assert rows.tolist() == [len(events)] * SIZES["num_hashes"]


def test_many_workers(tmp_path):
    events = make_events()
    blocks = [as_block(events[i::9]) for i in range(9)]
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    *state, _ = estimate(blocks, tmp_path, Estimator(**SIZES, ranges=5), *flags)
    paper_of(events).check(*state)


def save(directory, last_step, interval):
    directory.mkdir()
    np.save(directory / schema.STREAMING_LAST_STEP, last_step)
    np.save(directory / schema.STREAMING_INTERVAL, interval)
    return str(directory)


@pytest.mark.parametrize("ranges", [2, 23])
def test_going_on_equals_never_stopping(tmp_path, ranges):
    events = sorted(make_events())
    previous = ""
    for number, part in enumerate(np.array_split(np.arange(len(events)), 2)):
        estimator = Estimator(**SIZES, ranges=ranges, previous=previous)
        block = as_block([events[i] for i in part])  # may begin inside a step
        *state, _ = estimate([block], tmp_path, estimator)
        previous = save(tmp_path / str(number), *state)
    paper_of(events).check(*state)


# --- the unbounded transform ----------------------------------------------------------------

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
    *state, _ = assemble(estimator, [buckets for last, buckets in found if last <= upto])
    return state


@pytest.mark.parametrize(("ranges", "window"), [(1, 1), (4, 7), (23, 1)])
def test_a_stream_out_of_order_with_repeats(tmp_path, ranges, window):
    """Every event comes up to two windows late, but before its window closes; some come twice."""
    events = make_events(num_events=100, num_steps=15)
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
        paper_of(upto).check(*states(estimator, found, end))
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
    paper_of(counted).check(*states(estimator, found, 99))
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
        paper_of(upto).check(*states(estimator, found, end))


def test_a_stream_goes_on_from_a_snapshot(tmp_path):
    events = sorted(make_events(num_events=120, num_steps=20))
    half = events[len(events) // 2][0]
    before = [event for event in events if event[0] <= half]
    paper = paper_of(before)
    previous = save(tmp_path / "previous", paper.last_step, paper.interval)
    source = live.TestStream().advance_watermark_to(0)
    for event in events[len(before) - 5 :]:  # the first five once more, in the step of the cut
        source = source.add_elements([events_at(event)])
    estimator = Estimator(**SIZES, ranges=3, previous=previous)
    clock = StepClock(**CLOCK, first_step=half)
    found, late = stream(tmp_path, source.advance_watermark_to_infinity(), estimator, clock)
    paper_of(events).check(*states(estimator, found, 10**6))
    assert all(step < half for step, _ in late)


def test_the_unbounded_transform_on_a_bounded_log(tmp_path):
    events = make_events()
    blocks = [events_at(*events[i::7]).value for i in range(7)]
    source = beam.Create(blocks) | beam.Map(
        lambda block: TimestampedValue(block, int(min(block[1])))
    )
    estimator, clock = Estimator(**SIZES, ranges=4), StepClock(**CLOCK, window=10)
    found, late = stream(tmp_path, source, estimator, clock, runner="FnApiRunner")
    assert late == []
    paper_of(events).check(*states(estimator, found, 10**6))
