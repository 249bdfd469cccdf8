import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_hits

import samplers
from samplers.methods.by_name import build
from samplers.random_numbers import uniform_numbers
from samplers.selection.mixing import mixing_weights, symmetric_beta

SEED = tf.constant([5, 2], tf.int64)  # of the losses, see conftest


def batch_losses(scores, log_q, *, allowed=None, valid=None, twice=False):
    losses = np.zeros(len(scores))
    for b in np.flatnonzero(np.isfinite(log_q)):
        own = scores[b, b] - log_q[b]
        total = np.exp(own) * (2 if twice else 1)
        for j in range(len(scores)):
            usable = (allowed is None or allowed[b, j]) and (valid is None or valid[j])
            if j != b and usable and not np.isneginf(log_q[j]):
                total += np.exp(scores[b, j] - log_q[j])
        losses[b] = np.log(total) - own
    return losses


def mixture_losses(scores, log_q, mixed, *, with_positive=True):
    """Of rows [B], from the scores m_uk of the virtual negatives: lists that may be empty."""
    losses = np.zeros(len(scores))
    for b in np.flatnonzero(np.isfinite(log_q)):
        own = scores[b, b] - log_q[b]
        total = sum(np.exp(m) for m in mixed[b]) + (np.exp(own) if with_positive else 0)
        losses[b] = np.log(total) - own if total > 0 else 0.0
    return losses


def mix(gamma, log_q, valid, in_batch, on_mixtures):
    known = np.isfinite(log_q) & (True if valid is None else valid)
    return np.where(known, gamma * in_batch + (1 - gamma) * on_mixtures, 0)


def bmns_loop(log_q, weights, gamma, *, allowed=None, valid=None, with_positive=True, twice=False):
    def losses(query, positive, _):
        scores = query @ positive.T
        mixed = []
        for b in range(len(query)):
            row = []
            for w in weights:
                w = w if allowed is None else w * allowed[b]
                if w.sum() > 0:
                    row.append(sum(w[j] / w.sum() * scores[b, j] for j in range(len(query))))
            mixed.append(row)
        in_batch = batch_losses(scores, log_q, allowed=allowed, valid=valid, twice=twice)
        second = mixture_losses(scores, log_q, mixed, with_positive=with_positive)
        return mix(gamma, log_q, valid, in_batch, second)

    return losses


def weights_of(log_q, num_mixed, *, alpha=None, correct=True):
    log_q = tf.constant(log_q, tf.float32)
    weights = mixing_weights(log_q, num_mixed, SEED, alpha=alpha, correct=correct)
    return weights.numpy().astype(float)


def loops_of_draws(draws, log_q, correct):
    expected = np.zeros_like(draws)
    for k in range(len(draws)):
        logits = draws[k] - (log_q if correct else 0)
        parts = np.where(np.isneginf(log_q), 0, np.exp(logits))
        expected[k] = parts / parts.sum()
    return expected


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_mixing_weights_equal_their_equation(alpha, correct):
    log_q = np.array([np.log(0.1), -np.inf, np.log(0.5), np.log(0.4)])
    draws = symmetric_beta([6, 4], alpha, SEED) if alpha else uniform_numbers([6, 4], SEED)
    expected = loops_of_draws(draws.numpy().astype(float), log_q, correct)
    actual = weights_of(log_q, 6, alpha=alpha, correct=correct)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert (actual[:, 1] == 0).all()


def test_nothing_to_mix_has_weights_0():
    assert not weights_of(np.full(3, -np.inf), 5).any()


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 3.0])
def test_beta_draws_have_the_moments_of_beta(alpha):
    draws = symmetric_beta([200_000], alpha, SEED).numpy().astype(float)
    assert np.isfinite(draws).all()
    assert draws.min() >= 0
    assert draws.max() <= 1
    for power in (1, 2, 3, 4):
        moment = np.prod([(alpha + r) / (2 * alpha + r) for r in range(power)])
        assert (draws**power).mean() == pytest.approx(moment, abs=0.005)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.4},
        {"correct_weights": False},
        {"gamma": 0.0},
        {"gamma": 0.6, "positive_in_mixture": False},
        {"block_size": 3},
        {"positive_twice": True},
    ],
)
def test_bmns_equals_its_equation(problem, log_popularity, options):
    p = problem(unseen=True)
    log_q = log_popularity(p.counts)[p.batch.candidate_ids.numpy()]
    weights = weights_of(
        log_q, 4, alpha=options.get("alpha"), correct=options.get("correct_weights", True)
    )
    loop = bmns_loop(
        log_q,
        weights,
        options.get("gamma", 0.2),
        with_positive=options.get("positive_in_mixture", True),
        twice=options.get("positive_twice", False),
    )
    method = build("bmns", frequency=p.counts, num_mixed=4, **options)
    p.check(method, loop)


