"""Draws by rank along one factor, and when the orders are renewed."""

import math

import numpy as np
import pytest
import tensorflow as tf

import samplers
from samplers.methods.by_name import build
from samplers.proposals.adaptive_oversampling import AdaptiveOversampler

SEED = tf.constant([4, 8], tf.int64)
N, D = 7, 3


def sampler_of(table, rank_scale):
    sampler = AdaptiveOversampler(len(table), rank_scale=rank_scale)
    sampler.renew(tf.constant(table, tf.float32))
    return sampler


def probabilities(query, table, scale):
    """Of each candidate: over factors and ranks, from the paper."""
    by_rank = np.exp(-np.arange(len(table)) / scale)
    by_rank /= by_rank.sum()
    by_factor = np.abs(query) * table.std(axis=0)
    by_factor /= by_factor.sum()
    result = np.zeros(len(table))
    for f in range(len(query)):
        order = np.argsort(-table[:, f] if query[f] > 0 else table[:, f])
        result[order] += by_factor[f] * by_rank
    return result


@pytest.mark.parametrize("scale", [0.7, 3.0, 500.0])
def test_frequency_is_that_of_ranks_and_factors(scale):
    rng = np.random.default_rng(0)
    query, table = rng.normal(size=[2, D]), rng.normal(size=[N, D]) * [1, 2, 0.3]
    drawn = sampler_of(table, scale).sample(tf.constant(query, tf.float32), 40_000, seed=SEED)
    for row in range(2):
        observed = np.bincount(drawn.ids.numpy()[row], minlength=N) / 40_000
        # four standard deviations of a share of a half among 40,000 draws
        np.testing.assert_allclose(observed, probabilities(query[row], table, scale), atol=0.01)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_q_of_a_single_factor_is_the_log_frequency(sign):
    table = np.array([[3.0], [-1.0], [7.0], [0.5]])
    sampler = sampler_of(table, 2.0)
    drawn = sampler.sample(tf.constant([[sign * 0.3]]), 20_000, seed=SEED)
    expected = probabilities(np.array([sign]), table, 2.0)
    np.testing.assert_allclose(np.exp(drawn.log_q[0]), expected[drawn.ids[0]], rtol=1e-5)
    assert expected.argmax() == (2 if sign > 0 else 1)


def test_a_query_of_zeros_gives_no_nan():
    table = np.random.default_rng(0).normal(size=[N, D])
    drawn = sampler_of(table, 2.0).sample(tf.zeros([3, D]), 10, seed=SEED)
    assert np.isfinite(drawn.log_q).all()
    assert set(drawn.ids.numpy().ravel()) <= set(range(N))


def test_large_corpora_reach_their_first_ranks_only():
    sampler = sampler_of(np.arange(20_000.0)[:, None], 50.0)
    drawn = sampler.sample(tf.ones([1, 1]), 20_000, seed=SEED)
    ranks = 19_999 - drawn.ids.numpy()[0]
    assert ranks.min() == 0
    assert ranks.mean() == pytest.approx(1 / math.expm1(1 / 50), rel=0.03)


def test_orders_are_renewed_every_n_log_n_draws_and_survive_a_checkpoint(tmp_path):
    def make():
        return build("aobpr", num_candidates=N, num_negatives=2)

    table = tf.Variable(tf.random.stateless_normal([N, D], SEED))
    batch = samplers.Batch(tf.zeros([3], tf.int64), tf.zeros([3], tf.int64))
    encoders = samplers.Encoders(
        query=tf.ones([3, D]),
        positive=tf.ones([3, D]),
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: tf.convert_to_tensor(table),
    )
    method = make()
    step = tf.function(lambda: (method(encoders, batch, seed=SEED), method.update(batch))[0])
    step()
    first = method._sampler.orders.numpy()
    np.testing.assert_array_equal(first, np.argsort(-table.numpy().T, axis=1))
    np.testing.assert_allclose(method._sampler.deviations, table.numpy().std(axis=0), rtol=1e-5)
    table.assign(-table)
    step()  # 6 of 14 draws, N log N = 13.6
    step()
    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    np.testing.assert_array_equal(method._sampler.orders, first)
    step()  # 18 draws were made before it
    np.testing.assert_array_equal(method._sampler.orders, np.argsort(-table.numpy().T, axis=1))

    restored = make()
    tf.train.Checkpoint(method=restored).read(path).assert_consumed()
    assert int(restored._sampler.draws) == 18
    np.testing.assert_array_equal(restored._sampler.orders, first)
