import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from serving.version import index as index_module
from serving.version.index import ExactIndex, ScannIndex
from serving.version.served_model import GivenEmbedding, ServedModel


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(2).normal(size=(2000, 6)).astype(np.float32)


def test_exact_scores_worked_by_hand():
    index = ExactIndex(np.array([[1, 0], [0, 2], [-1, 1]], np.float32), k=5)
    rows, scores = index.search(tf.constant([[1.0, 3.0], [-1.0, -1.0]]))
    assert rows.numpy().tolist() == [[1, 2, 0], [2, 0, 1]]  # (1, 6, 2) and (-1, -2, 0)
    assert scores.numpy().tolist() == [[6, 2, 1], [0, -1, -2]]


def test_equal_scores_keep_the_order_of_the_rows():
    rows, _ = ExactIndex(np.ones((50, 3), np.float32), k=4).search(tf.ones([1, 3]))
    assert rows.numpy().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("num_vectors", [16, 50, 64, 128, 201])
def test_blocks_of_candidates_find_what_the_whole_corpus_has(num_vectors, tmp_path, monkeypatch):
    # Of three queries at most 64 candidates at a time, in groups where it is 40 or more of them.
    monkeypatch.setattr(index_module, "_MAX_SCORES", 3 * 64)
    monkeypatch.setattr(index_module, "_GROUP", 2)
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (num_vectors, 3)).astype(np.float32)  # many ties
    exact = ServedModel(GivenEmbedding(3), ExactIndex(vectors, k=10), ["id"] * num_vectors, 3)
    exact.save(tmp_path / "model")
    search = tf.saved_model.load(tmp_path / "model").signatures["embedding_search"]
    for num_queries in (0, 1, 3, 60):
        queries = rng.integers(-2, 3, (num_queries, 3)).astype(np.float32)
        scores = queries @ vectors.T
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        found = search(embedding=tf.constant(queries))
        np.testing.assert_array_equal(found["candidate_row"], expected)
        np.testing.assert_array_equal(found["score"], np.take_along_axis(scores, expected, axis=1))


@pytest.mark.long
def test_memory_of_exact_search_does_not_grow_with_the_corpus():
    """All scores of 64 queries and 10 M candidates would be 2.6 GB."""
    code = """
import resource, numpy as np, tensorflow as tf
from serving.version.index import ExactIndex
index = ExactIndex(np.random.default_rng(0).random((10_000_000, 2), np.float32), k=20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tf.function(index.search)(tf.random.normal([64, 2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < 500_000  # kilobytes


def test_too_few_leaves_give_no_result_rather_than_a_wrong_one(vectors):
    index = ScannIndex(vectors, k=60, num_leaves=100)  # 20 candidates in a leaf, or so
    rows, scores = index.search(tf.constant(vectors[:32]), tf.constant(1))
    assert rows.shape == scores.shape == (32, 60)
    rows, scores = rows.numpy(), scores.numpy()
    found = rows >= 0
    assert found.any()  # of one query there may be none: its leaf may be empty
    assert not found.all()
    assert not scores[~found].any()
    for query, there in enumerate(found):
        assert len(set(rows[query][there])) == there.sum()
        expected = vectors[rows[query][there]] @ vectors[query]
        np.testing.assert_allclose(scores[query][there], expected, rtol=1e-4, atol=1e-5)


def test_without_a_number_the_tuned_leaves_are_searched(vectors):
    index = ScannIndex(vectors, k=20, num_leaves=50)
    index.leaves_to_search = 3
    queries = tf.constant(vectors[:16])
    expected = index.search(queries, tf.constant(3))[0].numpy()
    for leaves in (None, tf.constant(0), tf.constant(-1)):
        np.testing.assert_array_equal(index.search(queries, leaves)[0], expected)
    assert (index.search(queries, tf.constant(50))[0].numpy() != expected).any()


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_candidates_that_are_all_the_same_can_be_indexed(fill):
    index = ScannIndex(np.full((2000, 4), fill, np.float32), k=5)
    rows, scores = index.search(tf.ones([2, 4]))
    assert (rows.numpy() >= 0).all()
    np.testing.assert_allclose(scores, np.full((2, 5), 4 * fill))


def test_a_corpus_of_one_can_be_indexed():
    rows, scores = ScannIndex(np.full((1, 4), 2.0, np.float32), k=10).search(tf.ones([2, 4]))
    assert (rows.numpy().tolist(), scores.numpy().tolist()) == ([[0], [0]], [[8], [8]])


def test_no_queries_have_no_rows(vectors):
    for index in (ExactIndex(vectors, 7), ScannIndex(vectors, 7)):
        rows, scores = index.search(tf.zeros([0, 6]))
        assert rows.shape == scores.shape == (0, 7)


def test_native_log_lines_of_a_build_are_shown_only_where_it_fails(vectors, capfd, monkeypatch):
    ScannIndex(vectors, k=3).release()
    assert capfd.readouterr().err == ""

    class Failing:
        def __init__(self, *_):
            pass

        def score_brute_force(self):
            return self

        def build(self):
            os.write(2, b"why it fails\n")
            raise RuntimeError("no searcher")

    monkeypatch.setattr(index_module, "_scann_ops", lambda: SimpleNamespace(builder=Failing))
    with pytest.raises(RuntimeError, match="no searcher"):
        ScannIndex(vectors[:50], k=3)
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "why it fails\nafterwards\n"
