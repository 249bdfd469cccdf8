import numpy as np
import pytest
import tensorflow as tf

from towers.legacy_keras import tf_keras
from towers.model.optimizers import CoupledAdam, staircase_decay


def reference(theta, gradients, rate, l2, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    """Algorithm 1 of the paper on gradient + l2 · θ, in float64."""
    theta, m, v = theta.astype(np.float64), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.astype(np.float64) + l2 * theta
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
        theta = theta - rate(t - 1) * m_hat / (np.sqrt(v_hat) + epsilon)
    return theta


def sparse_steps(seed, rows=9, dim=3, steps=25):
    """Gradients of a few rows a step, some of them twice, and the same as dense ones."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(rows, dim)).astype(np.float32)
    sparse, dense = [], []
    for _ in range(steps):
        ids = rng.integers(0, rows - 2, 5)  # the last two rows are never in a batch
        values = rng.normal(size=(5, dim)).astype(np.float32)
        whole = np.zeros((rows, dim), np.float32)
        np.add.at(whole, ids, values)
        sparse.append(tf.IndexedSlices(tf.constant(values), tf.constant(ids), [rows, dim]))
        dense.append(whole)
    return theta, sparse, dense


@pytest.mark.parametrize("l2", [0.0, 1e-5, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_equals_the_algorithm(l2, kind):
    theta, sparse, dense = sparse_steps(0)
    variable = tf.Variable(theta)
    optimizer = CoupledAdam(0.05, l2)
    for gradient in sparse if kind == "sparse" else map(tf.constant, dense):
        optimizer.apply_gradients([(gradient, variable)])
    expected = reference(theta, dense, lambda step: 0.05, l2)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_l2_reaches_rows_outside_the_batch():
    theta, sparse, _ = sparse_steps(1)
    variable = tf.Variable(theta)
    optimizer = CoupledAdam(0.01, 1e-3)
    optimizer.apply_gradients([(sparse[0], variable)])
    # The first step of Adam moves every coordinate by the learning rate against its gradient.
    np.testing.assert_allclose(
        variable.numpy()[-2:], theta[-2:] - 0.01 * np.sign(theta[-2:]), atol=1e-4
    )
    without = tf.Variable(theta)
    CoupledAdam(0.01).apply_gradients([(sparse[0], without)])
    np.testing.assert_array_equal(without.numpy()[-2:], theta[-2:])


def test_without_l2_it_is_the_adam_of_keras():
    theta, sparse, _ = sparse_steps(2)
    ours, theirs = tf.Variable(theta), tf.Variable(theta)
    one, two = CoupledAdam(0.01), tf_keras.optimizers.Adam(0.01, epsilon=1e-8)
    for gradient in sparse:
        one.apply_gradients([(gradient, ours)])
        two.apply_gradients([(gradient, theirs)])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("l2", [1e-2, 1.0])  # a product with 1 must not become θ itself
def test_equals_the_algorithm_inside_a_function_with_a_schedule(l2):
    theta, sparse, dense = sparse_steps(3)
    variable = tf.Variable(theta)
    schedule = staircase_decay(0.05, 0.5, decay_epochs=2, steps_per_epoch=4)
    optimizer = CoupledAdam(schedule, l2)
    optimizer.build([variable])

    @tf.function
    def step(values, ids):
        optimizer.apply_gradients([(tf.IndexedSlices(values, ids, [9, 3]), variable)])

    for gradient in sparse:
        step(gradient.values, gradient.indices)
    expected = reference(theta, dense, lambda step: 0.05 * 0.5 ** (step // 8), l2)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_repeated_rows_are_summed_to_the_same_bits():
    rng = np.random.default_rng(4)
    gradient = tf.IndexedSlices(
        tf.constant(rng.normal(size=(4000, 16)), tf.float32),
        tf.constant(rng.integers(0, 7, 4000)),
        tf.constant([500, 16], tf.int64),
    )
    results = set()
    for _ in range(5):
        variable = tf.Variable(tf.ones([500, 16]))
        optimizer = CoupledAdam(0.01, 0.1, epsilon=1.0)
        for _ in range(3):
            optimizer.apply_gradients([(gradient, variable)])
        results.add(variable.numpy().tobytes())
    assert len(results) == 1


def test_staircase():
    schedule = staircase_decay(0.01, 0.95, decay_epochs=5, steps_per_epoch=100)
    rates = [float(schedule(step)) for step in (0, 499, 500, 999, 1000)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.0095, 0.0095, 0.009025], rtol=1e-6)


def test_configuration_round_trip():
    optimizer = CoupledAdam(0.02, 0.1, beta_1=0.8)
    again = CoupledAdam.from_config(optimizer.get_config())
    assert (again.l2, again.beta_1, float(again.learning_rate)) == (0.1, 0.8, pytest.approx(0.02))


def test_negative_l2_is_an_error():
    with pytest.raises(ValueError, match="l2 must be at least 0, got -1"):
        CoupledAdam(0.01, -1)
