"""What the hard-negative methods are, beyond the loop over rows: their papers' equalities."""

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import make_encoders, seen_by

import samplers
from samplers.methods.by_name import build
from samplers.random_numbers import split_seed

N, Q, B, D = 12, 7, 6, 3
SEED = tf.constant([5, 11], tf.int64)


def tables():
    rng = np.random.default_rng(0)
    return rng.normal(size=(Q, D)).astype(np.float32), rng.normal(size=(N, D)).astype(np.float32)


def make_batch():
    return samplers.Batch(
        tf.constant([0, 3, 1, 6, 3, 2], tf.int64),
        tf.constant([4, 0, 11, 2, 7, 1], tf.int64),
    )


def test_losses_by_hand():
    """One query at (1, 0), one negative that scores 2, a positive that scores 1."""
    encoders = samplers.Encoders(
        query=tf.constant([[1.0, 0.0]]),
        positive=tf.constant([[1.0, 5.0]]),
        candidates=lambda ids: tf.fill([*ids.shape, 2], 2.0),
        corpus=lambda: tf.constant([[1.0, 5.0], [2.0, 2.0]]),
    )
    batch = samplers.Batch(tf.constant([0], tf.int64), tf.constant([0], tf.int64))

    def loss(name, ids=(1,), **options):
        method = build(name, num_candidates=2, **options)
        proposed = samplers.Candidates(tf.constant([ids], tf.int64), tf.zeros([1, len(ids)]))
        return float(
            method.loss(encoders, batch, method.select(encoders, batch, proposed), seed=SEED)[0]
        )

    assert loss("bpr") == pytest.approx(1.3132617)  # log(1 + e)
    assert loss("soft_bpr", soft_factor=0.5) == pytest.approx(0.9740770)  # log(1 + e^.5)
    assert loss("dns_mn", (1, 1, 1), num_kept=2, sum_over_kept=True) == pytest.approx(2.6265234)
    # J(floor(1 / 1) + 1) = 1.5, and J(floor(1 / 3) + 1) = 1 after two draws of the positive
    assert loss("warp", margin=0.0) == pytest.approx(1.5 * 1.3132617)
    assert loss("warp", (0, 0, 1), margin=0.0) == pytest.approx(1.3132617)
    assert loss("warp", (0, 0), margin=0.0) == 0.0


def test_soft_bpr_is_bpr_against_the_mix_with_the_positive():
    """Eq. (5) and (10) of the soft BPR paper, also for the gradients through the mix."""
    queries, table = (tf.Variable(array) for array in tables())
    batch, alpha = make_batch(), 0.7
    soft = build("soft_bpr", num_candidates=N, soft_factor=1 - alpha)
    chosen = soft.select(
        make_encoders(queries, table, batch),
        batch,
        soft.propose(None, batch, seed=split_seed(SEED)[0]),
    )
    with tf.GradientTape(persistent=True) as tape:
        encoders = make_encoders(queries, table, batch)
        losses = soft(encoders, batch, seed=SEED)
        mixed = encoders._replace(
            candidates=lambda ids: (
                alpha * encoders.positive[:, None] + (1 - alpha) * tf.gather(table, ids)
            )
        )
        expected = build("bpr", num_candidates=N).loss(mixed, batch, chosen, seed=SEED)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for variable in (queries, table):
        one, other = (tf.convert_to_tensor(tape.gradient(x, variable)) for x in (losses, expected))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_dns_mn_over_all_negatives_is_the_estimator_of_opauc(kept):
    """Eq. (12): the mean over positives and over the top β n₋ negatives, M = β n₋."""
    queries, table = tables()
    positives, query = [4, 0, 7, 9], 3
    negatives = [j for j in range(N) if j not in positives]  # n₋ = 8
    batch = samplers.Batch(tf.constant([query] * 4, tf.int64), tf.constant(positives, tf.int64))
    seen = seen_by([positives if u == query else [] for u in range(Q)])
    encoders = make_encoders(tf.constant(queries), tf.constant(table), batch)
    method = build("dns_mn", num_candidates=N, num_negatives=N, num_kept=kept, seen=seen)
    everything = samplers.Candidates(
        tf.tile(tf.range(N, dtype=tf.int64)[None], [4, 1]), tf.fill([4, N], -np.log(N))
    )
    selected = method.select(encoders, batch, everything)
    loss = tf.reduce_mean(method.loss(encoders, batch, selected, seed=SEED))
    scores = table.astype(np.float64) @ queries[query]
    hardest = np.sort(scores[negatives])[::-1][:kept]
    estimator = np.mean([[np.logaddexp(0, s_j - scores[i]) for s_j in hardest] for i in positives])
    assert float(loss) == pytest.approx(estimator, rel=1e-6)
    assert not set(selected.ids.numpy().ravel()) & set(positives)


def test_the_dro_loss_of_a_whole_number_of_draws_is_dns_mn():
    """Lemma 1: eq. (14) with β = M / N."""
    queries, table = (tf.constant(array) for array in tables())
    encoders = make_encoders(queries, table, make_batch())
    for kept in (1, 2, 4, 8):
        method = {"num_candidates": N, "num_negatives": 8}
        robust = build("dns_mn", dro=kept / 8, **method)
        plain = build("dns_mn", num_kept=kept, **method)
        expected = plain(encoders, make_batch(), seed=SEED)
        np.testing.assert_allclose(robust(encoders, make_batch(), seed=SEED), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adasir_w", "warp"])
def test_a_positive_never_outranks_itself(name):
    """Two kernels may sum the same products in other orders."""
    rng = np.random.default_rng(0)
    query, positive = (tf.constant(rng.normal(size=[200, 33]), tf.float32) for _ in range(2))
    ids = tf.range(200, dtype=tf.int64)
    batch = samplers.Batch(ids, ids)
    encoders = samplers.Encoders(
        query=query,
        positive=positive,
        candidates=lambda ids: tf.gather(positive, ids),
        corpus=lambda: positive,
    )
    method = build(
        name,
        num_candidates=200,
        num_queries=200,
        **({"pool_size": 2} if name == "adasir_w" else {}),
    )
    own = tf.tile(ids[:, None], [1, 2])
    if name == "adasir_w":
        method._pool.proposed.assign(own)
    selected = method.select(encoders, batch, samplers.Candidates(own, tf.zeros([200, 2])))
    rank_weight = 1.0 if name == "adasir_w" else 0.0  # J(1), no violator
    np.testing.assert_allclose(selected.row_weight, np.full(200, rank_weight), rtol=1e-6)
