import numpy as np
import pytest
import tensorflow as tf

from samplers.losses.softmax import in_batch_softmax_loss, positive_corrected_loss

INF = float("inf")


def reference(scores, log_q, *, positive_log_q=None, valid=None, positive_twice=False):
    """The equation as a loop: losses [B] and the gradient of their sum by the scores."""
    rows, columns = scores.shape
    losses, gradient = np.zeros(rows), np.zeros_like(scores)
    for b in range(rows):
        own = log_q[b] if positive_log_q is None else positive_log_q[b]
        if np.isneginf(own):
            continue
        exponents = {b: [scores[b, b] - own] * (2 if positive_twice else 1)}
        for j in range(columns):
            if j != b and not np.isneginf(log_q[j]) and (valid is None or valid[b, j]):
                exponents[j] = [scores[b, j] - log_q[j]]
        total = sum(np.exp(value) for values in exponents.values() for value in values)
        losses[b] = np.log(total) - (scores[b, b] - own)
        for j, values in exponents.items():
            gradient[b, j] = sum(np.exp(value) for value in values) / total
        gradient[b, b] -= 1
    return losses, gradient


def corrected_reference(scores, log_q):
    rows, columns = scores.shape
    losses, gradient = np.zeros(rows), np.zeros_like(scores)
    for b in range(rows):
        others = [j for j in range(columns) if j != b and not np.isneginf(log_q[j])]
        if np.isneginf(log_q[b]) or not others:
            continue
        q = np.exp(log_q)
        mean = np.mean([np.exp(scores[b, j]) * (1 - q[b]) / q[j] for j in others])
        p = np.exp(scores[b, b]) / (np.exp(scores[b, b]) + mean)
        parts = np.array([np.exp(scores[b, j] - log_q[j]) for j in others])
        losses[b] = (1 - p) * (np.log(parts.sum()) - scores[b, b])
        gradient[b, others] = (1 - p) * parts / parts.sum()
        gradient[b, b] = -(1 - p)
    return losses, gradient


def run(function, scores, log_q, valid=None, **options):
    """Losses and their gradient by the scores: queries that are scores, candidates that are 1."""
    query, candidates = tf.constant(scores), tf.eye(scores.shape[1], dtype=scores.dtype)
    if valid is not None:
        options["valid"] = lambda columns: tf.gather(valid, columns, axis=1)
    with tf.GradientTape() as tape:
        tape.watch(query)
        losses = function(query, candidates, tf.constant(log_q), **options)
        total = tf.reduce_sum(losses)
    return losses.numpy(), tape.gradient(total, query).numpy()


def example(seed, rows=7, columns=7, dtype=np.float64):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, columns), scale=3).astype(dtype)
    log_q = np.log(rng.dirichlet(np.ones(columns))).astype(dtype)
    valid = rng.random((rows, columns)) < 0.6
    return scores, log_q, valid


@pytest.mark.parametrize(("seed", "columns"), [(0, 7), (1, 11)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("unseen", [(), (2, 5), tuple(range(7))])
def test_equals_the_equation(seed, columns, masked, twice, unseen):
    scores, log_q, valid = example(seed, columns=columns)
    log_q[list(unseen)] = -INF
    options = {"valid": valid if masked else None, "positive_twice": twice}
    expected = reference(scores, log_q, **options)
    actual = run(in_batch_softmax_loss, scores, log_q, **options)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-9)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-9)


def test_equals_the_equation_in_float32():
    scores, log_q, _ = example(0, dtype=np.float32)
    expected = reference(scores.astype(np.float64), log_q.astype(np.float64))
    losses, gradient = run(in_batch_softmax_loss, scores, log_q)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-5)


def test_another_correction_of_the_positive():
    scores, log_q, valid = example(0)
    own = log_q[::-1].copy()
    own[3] = -INF
    expected = reference(scores, log_q, positive_log_q=own, valid=valid)
    actual = run(in_batch_softmax_loss, scores, log_q, positive_log_q=tf.constant(own), valid=valid)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-9)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-9)


