import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_by, seen_hits

import samplers
from samplers.methods.by_name import build
from samplers.methods.full_softmax import SoftTargets

SEED = tf.constant([3, 4], tf.int64)
NONE = -1


@pytest.mark.parametrize(("with_seen", "block_size"), [(False, None), (True, None), (True, 4)])
def test_full_softmax_equals_its_equation(problem, with_seen, block_size):
    p = problem(columns=9, unseen=True)
    ids = p.batch.candidate_ids.numpy()
    seen = np.random.default_rng(1).integers(-1, 9, (7, 3))
    seen[:, 0] = ids  # the positive is seen, and stays in the sum
    batch = p.batch._replace(seen=seen_hits(seen, range(9))) if with_seen else p.batch

    def losses(query, positive, corpus):
        result = np.zeros(7)
        for b in range(7):
            left_out = set(seen[b]) - {ids[b]} if with_seen else set()
            total = sum(np.exp(query[b] @ corpus[j]) for j in range(9) if j not in left_out)
            result[b] = np.log(total) - query[b] @ positive[b]
        return result

    method = build("full_softmax", block_size=block_size)
    p.check(method, losses, batch=batch)


# Queries 0 to 3 chose 2, 5, 1 and 3 of 9 candidates; the teacher ranks nothing for query 2.
CHOSEN = [[0, 4], [1, 2, 3, 7, 8], [5], [0, 1, 6]]
TAUGHT = [[7, 3, 1], [0, 5, NONE], [NONE, NONE, NONE], [8, 2, 4]]
SCORES = [[2.0, 1.0, 0.5], [3.0, 3.0, -np.inf], [-np.inf] * 3, [0.1, 0.0, -4.0]]


def targets(taught=TAUGHT, scores=SCORES):
    sizes = [len(some) for some in CHOSEN]
    return SoftTargets(
        np.array(taught, np.int32),
        np.array(scores, np.float32),
        np.concatenate(CHOSEN).astype(np.int32),
        np.concatenate([[0], np.cumsum(sizes)]),
    )


def dense(query, *, weight, temperature):
    """t_u of all nine candidates, as it is defined."""
    taught = {j: s for j, s in zip(TAUGHT[query], SCORES[query], strict=True) if j != NONE}
    share = weight if taught else 0.0
    result = np.zeros(9)
    result[CHOSEN[query]] += (1 - share) / len(CHOSEN[query])
    total = sum(np.exp(s / temperature) for s in taught.values())
    for j, s in taught.items():
        result[j] += share * np.exp(s / temperature) / total
    return result


def drawn(queries, **options):
    """t_u of all nine candidates, as the method proposes it."""
    method = build("full_softmax", targets=targets(), **options)
    ids = tf.constant(queries, tf.int64)
    found = method.propose(tf.zeros([len(queries), 3]), samplers.Batch(ids, ids), seed=SEED)
    result = np.zeros((len(queries), 9))
    weights = np.exp(found.log_q.numpy())
    for row in range(len(queries)):
        np.add.at(result[row], found.ids.numpy()[row], weights[row])
    return result


