import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_hits

import samplers
from samplers.methods.by_name import build

SEED = tf.constant([1, 2], tf.int64)


def mixture_of(pop, rows, uniform, corpus, *, swap=False):
    shares = np.array([rows, uniform]) / (rows + uniform)
    shares = shares[::-1] if swap else shares
    return np.log(shares[0] * pop + shares[1] / corpus)


def mns_loop(ids, uniform_ids, log_pop, mixture, *, own=None, twice=False, allowed=None):
    def losses(query, positive, proposed):
        result = np.zeros(len(query))
        for b in range(len(query)):
            correction = log_pop[ids[b]] if own is None else own[ids[b]]
            if np.isneginf(correction):
                continue
            own_logit = query[b] @ positive[b] - correction
            total = np.exp(own_logit) * (2 if twice else 1)
            columns = [*zip(ids, positive, strict=True), *zip(uniform_ids, proposed, strict=True)]
            for j, (candidate, value) in enumerate(columns):
                if j != b and (allowed is None or allowed(b, candidate)):
                    total += np.exp(query[b] @ value - mixture[candidate])
            result[b] = np.log(total) - own_logit
        return result

    return losses


@pytest.mark.parametrize(
    ("by_mixture", "swap", "block_size"),
    [(False, False, None), (True, False, 4), (False, True, 4), (True, True, None)],
)
def test_mns_equals_its_equation(problem, log_popularity, by_mixture, swap, block_size):
    p = problem(unseen=True)
    method = build(
        "mns",
        frequency=p.counts,
        num_candidates=9,
        num_uniform=5,
        mixture_for_positive=by_mixture,
        swap_shares=swap,
        positive_twice=swap,
        block_size=block_size,
    )
    proposed = method.propose(None, p.batch, seed=SEED)
    mixture = mixture_of(p.counts / p.counts.sum(), 7, 5, 9, swap=swap)
    loop = mns_loop(
        p.batch.candidate_ids.numpy(),
        proposed.ids.numpy(),
        log_popularity(p.counts),
        mixture,
        own=mixture if by_mixture else None,
        twice=swap,
    )
    p.check(method, loop, proposed)


def test_mns_masks_hits_in_both_parts_and_padding_shrinks_the_batch(problem, log_popularity):
    p = problem(seed=1)
    ids, valid = p.batch.candidate_ids.numpy(), np.arange(7) < 5
    method = build(
        "mns", frequency=p.counts, num_candidates=9, num_uniform=5, mask_accidental_hits=True
    )
    seen = np.random.default_rng(0).integers(-1, 9, (7, 2))
    proposed = method.propose(None, p.batch, seed=SEED)
    hits = seen_hits(seen, [*ids, *proposed.ids.numpy()])
    batch = p.batch._replace(valid=tf.constant(valid), seen=hits)

    def cut(query, positive, rows):
        loop = mns_loop(
            ids[:5],
            proposed.ids.numpy(),
            log_popularity(p.counts),
            mixture_of(p.counts / p.counts.sum(), 5, 5, 9),
            allowed=lambda b, candidate: candidate != ids[b] and candidate not in seen[b],
        )
        return np.append(loop(query[:5], positive[:5], rows), [0, 0])

    p.check(method, cut, proposed, batch=batch)


def test_mns_columns_follow_the_mixture():
    counts = np.array([0, 1, 2, 5, 8])
    method = build("mns", frequency=counts, num_candidates=5, num_uniform=30_000)
    rows = 60_000
    batch_ids = tf.constant(np.random.default_rng(0).choice(5, rows, p=counts / 16))
    drawn = method.propose(None, None, seed=SEED).ids
    log_pop = method._popularity.of_ids(tf.range(5))
    mixture = np.exp(method.log_mixture(log_pop, tf.constant(rows), tf.size(drawn)))
    observed = np.bincount(tf.concat([batch_ids, drawn], 0).numpy(), minlength=5) / 90_000
    np.testing.assert_allclose(observed, mixture, atol=4 * np.sqrt(0.25 / 90_000))
    assert mixture[0] == pytest.approx(1 / 3 / 5)  # no train rows: its share of the uniform part
    assert mixture.sum() == pytest.approx(1)


def test_mns_draws_as_many_uniform_candidates_as_rows(problem):
    p = problem()
    method = build("mns", frequency=p.counts, num_candidates=9)
    proposed = method.propose(None, p.batch, seed=SEED)
    assert proposed.ids.shape == [7]
    np.testing.assert_allclose(proposed.log_q, -np.log(9), rtol=1e-6)


@pytest.mark.parametrize("name", ["mns", "full_softmax", "sl_at_k"])
def test_a_batch_of_one_is_finite(problem, name):
    p = problem(rows=1, columns=9)
    sizes = {"num_candidates": 9, "num_queries": 6}
    method = build(name, frequency=p.counts, **sizes, **({"k": 2} if name == "sl_at_k" else {}))
    proposed = samplers.Candidates(tf.range(9, dtype=tf.int64), tf.zeros(9))
    losses, gradients = p.run(method, proposed)
    assert (losses > 0).all()
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("mns", {"num_uniform": 0}, "num_uniform must be at least 1"),
        ("mns", {"block_size": 0}, "block_size must be at least 1"),
        ("full_softmax", {"block_size": -1}, "block_size must be at least 1"),
        ("mns", {"frequency": None}, "needs frequency="),
        ("mns", {"num_candidates": None}, "needs num_candidates="),
        ("mns", {"num_candidates": 5}, "frequency must have shape"),
    ],
)
def test_wrong_arguments_are_errors(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, **{"frequency": np.ones(4), "num_candidates": 4} | options)
