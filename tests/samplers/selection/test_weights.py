import numpy as np
import pytest
import tensorflow as tf

from samplers.selection import weights

VALID = np.array(
    [[True, True, False, True], [False, False, False, False], [False, True, False, False]]
)


def test_softmax_weights_are_those_of_the_valid_negatives():
    logits = np.random.default_rng(0).normal(size=VALID.shape).astype(np.float32)
    actual = weights.softmax_weights(tf.constant(logits), valid=tf.constant(VALID))
    e = np.exp(logits[0, VALID[0]])
    np.testing.assert_allclose(actual[0].numpy()[VALID[0]], e / e.sum(), rtol=1e-6)
    np.testing.assert_array_equal(actual[0, 2], 0)
    np.testing.assert_array_equal(actual[1], 0)
    np.testing.assert_array_equal(actual[2], [0, 1, 0, 0])
    everything = weights.softmax_weights(tf.constant(logits), valid=tf.ones_like(VALID))
    np.testing.assert_allclose(everything, weights.softmax_weights(tf.constant(logits)), rtol=1e-6)


def test_equal_weights_are_shared_by_the_valid_negatives():
    actual = weights.equal_weights(tf.zeros(VALID.shape), valid=tf.constant(VALID))
    expected = [[1 / 3, 1 / 3, 0, 1 / 3], [0] * 4, [0, 1, 0, 0]]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(weights.equal_weights(tf.zeros([1, 4])), [[0.25] * 4])


def test_no_gradient_flows_through_weights():
    x = tf.Variable(np.random.default_rng(0).normal(size=[3, 4]).astype(np.float32))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(
            weights.softmax_weights(x)[:, 0]
            + weights.loss_weights(x, weights.adaptive_temperature(x, 1.0))[:, 0]
        )
    assert tape.gradient(total, x) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_over_rho_goes_to_1_as_rho_goes_to_0(seed):
    """To first order in ρ; the next term is the skewness of the losses times sqrt(2 ρ) / 3."""
    losses = np.random.default_rng(seed).gamma(2.0, size=[1, 4000])
    errors = []
    for rho in (1e-1, 1e-2, 1e-3):
        x = tf.constant(losses)
        p = weights.loss_weights(x, weights.adaptive_temperature(x, rho)).numpy()[0]
        divergence = np.sum(p * np.log(p * len(p)))
        errors.append(abs(divergence / rho - 1))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_adaptive_temperature_is_eq_15_over_the_valid_losses():
    losses = np.random.default_rng(3).gamma(2.0, size=VALID.shape)
    actual = weights.adaptive_temperature(tf.constant(losses), 0.7, valid=tf.constant(VALID))
    expected = np.sqrt(np.var(losses[0, VALID[0]]) / 1.4)
    np.testing.assert_allclose(actual[:, 0], [expected, 0, 0], rtol=1e-6, atol=1e-8)


def test_equal_losses_get_equal_weights():
    losses = tf.fill([2, 5], 0.693)
    tau = weights.adaptive_temperature(losses, 1.0)
    np.testing.assert_allclose(weights.loss_weights(losses, tau), np.full([2, 5], 0.2), rtol=1e-6)


def test_harmonic_numbers():
    ranks = np.array([1, 2, 3, 10, 1000, 41_000])
    expected = [sum(1 / k for k in range(1, rank + 1)) for rank in ranks]
    np.testing.assert_allclose(weights.harmonic_number(tf.constant(ranks)), expected, rtol=1e-6)
