import numpy as np
import pytest

from samplers.proposals.frequency import log_pop


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
