"""Recall by popularity and by activity, against a loop over users and items."""

import copy

import numpy as np
import pytest

from towers.evaluation.breakdown import (
    ACTIVITY_CUTS,
    POPULARITY_CUTS,
    breakdown,
    bucket_of,
)
from towers.metrics.definitions import half_width
from towers.metrics.held_out import HeldOut

K = 7


def mean_and_half_width(values):
    values = np.array(values)
    return values.mean(), half_width(values)


@pytest.fixture(scope="module")
def ranked(data):
    """(held-out part, rankings of a random model and of popularity)."""
    rng = np.random.default_rng(5)
    held_out = HeldOut(data, "test")
    queries = rng.normal(size=(data.num_queries, 4)).astype(np.float32)
    candidates = rng.normal(size=(data.num_candidates, 4)).astype(np.float32)
    model = held_out.rank(queries, candidates, 10)
    return held_out, {"model": model, "popularity": held_out.rank_by_popularity(10)}


def test_by_popularity_equals_a_loop(ranked, data):
    held_out, rankings = ranked
    found = breakdown(held_out, rankings, K)["by_popularity"]
    assert len(found) > 5
    assert sum(bucket["candidates"] for bucket in found) == data.num_candidates
    assert sum(bucket["positives"] for bucket in found) == data.num_rows("test")
    positives = data.positives("test")
    for bucket in found:
        members = {
            item
            for item, count in enumerate(data.train_counts)
            if bucket["from"] <= count <= bucket["to"]
        }
        assert len(members) == bucket["candidates"]
        for name, ranking in rankings.items():
            recalls = []
            for row, query in enumerate(held_out.query_ids):
                sought = members & set(positives.of(query).tolist())
                if sought:
                    top = set(ranking.candidates[row, :K].tolist())
                    recalls.append(len(sought & top) / len(sought))
            assert len(recalls) == bucket["queries"]
            got = bucket[name]["mean"], bucket[name]["half_width"]
            np.testing.assert_allclose(got, mean_and_half_width(recalls), rtol=1e-12)


def test_by_activity_equals_a_loop(ranked, data):
    held_out, rankings = ranked
    found = breakdown(held_out, rankings, K)["by_activity"]
    assert len(found) == len(ACTIVITY_CUTS) + 1
    assert sum(bucket["queries"] for bucket in found) == len(held_out.query_ids)
    train, test = data.positives("train"), data.positives("test")
    for bucket in found:
        for name, ranking in rankings.items():
            recalls = [
                np.isin(ranking.candidates[row, :K], test.of(query)).sum() / len(test.of(query))
                for row, query in enumerate(held_out.query_ids)
                if bucket["from"] <= len(train.of(query)) <= bucket["to"]
            ]
            got = bucket[name]["mean"], bucket[name]["half_width"]
            np.testing.assert_allclose(got, mean_and_half_width(recalls), rtol=1e-12)


def test_the_mean_is_that_of_the_metrics(ranked):
    """Groups of users, by their size, make up the recall of all."""
    held_out, rankings = ranked
    groups = breakdown(held_out, rankings, K)["by_activity"]
    whole = sum(one["queries"] * one["model"]["mean"] for one in groups)
    means, _ = held_out.means(rankings["model"], [K])
    assert whole / len(held_out.query_ids) == pytest.approx(means[f"recall@{K}"], rel=1e-12)


def test_equal_counts_share_a_bucket_and_none_is_empty():
    counts = np.array([0, 0, 5, 5, 5, 5, 5, 5, 7, 9, 100])
    # Quartiles of the nine that have rows: 5, 5, 7.
    assert bucket_of(counts, ACTIVITY_CUTS).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3]
    assert bucket_of(np.arange(1, 101), POPULARITY_CUTS).tolist() == [
        *np.repeat(np.arange(9), 10),
        *[9] * 9,
        10,
    ]
    assert bucket_of(np.zeros(3, int), ACTIVITY_CUTS).tolist() == [0, 0, 0]


def test_a_bucket_of_which_nothing_is_held_out_has_no_mean(ranked):
    held_out, rankings = ranked
    other = copy.copy(held_out)
    other.train_counts = held_out.train_counts.copy()
    absent = np.setdiff1d(np.arange(len(other.train_counts)), held_out.pairs[1])
    other.train_counts[absent] = 0
    assert len(absent)
    first = breakdown(other, rankings, K)["by_popularity"][0]
    assert (first["to"], first["positives"], first["queries"]) == (0, 0, 0)
    assert first["model"] == {"mean": None, "half_width": None}
