"""Losses and gradients of the per-query methods against loops over rows, in float64."""

import math

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import make_encoders, seen_by

import samplers
from samplers.candidates import candidate_scores, positive_scores
from samplers.methods.by_name import METHODS, build
from samplers.random_numbers import split_seed, uniform_numbers

N, Q, B, D = 12, 7, 6, 3
SEED = tf.constant([5, 11], tf.int64)
COUNTS = np.array([9, 7, 5, 5, 4, 3, 3, 2, 2, 1, 1, 0])  # the last has no train rows
UNIFORM = ("bpr", "dns", "dns_mn", "soft_bpr", "softmax_v", "pris_u", "warp")
POPULARITY = {"pns": lambda f: f**0.75, "pris_p": lambda f: np.log(1 + f)}
POOLS = ("adasir_u", "adasir_p", "adasir_w")
PER_QUERY = (*UNIFORM, *POPULARITY, *POOLS, "aobpr", "kernel")

CASES = [
    *((name, {}) for name in PER_QUERY),
    ("bpr", {"num_negatives": 4}),
    ("pns", {"num_negatives": 3}),
    ("dns", {"num_negatives": 3}),
    ("dns_mn", {"num_negatives": 9, "num_kept": 4}),
    ("dns_mn", {"num_negatives": 9, "num_kept": 4, "sum_over_kept": True}),
    ("dns_mn", {"num_negatives": 9, "num_kept": 4, "group_size": 1}),
    ("dns_mn", {"num_negatives": 9, "dro": 0.4}),
    ("dns_mn", {"num_negatives": 9, "dro": 0.05}),
    ("soft_bpr", {"soft_factor": 0.3, "num_negatives": 5}),
    ("soft_bpr", {"soft_factor": 0.3, "num_negatives": 5, "mix": "fixed"}),
    ("soft_bpr", {"soft_factor": 0.5, "num_negatives": 5, "mix": "uniform"}),
    ("softmax_v", {"num_negatives": 10, "rho": 0.2}),
    ("softmax_v", {"num_negatives": 10, "group_size": 1}),
    ("softmax_v", {"num_negatives": 10, "tau": 0.5}),
    ("pris_u", {"num_negatives": 7}),
    ("adasir_u", {"add_log_weights": True, "pool_size": 9}),
    ("adasir_w", {"count_below": True, "pool_size": 9}),
    ("warp", {"num_negatives": 3}),
    ("warp", {"num_negatives": 3, "margin": 0.0}),
    ("aobpr", {"num_negatives": 4, "rank_scale": 2.0}),
    ("kernel", {"alpha": 100.0, "leaf_size": 2, "num_negatives": 6}),
    ("softmax_v", {"num_negatives": 10, "group_size": 2}),
    ("softmax_v", {"num_negatives": 10, "group_size": 5}),
    ("softmax_v", {"num_negatives": 10, "group_size": 9}),
    *(  # two groups of three rows
        (name, {"num_negatives": 5, "group_size": 4})
        for name in ("softmax_v", "dns", "dns_mn", "soft_bpr", "warp", "pris_u", "pris_p")
    ),
    ("soft_bpr", {"num_negatives": 5, "group_size": 4, "mix": "fixed"}),
]


def tables(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(Q, D)).astype(np.float32), rng.normal(size=(N, D)).astype(np.float32)


# Query 0 has seen everything, the others a few candidates.
CHOSEN = [range(N), *np.random.default_rng(1).integers(0, N, [Q - 1, 3])]


def make_batch():
    query_ids = np.array([0, 3, 1, 6, 3, 2])
    candidate_ids = np.array([4, 0, 11, 2, 7, 1])
    return samplers.Batch(tf.constant(query_ids), tf.constant(candidate_ids))


def make(name, masked=False, **options):
    if masked:
        options |= {"mask_accidental_hits": True, "seen": seen_by(CHOSEN)}
    return build(name, frequency=COUNTS, num_candidates=N, num_queries=Q, **options)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def softplus(x):
    return np.logaddexp(0, x)


