"""FISM and SVD++ queries against their formula, row by row in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from pipeline.contract import schema
from towers.encoders.history_tower import HistoryTower
from towers.model.two_tower import TwoTower

# Query 0 chose much, 3 one candidate, 4 nothing.
CHOSEN = {0: [5, 1, 4, 0, 2, 8, 7], 1: [2, 3], 2: [6, 1, 0], 3: [2], 4: []}
N, DIM = 9, 4
PAIRS = np.array([(query, item) for query, items in CHOSEN.items() for item in items])
ROWS = {schema.QUERY_ID: PAIRS[:, 0], schema.CANDIDATE_ID: PAIRS[:, 1]}


def make_tower(length=20, **settings):
    return HistoryTower(ROWS, len(CHOSEN), N, DIM, length=length, init_stddev=1.0, **settings)


def in_numpy(tower, query, without=None):
    """row + |N(u)∖i|^(-1/2) Σ y_j, in float64."""
    items = tower.items.numpy().astype(float)
    if tower.normalize:
        items /= np.linalg.norm(items, axis=1, keepdims=True)
    others = [item for item in CHOSEN[query] if item != without]
    total = np.zeros(DIM) if tower.table is None else tower.table.numpy()[query].astype(float)
    for item in others:
        total = total + items[item] / np.sqrt(len(others))
    return total / (np.linalg.norm(total) or 1) if tower.normalize else total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("has_table", [False, True])
def test_whole_histories(has_table, normalize):
    tower = make_tower(length=2, has_table=has_table, normalize=normalize)
    expected = [in_numpy(tower, query) for query in CHOSEN]
    np.testing.assert_allclose(tower.embed(None), expected, atol=1e-5)
    ids = tf.constant([[3, 0], [4, 4]], tf.int64)
    by_place = [[expected[query] for query in row] for row in ids.numpy()]
    np.testing.assert_allclose(tower.embed(ids), by_place, atol=1e-5)


@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("seed", [None, (3, 4)])
def test_a_query_does_not_know_what_it_is_trained_on(has_table, seed):
    tower = make_tower(has_table=has_table, normalize=seed is None)
    found = tower.embed(tf.constant(PAIRS[:, 0]), positives=tf.constant(PAIRS[:, 1]), seed=seed)
    expected = [in_numpy(tower, query, without=item) for query, item in PAIRS]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("has_table", [False, True])
def test_a_pair_that_was_held_out_sees_the_whole_history(has_table):
    tower = make_tower(length=7, has_table=has_table)
    queries, positives = [0, 1, 3, 4], [3, 8, 0, 1]
    found = tower.embed(tf.constant(queries, tf.int64), positives=tf.constant(positives, tf.int64))
    np.testing.assert_allclose(found, [in_numpy(tower, query) for query in queries], atol=1e-5)


def test_of_long_histories_a_sample_is_read():
    """Three of the seven in every step, or two and the positive; on average, all others."""
    query, positive, tower = 0, 2, make_tower(length=3)
    tower.items.assign(np.eye(N, DIM, dtype=np.float32))  # only candidates 0 … 3 can be seen
    pair = tf.constant([query], tf.int64), tf.constant([positive], tf.int64)
    draws = [tower.embed(pair[0], positives=pair[1], seed=(1, step))[0] for step in range(100)]
    draws, root = np.array(draws), np.sqrt(len(CHOSEN[query]) - 1)
    assert (draws[:, [2, 3]] == 0).all()  # the positive, and what it never chose
    assert np.isclose(draws[..., None], [0, root / 2, root / 3], atol=1e-5).any(-1).all()
    assert len(np.unique(draws.round(4), axis=0)) > 3
    np.testing.assert_allclose(draws.mean(0), in_numpy(tower, query, without=positive), atol=0.2)


def test_one_pair_draws_alike_wherever_it_stands():
    tower = make_tower(length=2)
    ids, positives = tf.constant([0, 2, 0]), tf.constant([5, 6, 5])
    rows = tower.embed(tf.cast(ids, tf.int64), positives=tf.cast(positives, tf.int64), seed=(1, 2))
    np.testing.assert_array_equal(rows[0], rows[2])


def test_the_gradient_reaches_the_others_alone(checkerboard):
    model = TwoTower(checkerboard, 4, tower="fism", init_stddev=1.0)
    assert model.query_tower.items is model.candidate_tower.table
    assert len(model.trainable_variables) == 1
    tower = make_tower()
    with tf.GradientTape() as tape:
        rows = tower.lookup(tf.constant([1], tf.int64), positives=tf.constant([3], tf.int64))
    gradient = tf.convert_to_tensor(tape.gradient(rows, tower.items)).numpy()
    np.testing.assert_allclose(gradient[2], 1.0)
    assert (np.delete(gradient, 2, axis=0) == 0).all()
