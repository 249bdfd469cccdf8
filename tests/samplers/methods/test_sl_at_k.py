import numpy as np
import pytest
import tensorflow as tf

import samplers
from samplers.methods.by_name import build

SEED = tf.constant([1, 2], tf.int64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def method_of(**options):
    return build(
        "sl_at_k",
        **{"num_candidates": 9, "num_queries": 6, "num_negatives": 5, "k": 2} | options,
    )


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("with_positive", [False, True])
def test_equals_its_equation(problem, with_positive, gradient, block_size):
    p = problem()
    thresholds = np.linspace(-2, 2, 6)
    method = method_of(
        weight_temperature=2.0,
        positive_in_sum=with_positive,
        weight_gradient=gradient,
        block_size=block_size,
    )
    method.threshold.assign(thresholds)
    beta = thresholds[p.batch.query_ids.numpy()]
    constant = sigmoid(((p.query * p.positive).sum(1).astype(float) - beta) / 2)

    def losses(query, positive, negatives):
        result = np.zeros(7)
        for b in range(7):
            own = query[b] @ positive[b]
            total = sum(np.exp(query[b] @ v - own) for v in negatives) + with_positive
            weight = sigmoid((own - beta[b]) / 2) if gradient else constant[b]
            result[b] = weight * np.log(total)
        return result

    proposed = method.propose(None, p.batch, seed=SEED)
    p.check(method, losses, proposed)


def test_masks_padding_and_weights(problem):
    p = problem()
    method = method_of(mask_accidental_hits=True)
    proposed = method.propose(None, p.batch, seed=SEED)
    ids, drawn = p.batch.candidate_ids.numpy(), proposed.ids.numpy()
    batch = p.batch._replace(valid=tf.range(7) < 6, weight=tf.linspace(1.0, 2.0, 7))

    def losses(query, positive, negatives):  # all weights are 1 before the first estimate
        result = np.zeros(7)
        for b in range(6):
            own = query[b] @ positive[b]
            pairs = zip(drawn, negatives, strict=True)
            total = sum(np.exp(query[b] @ v - own) for j, v in pairs if j != ids[b])
            result[b] = np.log(1 + total)
        return result * np.linspace(1, 2, 7)

    p.check(method, losses, proposed, batch=batch)


def towers(queries, table):
    nothing = tf.zeros([0, 3])
    return samplers.Encoders(
        nothing,
        nothing,
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: tf.constant(table),
        queries=lambda ids: tf.gather(queries, ids),
    )


def test_thresholds_are_the_kth_best_scores_every_few_epochs():
    rng = np.random.default_rng(0)
    queries, table = rng.normal(size=(6, 3)), rng.normal(size=(9, 3))
    method = method_of(refresh_epochs=2)
    assert np.isneginf(method.threshold).all()
    expected = np.sort(queries @ table.T, axis=1)[:, -2]
    method.end_epoch(towers(queries, table))
    np.testing.assert_allclose(method.threshold, expected, rtol=1e-5)
    method.end_epoch(towers(2 * queries, table))  # not yet again
    np.testing.assert_allclose(method.threshold, expected, rtol=1e-5)
    method.end_epoch(towers(3 * queries, table))
    np.testing.assert_allclose(method.threshold, 3 * expected, rtol=1e-5)


def test_thresholds_from_a_part_of_the_corpus_are_near_those_from_all():
    rng = np.random.default_rng(1)
    queries, table = rng.normal(size=(1500, 3)), rng.normal(size=(20_000, 3))
    sizes = {"num_candidates": 20_000, "num_queries": 1500, "k": 200}
    part, whole = method_of(**sizes, num_estimated=4000), method_of(**sizes)
    for method in (part, whole):
        method.end_epoch(towers(queries, table))
    np.testing.assert_allclose(part.threshold, whole.threshold, rtol=0.15)


def test_thresholds_survive_a_checkpoint(tmp_path):
    rng = np.random.default_rng(2)
    encoders = towers(rng.normal(size=(6, 3)), rng.normal(size=(9, 3)))
    method, other = method_of(), method_of()
    method.end_epoch(encoders)
    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    tf.train.Checkpoint(method=other).read(path).assert_consumed()
    np.testing.assert_array_equal(other.threshold, method.threshold)
    assert int(other.epoch) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 10}, "k must be at most the size of the corpus, 9, got 10"),
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"refresh_epochs": 0}, "refresh_epochs must be at least 1"),
        ({"num_estimated": 0}, "num_estimated must be at least 1"),
        ({"weight_temperature": 0.0}, "weight_temperature must be above 0"),
        ({"num_queries": None}, "needs num_queries="),
    ],
)
def test_wrong_arguments_are_errors(options, text):
    with pytest.raises(ValueError, match=text):
        method_of(**options)


def test_missing_query_embeddings_are_named():
    with pytest.raises(ValueError, match=r"sl_at_k needs Encoders\.queries"):
        method_of().end_epoch(towers(np.zeros((6, 3)), np.zeros((9, 3)))._replace(queries=None))
