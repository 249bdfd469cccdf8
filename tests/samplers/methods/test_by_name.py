"""What every method of METHODS must hold, and the look-up itself."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_by

import samplers
from samplers.methods.by_name import METHODS, build

N, B, D = 40, 12, 8
COUNTS = np.arange(N)  # candidate 0 has no train rows
SEED = tf.constant([3, 1], tf.int64)


def encoders_and_batch(seed=0, low=1):
    rng = np.random.default_rng(seed)
    queries = tf.constant(rng.normal(size=(30, D)), tf.float32)
    table = tf.constant(rng.normal(size=(N, D)), tf.float32)
    query_ids = tf.constant(rng.integers(0, 30, B))
    candidate_ids = tf.constant(rng.integers(low, N, B))
    encoders = samplers.Encoders(
        query=tf.gather(queries, query_ids),
        positive=tf.gather(table, candidate_ids),
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: table,
        queries=lambda ids: tf.gather(queries, ids),
    )
    return encoders, samplers.Batch(query_ids, candidate_ids)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return build(request.param, frequency=COUNTS, num_candidates=N, num_queries=30)


def test_losses_are_finite_weighed_and_the_same_for_the_same_seed(method):
    encoders, batch = encoders_and_batch()
    losses = method(encoders, batch, seed=SEED)
    assert losses.shape == [B]
    assert losses.dtype == tf.float32
    assert np.isfinite(losses).all()
    assert (losses.numpy() >= 0).all()
    weight = tf.linspace(0.0, 2.0, B)
    weighed = method(encoders, batch._replace(weight=weight), seed=SEED).numpy()
    np.testing.assert_array_equal(weighed, losses * weight)


def test_padding_has_loss_0_and_no_effect(method):
    encoders, batch = encoders_and_batch()
    batch = batch._replace(valid=tf.range(B) < B - 2)
    changed = encoders._replace(
        query=tf.concat([encoders.query[:-2], 50 * tf.ones([2, D])], axis=0),
        positive=tf.concat([encoders.positive[:-2], 50 * tf.ones([2, D])], axis=0),
    )
    before = method(encoders, batch, seed=SEED).numpy()
    after = method(changed, batch, seed=SEED).numpy()
    assert (before[-2:] == 0).all()
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_candidates_without_train_rows_give_no_nan(method):
    encoders, batch = encoders_and_batch(low=0)
    batch = batch._replace(candidate_ids=tf.constant([0, *range(B - 1)], tf.int64))
    positive = tf.Variable(encoders.positive)
    with tf.GradientTape() as tape:
        losses = method(encoders._replace(positive=positive.read_value()), batch, seed=SEED)
        total = tf.reduce_sum(losses)
    assert np.isfinite(losses).all()
    assert np.isfinite(tape.gradient(total, positive)).all()


MASKED = {"block_size": 4, "mask_accidental_hits": True}
COMPILED = [
    *((name, {}) for name in sorted(METHODS)),
    *((name, MASKED) for name in ("ssl_pop", "cbns", "mns", "bir", "bmns", "sl_at_k")),
    ("xir", MASKED | {"cache_size": 30}),
    ("ssl_pop", {"positive_correction": True, "block_size": 4}),
    ("full_softmax", {"block_size": 4}),
    ("bir", {"draws": "independent", "weights": "importance"}),
    ("bmns", {"alpha": 0.4, "num_mixed": 5}),
    ("softmax_v", {"mask_accidental_hits": True, "tau": 0.5}),
]
QUICK = [("ssl_pop", MASKED), ("softmax_v", {"mask_accidental_hits": True, "tau": 0.5})]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if (name, options) in QUICK else pytest.mark.long)
        for name, options in COMPILED
    ],
)
def test_eager_graph_and_xla_agree_in_losses_and_gradients(name, options):
    method = build(name, frequency=COUNTS, num_candidates=N, num_queries=30, **options)
    encoders, batch = encoders_and_batch()
    eager = method(encoders, batch, seed=SEED)
    in_graph = tf.function(lambda: method(encoders, batch, seed=SEED))
    np.testing.assert_allclose(in_graph(), eager, rtol=2e-5, atol=1e-5)
    proposed = method.propose(encoders.query, batch, seed=SEED)
    rows = encoders.corpus()
    if proposed is not None:
        proposed = method.select(encoders, batch, proposed)
        rows = encoders.candidates(proposed.ids)

    def run(query, positive, rows):
        with tf.GradientTape() as tape:
            tape.watch([query, positive, rows])
            towers = samplers.Encoders(query, positive, lambda ids: rows, lambda: rows)
            losses = method.loss(towers, batch, proposed, seed=SEED)
        gradients = tape.gradient(losses, [query, positive, rows], unconnected_gradients="zero")
        return losses, *gradients

    inputs = encoders.query, encoders.positive, rows
    compiled = tf.function(run, jit_compile=True)(*inputs)
    for ours, theirs in zip(compiled, run(*inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_state_survives_a_checkpoint(method, tmp_path):
    encoders, batch = encoders_and_batch()
    method.update(batch)
    method.end_epoch(encoders)
    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    other = build_like(method)
    tf.train.Checkpoint(method=other).restore(path).expect_partial()
    for mine, theirs in zip(method.variables, other.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def build_like(method):
    name = next(name for name, kind in METHODS.items() if kind is type(method))
    return build(name, frequency=COUNTS, num_candidates=N, num_queries=30)


def test_ssl_pop_equals_tfrs():
    from towers.legacy_keras import tfrs

    encoders, batch = encoders_and_batch()
    probability = tf.gather(tf.constant(COUNTS / COUNTS.sum(), tf.float32), batch.candidate_ids)
    assert probability.numpy().min() > 1e-6  # below that TFRS clips
    weight = tf.linspace(0.5, 2.0, B)
    for options in ({}, {"mask_accidental_hits": True}):
        task = tfrs.tasks.Retrieval(remove_accidental_hits=bool(options))
        expected = task(
            encoders.query,
            encoders.positive,
            sample_weight=weight,
            candidate_sampling_probability=probability,
            candidate_ids=batch.candidate_ids,
        )
        ours = build("ssl_pop", frequency=COUNTS, **options)
        actual = ours(encoders, batch._replace(weight=weight), seed=SEED)
        np.testing.assert_allclose(tf.reduce_sum(actual), expected, rtol=1e-5)


def test_ssl_is_ssl_pop_with_equal_counts():
    encoders, batch = encoders_and_batch()
    plain = build("ssl")(encoders, batch, seed=SEED)
    equal = build("ssl_pop", frequency=np.full(N, 7))(encoders, batch, seed=SEED)
    np.testing.assert_allclose(plain, equal, rtol=1e-5)


def test_accidental_hits_are_masked_on_request():
    encoders, batch = encoders_and_batch()
    batch = batch._replace(candidate_ids=tf.fill([B], tf.constant(5, tf.int64)))
    masked = build("ssl_pop", frequency=COUNTS, mask_accidental_hits=True)
    np.testing.assert_array_equal(masked(encoders, batch, seed=SEED), np.zeros(B))
    kept = build("ssl_pop", frequency=COUNTS)
    assert (kept(encoders, batch, seed=SEED).numpy() > 0).all()


def weights_on_scores(method, encoders, batch):
    """∂loss_b / ∂s_bj: [B, N], through a column of the embeddings for each row."""
    with tf.GradientTape() as tape:
        zeros = tf.zeros([N, B])
        tape.watch(zeros)

        def marked(ids):
            return tf.concat([encoders.candidates(ids), tf.gather(zeros, ids)], axis=-1)

        by_row = encoders._replace(
            query=tf.concat([encoders.query, tf.eye(B)], axis=1),
            positive=marked(batch.candidate_ids),
            candidates=marked,
            corpus=lambda: marked(tf.range(N)),
            queries=lambda ids: tf.pad(encoders.queries(ids), [[0, 0], [0, B]]),
        )
        total = tf.reduce_sum(method(by_row, batch, seed=SEED))
    return tf.transpose(tf.convert_to_tensor(tape.gradient(total, zeros))).numpy()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_query_has_seen_is_no_negative(name):
    encoders, batch = encoders_and_batch()
    own = np.arange(N) == batch.candidate_ids.numpy()[:, None]
    chosen = np.random.default_rng(5).random((30, N)) < 0.5
    chosen[batch.query_ids.numpy(), batch.candidate_ids.numpy()] = True
    has_seen = chosen[batch.query_ids.numpy()] & ~own
    weights = {}
    for seen in (None, seen_by([np.flatnonzero(row) for row in chosen])):
        data = {"frequency": COUNTS, "num_candidates": N, "num_queries": 30, "seen": seen}
        weights[seen] = weights_on_scores(build(name, **data), encoders, batch)
    before, after = weights.values()
    assert before[has_seen].any()
    assert not after[has_seen].any()
    assert after[~has_seen & ~own].any()


def test_options_may_be_text():
    method = build("ssl_pop", frequency=COUNTS, positive_twice="true", mask_accidental_hits="0")
    assert method.positive_twice is True
    assert method.mask_accidental_hits is False


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("sslpop", {}, "Did you mean 'ssl_pop'"),
        ("ssl", {"positive_twise": 1}, "Did you mean 'positive_twice'"),
        ("ssl", {"positive_twice": "maybe"}, "must be bool, got 'maybe'"),
        ("ssl", {"positive_twice": 2}, "must be bool, got 2"),
        ("ssl_pop", {"positive_twice": True, "positive_correction": True}, "choose one"),
    ],
)
def test_wrong_names_and_options_are_errors(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, frequency=COUNTS, **options)


def test_what_a_method_needs_is_named():
    with pytest.raises(ValueError, match="needs frequency="):
        build("mns")


def test_the_page_of_methods_lists_these():
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    tables = text.partition("\n## Softmax over shared")[2].partition("\n## A small model")[0]
    cells = [row.split("|")[1] for row in tables.split("\n") if row.startswith("|")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(METHODS)
