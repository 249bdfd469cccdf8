"""The kernel tree against the kernel of the whole corpus."""

import numpy as np
import pytest
import tensorflow as tf

from samplers.proposals import kernel_tree
from samplers.proposals.kernel_tree import KernelTree

SEED = tf.constant([4, 8], tf.int64)


def tree_of(table, **options):
    tree = KernelTree(len(table), **{"alpha": 1.0, "leaf_size": 2, **options})
    tree.renew(tf.constant(table, tf.float32))
    return tree


def probabilities(query, table, alpha):
    mass = alpha * (query @ table.T) ** 2 + 1
    return mass / mass.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("num_candidates", "leaf_size", "max_roots", "alpha"),
    [
        (1, 4, 256, 1.0),
        (7, 2, 256, 1.0),  # one level
        (13, 2, 2, 1.0),  # three levels, the last leaf half empty, one leaf empty
        (11, 1, 1, 100.0),  # a binary tree down to single candidates
        (16, 4, 1, 0.1),
    ],
)
def test_frequency_and_log_q_are_those_of_the_kernel(
    num_candidates, leaf_size, max_roots, alpha, monkeypatch
):
    monkeypatch.setattr(kernel_tree, "_MAX_ROOTS", max_roots)
    rng = np.random.default_rng(0)
    query, table = rng.normal(size=[2, 3]), rng.normal(size=[num_candidates, 3])
    tree = tree_of(table, alpha=alpha, leaf_size=leaf_size)
    drawn = tree.sample(tf.constant(query, tf.float32), 40_000, seed=SEED)
    ids, expected = drawn.ids.numpy(), probabilities(query, table, alpha)
    assert ids.shape == (2, 40_000)
    for row in range(2):
        observed = np.bincount(ids[row], minlength=num_candidates) / 40_000
        # four standard deviations of a share of a half among 40,000 draws
        np.testing.assert_allclose(observed, expected[row], atol=0.01)
        np.testing.assert_allclose(np.exp(drawn.log_q[row]), expected[row][ids[row]], rtol=1e-4)


def test_levels_of_a_large_corpus():
    tree = KernelTree(40_988, alpha=1.0, leaf_size=32)  # 1281 leaves: 161 subtrees of 8
    tree.renew(tf.random.stateless_normal([40_988, 4], SEED))
    assert [int(tf.shape(level)[0]) for level in tree.sums] == [161, 322, 644, 1288]
    drawn = tree.sample(tf.random.stateless_normal([8, 4], SEED), 50, seed=SEED)
    assert np.isfinite(drawn.log_q).all()
    assert drawn.ids.numpy().max() < 40_988
    assert drawn.ids.numpy().max() > 30_000


def test_renewal_replaces_the_tree():
    rng = np.random.default_rng(1)
    query, table = rng.normal(size=[1, 3]), rng.normal(size=[9, 3])
    tree = tree_of(table)
    tree.renew(tf.constant(5 * table[::-1], tf.float32))
    drawn = tree.sample(tf.constant(query, tf.float32), 100, seed=SEED)
    expected = probabilities(query, 5 * table[::-1], 1.0)[0]
    np.testing.assert_allclose(np.exp(drawn.log_q[0]), expected[drawn.ids[0]], rtol=1e-4)


def test_same_seed_same_draws_in_a_graph():
    table = np.random.default_rng(1).normal(size=[50, 3])
    tree, query = tree_of(table), tf.random.stateless_normal([4, 3], SEED)
    eager = tree.sample(query, 6, seed=SEED)
    graph = tf.function(lambda: tree.sample(query, 6, seed=SEED))()
    np.testing.assert_array_equal(eager.ids, graph.ids)
    assert (eager.ids.numpy() != tree.sample(query, 6, seed=SEED + 1).ids.numpy()).any()


def test_the_largest_draw_ends_at_a_candidate(monkeypatch):
    """By rounding, the mass of a node may exceed that of its candidates."""
    monkeypatch.setattr(kernel_tree, "_MAX_ROOTS", 1)
    rng = np.random.default_rng(2)
    tree = tree_of(rng.normal(size=[9, 8]))  # 5 leaves of 8
    largest = np.nextafter(np.float32(1), np.float32(0))
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda shape, seed: tf.fill(shape, largest))
    query = tf.constant(rng.normal(size=[500, 8]), tf.float32)
    drawn = tree.sample(query, 1, seed=SEED)
    assert np.isfinite(drawn.log_q).all()
    assert drawn.ids.numpy().max() == 8
