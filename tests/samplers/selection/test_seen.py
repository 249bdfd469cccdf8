"""The look-up of what queries have seen, against Python sets."""

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_by

Q, N = 40, 90


@pytest.fixture(scope="module")
def lists():
    """Of no candidate, one, all, and of random sizes."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, N, *rng.integers(0, 30, Q - 3)]
    return [set(rng.choice(N, size, replace=False).tolist()) for size in sizes]


@pytest.mark.parametrize("compiled", [False, True])
def test_holds_what_each_query_chose(lists, compiled):
    rng = np.random.default_rng(1)
    queries, ids = rng.permutation(Q), rng.integers(0, N, (Q, 50))
    holds = seen_by(lists).holds
    holds = tf.function(holds, jit_compile=True) if compiled else holds
    expected = [[j in lists[u] for j in row] for u, row in zip(queries, ids, strict=True)]
    np.testing.assert_array_equal(holds(tf.constant(queries), tf.constant(ids)), expected)


@pytest.mark.parametrize("rows", [0, 1, 7, 400])
def test_pairs_are_what_the_queries_of_a_batch_chose(lists, rows):
    queries = np.random.default_rng(2).integers(0, Q, rows)
    pairs = seen_by(lists).pairs(tf.constant(queries)).numpy().tolist()
    assert pairs == [[row, j] for row, u in enumerate(queries) for j in sorted(lists[u])]


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (300, 40)])
def test_hits_are_the_columns_that_a_query_chose(lists, rows, columns):
    rng = np.random.default_rng(2)
    queries, ids = rng.integers(0, Q, rows), rng.integers(0, N, columns)  # some of them twice
    hits = seen_by(lists).hits(tf.constant(queries), tf.constant(ids)).numpy().tolist()
    expected = [[b, c] for b, u in enumerate(queries) for c, j in enumerate(ids) if j in lists[u]]
    assert sorted(hits[: len(expected)]) == expected
    rest = hits[len(expected) :]
    assert rest == [[0, -1]] * len(rest)
    assert len(hits) <= max(1024, 1.25 * len(expected) + 1)


def test_batches_of_like_size_have_hits_of_the_same_shape():
    """Or XLA would compile a step for every batch."""
    rng = np.random.default_rng(3)
    seen = seen_by([rng.integers(0, 400, rng.integers(0, 20)) for _ in range(500)])
    batches = [tf.constant(rng.integers(0, 500, 512)) for _ in range(20)]
    ids = tf.constant(rng.integers(0, 400, 512))
    assert len({seen.hits(queries, ids).shape[0] for queries in batches}) <= 2


def test_nobody_has_seen_anything():
    seen = seen_by([[], []])
    assert (
        not seen.holds(tf.constant([0, 1], tf.int64), tf.constant([[0], [3]], tf.int64))
        .numpy()
        .any()
    )
    ids = tf.constant([1, 1], tf.int64)
    assert (seen.hits(ids, ids).numpy() == [0, -1]).all()
