"""Rows whose negatives are the positives of a larger batch: the parts add up to the whole."""

import numpy as np
import pytest
import tensorflow as tf

import samplers
from samplers.random_numbers import split_seed

B, N, D = 11, 9, 4
SEED = tf.constant([3, 4], tf.int64)
SEEN = samplers.Seen(np.arange(2 * B) // 2 % 4 * 2, 2 * np.arange(B + 1))
CASES = [
    ("ssl", {}),
    ("ssl", {"positive_twice": True, "mask_accidental_hits": True}),
    ("ssl_pop", {}),
    ("ssl_pop", {"mask_accidental_hits": True, "block_size": 4}),
    ("ssl_pop", {"positive_correction": True}),
    ("ssl_pop", {"positive_correction": True, "block_size": 4}),
    ("correct_sfx", {"alpha": 0.1}),
    ("cbns", {"warm_up": 1}),
    ("mns", {}),
    ("mns", {"mixture_for_positive": True, "mask_accidental_hits": True}),
    ("bir", {}),
    ("bir", {"draws": "independent", "weights": "importance"}),
    ("bir", {"weights": "equal"}),
    ("bir", {"block_size": 4, "mask_accidental_hits": True}),
    ("xir", {"cache_size": 5}),
    ("bmns", {"num_mixed": 6}),
    ("bmns", {"num_mixed": 6, "mask_accidental_hits": True, "block_size": 4}),
    ("positive_mixing", {"num_mixed": 6}),
    ("ssl_pop", {"seen": SEEN}),
    ("mns", {"seen": SEEN}),
    ("xir", {"seen": SEEN, "cache_size": 5}),
    ("positive_mixing", {"seen": SEEN, "num_mixed": 6}),
    ("positive_mixing", {"num_mixed": 6, "gamma": 0.0, "mask_accidental_hits": True}),
]


def losses_and_gradients(method, batch, tensors, proposed):
    """The losses, and gradients of their sum by queries, positives, columns and the table."""

    query, positive, columns, table = tensors
    encoders = samplers.Encoders(
        query=query,
        positive=positive,
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: table,
        whole=columns,
    )
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        batch = method.with_seen(batch, proposed)
        losses = method.loss(encoders, batch, proposed, seed=split_seed(SEED)[1])
    gradients = tape.gradient(losses, tensors, unconnected_gradients="zero")
    return losses.numpy(), [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parts_have_the_losses_and_gradients_of_the_whole(name, options):
    rng = np.random.default_rng(5)
    table = tf.constant(rng.normal(size=(N, D)), tf.float32)
    queries = tf.constant(rng.normal(size=(B, D)), tf.float32)
    ids = tf.constant(rng.integers(0, N, B))
    whole = samplers.Batch(
        tf.range(B, dtype=tf.int64),
        ids,
        weight=tf.constant(rng.uniform(1, 2, B), tf.float32),
        valid=tf.constant(rng.random(B) < 0.9),
    )
    method = samplers.build(name, frequency=np.arange(1, N + 1), num_candidates=N, **options)
    proposed = method.propose(queries, whole, seed=split_seed(SEED)[0])
    positives, columns = tf.gather(table, ids), tf.gather(table, ids)
    expected, (by_query, by_positive, by_columns, by_table) = losses_and_gradients(
        method, whole, (queries, positives, columns, table), proposed
    )
    counts = [counted.numpy() for counted in method.counted]
    found, summed, sums = [], [], [0.0 for _ in counts]
    for first, size in ((0, 4), (4, 0), (4, 7)):
        rows = slice(first, first + size)
        part = samplers.Batch(*(x if x is None else x[rows] for x in whole[:6]))
        part = part._replace(whole=whole, first=tf.constant(first, tf.int32))
        tensors = (queries[rows], positives[rows], columns, table)
        losses, gradients = losses_and_gradients(method, part, tensors, proposed)
        found.append(losses)
        summed.append(gradients)
        sums = [x + counted.numpy() for x, counted in zip(sums, method.counted, strict=True)]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5, atol=1e-6)
    by_parts = [np.concatenate([g[place] for g in summed]) for place in (0, 1)]
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(by_parts[0], by_query, **close)
    by_all = sum(g[2] for g in summed)
    np.testing.assert_allclose(by_parts[1] + by_all, by_positive + by_columns, **close)
    np.testing.assert_allclose(sum(g[3] for g in summed), by_table, **close)
    for actual, count in zip(sums, counts, strict=True):
        np.testing.assert_array_equal(actual, count)
