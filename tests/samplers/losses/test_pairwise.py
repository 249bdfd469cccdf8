import numpy as np
import pytest
import tensorflow as tf

from samplers.losses.pairwise import bpr_loss, soft_bpr_loss

POSITIVE = np.array([0.3, -2.0, 1.5])
NEGATIVE = np.array([[0.3, 1.0], [-9.0, 4.0], [1.5, 0.0]])


@pytest.mark.parametrize("soft_factor", [0.05, 0.4, 1.0])
def test_soft_bpr_is_the_loop_of_eq_10(soft_factor):
    positive, negative = tf.constant(POSITIVE), tf.constant(NEGATIVE)
    with tf.GradientTape() as tape:
        tape.watch([positive, negative])
        losses = soft_bpr_loss(positive, negative, soft_factor=soft_factor)
    for_positive, for_negative = tape.gradient(losses, [positive, negative])
    for b in range(3):
        slopes = []
        for j in range(2):
            x = soft_factor * (POSITIVE[b] - NEGATIVE[b, j])
            assert float(losses[b, j]) == pytest.approx(-np.log(1 / (1 + np.exp(-x))))
            slopes.append(soft_factor / (1 + np.exp(x)))
            assert float(for_negative[b, j]) == pytest.approx(slopes[-1])
        assert float(for_positive[b]) == pytest.approx(-sum(slopes))


def test_bpr_by_hand_and_far_from_0():
    np.testing.assert_allclose(
        bpr_loss(tf.constant([0.0, 1.0]), tf.constant([[0.0], [2.0]])),
        [[np.log(2)], [1.3132617]],
        rtol=1e-6,
    )
    far = bpr_loss(tf.constant([0.0, 0.0]), tf.constant([[1e4], [-1e4]]))
    np.testing.assert_array_equal(far, [[1e4], [0.0]])
