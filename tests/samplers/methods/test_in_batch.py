import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_hits

import samplers
from samplers.methods.by_name import build


def batch_loop(ids, log_q, *, valid=None, allowed=None, twice=False, without_own=False):
    """log Σ_j e^(s_uj - log q_j) - (s_ui - log q_i) as a loop over rows and columns."""

    def losses(query, positive, proposed):
        del proposed
        result = np.zeros(len(query))
        for b in range(len(query)):
            if np.isneginf(log_q[b]) or (valid is not None and not valid[b]):
                continue
            own = query[b] @ positive[b] - log_q[b]
            total = 0.0 if without_own else np.exp(own) * (2 if twice else 1)
            for j in range(len(query)):
                usable = valid is None or valid[j]
                usable &= allowed is None or allowed[b, j]
                if j != b and usable and not np.isneginf(log_q[j]):
                    total += np.exp(query[b] @ positive[j] - log_q[j])
            result[b] = np.log(total) - own
        return result

    return losses


def corrected_loop(log_pop, weights, allowed):
    """The loss of arXiv 2507.09331 with its weights 1 - P as constants."""

    def losses(query, positive, proposed):
        loop = batch_loop(None, log_pop, allowed=allowed, without_own=True)
        loop = loop(query, positive, proposed)
        return weights * (loop - log_pop)

    return losses


def positive_probabilities(query, positive, log_pop, others):
    scores = query.astype(float) @ positive.T.astype(float)
    pop = np.exp(log_pop)
    means = [np.mean(np.exp(scores[b, o]) * (1 - pop[b]) / pop[o]) for b, o in enumerate(others)]
    own = np.exp(np.diag(scores))
    return own / (own + means)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", ["ssl", "ssl_pop"])
def test_equals_its_equation(problem, log_popularity, name, twice, block_size):
    p = problem(unseen=name == "ssl_pop")
    ids = p.batch.candidate_ids.numpy()
    log_q = log_popularity(p.counts)[ids] if name == "ssl_pop" else np.zeros(len(ids))
    method = build(name, frequency=p.counts, positive_twice=twice, block_size=block_size)
    p.check(method, batch_loop(ids, log_q, twice=twice))


@pytest.mark.parametrize("block_size", [None, 3])
def test_masks_padding_and_weights(problem, log_popularity, block_size):
    p = problem(seed=1, rows=9, num_candidates=5)
    ids = p.batch.candidate_ids.numpy()
    valid = np.arange(9) < 7
    seen = np.random.default_rng(0).integers(-1, 5, (9, 2))
    batch = p.batch._replace(
        valid=tf.constant(valid), seen=seen_hits(seen, ids), weight=tf.linspace(0.5, 2.0, 9)
    )
    allowed = (ids[:, None] != ids[None, :]) & (ids[None, :, None] != seen[:, None, :]).all(-1)
    loop = batch_loop(ids, log_popularity(p.counts)[ids], valid=valid, allowed=allowed)
    method = build("ssl_pop", frequency=p.counts, mask_accidental_hits=True, block_size=block_size)
    p.check(method, lambda *inputs: loop(*inputs) * np.linspace(0.5, 2, 9), batch=batch)


@pytest.mark.parametrize("block_size", [None, 3])
def test_positive_correction(problem, log_popularity, block_size):
    p = problem(seed=2)
    ids = p.batch.candidate_ids.numpy()
    assert len(set(ids)) < len(ids)  # Q / (1 - Q) is over all candidates but the row's positive
    log_pop, allowed = log_popularity(p.counts)[ids], ids[:, None] != ids[None, :]
    weights = 1 - positive_probabilities(p.query, p.positive, log_pop, allowed)
    method = build("ssl_pop", frequency=p.counts, positive_correction=True, block_size=block_size)
    p.check(method, corrected_loop(log_pop, weights, allowed))


