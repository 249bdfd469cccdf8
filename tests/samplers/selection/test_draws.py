import numpy as np
import pytest
import tensorflow as tf

from samplers.selection.draws import resample, systematic_counts

INF = float("inf")
SYSTEMATIC = pytest.mark.parametrize("systematic", [True, False])


def example(seed, rows=5, columns=9):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, columns), scale=2).astype(np.float32)
    log_q = np.log(rng.dirichlet(np.ones(columns))).astype(np.float32)
    scores[:, 3], log_q[6] = -INF, -INF  # neither may be drawn
    return scores, log_q


def weights_of(scores, log_q):
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isfinite(log_q), np.exp(scores.astype(float) - log_q), 0)
    return weights / weights.sum(1, keepdims=True)


@SYSTEMATIC
@pytest.mark.parametrize("n", [1, 7, 400])
def test_expected_counts_are_n_times_the_weights(systematic, n):
    scores, log_q = example(0)
    weights = weights_of(scores, log_q)
    repeated = np.tile(scores, [1500, 1])  # rows are drawn independently
    counts = resample(repeated, log_q, n, tf.constant([1, 2]), systematic).counts.numpy()
    assert (counts.sum(1) == n).all()
    assert (counts >= 0).all()
    assert (counts[:, [3, 6]] == 0).all()
    counts = counts.reshape(1500, *scores.shape)
    variance = n * weights * (1 - weights)
    if systematic:  # n · w rounded down or up
        assert (np.abs(counts - n * weights) < 1 + 1e-3).all()
        fraction = n * weights % 1
        variance = fraction * (1 - fraction)
    error = np.sqrt(variance / 1500)
    assert (np.abs(counts.mean(0) - n * weights) <= 4.5 * error + 1e-4 * n).all()
    np.testing.assert_allclose(counts.var(0), variance, atol=0.12 * max(1, variance.max()))


@SYSTEMATIC
def test_a_multinomial_draw_varies_and_seeds_differ(systematic):
    scores, log_q = example(1)
    first = resample(scores, log_q, 50, tf.constant([1, 2]), systematic).counts.numpy()
    again = resample(scores, log_q, 50, tf.constant([1, 2]), systematic).counts.numpy()
    other = resample(scores, log_q, 50, tf.constant([1, 3]), systematic).counts.numpy()
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@SYSTEMATIC
def test_eager_graph_and_xla_draw_the_same(systematic):
    scores, log_q = example(2, rows=30, columns=70)

    def draw(seed):
        return resample(tf.constant(scores), tf.constant(log_q), 40, seed, systematic).counts

    for jit_compile in (False, True):
        compiled = tf.function(draw, jit_compile=jit_compile)
        for seed in range(2):
            at = tf.constant([seed, 7], tf.int64)
            np.testing.assert_array_equal(compiled(at), draw(at))


@SYSTEMATIC
def test_rows_with_nothing_to_draw_have_no_counts(systematic):
    scores = np.array([[-INF, -INF, -INF], [0, -INF, 0]], np.float32)
    counts = resample(scores, np.zeros(3, np.float32), 6, tf.constant([1, 2]), systematic).counts
    assert counts[0].numpy().tolist() == [0, 0, 0]
    assert counts[1].numpy()[[0, 2]].sum() == 6
    nothing = np.full(3, -INF, np.float32)
    assert not resample(scores, nothing, 6, tf.constant([1, 2]), systematic).counts.numpy().any()


@SYSTEMATIC
def test_one_column_takes_all_draws(systematic):
    counts, *_ = resample(
        np.zeros((4, 1), np.float32), np.zeros(1), 3, tf.constant([1, 2]), systematic
    )
    assert counts.numpy().tolist() == [[3.0]] * 4


@pytest.mark.parametrize("first", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_no_point_is_lost_to_rounding(first):
    masses = np.random.default_rng(0).integers(0, 10**6, (50, 900)).astype(np.int32)
    sums = masses.cumsum(1, dtype=np.int32)
    for n in (1, 7, 5000):
        counts = systematic_counts(
            np.zeros(50, np.int32), sums, sums[:, -1], n, np.full(50, first, np.float32)
        ).numpy()
        assert (counts.sum(1) == n).all()
        assert counts.min() >= 0


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_counts_of_many_columns_add_up(spread):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(64, 5000), scale=spread).astype(np.float32)
    counts = resample(scores, np.zeros(5000, np.float32), 5000, tf.constant([1, 2])).counts.numpy()
    assert (counts.sum(1) == 5000).all()
    assert counts.min() == 0 or spread == 0
    expected = 5000 * weights_of(scores, np.zeros(5000))
    assert np.abs(counts - expected).max() < 1 + 2e-3


def test_columns_of_tiny_weight_keep_their_share():
    scores = np.zeros((3000, 1001), np.float32)
    scores[:, 1:] = np.log(1e-5)  # the masses of these are about one unit
    scores[:, 0] = np.log(1000)
    counts = resample(scores, np.zeros(1001, np.float32), 10**6, tf.constant([1, 2])).counts.numpy()
    share = 1e6 * 1e-2 / (1000 + 1e-2)
    assert counts[:, 1:].sum(1).mean() == pytest.approx(share, rel=0.05)


def test_log_q_may_differ_by_row():
    scores, log_q = example(4)
    by_row = np.tile(log_q, [5, 1])
    one, all_rows = (
        resample(scores, x, 20, tf.constant([1, 2])).counts.numpy() for x in (log_q, by_row)
    )
    np.testing.assert_array_equal(one, all_rows)


def test_no_gradient_flows_through_a_draw():
    scores, log_q = (
        tf.Variable(tf.random.stateless_normal([3, 4], [1, 2])),
        tf.Variable(tf.zeros(4)),
    )
    with tf.GradientTape() as tape:
        counts = resample(scores, log_q, 5, tf.constant([1, 2])).counts
    assert tape.gradient(counts, [scores, log_q]) == [None, None]
