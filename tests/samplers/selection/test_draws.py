import numpy as np
import pytest
import tensorflow as tf

from samplers.selection.draws import resample

INF = float("inf")
EACH = pytest.mark.parametrize("draws", ["rounded", "independent"])


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


@EACH
@pytest.mark.parametrize("n", [1, 7, 400])
def test_expected_counts_are_n_times_the_weights(draws, n):
    scores, log_q = example(0)
    weights = weights_of(scores, log_q)
    repeated = np.tile(scores, [1500, 1])  # rows are drawn independently
    counts = resample(repeated, log_q, n, tf.constant([1, 2]), draws).counts.numpy()
    assert (counts >= 0).all()
    assert (counts[:, [3, 6]] == 0).all()
    counts = counts.reshape(1500, *scores.shape)
    variance = n * weights * (1 - weights)
    totals, fraction = counts.sum(2), n * weights % 1
    if draws != "independent":  # n · w rounded down or up
        assert (np.abs(counts - n * weights) < 1 + 1e-3).all()
        variance = fraction * (1 - fraction)
    if draws != "rounded":
        assert (totals == n).all()
    error = np.sqrt(variance / 1500)
    assert (np.abs(counts.mean(0) - n * weights) <= 4.5 * error + 1e-4 * n).all()
    np.testing.assert_allclose(counts.var(0), variance, atol=0.12 * max(1, variance.max()))


@pytest.mark.parametrize("n", [2, 300])
def test_a_row_of_rounded_counts_adds_up_to_n_on_average(n):
    """Its columns are rounded independently of each other, which other seeds show."""
    scores, log_q = example(0)
    draw = tf.function(lambda seed: resample(scores, log_q, n, seed).counts)
    totals = np.stack([draw(tf.constant([seed, 3])).numpy().sum(1) for seed in range(1500)])
    fraction = n * weights_of(scores, log_q) % 1
    variance = (fraction * (1 - fraction)).sum(1)
    assert (np.abs(totals.mean(0) - n) <= 4.5 * np.sqrt(variance / 1500) + 1e-4 * n).all()
    np.testing.assert_allclose(totals.var(0), variance, rtol=0.2)


@EACH
def test_a_multinomial_draw_varies_and_seeds_differ(draws):
    scores, log_q = example(1)
    first = resample(scores, log_q, 50, tf.constant([1, 2]), draws).counts.numpy()
    again = resample(scores, log_q, 50, tf.constant([1, 2]), draws).counts.numpy()
    other = resample(scores, log_q, 50, tf.constant([1, 3]), draws).counts.numpy()
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@EACH
def test_eager_graph_and_xla_draw_the_same(draws):
    scores, log_q = example(2, rows=30, columns=70)

    def draw(seed):
        return resample(tf.constant(scores), tf.constant(log_q), 40, seed, draws).counts

    for jit_compile in (False, True):
        compiled = tf.function(draw, jit_compile=jit_compile)
        for seed in range(2):
            at = tf.constant([seed, 7], tf.int64)
            np.testing.assert_array_equal(compiled(at), draw(at))


@EACH
def test_rows_with_nothing_to_draw_have_no_counts(draws):
    scores = np.array([[-INF, -INF, -INF], [0, -INF, 0]], np.float32)
    counts = resample(scores, np.zeros(3, np.float32), 6, tf.constant([1, 2]), draws).counts
    assert counts[0].numpy().tolist() == [0, 0, 0]
    assert counts[1].numpy().tolist() == [3, 0, 3] or draws == "independent"
    nothing = np.full(3, -INF, np.float32)
    assert not resample(scores, nothing, 6, tf.constant([1, 2]), draws).counts.numpy().any()


@EACH
def test_one_column_takes_all_draws(draws):
    counts, *_ = resample(np.zeros((4, 1), np.float32), np.zeros(1), 3, tf.constant([1, 2]), draws)
    assert counts.numpy().tolist() == [[3.0]] * 4


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_counts_of_many_columns_add_up(spread):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(64, 5000), scale=spread).astype(np.float32)
    log_q = np.zeros(5000, np.float32)
    counts = resample(scores, log_q, 5000, tf.constant([1, 2])).counts.numpy()
    assert (np.abs(counts.sum(1) - 5000) <= 4.5 * np.sqrt(5000) / 2).all()
    assert counts.min() == 0 or spread == 0
    expected = 5000 * weights_of(scores, np.zeros(5000))
    assert np.abs(counts - expected).max() < 1 + 2e-3


@pytest.mark.parametrize(
    ("draws", "rows", "n", "error"),
    [("rounded", 3000, 10**6, 0.05), ("independent", 300, 20_000, 0.3)],
)
def test_columns_of_tiny_weight_keep_their_share(draws, rows, n, error):
    scores = np.zeros((rows, 1001), np.float32)
    scores[:, 1:] = np.log(1e-5)  # the masses of these are about one unit
    scores[:, 0] = np.log(1000)
    log_q = np.zeros(1001, np.float32)
    counts = resample(scores, log_q, n, tf.constant([1, 2]), draws).counts.numpy()
    share = n * 1e-2 / (1000 + 1e-2)
    assert counts[:, 1:].sum(1).mean() == pytest.approx(share, rel=error)


def test_few_rounded_draws_of_many_columns_vary_in_number():
    """32 of 2,048: a row has 32 on average, by a spread of √(Σ f (1 - f)), about 18 %."""
    scores = np.random.default_rng(5).normal(size=(4000, 2048)).astype(np.float32)
    counts = resample(scores, np.zeros(2048, np.float32), 32, tf.constant([1, 2])).counts.numpy()
    totals, fraction = counts.sum(1), 32 * weights_of(scores, np.zeros(2048)) % 1
    spread = np.sqrt((fraction * (1 - fraction)).sum(1).mean())
    assert 0.16 * 32 < spread < 0.18 * 32
    assert totals.std() == pytest.approx(spread, rel=0.05)
    assert totals.mean() == pytest.approx(32, abs=0.5)


def test_expected_counts_are_no_draw():
    scores, log_q = example(6)
    counts = resample(scores, log_q, 7, tf.constant([1, 2]), "expected").counts
    np.testing.assert_allclose(counts, 7 * weights_of(scores, log_q), rtol=1e-5)


def test_no_gradient_flows_through_a_draw():
    scores, log_q = (
        tf.Variable(tf.random.stateless_normal([3, 4], [1, 2])),
        tf.Variable(tf.zeros(4)),
    )
    with tf.GradientTape() as tape:
        counts = resample(scores, log_q, 5, tf.constant([1, 2])).counts
    assert tape.gradient(counts, [scores, log_q]) == [None, None]