@pytest.mark.parametrize("block_size", [None, 3])
def test_bmns_mixes_neither_hits_nor_padding(problem, log_popularity, block_size):
    p = problem(seed=1, num_candidates=5)
    ids, valid = p.batch.candidate_ids.numpy(), np.arange(7) < 6
    seen = np.full((7, 5), -1)
    seen[1, :2], seen[2] = [ids[0], ids[3]], np.arange(5)  # nothing is left for row 2
    batch = p.batch._replace(
        valid=tf.constant(valid), seen=seen_hits(seen, ids), weight=tf.linspace(1.0, 2.0, 7)
    )
    allowed = (ids[:, None] != ids[None, :]) & (ids[None, :, None] != seen[:, None, :]).all(-1)
    log_q = np.where(valid, log_popularity(p.counts)[ids], -np.inf)
    loop = bmns_loop(log_q, weights_of(log_q, 4), 0.2, allowed=allowed, valid=valid)
    method = build(
        "bmns",
        frequency=p.counts,
        num_mixed=4,
        mask_accidental_hits=True,
        block_size=block_size,
    )
    p.check(method, lambda *inputs: loop(*inputs) * np.linspace(1, 2, 7), batch=batch)


def test_gamma_1_is_ssl_pop(problem):
    p = problem()
    plain, _ = p.run(build("ssl_pop", frequency=p.counts))
    for name in ("bmns", "positive_mixing"):
        losses, _ = p.run(build(name, frequency=p.counts, gamma=1.0))
        np.testing.assert_array_equal(losses, plain)


def test_bmns_gradient_without_the_positive_approaches_that_of_the_paper():
    """E[∇] = -∇s_ui + Σ_j (γ P_j + (1 - γ) o_j) ∇s_uj with o_j ∝ 1/pop_j (appendix A)."""
    rng, rows, gamma = np.random.default_rng(0), 1024, 0.3
    pop = rng.dirichlet(np.full(rows, 5.0))
    query, positive = ((rng.normal(size=(rows, 8)) / 4).astype(np.float32) for _ in range(2))
    batch = samplers.Batch(
        tf.zeros(rows, tf.int64),
        tf.range(rows, dtype=tf.int64),
        log_pop=tf.constant(np.log(pop), tf.float32),
    )
    method = build("bmns", gamma=gamma, num_mixed=1024, positive_in_mixture=False)
    gradient = np.zeros((rows, 8))
    for repeat in range(4):
        rows_of = tf.constant(query)
        with tf.GradientTape() as tape:
            tape.watch(rows_of)
            encoders = samplers.Encoders(rows_of, tf.constant(positive), None, None)
            losses = method.loss(encoders, batch, None, seed=tf.constant([repeat, 1]))
        gradient += tape.gradient(losses, rows_of).numpy() / 4
    logits = query @ positive.T - np.log(pop)
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    inverse = 1 / pop / (1 / pop).sum()
    expected = (gamma * softmax + (1 - gamma) * inverse) @ positive - positive
    error = np.linalg.norm(gradient - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.02


@pytest.mark.parametrize("masked", [False, True])
def test_positive_mixing_equals_its_equation(problem, log_popularity, masked):
    p = problem(unseen=True)
    ids = p.batch.candidate_ids.numpy()
    valid = np.arange(7) < 6
    log_q = log_popularity(p.counts)[ids]
    batch, allowed = p.batch, np.ones((7, 7), bool)
    if masked:
        log_q = np.where(valid, log_q, -np.inf)
        batch = batch._replace(valid=tf.constant(valid))
        allowed = ids[:, None] != ids[None, :]
    numbers = uniform_numbers([2, 5], SEED).numpy().astype(float)
    columns = np.floor(numbers[0] * 7).astype(int)

    def losses(query, positive, _):
        scores = query @ positive.T
        mixed = [
            [
                share * scores[b, b] + (1 - share) * scores[b, j]
                for share, j in zip(numbers[1], columns, strict=True)
                if allowed[b, j] and not np.isneginf(log_q[j])
            ]
            for b in range(7)
        ]
        in_batch = batch_losses(scores, log_q, allowed=allowed if masked else None)
        return mix(0.2, log_q, None, in_batch, mixture_losses(scores, log_q, mixed))

    method = build("positive_mixing", frequency=p.counts, num_mixed=5, mask_accidental_hits=masked)
    p.check(method, losses, batch=batch)


def test_the_second_sum_without_the_positive_is_unbounded(problem):
    p = problem()
    p.query, p.positive = 40 * p.query, 40 * p.query  # positives far above all else
    printed = build("bmns", frequency=p.counts, gamma=0.0, positive_in_mixture=False)
    assert p.run(printed)[0].min() < -100
    assert p.run(build("bmns", frequency=p.counts, gamma=0.0))[0].min() >= 0


def test_a_batch_of_one_is_finite(problem):
    p = problem(rows=1)
    for name in ("bmns", "positive_mixing"):
        for options in ({}, {"mask_accidental_hits": True}, {"positive_in_mixture": False}):
            losses, gradients = p.run(build(name, frequency=p.counts, **options))
            assert np.isfinite(losses).all()
            assert all(np.isfinite(x).all() for x in gradients)
        masked = build(name, frequency=p.counts, mask_accidental_hits=True)
        assert p.run(masked)[0] == [0]  # nothing is left to mix


@pytest.mark.parametrize("name", ["bmns", "positive_mixing"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": -0.1}, "gamma must be between 0 and 1, got -0.1"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1"),
        ({"num_mixed": 0}, "num_mixed must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"frequency": np.zeros(4)}, "above 0"),
    ],
)
def test_wrong_arguments_are_errors(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, **{"frequency": np.ones(4)} | options)


def test_wrong_alpha_is_an_error():
    with pytest.raises(ValueError, match="alpha must be above 0"):
        build("bmns", frequency=np.ones(4), alpha=0.0)
