import itertools

import numpy as np
import pytest
import tensorflow as tf

from samplers.losses.streamed_softmax import Counted, dot_logsumexp, fold_columns, take_columns

INF = float("inf")
BLOCKS = [None, 1, 4, 64]


def reference(query, candidates, bias, *, own_bias=None, valid=None, counts=None):
    """The sum as a loop: values [B] and the gradients of Σ b · value_b over finite values."""
    values = np.full(len(query), -INF)
    by_query, by_candidates = np.zeros_like(query), np.zeros_like(candidates)
    for b in range(len(query)):
        parts = np.zeros(len(candidates))
        for j in range(len(candidates)):
            exponent, times = bias[j], 1.0 if counts is None else counts[b, j]
            if valid is not None and not valid[b, j]:
                times = 0.0
            if own_bias is not None and b == j:
                exponent, times = own_bias[b], 1.0
            parts[j] = times * np.exp(query[b] @ candidates[j] + exponent)
        if parts.sum() > 0:
            values[b] = np.log(parts.sum())
            by_query[b] = b * parts / parts.sum() @ candidates
            by_candidates += b * np.outer(parts / parts.sum(), query[b])
    return values, by_query, by_candidates


def run(query, candidates, bias, *, own_bias=None, valid=None, counts=None, block_size=None):
    query, candidates = tf.constant(query), tf.constant(candidates)
    columns = {"own_bias": None if own_bias is None else tf.constant(own_bias)}
    if valid is not None:
        columns["valid"] = lambda places: tf.transpose(take_columns(tf.constant(valid.T), places))
    if counts is not None:
        scores = query @ tf.transpose(candidates) + bias
        highest = tf.reduce_max(tf.where(counts > 0, scores, -INF), axis=1)
        columns["counted"] = Counted(
            lambda scores, places: tf.transpose(take_columns(tf.constant(counts.T), places)),
            tf.where(highest > -INF, highest + 5, 0),
        )
    with tf.GradientTape() as tape:
        tape.watch([query, candidates])
        values = dot_logsumexp(
            query, candidates, tf.constant(bias), block_size=block_size, **columns
        )
        total = tf.reduce_sum(
            tf.where(values > -INF, values, 0) * tf.range(len(query), dtype=values.dtype)
        )
    return [x.numpy() for x in (values, *tape.gradient(total, [query, candidates]))]


def example(seed, rows=6, columns=11, dim=3):
    rng = np.random.default_rng(seed)
    query, candidates = rng.normal(size=(rows, dim)), rng.normal(size=(columns, dim))
    bias = rng.normal(size=columns)
    bias[4] = -INF
    return rng, query, candidates, bias


def options_of(kind, rng, rows, columns):
    valid = rng.random((rows, columns)) < 0.5
    valid[2] = False
    counts = rng.integers(0, 3, (rows, columns)).astype(float)
    counts[2] = 0
    return {
        "plain": {},
        "own": {"own_bias": rng.normal(size=rows)},
        "without own": {"own_bias": np.full(rows, -INF)},
        "valid": {"valid": valid},
        "valid and own": {"valid": valid, "own_bias": rng.normal(size=rows)},
        "counts": {"counts": counts},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [
        *itertools.product(["plain", "own", "without own", "valid", "valid and own"], BLOCKS),
        *(("counts", block_size) for block_size in BLOCKS[1:]),  # in blocks alone
    ],
)
def test_equals_a_loop(kind, block_size):
    rng, query, candidates, bias = example(0)
    options = options_of(kind, rng, 6, 11)
    for unknown, scale in ((-INF, 1), (0.3, 1), (0.3, 40)):  # the second without a maximum
        bias[4] = unknown
        inputs = query * scale, candidates, bias
        expected = reference(*inputs, **options)
        actual = run(*inputs, **options, block_size=block_size)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("block_size", [None, 4])
def test_an_empty_sum_is_minus_infinity_without_a_gradient(block_size):
    _, query, candidates, bias = example(1)
    values, by_query, by_candidates = run(
        query, candidates, np.full_like(bias, -INF), block_size=block_size
    )
    assert (values == -INF).all()
    assert (by_query == 0).all()
    assert (by_candidates == 0).all()


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("shift", [-900.0, 900.0])
def test_large_scores_neither_overflow_nor_vanish(block_size, shift):
    _, query, candidates, bias = example(2)
    before = run(query, candidates, bias, block_size=block_size)
    after = run(query, candidates, bias + shift, block_size=block_size)
    np.testing.assert_allclose(after[0], before[0] + shift, atol=1e-9)
    np.testing.assert_allclose(after[2], before[2], atol=1e-9)


@pytest.mark.parametrize("block_size", [None, 1])
@pytest.mark.parametrize("score", [1.0, 800.0])
def test_a_column_of_very_small_bias_neither_overflows_nor_counts(block_size, score):
    inputs = np.ones((1, 1)), np.array([[score], [1.0]]), np.array([-900.0, 0.0])
    values, by_query, _ = run(*inputs, block_size=block_size)
    np.testing.assert_allclose(values, [1.0])
    assert np.isfinite(by_query).all()


def test_blocks_of_a_large_batch_equal_one_pass():
    rng = np.random.default_rng(3)
    query = (rng.normal(size=(1024, 16)) / 2).astype(np.float32)
    candidates = (rng.normal(size=(1024, 16)) / 2).astype(np.float32)
    bias = rng.normal(size=1024).astype(np.float32)
    whole = run(query, candidates, bias, own_bias=bias)
    blocks = run(query, candidates, bias, own_bias=bias, block_size=100)
    for ours, theirs in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(ours / 1024, theirs / 1024, atol=1e-5)


def test_half_precision_embeddings_are_scored_in_float32():
    _, query, candidates, bias = example(4)
    query, candidates = tf.constant(query, tf.bfloat16), tf.constant(candidates, tf.bfloat16)
    with tf.GradientTape() as tape:
        tape.watch(query)
        values = dot_logsumexp(query, candidates, tf.constant(bias, tf.float32))
    assert values.dtype == tf.float32
    assert tape.gradient(values, query).dtype == tf.bfloat16
    rounded = [np.asarray(tf.cast(x, tf.float64)) for x in (query, candidates)]
    np.testing.assert_allclose(values, reference(*rounded, bias)[0], rtol=1e-5)


def test_no_gradient_through_the_bias():
    bias = tf.Variable(tf.zeros(5))
    with tf.GradientTape() as tape:
        values = dot_logsumexp(tf.ones([2, 3]), tf.ones([5, 3]), bias, own_bias=bias[:2])
    assert tape.gradient(values, bias) is None


def test_blocks_cover_all_columns_once():
    def step(columns, carry):
        return carry + tf.reduce_sum(take_columns(tf.range(1, 12), columns, 0)), columns[0]

    total, starts = fold_columns(step, tf.constant(0), tf.constant(11), 4, writes=(tf.int32, []))
    assert int(total) == 66
    assert starts.stack().numpy().tolist() == [0, 4, 8]
