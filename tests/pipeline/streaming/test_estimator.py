"""Streaming frequencies against the paper's loop, bit for bit, however the work is divided."""

import uuid

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from streaming_events import SIZES, as_block, keep, kept, make_events, paper_of, save

from pipeline.streaming.estimator import (
    STATE,
    EstimateFrequencies,
    Estimator,
    advance,
    assemble,
    distinct,
    occurrences,
)


def estimate(blocks, tmp_path, estimator):
    """The bounded transform over blocks: the state, and the rows of each array."""
    out = tmp_path / uuid.uuid4().hex
    out.mkdir()
    options = PipelineOptions(["--runner=FnApiRunner"])
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


def untouched(num_buckets):
    return Estimator(num_buckets, 1, 0.1).initial(0, 0, num_buckets)


def test_worked_by_hand():
    """α = 1/2; bucket 0 in steps 1, 3, 4; bucket 1 never; bucket 2 in step 4."""
    state = untouched(3)
    after = advance(state, np.array([0, 2, 0, 0]), np.array([4, 4, 3, 1]), 0.5)
    assert after["last_step"].tolist() == [4, 0, 4]
    assert after["weight"].tolist() == [7 / 8, 0, 1 / 2]  # 1 - 1 / 2^n
    # Intervals 1, 2, 1 with weights 1/8, 1/4, 1/2; none; 4.
    mean = (1 / 8 + 2 / 4 + 1 / 2) / (7 / 8)
    np.testing.assert_allclose(after["interval"], [mean, 1, 4], rtol=1e-15)
    assert (state == untouched(3)).all()  # what was given stays as it is


@pytest.mark.parametrize("alpha", [1e-4, 1e-2])
def test_estimates_are_near_the_truth_long_before_1_over_alpha_occurrences(alpha):
    """3,000 batches of 256 of 2,000 items: the start is not what is estimated."""
    steps, batch, rng = 3000, 256, np.random.default_rng(0)
    share = 1 / np.arange(1, 2001)
    share /= share.sum()
    items = rng.choice(2000, steps * batch, p=share)
    when = 1 + np.repeat(np.arange(steps), batch)
    estimates = 1 / advance(untouched(2000), items, when, alpha)["interval"]
    truth = -np.expm1(batch * np.log1p(-share))  # from 1.0 to .016
    error = np.abs(np.log(estimates / truth))
    assert [part.mean() < 0.15 for part in np.array_split(error, 10)] == [True] * 10
    assert error.max() < 0.7


def test_occurrences_are_counted_by_their_weight():
    state = advance(untouched(4), np.repeat([0, 1, 2], [9, 10, 50]), np.r_[1:10, 1:11, 1:51], 0.01)
    assert occurrences(state["weight"][None], 0.01) == {"touched": 3, "few": 1}


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
    weight = [0.0] * num_buckets
    for step, bucket in sorted(set(zip(steps.tolist(), buckets.tolist(), strict=True))):
        gap = step - last_step[bucket]
        weight[bucket] = (1 - alpha) * weight[bucket] + alpha
        interval[bucket] += alpha / weight[bucket] * (gap - interval[bucket])
        last_step[bucket] = step
    state = untouched(num_buckets)
    # In one go, or in parts whose borders may lie inside a step.
    by_step = np.argsort(steps, kind="stable")
    for part in np.array_split(by_step, cuts + 1):
        state = advance(state, buckets[part], steps[part], alpha)
    assert state["last_step"].tolist() == last_step
    assert state["interval"].tolist() == interval
    assert state["weight"].tolist() == weight


def test_a_step_before_the_last_one_is_an_error():
    state = np.array([(5, 2.0, 0.5), (0, 1.0, 0.0)], STATE)
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


def test_division_does_not_matter(tmp_path):
    """One key for each (array, bucket), and events in any order."""
    events, ranges = make_events(), SIZES["num_buckets"]
    parts = np.array_split(np.random.default_rng(0).permutation(len(events)), ranges + 2)
    blocks = [as_block([events[i] for i in part]) for part in parts]
    state, rows = estimate(blocks, tmp_path, Estimator(**SIZES, ranges=ranges))
    paper_of(events).check(state)
    assert rows.tolist() == [len(events)] * SIZES["num_hashes"]


def test_going_on_equals_never_stopping(tmp_path):
    events = sorted(make_events())
    previous = ""
    for number, part in enumerate(np.array_split(np.arange(len(events)), 2)):
        estimator = Estimator(**SIZES, ranges=2, previous=previous)
        block = as_block([events[i] for i in part])  # may begin inside a step
        state, _ = estimate([block], tmp_path, estimator)
        previous = save(tmp_path / str(number), state)
    paper_of(events).check(state)