@pytest.mark.parametrize("block_size", [None, 3])
def test_cbns_adds_the_last_positives_as_they_were_embedded(
    problem, log_popularity, block_size, tmp_path
):
    p, later = problem(seed=3), problem(seed=4, rows=5)
    log_pop, latest = log_popularity(p.counts), p.positive
    method = build("cbns", frequency=p.counts, num_cached=10, warm_up=1, block_size=block_size)
    valid = np.arange(7) != 4
    batch = p.batch._replace(valid=tf.constant(valid))
    for step in range(3):
        if step < 2:  # nothing is kept of the first step
            later.check(method, batch_loop(None, log_pop[later.batch.candidate_ids.numpy()]))
        p.positive = latest = p.positive + step  # the towers change, the queue does not
        take_step(method, p, batch)
    cached = np.concatenate([p.positive - 2, latest])[-10:]  # of the last two steps, 3 and 7 rows
    ids = np.tile(p.batch.candidate_ids.numpy(), 2)[-10:]
    kept = np.tile(valid, 2)[-10:]
    own_ids = later.batch.candidate_ids.numpy()

    def losses(query, positive, proposed):
        scores = np.concatenate([query @ positive.T, query @ cached[kept].T.astype(float)], axis=1)
        scores -= np.concatenate([log_pop[own_ids], log_pop[ids[kept]]])
        return np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)

    later.check(method, losses)
    before, _ = later.run(method)
    p.run(method)  # a loss that no update follows is forgotten
    np.testing.assert_array_equal(later.run(method)[0], before)
    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    other = build("cbns", frequency=p.counts, block_size=block_size)
    tf.train.Checkpoint(method=other).restore(path).expect_partial()
    encoders = samplers.Encoders(*map(tf.constant, (later.query, later.positive)), None, None)
    compiled = tf.function(other.loss, jit_compile=True)
    losses = compiled(encoders, later.batch, None, seed=tf.constant([1, 2], tf.int64))
    np.testing.assert_allclose(losses, before, rtol=1e-5)


def take_step(method, p, batch):
    encoders = samplers.Encoders(*map(tf.constant, (p.query, p.positive)), None, None)
    method(encoders, batch, seed=tf.constant([1, 2], tf.int64))
    method.update(batch)


def test_cbns_leaves_out_cached_hits(problem):
    p = problem(seed=5)
    ids = p.batch.candidate_ids.numpy()
    seen = samplers.Seen(np.tile(np.arange(9), 6), 9 * np.arange(7))  # everybody, everything
    for options in ({"mask_accidental_hits": True}, {"seen": seen}):
        method = build("cbns", frequency=p.counts, warm_up=1, **options)
        batch = p.batch._replace(candidate_ids=tf.fill([7], ids[0]))
        for _ in range(2):
            take_step(method, p, batch)
        losses = method(
            samplers.Encoders(*map(tf.constant, (p.query, p.positive)), None, None),
            batch,
            seed=tf.constant([1, 2], tf.int64),
        )
        np.testing.assert_allclose(losses, np.zeros(7), atol=1e-6)


def test_popularity_may_come_with_the_batch(problem):
    p = problem()
    log_pop = tf.math.log(p.counts / p.counts.sum())
    batch = p.batch._replace(log_pop=tf.gather(log_pop, p.batch.candidate_ids))
    for name in ("ssl_pop", "bir", "bmns"):
        from_counts, _ = p.run(build(name, frequency=p.counts))
        from_batch, _ = p.run(build(name), batch=batch)
        np.testing.assert_allclose(from_batch, from_counts, rtol=1e-5)
        with pytest.raises(ValueError, match=f"{type(build(name)).__name__} needs frequency="):
            p.run(build(name))


@pytest.mark.parametrize("name", ["ssl", "ssl_pop", "correct_sfx", "bmns", "positive_mixing"])
def test_a_batch_of_one_has_no_batch_loss(problem, name):
    p = problem(rows=1)
    options = {"gamma": 1.0} if "mix" in name or name == "bmns" else {}
    method = build(name, frequency=p.counts, num_candidates=9, **options)
    losses, gradients = p.run(method)
    assert losses == pytest.approx([0], abs=1e-6)
    assert np.abs(np.concatenate([x.ravel() for x in gradients])).max() < 1e-6


@pytest.mark.parametrize("name", ["ssl_pop", "bir", "bmns", "mns"])
def test_half_precision_embeddings_give_a_float32_loss(problem, name):
    p = problem()
    method = (
        build(name, frequency=p.counts, num_candidates=9, num_uniform=5)
        if name == "mns"
        else (build(name, frequency=p.counts))
    )
    proposed = method.propose(None, p.batch, seed=tf.constant([1, 2]))
    half, _ = p.run(method, proposed, dtype=tf.bfloat16)
    assert half.dtype == np.float32
    for part in ("query", "positive", "proposed"):
        rounded = tf.cast(tf.cast(getattr(p, part), tf.bfloat16), tf.float32).numpy()
        setattr(p, part, rounded)
    whole, _ = p.run(method, proposed)
    if name != "bir":  # a draw may fall to the other side of a rounded score
        np.testing.assert_allclose(half, whole, rtol=1e-5)


