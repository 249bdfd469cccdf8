import ir_measures
import numpy as np
import pytest

from towers.metrics import definitions as metrics

HITS = np.array(
    [
        [True, False, True, False],
        [False, False, False, True],
        [False, False, False, False],
        [True, True, True, True],
    ]
)
POSITIVES = np.array([2, 5, 1, 4])
L3, L5 = np.log2(3), np.log2(5)


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("recall", 1, [1 / 2, 0, 0, 1 / 4]),
        ("recall", 4, [1, 1 / 5, 0, 1]),
        ("precision", 2, [1 / 2, 0, 0, 1]),
        ("precision", 4, [1 / 2, 1 / 4, 0, 1]),
        ("hit_rate", 3, [1, 0, 0, 1]),
        ("mrr", 4, [1, 1 / 4, 0, 1]),
        ("mrr", 3, [1, 0, 0, 1]),
        ("ndcg", 1, [1, 0, 0, 1]),
        # ideal: 2 positives 1 + 1/log2 3; 5 and 4 positives in 4 places the whole sum.
        (
            "ndcg",
            4,
            [
                (1 + 1 / 2) / (1 + 1 / L3),
                (1 / L5) / (1 + 1 / L3 + 1 / 2 + 1 / L5),
                0,
                1,
            ],
        ),
        (
            "ndcg_xir",
            4,
            [
                1,  # (1 + 1/log2 3) / (1 + 1/log2 3)
                (1 / L3) / (1 + 1 / L3 + 1 / 2 + 1 / L5),
                0,
                (1 + 3 / L3) / (1 + 1 / L3 + 1 / 2 + 1 / L5),
            ],
        ),
    ],
)
def test_values_by_hand(name, k, expected):
    actual = metrics.METRICS[name](HITS, POSITIVES, k)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_cut_off_beyond_the_ranked_places():
    np.testing.assert_allclose(metrics.recall(HITS, POSITIVES, 9), [1, 1 / 5, 0, 1])
    np.testing.assert_allclose(metrics.ndcg_xir(HITS, POSITIVES, 9)[2:3], [0])


def test_means_leave_out_queries_without_positives():
    means, half_widths = metrics.mean_metrics(
        np.vstack([HITS, [[True] * 4]]), np.append(POSITIVES, 0), (1, 4)
    )
    assert means["recall@4"] == pytest.approx((1 + 0.2 + 0 + 1) / 4)
    values = np.array([1, 0.2, 0, 1])
    spread = np.sqrt(((values - values.mean()) ** 2).sum() / 3)
    assert half_widths["recall@4"] == pytest.approx(3.182446 * spread / 2)  # ν = 3
    assert set(means) == {f"{name}@{k}" for name in metrics.METRICS for k in (1, 4)}


def test_one_query_has_no_interval():
    _, half_widths = metrics.mean_metrics(HITS[:1], POSITIVES[:1], (2,))
    assert half_widths["recall@2"] == 0


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.mean_metrics(HITS, np.zeros(4, int), (1,))


def test_values_of_another_library():
    """Of rankings and positives drawn at random, each query by ir-measures (trec_eval)."""
    rng = np.random.default_rng(5)
    num_queries, num_candidates, ranked_places = 60, 50, 20
    ranked = np.argsort(rng.random((num_queries, num_candidates)))[:, :ranked_places]
    wanted = rng.random((num_queries, num_candidates)) < rng.random((num_queries, 1)) / 2
    wanted[:, 0] = True  # a query without positives is not measured by either
    qrels = [ir_measures.Qrel(f"{u}", f"{i}", 1) for u, i in np.argwhere(wanted)]
    run = [
        ir_measures.ScoredDoc(f"{u}", f"{i}", float(ranked_places - place))
        for u, row in enumerate(ranked)
        for place, i in enumerate(row)
    ]
    hits = np.take_along_axis(wanted, ranked, axis=1)
    names = {"recall": "R", "precision": "P", "hit_rate": "Success", "mrr": "RR", "ndcg": "nDCG"}
    for ours, theirs in names.items():
        for k in (1, 5, 20):
            measure = ir_measures.parse_measure(f"{theirs}@{k}")
            expected = np.zeros(num_queries)
            for value in ir_measures.iter_calc([measure], qrels, run):
                expected[int(value.query_id)] = value.value
            actual = metrics.METRICS[ours](hits, wanted.sum(axis=1), k)
            np.testing.assert_allclose(actual, expected, atol=1e-12, err_msg=f"{ours}@{k}")
