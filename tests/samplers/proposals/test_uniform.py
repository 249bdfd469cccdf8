import numpy as np
import tensorflow as tf

from samplers.proposals.uniform import UniformSampler

SEED = tf.constant([2, 9], tf.int64)


def test_every_candidate_is_as_frequent_as_log_q_says():
    drawn = UniformSampler(7).sample([400, 350], seed=SEED)
    assert drawn.ids.dtype == tf.int64
    observed = np.bincount(drawn.ids.numpy().ravel(), minlength=7) / 140_000
    np.testing.assert_allclose(drawn.log_q, np.full([400, 350], -np.log(7)), rtol=1e-6)
    # four standard deviations of a share of 1/7 among 140,000 draws
    np.testing.assert_allclose(observed, np.exp(drawn.log_q[0, 0]), atol=0.0038)


def test_draws_are_a_function_of_the_seed_and_may_be_shared():
    sampler = UniformSampler(1000)
    one = sampler.sample([64], seed=SEED)
    assert one.ids.shape == one.log_q.shape == [64]
    np.testing.assert_array_equal(one.ids, sampler.sample([64], seed=SEED).ids)
    assert (one.ids.numpy() != sampler.sample([64], seed=SEED + 1).ids.numpy()).any()