class TestCorrectSfx:
    @pytest.mark.parametrize("published", [False, True])
    def test_estimates_are_those_of_the_recursion_before_scoring(self, problem, published):
        p = problem(rows=6, num_candidates=9)
        alpha, rng = 0.3, np.random.default_rng(0)
        sizes = {"num_candidates": 9, "num_hashes": 2, "num_buckets": 4}
        method = build("correct_sfx", alpha=alpha, published_start=published, **sizes)
        buckets = method.estimates.buckets.numpy()
        a, b = np.zeros((2, 4)), np.ones((2, 4))
        n = np.zeros((2, 4))
        for t in range(1, 7):
            ids = rng.integers(0, 9, 6)
            for h in range(2):  # once for each bucket, before scoring
                for bucket in {int(buckets[i, h]) for i in ids}:
                    n[h, bucket] += 1
                    share = alpha if published else alpha / (1 - (1 - alpha) ** n[h, bucket])
                    b[h, bucket] = (1 - share) * b[h, bucket] + share * (t - a[h, bucket])
                    a[h, bucket] = t
            log_p = np.array([-np.log(max(b[h, buckets[i, h]] for h in range(2))) for i in ids])
            batch = p.batch._replace(candidate_ids=tf.constant(ids))
            expected = batch_loop(ids, log_p)(p.query.astype(float), p.positive.astype(float), None)
            losses, _ = p.run(method, batch=batch)
            np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
            method.update(batch)
            np.testing.assert_allclose(method.estimates.interval, b.ravel(), rtol=1e-5)
            np.testing.assert_array_equal(method.estimates.last_step, a.ravel())

    def test_equals_its_equation(self, problem):
        p = problem(seed=3)
        method = build("correct_sfx", num_candidates=9, alpha=0.5)
        for ids in ([1, 2, 3], [1, 5], [8, 1, 2]):
            method.estimates.update(tf.constant(ids, tf.int64))
        ids = p.batch.candidate_ids
        log_p = method.estimates.log_q_with(ids).numpy().astype(float)
        assert len(set(log_p)) > 2
        p.check(method, batch_loop(None, log_p))

    def test_a_loss_leaves_no_trace_and_padding_is_no_observation(self, problem):
        p = problem()
        method = build("correct_sfx", num_candidates=9, alpha=0.5)
        before = [v.numpy() for v in method.variables]
        p.run(method)
        for variable, value in zip(method.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)
        method.update(p.batch._replace(valid=tf.zeros(7, tf.bool)))
        assert int(method.estimates.step) == 1
        assert not method.estimates.last_step.numpy().any()

    def test_fingerprints_choose_the_buckets(self):
        ids = np.array([3, -5, 2**62, 7], np.int64)
        given = build("correct_sfx", num_candidates=4, fingerprints=ids, num_buckets=97)
        dense = build("correct_sfx", num_candidates=4, num_buckets=97)
        assert (given.estimates.buckets.numpy() != dense.estimates.buckets.numpy()).any()
        with pytest.raises(ValueError, match="fingerprints must have shape"):
            build("correct_sfx", num_candidates=5, fingerprints=ids)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ssl", {"block_size": 0}, "block_size must be at least 1"),
        ("correct_sfx", {"alpha": 0.0}, "alpha must be above 0 and at most 1"),
        ("correct_sfx", {"alpha": 1.5}, "alpha must be above 0 and at most 1"),
        ("correct_sfx", {"num_hashes": 0}, "num_hashes must be at least 1"),
        ("correct_sfx", {"num_buckets": 0}, "num_buckets must be at least 1"),
    ],
)
def test_wrong_options_are_errors(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, frequency=np.ones(4), num_candidates=4, **options)


def test_wrong_counts_are_errors():
    with pytest.raises(ValueError, match="above 0"):
        build("ssl_pop", frequency=np.zeros(4))
    with pytest.raises(ValueError, match="frequency must have shape"):
        build("ssl_pop", frequency=np.ones(4), num_candidates=5)


def test_published_buckets_are_fingerprints_modulo_primes():
    prints = np.array([5, 4993 * 7 + 5, -1, 5011, 2**62])
    method = build("correct_sfx", num_candidates=5, fingerprints=prints, published_buckets=True)
    expected = [[int(f) % p for p in (4993, 4999, 5003, 5009, 5011)] for f in prints]
    np.testing.assert_array_equal(method.estimates.buckets, expected)
    # 0 and 1 share a bucket of the first array: either of them makes its interval shorter.
    for candidate in (0, 1, 3):
        batch = samplers.Batch(tf.constant([0], tf.int64), tf.constant([candidate], tf.int64))
        method.update(batch)
    last = method.estimates.last_step.numpy().reshape(5, 5011)
    assert last[0, 5] == 2
    assert last[1:, 5].tolist() == [1] * 4
    with pytest.raises(ValueError, match="num_buckets and num_hashes must be left out"):
        build("correct_sfx", num_candidates=5, published_buckets=True, num_buckets=9)