@pytest.mark.parametrize("unseen", [(), (2, 5), tuple(range(7))])
def test_positive_correction_equals_its_equation(unseen):
    scores, log_q, _ = example(0)
    log_q[list(unseen)] = -INF
    expected = corrected_reference(scores, log_q)
    actual = run(positive_corrected_loss, scores, log_q)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-9)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-9)


def test_golden_numbers():
    # log(e^1 + e^0) - 1, log(e^2 + e^2) - 2, then with q = (1/4, 3/4):
    # row 0 is log(4e + 4/3) - log 4e = log(1 + 1/(3e)), row 1 is log(4e² + 4e²/3) - log(4e²/3).
    scores = np.array([[1.0, 0.0], [2.0, 2.0]])
    plain, _ = run(in_batch_softmax_loss, scores, np.zeros(2))
    np.testing.assert_allclose(plain, [0.31326169, 0.69314718], atol=1e-8)
    corrected, _ = run(in_batch_softmax_loss, scores, np.log([0.25, 0.75]))
    np.testing.assert_allclose(corrected, [0.11567101, np.log(4.0)], atol=1e-8)
    twice, _ = run(in_batch_softmax_loss, scores, np.zeros(2), positive_twice=True)
    np.testing.assert_allclose(twice, [np.log(2 + np.exp(-1)), np.log(3)], atol=1e-8)


def test_start_values():
    equal = np.zeros((5, 8))
    losses, _ = run(in_batch_softmax_loss, equal, np.full(8, -3.0))
    np.testing.assert_allclose(losses, np.log(8))
    losses, _ = run(positive_corrected_loss, equal, np.full(8, -np.log(100)))
    np.testing.assert_allclose(losses, 0.99 * np.log(7 * 100))


@pytest.mark.parametrize("shift", [-80.0, 900.0])
def test_does_not_change_when_scores_or_log_q_shift(shift):
    scores, log_q, valid = example(4)
    before = run(in_batch_softmax_loss, scores, log_q, valid=valid)
    for after in (
        run(in_batch_softmax_loss, scores + shift, log_q, valid=valid),
        run(in_batch_softmax_loss, scores, log_q + shift, valid=valid),
    ):
        np.testing.assert_allclose(after[0], before[0], atol=1e-9)
        np.testing.assert_allclose(after[1], before[1], atol=1e-9)


def test_masked_columns_have_no_gradient_and_no_effect():
    scores, log_q, valid = example(5)
    valid[:, 3] = False
    losses, gradient = run(in_batch_softmax_loss, scores, log_q, valid=valid)
    others = np.arange(7) != 3
    assert (gradient[others, 3] == 0).all()
    scores[others, 3] = 1e6
    again, _ = run(in_batch_softmax_loss, scores, log_q, valid=valid)
    np.testing.assert_allclose(again, losses, rtol=1e-12)


@pytest.mark.parametrize("log_q", [-1.0, -INF])
def test_batch_of_one_has_loss_0(log_q):
    for function in (in_batch_softmax_loss, positive_corrected_loss):
        losses, gradient = run(function, np.array([[3.0]]), np.array([log_q]))
        assert losses == [0]
        assert gradient == [[0]]


def test_half_precision_scores_give_a_float32_loss():
    scores, log_q, _ = example(7)
    query, candidates = tf.constant(scores, tf.float16), tf.eye(7, dtype=tf.float16)
    losses = in_batch_softmax_loss(query, candidates, tf.constant(log_q, tf.float32))
    assert losses.dtype == tf.float32
    np.testing.assert_allclose(losses, reference(scores, log_q)[0], atol=2e-2)


def test_wrong_shapes_are_errors():
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        in_batch_softmax_loss(tf.zeros([3, 2]), tf.zeros([4, 2]), tf.zeros([3]))
