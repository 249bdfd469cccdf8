"""Options of the per-query methods: each has an effect, and wrong values are errors."""

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import make_encoders

import samplers
from samplers.methods.by_name import build

N, Q, D = 12, 7, 3
SEED = tf.constant([5, 11], tf.int64)
COUNTS = np.array([9, 7, 5, 5, 4, 3, 3, 2, 2, 1, 1, 0])


def test_options_have_an_effect():
    rng = np.random.default_rng(0)
    queries, table = (tf.constant(rng.normal(size=[rows, D]), tf.float32) for rows in (Q, N))
    batch = samplers.Batch(
        tf.constant([0, 3, 1, 6, 3, 2], tf.int64), tf.constant([4, 0, 11, 2, 7, 1], tf.int64)
    )
    encoders = make_encoders(queries, table, batch)

    def loss(name, **options):
        method = build(name, frequency=COUNTS, num_candidates=N, num_queries=Q, **options)
        return method(encoders, batch, seed=SEED).numpy()

    assert (loss("dns", num_negatives=40) > loss("dns", num_negatives=1)).any()
    assert (loss("softmax_v", rho=4.0) > loss("softmax_v", rho=0.1)).all()
    assert (loss("softmax_v", tau=0.1) > loss("softmax_v", tau=10.0)).all()
    np.testing.assert_allclose(
        loss("softmax_v", tau=1e9, group_size=1), loss("bpr", num_negatives=200), rtol=1e-5
    )
    np.testing.assert_array_equal(
        loss("soft_bpr", soft_factor=1.0, num_negatives=7), loss("dns", num_negatives=7)
    )
    np.testing.assert_array_equal(
        loss("dns_mn", num_kept=1, num_negatives=7, group_size=1), loss("dns", num_negatives=7)
    )
    for name, option in (
        ("adasir_u", {"add_log_weights": True}),
        ("adasir_w", {"count_below": True}),
        ("pns", {"power": 9.0}),
        ("warp", {"margin": 3.0}),
    ):
        assert (loss(name) != loss(name, **option)).any()


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("bpr", {"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ("pns", {"num_negatives": 0}, "num_negatives must be at least 1"),
        ("pns", {"power": 0.0}, "power must be above 0"),
        ("aobpr", {"num_negatives": 0}, "num_negatives must be at least 1"),
        ("aobpr", {"rank_scale": -1.0}, "rank_scale must be above 0"),
        ("kernel", {"num_negatives": 0}, "num_negatives must be at least 1"),
        ("kernel", {"alpha": 0.0}, "alpha must be above 0"),
        ("kernel", {"leaf_size": 0}, "leaf_size must be at least 1"),
        ("dns_mn", {"num_kept": 0}, "num_kept must be at least 1"),
        ("dns_mn", {"num_kept": 5, "num_negatives": 4}, "at most num_negatives = 4, got 5"),
        ("soft_bpr", {"soft_factor": 0.0}, "soft_factor must be above 0 and at most 1"),
        ("soft_bpr", {"soft_factor": 1.1}, "soft_factor must be above 0 and at most 1"),
        ("soft_bpr", {"mix": "beta"}, "mix must be none, fixed or uniform, got 'beta'"),
        (
            "soft_bpr",
            {"mix": "uniform", "soft_factor": 0.6},
            "soft_factor must be at most 0.5 with",
        ),
        ("dns_mn", {"dro": 0.0}, "dro must be above 0 and at most 1, got 0.0"),
        ("dns_mn", {"dro": 0.1, "sum_over_kept": True}, "sum_over_kept must be false with dro"),
        ("softmax_v", {"rho": 0.0}, "rho must be above 0"),
        ("softmax_v", {"rho": float("inf")}, "rho must be above 0"),
        ("softmax_v", {"tau": 0.0}, "tau must be above 0"),
        ("warp", {"margin": -1.0}, "margin must be at least 0"),
        ("adasir_u", {"pool_size": 0}, "pool_size must be at least 1"),
        ("bpr", {"num_candidates": None}, "needs num_candidates="),
        ("bpr", {"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ("pris_p", {"frequency": None}, "needs frequency="),
        ("pris_p", {"frequency": np.zeros(N)}, "counts must have an entry above 0"),
        ("pns", {"frequency": -COUNTS}, "counts must be finite and at least 0"),
        ("adasir_p", {"frequency": np.zeros(N)}, "counts must have an entry above 0"),
        ("pns", {"frequency": COUNTS[:-1]}, "must have shape .num_candidates. = .12., got .11."),
        ("adasir_w", {"num_queries": None}, "needs num_queries="),
    ],
)
def test_wrong_arguments_are_errors(name, options, text):
    sizes = {"frequency": COUNTS, "num_candidates": N, "num_queries": Q}
    with pytest.raises(ValueError, match=text):
        build(name, **{**sizes, **options})
