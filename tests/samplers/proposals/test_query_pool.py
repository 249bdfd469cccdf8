"""The pools of AdaSIR: their renewal, what they follow, and their place in a step."""

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_by

import samplers
from samplers.methods.by_name import build
from samplers.proposals import query_pool
from samplers.proposals.popularity import PopularitySampler, UniformSampler
from samplers.proposals.query_pool import QueryPool

N, Q, D = 6, 5, 3
SEED = tf.constant([4, 8], tf.int64)


def encoders_of(queries, table):
    queries, table = tf.constant(queries, tf.float32), tf.constant(table, tf.float32)
    return samplers.Encoders(
        query=tf.zeros([0, D]),
        positive=tf.zeros([0, D]),
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: table,
        queries=lambda ids: tf.gather(queries, ids),
    )


@pytest.fixture
def towers():
    rng = np.random.default_rng(0)
    return rng.normal(size=[Q, D]), rng.normal(size=[N, D])


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def frequencies(ids):
    return np.stack([np.bincount(row, minlength=N) / len(row) for row in ids])


@pytest.mark.parametrize("weights", [np.ones(N), np.array([5, 3, 1, 1, 1, 0.5])])
def test_large_pools_follow_the_softmax_of_the_scores_whatever_the_proposal(towers, weights):
    pool = QueryPool(Q, 40_000, PopularitySampler(weights))
    pool.renew(encoders_of(*towers), seed=SEED)
    expected = softmax(towers[0] @ towers[1].T)
    np.testing.assert_allclose(frequencies(pool.ids.numpy()), expected, atol=0.02)
    pool.renew(encoders_of(*towers), seed=SEED + 1)  # reuse keeps the distribution
    np.testing.assert_allclose(frequencies(pool.ids.numpy()), expected, atol=0.02)


def test_pools_hold_nothing_that_their_query_has_seen(towers):
    chosen = [[0, 4], [], [1], range(N), [2, 3, 5]]
    pool = QueryPool(Q, 4_000, UniformSampler(N), seen=seen_by(chosen))
    scores = towers[0] @ towers[1].T
    for query in (0, 2, 4):
        scores[query, chosen[query]] = -np.inf
    for step in range(2):
        pool.renew(encoders_of(*towers), seed=SEED + step)
        np.testing.assert_allclose(frequencies(pool.ids.numpy()), softmax(scores), atol=0.05)
        assert np.isfinite(pool.log_weights).all()  # query 3 has nothing else to hold


def test_weights_are_the_softmax_over_what_was_proposed(towers):
    sampler = UniformSampler(N)
    pool = QueryPool(Q, 8, sampler, keep_proposed=True)
    pool.renew(encoders_of(*towers), seed=SEED)
    for query in range(Q):
        proposed = pool.proposed.numpy()[query]
        weight = softmax((towers[1][proposed] @ towers[0][query] + np.log(N))[None])[0]
        for j, log_w in zip(pool.ids.numpy()[query], pool.log_weights.numpy()[query], strict=True):
            assert j in proposed
            np.testing.assert_allclose(np.exp(log_w), weight[proposed == j][0], rtol=1e-4)


def test_later_renewals_draw_from_the_old_and_the_new_half(towers):
    """Old candidates stay with their old weights; about half of a pool is old."""
    queries, table = towers[0], np.zeros([N, D])
    pool = QueryPool(Q, 4000, PopularitySampler(np.array([1, 1, 0, 0, 0, 0])))
    pool.renew(encoders_of(queries, table), seed=SEED)
    np.testing.assert_allclose(pool.log_weights, np.full([Q, 4000], -np.log(4000)), rtol=1e-5)
    assert set(pool.ids.numpy().ravel()) == {0, 1}
    pool.proposal = PopularitySampler(np.array([0, 0, 0, 0, 3, 0]))
    pool.pool_size = 4000
    pool.log_weights.assign(pool.log_weights - 1.0)  # to know the old ones by
    pool.renew(encoders_of(queries, table), seed=SEED + 1)
    ids, log_weights = pool.ids.numpy(), pool.log_weights.numpy()
    np.testing.assert_allclose((ids == 4).mean(axis=1), 0.5, atol=0.04)
    np.testing.assert_allclose(log_weights[ids == 4], -np.log(4000), rtol=1e-5)
    np.testing.assert_allclose(log_weights[ids != 4], -np.log(4000) - 1, rtol=1e-5)


def test_draws_are_uniform_over_the_pool_of_the_query_with_its_weights():
    pool = QueryPool(Q, 4, UniformSampler(N))
    pool.ids.assign(np.arange(4 * Q).reshape(Q, 4))
    pool.log_weights.assign(-np.arange(4.0 * Q).reshape(Q, 4))
    drawn = pool.sample(tf.constant([3, 0], tf.int64), 20_000, seed=SEED)
    counts = np.bincount(drawn.ids.numpy()[0] - 12, minlength=4) / 20_000
    np.testing.assert_allclose(counts, 0.25, atol=0.015)
    assert set(drawn.ids.numpy()[1]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(drawn.log_q, -drawn.ids.numpy())


def test_blocks_of_queries_cover_all_of_them(towers, monkeypatch):
    monkeypatch.setattr(query_pool, "_BLOCK", 2)
    eager, graph = (QueryPool(Q, 6, UniformSampler(N)) for _ in range(2))
    eager.renew(encoders_of(*towers), seed=SEED)
    tf.function(lambda: graph.renew(encoders_of(*towers), seed=SEED))()
    assert (eager.log_weights.numpy() < 0).all()
    np.testing.assert_array_equal(eager.ids, graph.ids)
    np.testing.assert_allclose(eager.log_weights, graph.log_weights, rtol=1e-5)


@pytest.mark.parametrize("name", ["adasir_u", "adasir_p", "adasir_w", "kernel"])
def test_state_is_renewed_once_an_epoch_and_survives_a_checkpoint(name, towers, tmp_path):
    def make():
        return build(name, frequency=np.arange(N), num_candidates=N, num_queries=Q)

    encoders, other_encoders = encoders_of(*towers), encoders_of(towers[0], -2 * towers[1])
    batch = samplers.Batch(tf.constant([1, 4], tf.int64), tf.constant([0, 2], tf.int64))
    query = encoders.queries(batch.query_ids)

    def draw(method, encoders, seed=SEED):
        method.refresh(encoders, seed=seed)
        return method.propose(query, batch, seed=seed)

    method = make()
    first = draw(method, encoders)
    assert (first.ids.numpy() < N).all()
    state = [variable.numpy() for variable in method.variables]
    for _ in range(2):
        draw(method, other_encoders)  # the same epoch
    for before, now in zip(state, method.variables, strict=True):
        np.testing.assert_array_equal(before, now)

    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    restored = make()
    tf.train.Checkpoint(method=restored).read(path).assert_consumed()
    again = draw(restored, other_encoders)
    np.testing.assert_array_equal(again.ids, first.ids)
    np.testing.assert_array_equal(again.log_q, first.log_q)

    method.end_epoch(encoders)
    draw(method, other_encoders, SEED + 1)
    changed = [
        (before != now.numpy()).any()
        for before, now in zip(state, method.variables, strict=True)
        if before.size > 1
    ]
    assert all(changed)


def test_queries_that_cannot_be_embedded_are_an_error(towers):
    pool = QueryPool(Q, 4, UniformSampler(N))
    with pytest.raises(ValueError, match=r"needs Encoders\.queries"):
        pool.renew(encoders_of(*towers)._replace(queries=None), seed=SEED)