def drawn_ids(name, method, batch):
    """The ids that the method draws from SEED, and log Q of each."""
    groups = math.ceil(B / getattr(method, "group_size", 1))
    seed, shape, size = split_seed(SEED)[0], [groups, method.num_negatives], math.ceil(B / groups)
    if name in UNIFORM:
        ids = tf.random.stateless_uniform(shape, seed, minval=0, maxval=N, dtype=tf.int64)
        ids = np.repeat(ids.numpy(), size, axis=0)[:B]
        return ids, np.full(ids.shape, -np.log(N))
    if name in POPULARITY:
        probability = POPULARITY[name](COUNTS.astype(np.float64))
        probability /= probability.sum()
        draws = tf.random.stateless_uniform(shape, seed, dtype=tf.float64).numpy()
        ids = np.array([[np.sum(u >= np.cumsum(probability)) for u in row] for row in draws])
        ids = np.repeat(ids, size, axis=0)[:B]
        return ids, np.log(probability[ids])
    queries, table = tables()
    if name in POOLS:
        places = tf.random.stateless_uniform(
            shape, seed, minval=0, maxval=method.pool_size, dtype=tf.int64
        ).numpy()
        rows = batch.query_ids.numpy()[:, None]
        pool = method._pool
        return pool.ids.numpy()[rows, places], pool.log_weights.numpy()[rows, places]
    query = queries[batch.query_ids.numpy()]
    ids = method.propose(tf.constant(query), batch, seed=seed).ids.numpy()
    if name == "aobpr":
        return ids, np.zeros(shape)
    mass = method.alpha * (query.astype(np.float64) @ table.T.astype(np.float64)) ** 2 + 1
    log_q = np.log(mass / mass.sum(axis=1, keepdims=True))
    return ids, np.take_along_axis(log_q, ids, axis=1)


def row_terms(name, method, s_i, s, log_q):
    """One row from METHODS, over valid negatives: which are kept, p of each, J(rank)."""
    order = np.argsort(-s, kind="stable")
    every = np.arange(len(s))
    equal = np.full(len(s), 1 / len(s))
    loss = softplus(s - s_i)
    if name in ("bpr", "pns", "aobpr"):
        return every, equal, 1.0
    if name in ("dns", "soft_bpr"):
        return order[:1], np.ones(1), 1.0
    if name == "dns_mn" and method.dro:
        return dro_terms(loss, max(1, min(method.dro * method.num_negatives, len(loss))))
    if name == "dns_mn":
        kept = order[: method.num_kept]
        share = np.ones(len(kept)) if method.sum_over_kept else np.full(len(kept), 1 / len(kept))
        return kept, share, 1.0
    if name == "softmax_v":
        if method.tau:  # a fixed one is of the scores, the adaptive one of the losses
            return every, softmax(s / method.tau), 1.0
        tau = np.sqrt(np.var(loss) / (2 * method.rho))
        return every, softmax(loss / tau) if tau > 0 else equal, 1.0
    if name in ("pris_u", "pris_p", "kernel"):
        return every, softmax(s - log_q), 1.0
    if name in POOLS:
        sign = 1 if method.add_log_weights else -1
        return every, softmax(s + sign * log_q), 1.0
    raise AssertionError(name)


def dro_terms(losses, tail):
    """Where η + Σ (L - η)_+ / tail is least over η, of which a loss is one, and its slopes by L."""
    values = [eta + np.maximum(losses - eta, 0).sum() / tail for eta in losses]
    place = int(np.argmin(values))
    slopes = (losses > losses[place]) / tail
    slopes[place] = 1 - slopes.sum()
    return np.arange(len(losses)), slopes, 1.0


def harmonic(rank):
    return sum(1 / k for k in range(1, rank + 1))


def reference(name, method, batch, *, masked=False):
    """Loss of each row and the gradients of its sum by both tables."""
    queries, table = (array.astype(np.float64) for array in tables())
    all_ids, all_log_q = drawn_ids(name, method, batch)
    stretches = np.full(B, getattr(method, "soft_factor", 1.0))
    if getattr(method, "mix", None) == "uniform":
        stretches = 2 * method.soft_factor * uniform_numbers([B], split_seed(SEED)[1]).numpy()
    losses, by_queries, by_table = np.zeros(B), np.zeros_like(queries), np.zeros_like(table)
    for b in range(B):
        u, i = int(batch.query_ids[b]), int(batch.candidate_ids[b])
        s_i, scores = queries[u] @ table[i], table[all_ids[b]] @ queries[u]
        usable = np.ones(len(scores), bool)
        if masked:
            usable &= (all_ids[b] != i) & ~np.isin(all_ids[b], CHOSEN[u])
        if name == "warp":
            terms = warp_terms(method, s_i, scores, all_ids[b], usable, i)
        else:
            where = np.flatnonzero(usable)
            if len(where) == 0:
                continue
            kept, p, weight = row_terms(name, method, s_i, scores[where], all_log_q[b][where])
            terms = where[kept], p, weight
        kept, p, weight = terms
        if name == "adasir_w":
            left_out = {i, *(CHOSEN[u] if masked else ())}
            weight = adasir_rank_weight(method, queries[u], table, u, s_i, left_out)
        stretch = stretches[b]
        for j, p_j in zip(kept, p, strict=True):
            x = stretch * (scores[j] - s_i)
            losses[b] += weight * p_j * softplus(x)
            slope = weight * p_j * stretch / (1 + np.exp(-x))
            v_j, v_i = table[all_ids[b][j]], table[i]
            by_queries[u] += slope * (v_j - v_i)
            by_table[all_ids[b][j]] += slope * queries[u]
            by_table[i] -= slope * queries[u]
    return losses, by_queries, by_table


