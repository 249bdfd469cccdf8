import numpy as np
import pytest
import tensorflow as tf

from samplers.proposals.popularity import PopularitySampler, UniformSampler, log_pop

SEED = tf.constant([2, 9], tf.int64)


def test_every_candidate_is_as_frequent_as_log_q_says():
    weights = np.array([0, 5, 0, 1, 12, 0.25, 0, 2, 0])
    sampler = PopularitySampler(weights)
    drawn = sampler.sample([500, 400], seed=SEED)
    observed = np.bincount(drawn.ids.numpy().ravel(), minlength=9) / 200_000
    np.testing.assert_allclose(np.exp(sampler.log_q), weights / weights.sum(), rtol=1e-6)
    # four standard deviations of a share of a half among 200,000 draws
    np.testing.assert_allclose(observed, np.exp(sampler.log_q), atol=0.0045)
    assert (observed[weights == 0] == 0).all()
    np.testing.assert_array_equal(drawn.log_q, sampler.log_q.numpy()[drawn.ids.numpy()])


def test_rare_candidates_of_a_large_corpus_keep_their_share():
    """In float32 the last half of this distribution would lie between 1 - 2^-24 and 1."""
    weights = np.concatenate([[1e12], np.ones(100_000)])
    sampler = PopularitySampler(weights)
    cumulative = sampler._cumulative.numpy()
    assert (np.diff(cumulative) > 0).all()
    assert sampler.log_q.numpy()[1] == pytest.approx(-np.log(1e12 + 1e5))


@pytest.mark.parametrize("sampler", [PopularitySampler(np.arange(50)), UniformSampler(1000)])
def test_draws_are_a_function_of_the_seed_and_may_be_shared(sampler):
    one = sampler.sample([64], seed=SEED)
    assert one.ids.shape == one.log_q.shape == [64]
    np.testing.assert_array_equal(one.ids, sampler.sample([64], seed=SEED).ids)
    assert (one.ids.numpy() != sampler.sample([64], seed=SEED + 1).ids.numpy()).any()


def test_weights_that_are_all_0_are_an_error():
    with pytest.raises(ValueError, match="must have an entry above 0"):
        PopularitySampler(np.zeros(3))


def test_draws_on_a_boundary_belong_to_the_next_candidate(monkeypatch):
    """Uniform draws include 0, and may fall on a step: never on a candidate of weight 0."""
    sampler = PopularitySampler(np.array([0, 1, 0, 1, 2, 0]))
    draws = tf.constant([0.0, 0.25, 0.5, np.nextafter(1, 0)], tf.float64)
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda *args, **kwargs: draws)
    np.testing.assert_array_equal(sampler.sample([4], seed=SEED).ids, [1, 3, 4, 4])


def test_uniform_draws_are_as_frequent_as_log_q_says():
    drawn = UniformSampler(7).sample([400, 350], seed=SEED)
    assert drawn.ids.dtype == tf.int64
    observed = np.bincount(drawn.ids.numpy().ravel(), minlength=7) / 140_000
    np.testing.assert_allclose(drawn.log_q, np.full([400, 350], -np.log(7)), rtol=1e-6)
    # four standard deviations of a share of 1/7 among 140,000 draws
    np.testing.assert_allclose(observed, np.exp(drawn.log_q[0, 0]), atol=0.0038)


def test_golden_numbers():
    actual = log_pop(np.array([1, 0, 3]))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, [np.log(0.25), -np.inf, np.log(0.75)], rtol=1e-6)


def test_rare_candidates_are_not_clipped():
    counts = np.array([10**9, 1])
    assert log_pop(counts)[1] == pytest.approx(-np.log(10**9 + 1))


def test_probabilities_of_a_large_corpus_sum_to_1():
    counts = np.random.default_rng(0).zipf(1.5, 100_000)
    assert np.exp(log_pop(counts).astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([0, 0], "above 0"),
        ([1, -1], "at least 0"),
        ([1, np.nan], "finite"),
        ([[1, 2]], "shape"),
        (3, "shape"),
    ],
)
def test_wrong_counts_are_errors(counts, text):
    with pytest.raises(ValueError, match=text):
        log_pop(np.array(counts))
