import subprocess
import sys

import numpy as np
import pytest

from towers.data.dataframe import from_dataframe
from towers.data.interactions import Positives
from towers.metrics import ranking
from towers.metrics.definitions import mean_metrics
from towers.metrics.held_out import HeldOut
from towers.metrics.ranking import (
    find_hits,
    rank_by_popularity,
    rank_corpus,
    tie_order,
)


def slow_ranking(scores, query_ids, known, k, order):
    """Each query alone: best score first, equal scores in `order`, known ones left out."""
    place = np.argsort(order)
    ranked = np.full((len(query_ids), k), -1)
    for row, query in enumerate(query_ids):
        left = [c for c in range(scores.shape[1]) if c not in known.of(query)]
        left.sort(key=lambda c: (-scores[query, c], place[c]))
        ranked[row, : len(left)] = left[:k]
    return ranked


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)  # small integers: many ties
    candidates = rng.integers(-2, 3, (40, 3)).astype(np.float32)
    known = Positives(rng.integers(0, 30, 200), rng.integers(0, 40, 200), 30)
    return queries, candidates, known, rng.permutation(40), np.arange(1, 30, 2)


@pytest.mark.parametrize("block_size", [4, 100])
def test_equals_a_slow_ranking(example, block_size):
    queries, candidates, known, order, ids = example
    ranked = rank_corpus(queries, candidates, ids, known, k=12, order=order, block_size=block_size)
    expected = slow_ranking(queries @ candidates.T, ids, known, 12, order)
    np.testing.assert_array_equal(ranked, expected)


@pytest.mark.parametrize("columns", [1, 7, 13, 39, 40, 41])
def test_blocks_of_candidates_rank_as_the_whole_corpus(example, columns, monkeypatch):
    queries, candidates, known, order, ids = example
    monkeypatch.setattr(ranking, "MAX_SCORES", 4 * columns)
    ranked = rank_corpus(queries, candidates, ids, known, k=12, order=order, block_size=4)
    expected = slow_ranking(queries @ candidates.T, ids, known, 12, order)
    np.testing.assert_array_equal(ranked, expected)


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus():
    """All scores of 256 queries and 4 M candidates would be 4 GB."""
    code = """
import resource, numpy as np
from towers.data.interactions import Positives
from towers.metrics.ranking import rank_corpus
numbers = np.random.default_rng(0)
queries, candidates = (numbers.random((n, 4), np.float32) for n in (256, 4_000_000))
known = Positives(np.zeros(1, int), np.zeros(1, int), 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rank_corpus(queries, candidates, np.arange(256), known, k=20, order=np.arange(4_000_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < 1_500_000  # kilobytes


@pytest.mark.parametrize("block_size", [4, 100])
def test_popularity_equals_a_slow_ranking(example, block_size):
    _, _, known, order, ids = example
    counts = np.random.default_rng(1).integers(0, 4, 40)
    ranked = rank_by_popularity(counts, ids, known, k=12, order=order, block_size=block_size)
    scores = np.broadcast_to(counts.astype(float), (30, 40))
    np.testing.assert_array_equal(ranked, slow_ranking(scores, ids, known, 12, order))


def test_places_without_candidates_are_minus_1():
    known = Positives(np.array([0, 0, 1]), np.array([0, 1, 2]), 2)
    queries, candidates = np.ones((2, 1), np.float32), np.array([[3], [2], [1]], np.float32)
    ranked = rank_corpus(queries, candidates, np.array([0, 1]), known, k=4, order=np.arange(3))
    assert ranked.tolist() == [[2, -1, -1, -1], [0, 1, -1, -1]]
    popular = rank_by_popularity(
        np.array([1, 2, 3]), np.array([0, 1]), known, k=4, order=np.arange(3)
    )
    assert popular.tolist() == [[2, -1, -1, -1], [1, 0, -1, -1]]
    hits = find_hits(ranked, np.array([0, 1]), Positives(np.array([0]), np.array([2]), 2))
    assert hits.tolist() == [[True, False, False, False], [False] * 4]


def test_hits_are_held_out_pairs():
    rng = np.random.default_rng(3)
    pairs = {(int(q), int(c)) for q, c in rng.integers(0, 20, (80, 2))}
    held_out = Positives(*np.array(sorted(pairs)).T, 20)
    ranked = rng.integers(-1, 20, (20, 6))
    hits = find_hits(ranked, np.arange(20), held_out)
    expected = [[(q, int(c)) in pairs for c in ranked[q]] for q in range(20)]
    assert hits.tolist() == expected


def test_no_held_out_pairs_no_hits():
    nothing = Positives(np.array([], int), np.array([], int), 3)
    assert not find_hits(np.array([[0, 1]]), np.array([2]), nothing).any()


def test_ties_know_nothing_of_dense_ids():
    order = tie_order(np.random.default_rng(0).integers(-(2**62), 2**62, 2000))
    assert sorted(order) == list(range(2000))
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1


def test_equal_scores_give_the_metrics_of_chance(data):
    """A model that knows nothing must not profit from ids that go by count."""
    held_out = HeldOut(data, "test")
    zeros = (np.zeros((data.num_queries, 2)), np.zeros((data.num_candidates, 2)))
    means, _ = held_out.measure(*(z.astype(np.float32) for z in zeros), (10,))
    popularity, _ = held_out.measure_popularity((10,))
    free = data.num_candidates - data.positives("train", "validation").sizes
    chance = np.mean(np.minimum(10 / free, 1))
    assert popularity["recall@10"] > 1.4 * chance
    assert means["recall@10"] < 1.4 * chance


def test_what_was_known_before_is_left_out(data):
    """A model that scores known pairs highest finds what is held out all the same."""
    ones = np.eye(data.num_queries, dtype=np.float32)
    liked = np.zeros((data.num_candidates, data.num_queries), np.float32)
    for split, value in (("train", 3.0), ("validation", 2.0), ("test", 1.0)):
        arrays = data.arrays(split)
        liked[arrays["candidate_id"], arrays["query_id"]] = value
    for split, expected in (("test", 1.0), ("validation", 1.0)):
        means, _ = HeldOut(data, split).measure(ones, liked, (50,))
        assert means["recall@50"] == means["ndcg@50"] == expected


def test_queries_with_nothing_held_out_do_not_count(pairs):
    data = from_dataframe(pairs.head(100), user="user_id", item="item_id")
    held_out = HeldOut(data, "test")
    sizes = data.positives("test").sizes
    assert (sizes == 0).any()
    ranked = np.tile(np.arange(data.num_candidates), (len(held_out.query_ids), 1))
    hits = find_hits(ranked, held_out.query_ids, data.positives("test"))
    means, _ = mean_metrics(hits, sizes[held_out.query_ids], (data.num_candidates,))
    assert means[f"recall@{data.num_candidates}"] == 1


def test_embeddings_that_are_not_finite_are_errors(data):
    broken = np.full((data.num_queries, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="query embeddings must be finite"):
        HeldOut(data, "test").measure(broken, np.ones((data.num_candidates, 2)), (5,))


def test_missing_validation_is_an_error(checkerboard):
    with pytest.raises(ValueError, match="no validation rows"):
        HeldOut(checkerboard, "validation")
