"""Distributions of counts, against plain loops over every id."""

import json
import math

import numpy as np
import pytest

from pipeline.quality.histogram import (
    as_lists,
    describe,
    from_lists,
    gini,
    histogram,
    log_bins,
    merge,
    quantiles,
    rarest,
    top,
)


def whole(seed):
    return np.random.default_rng(seed).zipf(1.4, 700).clip(max=5000).astype(float)


def decayed(seed):
    rng = np.random.default_rng(seed)
    return rng.zipf(1.4, 700).clip(max=5000) * 0.9 ** rng.integers(0, 40, 700)


def plain_gini(counts):
    differences = sum(abs(a - b) for a in counts for b in counts)
    return differences / (2 * len(counts) * sum(counts))


def plain_rarest(counts, share):
    number, rows = 0, 0.0
    for count in sorted(counts):
        rows += count
        if rows > share * sum(counts):
            break
        number += 1
    return number


@pytest.mark.parametrize("seed", range(3))
def test_whole_counts_are_exact(seed):
    counts = whole(seed)
    found, ordered = histogram(counts), sorted(counts)
    assert (found.size, found.total) == (700, sum(counts))
    assert found.values.tolist() == sorted(set(counts))
    assert gini(found) == pytest.approx(plain_gini(counts), rel=1e-12)
    for share, value in quantiles(found).items():
        assert value == ordered[max(0, math.ceil(float(share) * 700) - 1)]
    for number in (1, 7, 350, 699, 700):
        assert top(found, number) == (sum(ordered[-number:]), ordered[-number])
    for share in (0.01, 0.2, 0.5, 1.0):
        assert rarest(found, share) == plain_rarest(counts, share)


@pytest.mark.parametrize("seed", range(3))
def test_decayed_counts_within_a_thousandth(seed):
    counts = decayed(seed)
    found, ordered = histogram(counts), sorted(counts)
    assert found.total == pytest.approx(sum(counts), rel=1e-14)
    assert gini(found) == pytest.approx(plain_gini(counts), rel=1e-3)
    for share, value in quantiles(found).items():
        assert value == pytest.approx(ordered[max(0, math.ceil(float(share) * 700) - 1)], rel=1e-3)
    assert top(found, 70) == pytest.approx((sum(ordered[-70:]), ordered[-70]), rel=1e-3)
    assert rarest(found, 0.2) == pytest.approx(plain_rarest(counts, 0.2), abs=2)


def test_a_histogram_of_decayed_counts_stays_small():
    rng = np.random.default_rng(0)
    found = histogram(rng.uniform(1, 2, 200_000))
    assert found.size == 200_000
    assert len(found.keys) <= 1025


@pytest.mark.parametrize("make", [whole, decayed])
def test_merged_parts_are_the_whole(make):
    counts = make(4)
    parts = [histogram(part) for part in (counts[:100], counts[100:100], counts[100:])]
    parts = [from_lists(json.loads(json.dumps(as_lists(part)))) for part in parts]
    merged, expected = merge(parts), histogram(counts)
    assert merged.keys.tolist() == expected.keys.tolist()
    assert merged.numbers.tolist() == expected.numbers.tolist()
    np.testing.assert_allclose(merged.weights, expected.weights, rtol=1e-14)


def test_by_hand():
    described = describe(histogram(np.array([8, 1, 1, 2, 4, 0, 1, 3])), head_share=0.25)
    assert (described["ids"], described["rows"]) == (8, 20)
    assert described["head"] == {
        "ids": 2,
        "share_of_ids": 0.25,
        "share_of_rows": 0.6,
        "smallest_count": 4,
    }
    assert described["seen_once"] == {"ids": 3, "share_of_ids": 0.375, "share_of_rows": 0.15}
    assert described["tail"] == {"share_of_rows": 0.2, "ids": 4, "share_of_ids": 0.5}
    assert described["quantiles"]["0.5"] == 1
    # how much each of 0 1 1 1 2 3 4 8 is above those before it: 0, 1, 1, 1, 5, 10, 16, 44
    assert described["gini"] == pytest.approx(78 / (8 * 20))


def test_equal_counts_and_no_counts():
    assert gini(histogram(np.full(9, 5))) == 0
    assert gini(histogram(np.r_[np.zeros(999), 7])) == pytest.approx(0.999)
    assert describe(histogram(np.empty(0)), 0.01)["ids"] == 0
    assert describe(histogram(np.zeros(3)), 0.01)["gini"] == 0


def test_log_bins():
    counts = np.array([0, 1, 1, 2, 3, 3, 4, 7, 8, 1000])
    bins = log_bins(histogram(counts))
    assert [one["from"] for one in bins] == [2**n for n in range(10)]
    for one in bins:
        inside = (counts >= one["from"]) & (counts < 2 * one["from"])
        assert one["ids"] == inside.sum()
    assert log_bins(histogram(np.zeros(2))) == []