@pytest.mark.parametrize("temperature", [0.4, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_targets_are_what_was_chosen_and_what_the_teacher_ranks(weight, temperature):
    options = {"teacher_weight": weight, "teacher_temperature": temperature, "num_chosen": 5}
    expected = [dense(u, weight=weight, temperature=temperature) for u in (3, 0, 2, 1, 0)]
    np.testing.assert_allclose(drawn([3, 0, 2, 1, 0], **options), expected, atol=1e-6)


def test_of_many_chosen_a_step_looks_at_some_and_all_are_as_likely():
    draws = drawn([1] * 3000, teacher_weight=0.3, teacher_temperature=1.0, num_chosen=2)
    assert set(np.count_nonzero(draws[:, CHOSEN[1]], axis=1)) == {2}
    np.testing.assert_allclose(draws.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        draws.mean(axis=0), dense(1, weight=0.3, temperature=1.0), atol=0.012
    )


@pytest.mark.parametrize(
    ("weight", "compiled", "block_size"), [(0.4, None, 4), (0.4, True, None), (1.0, None, 4)]
)
def test_full_softmax_with_a_teacher_equals_its_equation(weight, compiled, block_size):
    rng = np.random.default_rng(5)
    query = tf.Variable(rng.normal(size=(5, 3)).astype(np.float32))
    corpus = tf.Variable(rng.normal(size=(9, 3)).astype(np.float32))
    ids = np.array([3, 0, 2, 1, 0])
    # `seen` holds what was chosen: sought, and so never left out, unless the teacher is all.
    options = {"seen": seen_by(CHOSEN), "teacher_weight": weight, "block_size": block_size}
    method = build("full_softmax", targets=targets(), **options)
    batch = samplers.Batch(
        tf.constant(ids),
        tf.constant([CHOSEN[u][0] for u in ids]),
        weight=tf.constant([1.0, 2.0, 0.5, 1.0, 0.0]),
    )

    def summed(u):
        alone = weight == 1 and u != 2  # for which the teacher ranks nothing
        return [j for j in range(9) if not (alone and j in CHOSEN[u])]

    def losses(query, corpus):
        return tf.stack(
            [
                batch.weight[b]
                * (
                    tf.reduce_logsumexp(tf.linalg.matvec(tf.gather(corpus, summed(u)), query[b]))
                    - tf.tensordot(
                        dense(u, weight=weight, temperature=0.4).astype(np.float32),
                        tf.linalg.matvec(corpus, query[b]),
                        1,
                    )
                )
                for b, u in enumerate(ids)
            ]
        )

    def of_the_method():
        with tf.GradientTape() as tape:
            without_the_positive = query * (0.0 if weight == 1 else 1.0)
            encoders = samplers.Encoders(
                query=without_the_positive,
                positive=tf.gather(corpus, batch.candidate_ids),
                candidates=lambda wanted: tf.gather(corpus, wanted),
                corpus=lambda: tf.identity(corpus),
                queries=lambda wanted: tf.identity(query),
            )
            found = method(encoders, batch, seed=SEED)
        by_query, by_corpus = tape.gradient(found, [query, corpus])
        return found, [tf.convert_to_tensor(by_query), tf.convert_to_tensor(by_corpus)]

    with tf.GradientTape() as tape:
        expected = losses(query, corpus)
    gradients = tape.gradient(expected, [query, corpus])
    found, by = (tf.function(of_the_method, jit_compile=True) if compiled else of_the_method)()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(by, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_is_least_where_the_student_is_the_target():
    method = build("full_softmax", targets=targets(), teacher_weight=0.4, teacher_temperature=1.0)
    wanted = np.array([dense(u, weight=0.4, temperature=1.0) for u in range(4)])
    # Candidates are unit vectors: the scores of a query are its coordinates.
    query = tf.constant(np.log(np.maximum(wanted, 1e-9)).astype(np.float32))
    batch = samplers.Batch(tf.range(4, dtype=tf.int64), tf.constant([0, 1, 5, 0], tf.int64))
    with tf.GradientTape() as tape:
        tape.watch(query)
        encoders = samplers.Encoders(
            query=query,
            positive=tf.gather(tf.eye(9), batch.candidate_ids),
            candidates=lambda ids: tf.gather(tf.eye(9), ids),
            corpus=lambda: tf.eye(9),
        )
        losses = method(encoders, batch, seed=SEED)
    np.testing.assert_allclose(tape.gradient(losses, query), np.zeros((4, 9)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ssl", {}, "targets go with the method full_softmax alone, got ssl"),
        ("full_softmax", {"teacher_weight": 1.1}, "teacher_weight must be between 0 and 1"),
        ("full_softmax", {"teacher_temperature": 0}, "teacher_temperature must be above 0"),
        ("full_softmax", {"num_chosen": 0}, "num_chosen must be at least 1"),
        ("full_softmax", {"targets": targets(scores=[[1.0]] * 4)}, r"targets must have ids"),
    ],
)
def test_what_does_not_go_is_told(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, **{"targets": targets()} | options)
