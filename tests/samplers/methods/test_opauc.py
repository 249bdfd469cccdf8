"""Why hard negatives: OPAUC(β) bounds what the top K holds (Shi et al., WWW 2023, Theorem 3)."""

import math

import numpy as np


def opauc(positive, negative, beta):
    """Pairs of a positive above one of the β·n₋ hardest negatives, over n₊ n₋: in [0, β]."""
    kept = round(beta * len(negative))
    hardest = sorted(negative, reverse=True)[:kept]
    pairs = sum(p > n for p in positive for n in hardest)
    return pairs / (len(positive) * len(negative))


def printed(positive, negative, beta):
    """The estimator as printed, 1 minus the share of wrong pairs: in [1 - β, 1]."""
    return 1 - (beta - opauc(positive, negative, beta))


def bounds(value, num_positive, num_negative, k):
    """Of the number of positives among the top K: eq. (17) and (18) before the division."""
    pairs = num_positive * num_negative * value
    root = math.sqrt(max((num_positive + k) ** 2 - 4 * pairs, 0))
    return math.floor((num_positive + k - root) / 2 + 1e-9), math.ceil(math.sqrt(pairs) - 1e-9)


def rankings(seed):
    """A random number of positives and negatives, scored alike, and a K below both numbers."""
    rng = np.random.default_rng(seed)
    num_positive, num_negative = rng.integers(3, 40, 2)
    k = int(rng.integers(1, min(num_positive, num_negative)))
    shift = rng.normal(scale=2)
    scores = rng.permutation(num_positive + num_negative) + 0.0
    positive = scores[:num_positive] + shift * num_positive + 0.5
    return positive, scores[num_positive:], k


def hits_at(positive, negative, k):
    top = sorted([*positive, *negative], reverse=True)[:k]
    return len(set(top) & set(positive))


def test_theorem_3_bounds_what_the_top_k_holds_and_fails_for_the_estimator_as_printed():
    """Recall and precision are the hits over n₊ and over K."""
    broken = 0
    for seed in range(300):
        positive, negative, k = rankings(seed)
        value = opauc(positive, negative, k / len(negative))
        assert 0 <= value <= k / len(negative) + 1e-12
        low, high = bounds(value, len(positive), len(negative), k)
        hits = hits_at(positive, negative, k)
        assert low <= hits <= high
        value = printed(positive, negative, k / len(negative))
        low, high = bounds(value, len(positive), len(negative), k)
        broken += not low <= hits <= high
    assert broken > 100


def test_both_ends_by_hand():
    assert opauc([4, 3], [2, 1, 0, -1], 0.5) == 0.5  # all pairs right: β
    assert opauc([-2, -3], [2, 1, 0, -1], 0.5) == 0
    assert opauc([4, 1.5], [2, 1, 0, -1], 0.5) == 3 / 8
    assert bounds(0.5, 3, 4, 2) == (2, 3)
