import numpy as np
import pytest
import tensorflow as tf

from serving.publish.measuring import Judge
from serving.version.index import ExactIndex


@pytest.fixture(scope="module")
def exact():
    return ExactIndex(np.eye(6, dtype=np.float32), k=4)


def queries(count):
    """Each has a best candidate of its own, then the next ones in a circle."""
    weights = np.array([6, 5, 4, 3, 2, 1], np.float32)
    return np.stack([np.roll(weights, row % 6) for row in range(count)])


def test_exact_search_has_full_recall(exact):
    measured = Judge(queries(70), exact.search, at=4).measure(exact.search)
    assert (measured.recall, measured.error) == (1.0, 0.0)
    assert measured.batch_ms > 0


@pytest.mark.parametrize(("at", "recall"), [(1, 1.0), (2, 1.0), (4, 0.5)])
def test_recall_counts_up_to_its_rank(exact, at, recall):
    def half(batch):
        rows, scores = exact.search(batch)
        keep = tf.constant([True, True, False, False])
        return tf.where(keep, rows, -1), tf.where(keep, scores, 0.0)

    judge = Judge(queries(70), exact.search, at)
    measured = judge.measure(half)
    assert measured.recall == pytest.approx(recall)
    assert measured.error == pytest.approx(0)


def test_parameters_reach_the_search_and_queries_that_fill_a_batch_do_not_count(exact):
    def only_first_query(batch, rows_found):
        rows, scores = exact.search(batch)
        first = tf.reduce_all(batch == queries(1), axis=1, keepdims=True)
        keep = first & (tf.range(4) < rows_found)
        return tf.where(keep, rows, -1), scores

    judge = Judge(queries(4), exact.search, at=4)  # 60 more fill the batch, 16 of them the first
    measured = judge.measure(only_first_query, 3)
    assert measured.recall == pytest.approx(3 / 16)
    shares = np.array([3 / 4, 0, 0, 0])
    assert measured.error == pytest.approx(shares.std() / 2)


def test_another_candidate_with_the_same_score_is_right(exact):
    same = ExactIndex(np.ones((9, 6), np.float32), k=2)

    def other(batch):
        rows, scores = same.search(batch)
        return rows + 7, scores

    def worse(batch):
        rows, scores = same.search(batch)
        return rows, scores * 0.999

    judge = Judge(queries(3), same.search, at=2)
    assert judge.measure(other).recall == 1.0
    assert judge.measure(worse).recall == 0.0


def test_latency_is_of_a_batch_and_of_one_query(exact):
    sizes = []

    def counting(batch):
        sizes.append(len(batch))
        return exact.search(batch)

    latency = Judge(queries(70), exact.search, at=1).latency(counting)
    assert set(latency) == {"batch_ms", "single_ms"}
    assert set(sizes) == {64, 1}
