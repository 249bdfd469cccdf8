import numpy as np
import pytest

from serving.retrieval.filters import Filters, among, best_rows, first


def rows(*values):
    return np.array(values, np.int64)


def test_what_three_queries_may_get_worked_by_hand():
    seen = [rows(), rows(5, 0, 5), rows(1, 2)]
    filters = Filters(6, rows(0, 3), None, seen)
    assert filters.num_left.tolist() == [4, 3, 2]  # of 1, 2, 4, 5
    found = np.array([[0, 1, 5, -1], [1, 5, 2, 3], [4, 1, 5, 0]])
    assert filters.may_get(found).tolist() == [
        [False, True, True, False],
        [True, False, True, False],
        [True, False, True, False],
    ]
    assert filters.may_get(found[2:], np.array([1])).tolist() == [[True, True, False, False]]
    assert [filters.own_rows(query).tolist() for query in range(3)] == [[], [5], [1, 2]]


def test_only_allowed_rows_worked_by_hand():
    filters = Filters(6, rows(3), rows(1, 3, 4), [rows(), rows(0, 4)])
    assert filters.base.tolist() == [1, 4]
    assert filters.num_left.tolist() == [2, 1]
    found = np.array([[0, 1, 3, 4], [0, 1, 3, 4]])
    assert filters.may_get(found).tolist() == [
        [False, True, False, True],
        [False, True, False, False],
    ]


def test_a_mask_is_as_the_rows_that_it_marks():
    for excluded in (rows(), rows(3)):
        mask = np.array([False, True, False, True, True, False])
        filters = Filters(6, excluded, mask, [rows(), rows(0, 4)])
        same = Filters(6, excluded, np.flatnonzero(mask), [rows(), rows(0, 4)])
        assert filters.base.tolist() == same.base.tolist()
        assert filters.num_left.tolist() == same.num_left.tolist()
        found = np.array([[0, 1, 3, 4, -1], [0, 1, 3, 4, -1]])
        assert filters.may_get(found).tolist() == same.may_get(found).tolist()
        assert mask.tolist() == [False, True, False, True, True, False]  # it is shared


def test_nothing_allowed_is_nothing_left():
    filters = Filters(6, rows(), rows(), [rows(), rows(2)])
    assert filters.num_left.tolist() == [0, 0]
    assert not filters.may_get(np.arange(6)[None].repeat(2, axis=0)).any()


def test_no_queries_have_no_filters():
    assert Filters(6, rows(1), None, []).num_left.tolist() == []


def test_membership_and_the_first_k():
    assert among(np.array([[-1, 0], [7, 9]]), rows(0, 7)).tolist() == [[False, True], [True, False]]
    assert not among(rows(1, 2), rows()).any()
    keep = np.array([[True, False, True, True], [False, False, False, True]])
    assert first(keep, 2).tolist() == [[True, False, True, False], [False, False, False, True]]


@pytest.mark.parametrize("seed", range(12))
def test_exact_search_over_allowed_rows_is_a_sorted_list(seed, monkeypatch):
    monkeypatch.setattr("serving.retrieval.filters.MAX_SCORES", 1 << seed)  # also one at a time
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (60, 4)).astype(np.float32)  # many equal scores
    queries = rng.integers(-2, 3, (5, 4)).astype(np.float32)
    allowed = None if seed % 3 == 0 else np.sort(rng.permutation(60)[: rng.integers(0, 61)])
    excluded = np.sort(rng.permutation(60)[: rng.integers(0, 30)])
    seen = [rng.permutation(60)[: rng.integers(0, 40)] for _ in range(5)]
    lowest = None if seed % 2 else float(rng.integers(-4, 5))
    k = int(rng.integers(1, 70))
    filters = Filters(60, excluded, allowed, seen, lowest)
    chosen = rng.permutation(5)[:3]
    answers = list(best_rows([vectors], queries[chosen], filters, chosen, k))
    assert len(answers) == 3
    for query, (found, scores) in zip(chosen, answers, strict=True):
        exact = vectors @ queries[query]
        there = set(range(60) if allowed is None else allowed) - set(excluded) - set(seen[query])
        expected = [row for row in np.argsort(-exact, kind="stable") if row in there]
        assert filters.num_left[query] == len(expected)
        expected = [row for row in expected if lowest is None or exact[row] >= lowest][:k]
        assert found.tolist() == expected
        assert scores.tolist() == exact[expected].tolist()
