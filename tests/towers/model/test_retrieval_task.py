"""`RetrievalTask` where a TFRS model has `tfrs.tasks.Retrieval`."""

import functools
import logging

import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_by

import samplers
from towers import RetrievalTask
from towers.legacy_keras import tf_keras, tfrs

QUERIES, CANDIDATES, DIM = 24, 32, 8


@pytest.fixture(scope="module")
def pairs():
    """Even queries like even candidates, odd ones odd; one pair of some queries is held out."""
    rows = [(q, c) for q in range(QUERIES) for c in range(CANDIDATES) if q % 2 == c % 2]
    return np.array([(q, c) for q, c in rows if not (q % 3 == 0 and c >= CANDIDATES - 2)])


class Model(tfrs.Model):
    """A model as the tutorials of TFRS write it."""

    def __init__(self, make_task, call_arguments):
        super().__init__()
        self.queries = tf_keras.layers.Embedding(QUERIES, DIM)
        self.candidates = tf_keras.layers.Embedding(CANDIDATES, DIM)
        self.task = make_task(self)
        self.call_arguments = call_arguments

    def embed(self, layer, ids):
        return tf.math.l2_normalize(layer(ids), axis=-1)

    def compute_loss(self, inputs, training=False):
        return self.task(
            self.embed(self.queries, inputs["q"]),
            self.embed(self.candidates, inputs["c"]),
            compute_metrics=not training,
            **{name: of(inputs) for name, of in self.call_arguments.items()},
        )


def fit(model, pairs, epochs=25):
    tf_keras.utils.set_random_seed(3)
    rows = tf.data.Dataset.from_tensor_slices({"q": pairs[:, 0], "c": pairs[:, 1]})
    model.compile(optimizer=tf_keras.optimizers.Adam(0.05))
    end = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: model.task.end_epoch())
    rows = rows.shuffle(len(pairs), seed=1).batch(64)
    return model.fit(rows, epochs=epochs, verbose=0, callbacks=[end])


def assert_ranked_first(model, pairs):
    scores = (
        model.embed(model.queries, tf.range(QUERIES)).numpy()
        @ model.embed(model.candidates, tf.range(CANDIDATES)).numpy().T
    )
    scores[pairs[:, 0], pairs[:, 1]] = -np.inf
    for query in range(0, QUERIES, 3):
        assert scores[query].argmax() == CANDIDATES - 2 + query % 2


LONG = pytest.mark.long


@pytest.mark.parametrize("name", ["ssl_pop", pytest.param("bmns", marks=LONG)])
def test_in_batch_methods_with_the_arguments_of_tfrs(pairs, name):
    probability = np.bincount(pairs[:, 1], minlength=CANDIDATES) / len(pairs)
    model = Model(
        lambda model: RetrievalTask(name, temperature=0.2),
        {"candidate_sampling_probability": lambda rows: tf.gather(probability, rows["c"])},
    )
    fit(model, pairs)
    assert_ranked_first(model, pairs)


def model_of(name, temperature=0.2, **options):
    """A model whose task has all that any method needs."""
    ids = {"candidate_ids": lambda rows: rows["c"], "query_ids": lambda rows: rows["q"]}
    return Model(
        lambda model: RetrievalTask(
            name,
            temperature=temperature,
            frequency=np.arange(1, 1 + CANDIDATES),
            num_candidates=CANDIDATES,
            num_queries=QUERIES,
            fingerprints=np.arange(CANDIDATES),
            candidate_encoder=lambda ids: model.embed(model.candidates, ids),
            query_encoder=lambda ids: model.embed(model.queries, ids),
            **options,
        ),
        ids,
    )


@LONG
@pytest.mark.parametrize("name", ["adasir_u", "xir", "sl_at_k", "dns_mn"])
def test_other_methods_with_their_extra_arguments(pairs, name):
    model = model_of(name)
    fit(model, pairs, epochs=50)
    assert_ranked_first(model, pairs)