def warp_terms(method, s_i, scores, ids, usable, positive):
    for trial, (score, j) in enumerate(zip(scores, ids, strict=True), start=1):
        if usable[trial - 1] and j != positive and score > s_i - method.margin:
            return [trial - 1], [1.0], harmonic((N - 1) // trial + 1)
    return [], [], 0.0


def adasir_rank_weight(method, query, table, u, s_i, left_out):
    proposed = [k for k in method._pool.proposed.numpy()[u] if k not in left_out]
    others = [table[k] @ query for k in proposed]
    count = sum(s < s_i if method.count_below else s > s_i for s in others)
    return harmonic((N - 1) * count // method.pool_size + 1)


def losses_and_gradients(method, batch):
    queries, table = (tf.Variable(array) for array in tables())
    with tf.GradientTape() as tape:
        losses = method(make_encoders(queries, table, batch), batch, seed=SEED)
    gradients = tape.gradient(losses, [queries, table], unconnected_gradients="zero")
    return losses.numpy(), *(tf.convert_to_tensor(gradient).numpy() for gradient in gradients)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradients_are_those_of_a_loop_over_rows(name, options, masked):
    method = make(name, masked, **options)
    batch = make_batch()
    actual = losses_and_gradients(method, batch)
    expected = reference(name, method, batch, masked=masked)
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    if masked:
        assert actual[0][0] == 0  # has seen everything
        assert (actual[1][0] == 0).all()
    if name != "warp":
        assert (actual[0][1:] > 0).any()


@pytest.mark.parametrize("name", PER_QUERY)
def test_one_row_in_bfloat16_and_huge_scores(name):
    queries, table = tables()
    one = samplers.Batch(tf.constant([2], tf.int64), tf.constant([11], tf.int64))
    low = make_encoders(tf.cast(queries, tf.bfloat16), tf.cast(table, tf.bfloat16), one)
    loss = make(name)(low, one, seed=SEED)
    assert loss.shape == [1]
    assert loss.dtype == tf.float32
    assert np.isfinite(loss).all()

    method, batch = make(name, masked=True), make_batch()
    huge = [tf.Variable(300 * array) for array in (queries, table)]
    with tf.GradientTape() as tape:
        losses = method(make_encoders(*huge, batch), batch, seed=SEED)
    gradients = tape.gradient(losses, huge, unconnected_gradients="zero")
    for values in (losses, *gradients):
        assert np.isfinite(tf.convert_to_tensor(values)).all()


def test_scores_of_bfloat16_are_summed_in_float32():
    query, table = (tf.cast(array, tf.bfloat16) for array in tables())
    rows = tf.stack([table, -table])  # [2, N, D]
    exact = np.einsum("bnd,bd->bn", *(np.asarray(x, np.float64) for x in (rows, query[:2])))
    np.testing.assert_allclose(candidate_scores(query[:2], rows), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(positive_scores(query[:2], rows[:, 0]), exact[:, 0], rtol=1e-5)


def test_every_per_query_method_is_tested_here():
    assert {name for name in METHODS if hasattr(METHODS[name], "_pair_losses")} == set(PER_QUERY)


def test_the_last_group_may_have_fewer_rows():
    rng = np.random.default_rng(3)
    query, shared = rng.normal(size=(5, D)), rng.normal(size=(3, 1, 4, D))  # groups of 2, 2, 1
    scores = candidate_scores(tf.constant(query), tf.constant(shared))
    ids = tf.reshape(tf.range(12, dtype=tf.int64), [3, 1, 4])
    drawn = samplers.Candidates(ids, tf.cast(ids, tf.float32)).by_row(5)
    assert drawn.ids[:, 0].numpy().tolist() == [0, 0, 4, 4, 8]
    for row, group in enumerate([0, 0, 1, 1, 2]):
        np.testing.assert_allclose(scores[row], shared[group, 0] @ query[row])
