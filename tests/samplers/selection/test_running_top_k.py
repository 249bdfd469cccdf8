import numpy as np
import pytest
import tensorflow as tf

from samplers.selection.running_top_k import running_top_k


@pytest.mark.parametrize("block_size", [1, 3, 8, 20, 1000])
@pytest.mark.parametrize("k", [1, 5, 20, 30])
def test_equals_the_top_of_all_scores(k, block_size):
    rng = np.random.default_rng(4)
    query, candidates = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (6, 20))  # ties
    masked = np.stack(np.nonzero(rng.random((6, 20)) < 0.3), axis=1)
    scores = query @ candidates.T
    scores[tuple(masked.T)] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    search = tf.function(running_top_k)
    best, columns = search(query, candidates, k, block_size=block_size, masked=tf.constant(masked))
    np.testing.assert_array_equal(columns, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))