@pytest.mark.parametrize("name", sorted(samplers.METHODS))
def test_every_method_has_a_gradient_and_remembers_its_step(pairs, name):
    model, rows = model_of(name), {"q": pairs[:16, 0], "c": pairs[:16, 1]}
    with tf.GradientTape() as tape:
        loss = model.compute_loss(rows, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert np.isfinite(loss)
    assert all(np.any(tf.convert_to_tensor(gradient)) for gradient in gradients)
    assert int(model.task.iteration) == 1


# method → options; each remembers something of what it has been trained on
WITH_STATE = {"xir": {"redraw": "drawn"}, "correct_sfx": {}, "adasir_u": {}, "aobpr": {}}


@pytest.mark.parametrize(
    "name", ["aobpr", *(pytest.param(name, marks=LONG) for name in WITH_STATE if name != "aobpr")]
)
def test_evaluation_changes_nothing(pairs, name):
    """Although `compute_loss` does not say which of training and evaluation it is called in."""
    model = model_of(name, temperature=1.0, **WITH_STATE[name])
    model.compile(optimizer=tf_keras.optimizers.SGD(0.5))
    rows = tf.data.Dataset.from_tensor_slices({"q": pairs[:, 0], "c": pairs[:, 1]}).batch(64)
    model.fit(rows, epochs=2, verbose=0, validation_data=rows.take(2))
    assert int(model.task.iteration) == 2 * len(rows)
    kept = [v for v in model.task.method.variables if not v.name.startswith("drawn:")]
    kept += [*model.trainable_variables, model.task.iteration]
    before = [variable.numpy() for variable in kept]
    model.evaluate(rows.take(2), verbose=0)
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def embeddings(rows=6, seed=0):
    rng = np.random.default_rng(seed)
    return (tf.constant(rng.normal(size=(rows, 4)), tf.float32) for _ in range(2))


def test_ssl_pop_is_the_loss_of_tfrs():
    q, c = embeddings()
    probability = tf.constant([0.1, 0.2, 0.05, 0.3, 0.25, 0.1])
    arguments = {
        "candidate_sampling_probability": probability,
        "sample_weight": tf.range(6, dtype=tf.float32),
    }
    ours = RetrievalTask("ssl_pop", temperature=0.5)(q, c, **arguments)
    stock = tfrs.tasks.Retrieval(temperature=0.5)(q, c, **arguments)
    assert float(ours) == pytest.approx(float(stock), rel=1e-5)


def test_remove_accidental_hits_is_that_of_tfrs():
    q, c = embeddings()
    ids = tf.constant([1, 2, 1, 3, 2, 4])
    ours = RetrievalTask("ssl", remove_accidental_hits=True)(q, c, candidate_ids=ids)
    stock = tfrs.tasks.Retrieval(remove_accidental_hits=True)(q, c, candidate_ids=ids)
    assert float(ours) == pytest.approx(float(stock), rel=1e-5)
    text = tf.strings.as_string(ids)
    again = RetrievalTask("ssl", remove_accidental_hits=True)(q, c, candidate_ids=text)
    assert float(again) == pytest.approx(float(stock), rel=1e-5)


@pytest.mark.parametrize("name", ["ssl", "adasir_u"])
def test_float64_embeddings_are_trained_in_float32(name):
    values = np.random.default_rng(0).normal(size=(6, 4))
    ids = tf.range(6)

    def loss_and_gradient(dtype):
        table = tf.Variable(values, dtype=dtype)
        embed = functools.partial(tf.gather, table)
        given = {"num_candidates": 6, "num_queries": 6} if name != "ssl" else {}
        task = RetrievalTask(name, candidate_encoder=embed, query_encoder=embed, **given)
        with tf.GradientTape() as tape:
            loss = task(embed(ids), embed(ids[::-1]), candidate_ids=ids[::-1], query_ids=ids)
        gradient = tf.convert_to_tensor(tape.gradient(loss, table))
        assert gradient.dtype == dtype
        return [float(loss), *gradient.numpy().ravel()]

    assert loss_and_gradient(tf.float64) == pytest.approx(loss_and_gradient(tf.float32), rel=1e-5)


def test_what_queries_have_seen_is_left_out():
    q, c = embeddings()
    ids = tf.constant([0, 1, 2, 3, 4, 5], tf.int64)
    chosen = [[u, (u + 2) % 6] for u in range(6)]
    loss = RetrievalTask("ssl", seen=seen_by(chosen))(q, c, candidate_ids=ids, query_ids=ids)
    scores = q.numpy().astype(float) @ c.numpy().T
    expected = 0.0
    for u in range(6):
        kept = [j for j in range(6) if j == u or j not in chosen[u]]
        expected += np.log(np.exp(scores[u, kept]).sum()) - scores[u, u]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_metrics_are_those_of_tfrs():
    # Whole numbers: TFRS compares a dot product with a matrix product, which may round apart.
    rng = np.random.default_rng(0)
    q, c = (tf.constant(rng.integers(-3, 4, size=(6, 4)), tf.float32) for _ in range(2))
    corpus = tf.data.Dataset.from_tensor_slices(c).batch(2)
    weight = tf.constant([1.0, 2.0, 0.5, 3.0, 1.0, 0.25])

    def values(task):
        loss = task(q, c, sample_weight=weight)
        task(q, c, compute_metrics=False, compute_batch_metrics=False)
        return {metric.name: float(metric.result()) for metric in task.metrics}, float(loss)

    def metrics():
        return {
            "temperature": 0.5,
            "metrics": tfrs.metrics.FactorizedTopK(corpus, ks=[1, 3]),
            "batch_metrics": [
                tf_keras.metrics.TopKCategoricalAccuracy(k=2, name="in_batch"),
                tf_keras.metrics.CategoricalCrossentropy(from_logits=True, name="entropy"),
            ],
        }

    stock, _ = values(tfrs.tasks.Retrieval(**metrics()))
    ours, _ = values(RetrievalTask("ssl", **metrics()))
    assert len(ours) == 4
    assert ours == pytest.approx(stock, rel=1e-6)
    assert 0 < ours["in_batch"] < 1
    counted, loss = values(RetrievalTask("ssl", loss_metrics=[tf_keras.metrics.Sum(name="sum")]))
    assert counted["sum"] > loss  # of both calls


@pytest.mark.parametrize("autograph", [True, False])
def test_a_step_says_nothing_and_needs_no_autograph(autograph, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    q, c = embeddings()
    corpus = tf.data.Dataset.from_tensor_slices(c).batch(2)
    task = RetrievalTask("ssl", metrics=tfrs.metrics.FactorizedTopK(corpus, ks=[1]))
    step = tf.function(lambda q, c: task(q, c, training=True), autograph=autograph)
    assert float(step(q, c)) == pytest.approx(float(RetrievalTask("ssl")(q, c)))
    assert int(task.iteration) == 1
    assert "AutoGraph" not in caplog.text


def test_probabilities_under_the_floor_of_tfrs_are_corrected_all_the_same():
    q, c = embeddings()
    rare = tf.constant([1e-9] * 6)
    ours = RetrievalTask("ssl_pop")(q, c, candidate_sampling_probability=rare / 1e3)
    same = RetrievalTask("ssl_pop")(q, c, candidate_sampling_probability=rare)
    mixed = tf.constant([1e-9, 1e-7, 1e-8, 1e-9, 1e-7, 1e-8])
    other = RetrievalTask("ssl_pop")(q, c, candidate_sampling_probability=mixed)
    assert float(ours) == pytest.approx(float(same), rel=1e-5)
    assert float(other) != pytest.approx(float(same), rel=1e-2)


@pytest.mark.parametrize(
    ("name", "construction", "call", "missing"),
    [
        ("ssl_pop", {}, {}, "needs frequency="),
        ("ssl", {"remove_accidental_hits": True}, {}, "candidate_ids= at the call"),
        ("mns", {"frequency": np.ones(9), "num_candidates": 9}, {"c": 1}, "candidate_encoder="),
        ("dns", {"num_candidates": 9}, {"c": 1}, "candidate_encoder="),
        ("dns", {}, {"c": 1}, "needs num_candidates="),
        ("adasir_u", {"num_candidates": 9}, {"c": 1}, "needs num_queries="),
        ("adasir_u", {"num_candidates": 9, "num_queries": 9}, {"c": 1}, "query_ids= at the call"),
        ("ssl", {"seen": seen_by([[]])}, {"c": 1}, "query_ids= at the call"),
        ("ssl", {"seen": seen_by([[]])}, {}, "candidate_ids= at the call"),
        ("ssl", {"temperature": 0}, {}, "temperature must be above 0"),
    ],
)
def test_what_is_missing_is_named(name, construction, call, missing):
    q, c = embeddings()
    ids = {"candidate_ids": tf.range(6)} if call else {}
    with pytest.raises(ValueError, match=missing):
        RetrievalTask(name, **construction)(q, c, **ids)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ssl", {"seen": seen_by([[0, 1], [0, 2]])}),
        ("bpr", {"num_candidates": 6, "remove_accidental_hits": True}),
        ("ssl_pop", {"frequency": np.ones(6)}),
    ],
)
def test_text_is_refused_where_ids_are_looked_up(name, given):
    """Its hashes are no dense ids: a mask of what was seen would leave nothing out."""
    q, c = embeddings()
    ids = tf.constant([0, 1, 0, 1, 0, 1])
    task = RetrievalTask(name, candidate_encoder=lambda ids: tf.gather(c, ids), **given)
    assert np.isfinite(task(q, c, candidate_ids=ids, query_ids=ids))
    with pytest.raises(ValueError, match=r"candidate_ids must be dense .* look text up first, got"):
        task(q, c, candidate_ids=tf.strings.as_string(ids), query_ids=ids)


def test_draws_change_from_call_to_call_and_repeat_with_the_seed():
    q, c = embeddings()
    probability = tf.fill([6], 1 / 6)

    def losses(seed):
        task = RetrievalTask("bmns", seed=seed)
        given = {"candidate_sampling_probability": probability, "training": True}
        return [float(task(q, c, **given)) for _ in range(3)]

    assert len(set(losses(1))) == 3
    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
