import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towers.metrics.definitions import precision, recall
from towers.metrics.opauc import opauc, recall_bounds


def brute_force(scores, positive, beta):
    """OPAUC(β) of one query as it is defined: two sums over scores."""
    positives, negatives = scores[positive], np.sort(scores[~positive])[::-1]
    hardest = negatives[: round(beta * len(negatives))]
    wins = sum(float(mine > theirs) for mine in positives for theirs in hardest)
    return wins / (len(positives) * len(negatives))


@pytest.mark.parametrize("beta", [0.02, 0.1, 0.5, 1.0])
def test_against_two_sums(beta):
    rng = np.random.default_rng(0)
    hits, positives, negatives, expected = [], [], [], []
    for share in (0.02, 0.1, 0.3, 0.5, 0.9):
        scores, positive = rng.permutation(100).astype(float), np.zeros(100, bool)
        positive[rng.choice(100, round(100 * share), replace=False)] = True
        scores += 20 * positive * rng.normal(size=100)
        if round(beta * (~positive).sum()) == 0:
            continue
        hits.append(positive[np.argsort(-scores)])
        positives.append(positive.sum())
        negatives.append((~positive).sum())
        expected.append(brute_force(scores, positive, beta))
    found = opauc(np.array(hits), np.array(positives), np.array(negatives), beta)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert ((found >= 0) & (found <= beta + 1e-12)).all()
    assert found.max() > 0


def test_the_best_and_the_worst_ranking():
    hits = np.zeros((2, 30), bool)
    hits[0, :10], hits[1, -10:] = True, True
    found = opauc(hits, np.array([10, 10]), np.array([20, 20]), 0.25)
    np.testing.assert_allclose(found, [0.25, 0.0])


def test_a_ranking_cut_where_nothing_more_counts():
    rng = np.random.default_rng(1)
    hits = np.array([rng.permutation(np.arange(200) < 7) for _ in range(50)])
    whole = opauc(hits, np.full(50, 7), np.full(50, 193), 10 / 193)
    np.testing.assert_array_equal(
        whole, opauc(hits[:, :17], np.full(50, 7), np.full(50, 193), 10 / 193)
    )
    with pytest.raises(ValueError, match="at least 17 ranks"):
        opauc(hits[:, :16], np.full(50, 7), np.full(50, 193), 10 / 193)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, 1e-4])
def test_beta_must_reach_a_negative(beta):
    with pytest.raises(ValueError, match="beta must be in"):
        opauc(np.ones((1, 20), bool), np.array([5]), np.array([15]), beta)


@given(st.lists(st.booleans(), min_size=6, max_size=60), st.data())
@settings(max_examples=100, deadline=None)
def test_theorem_3(ranking, data):
    """For any order of all items: OPAUC(K/n₋) bounds recall@K and precision@K."""
    hits = np.array([ranking])
    positives, negatives = hits.sum(axis=1), (~hits).sum(axis=1)
    most = min(positives[0], negatives[0]) - 1
    if most < 1:
        return
    k = data.draw(st.integers(1, int(most)))
    low, high = recall_bounds(
        opauc(hits, positives, negatives, k / negatives), positives, negatives, k
    )
    assert low - 1e-9 <= recall(hits, positives, k) <= high + 1e-9
    share = positives / k
    assert low * share - 1e-9 <= precision(hits, positives, k) <= high * share + 1e-9


@pytest.mark.parametrize(
    ("top", "others", "side"),
    [([1, 1, 0, 0], range(4, 8), 0), ([0, 0, 1, 1], range(22, 26), 1)],
    ids=["lower", "upper"],
)
def test_the_bounds_are_reached(top, others, side):
    """By hits in front of the top K, others right behind it; by hits at its end, others far."""
    k, positives, negatives = 4, np.array([6]), np.array([20])
    hits = np.zeros((1, 26), bool)
    hits[0, :4], hits[0, list(others)] = top, True
    value = opauc(hits, positives, negatives, k / negatives)
    bound = recall_bounds(value, positives, negatives, k)[side]
    assert bound == pytest.approx(recall(hits, positives, k))


def test_where_the_theorem_says_nothing():
    with pytest.raises(ValueError, match="k must be below"):
        recall_bounds(np.array([0.1]), np.array([5]), np.array([50]), 5)
