import numpy as np
import pytest
import tensorflow as tf

import samplers
import towers
from samplers.candidates import Candidates
from samplers.methods.by_name import METHODS
from samplers.methods.method import Method
from samplers.random_numbers import split_seed, step_seed
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.model.optimizers import OPTIMIZERS
from towers.model.two_tower import TwoTower


def batch_of(data, size, seed=0):
    return next(iter(data.train(size, seed=seed)))


def keras_gradients(model, batch):
    """The gradients that stock TFRS would take of `compute_loss`, as dense tensors."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    return loss, [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


class Recording(tf_keras.optimizers.SGD):
    """Keeps the gradients it is given, densely."""

    def apply_gradients(self, grads_and_vars, **kwargs):
        pairs = [(tf.convert_to_tensor(g), v) for g, v in grads_and_vars]
        self.given = [g for g, _ in pairs]
        return super().apply_gradients(pairs, **kwargs)


@pytest.mark.parametrize(("jit_compile", "normalize"), [(False, False), (True, True)])
def test_step_takes_the_gradients_of_compute_loss(data, jit_compile, normalize):
    model = TwoTower(
        data, 4, normalize=normalize, temperature=0.5, jit_compile=jit_compile, init_stddev=1.0
    )
    batch = batch_of(data, 32)
    loss, expected = keras_gradients(model, batch)
    model.compile(optimizer=Recording(0.1), run_eagerly=True)
    assert float(model.train_step(batch)["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for ours, theirs in zip(model.optimizer.given, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("method", "jit_compile"), [("ssl_pop", True), ("dns", False)])
def test_a_step_leaves_out_what_a_query_has_seen(data, method, jit_compile):
    batch, losses = batch_of(data, 32), []
    for wanted in (False, True):
        settings = {"exclude_seen_negatives": wanted, "jit_compile": jit_compile}
        model = TwoTower(data, 4, method, init_stddev=1.0, **settings)
        loss, expected = keras_gradients(model, batch)
        model.compile(optimizer=Recording(0.1), run_eagerly=True)
        losses.append(float(model.train_step(batch)["loss"]))
        assert losses[-1] == pytest.approx(float(loss), rel=1e-5)
        for ours, theirs in zip(model.optimizer.given, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_l2_of_the_rows_of_a_batch(data, reduction):
    """The term of the published code of LightGCN, against a loop over pairs and negatives."""
    batch, size, settings = batch_of(data, 16), 16, {"jit_compile": False, "reduction": reduction}
    batch["valid"] = tf.range(size) < size - 1  # the last row is padding
    gradients = []
    for weight in (0.0, 0.3):
        model = TwoTower(
            *(data, 4, "bpr"), tower="light_gcn", num_negatives=2, batch_l2=weight, **settings
        )
        pairs = samplers.Batch(batch["query_id"], batch["candidate_id"])
        first, _ = split_seed(step_seed(10, model.iteration))
        negatives = model.method.propose(None, pairs, seed=first).ids.numpy()
        tables = [table.numpy() for table in model.trainable_variables]
        model.compile(optimizer=Recording(0.1), run_eagerly=True)
        model.train_step(batch)
        gradients.append(model.optimizer.given)

    assert [len(table) for table in tables] == [data.num_queries, data.num_candidates]
    expected = [np.zeros_like(table, np.float64) for table in tables]
    scale = 0.3 / (size - 1 if reduction == "mean" else 1)
    for b in range(size - 1):
        u = int(batch["query_id"][b])
        expected[0][u] += scale * tables[0][u]
        for j in (int(batch["candidate_id"][b]), *negatives[b]):
            expected[1][j] += scale * tables[1][j]
    for without, with_it, wanted in zip(*gradients, expected, strict=True):
        np.testing.assert_allclose(with_it - without, wanted, rtol=1e-4, atol=1e-6)


def test_seen_is_left_out_by_default_where_the_paper_does(data):
    excludes = {"dns", "dns_mn", "soft_bpr", "softmax_v"}
    assert {name for name, method in METHODS.items() if method.excludes_seen} == excludes
    for method, wanted, expected in (
        *(("dns", None, True), ("dns", False, False)),
        *(("bpr", None, False), ("bpr", True, True)),
    ):
        model = TwoTower(data, 4, method, exclude_seen_negatives=wanted)
        assert (model.method.seen is not None) == expected


def test_scores_are_cosines_over_the_temperature(data):
    model = TwoTower(data, 4, normalize=True, temperature=0.1)
    batch = batch_of(data, 8)
    scores = model(batch).numpy()
    tables = [model.query_tower.table.numpy(), model.candidate_tower.table.numpy()]
    q, c = tables[0][batch["query_id"].numpy()], tables[1][batch["candidate_id"].numpy()]
    cosine = (q * c).sum(1) / np.linalg.norm(q, axis=1) / np.linalg.norm(c, axis=1)
    np.testing.assert_allclose(scores, cosine / 0.1, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(model.candidate_embeddings(), axis=1), 1, rtol=1e-5)


def test_loss_is_the_mean_or_sum_of_the_method(data):
    batch = batch_of(data, 16)
    mean, total = (TwoTower(data, 4, reduction=r, seed=1) for r in ("mean", "sum"))
    assert float(total.compute_loss(batch)) == pytest.approx(16 * float(mean.compute_loss(batch)))


def test_padding_is_not_averaged_over(data):
    model = TwoTower(data, 4)
    batch = batch_of(data, 16)
    padded = {name: tf.concat([ids, ids[:4]], axis=0) for name, ids in batch.items()}
    padded["valid"] = tf.range(20) < 16
    expected = float(model.compute_loss(batch))
    assert float(model.compute_loss(padded)) == pytest.approx(expected, rel=1e-5)


def test_short_batches_down_to_one_row(data):
    model = TwoTower(data, 4, jit_compile=True)
    model.compile(optimizer=towers.CoupledAdam(0.01))
    rows = data.num_rows("train")
    size = next(size for size in range(50, rows) if rows % size == 1)
    history = model.fit(data.train(size), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert int(model.iteration) == int(model.optimizer.iterations) == -(-rows // size)


@pytest.mark.parametrize(
    "settings",
    [{"tower": "fism"}, {"method": "adasir_u"}, {"exclude_seen_negatives": True}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_a_plain_data_set_has_whole_numbers_of_any_size(data, settings):
    names, losses = ("query_id", "candidate_id"), []
    model = TwoTower(data, 4, jit_compile=False, **settings)
    for dtype in (tf.int64, tf.int32, tf.uint16):
        batch = {name: tf.cast(data.arrays("train")[name][:40], dtype) for name in names}
        losses.append(float(model.compute_loss(batch)))
    assert losses == losses[:1] * 3
    model.compile(optimizer=towers.CoupledAdam(0.01))
    model.fit(tf.data.Dataset.from_tensors(batch), verbose=0)
    batch["candidate_id"] = tf.strings.as_string(batch["candidate_id"])
    with pytest.raises(ValueError, match=r"candidate_id must be whole numbers.*encode_.*string"):
        model.fit(tf.data.Dataset.from_tensors(batch), verbose=0)


def test_counters_stay_in_step_with_the_data_in_a_part_of_an_epoch(data):
    model = TwoTower(data, 4, jit_compile=False)
    model.compile(optimizer=towers.CoupledAdam(0.01))
    steps = data.steps_per_epoch(64)
    model.fit(data.train(64, first_step=steps - 3), epochs=1, verbose=0)  # of unknown length
    assert int(model.iteration) == int(model.optimizer.iterations) == 3


def test_same_seed_same_weights_another_seed_others(data):
    def weights(seed):
        model = TwoTower(data, 4, seed=seed, jit_compile=False)
        model.compile(optimizer=towers.CoupledAdam(0.01, 1e-5), run_eagerly=True)
        for batch in data.train(64, seed=seed).take(3):
            model.train_step(batch)
        return model.query_embeddings().numpy()

    np.testing.assert_array_equal(weights(1), weights(1))
    assert not np.allclose(weights(1), weights(2))


@pytest.mark.long
def test_several_steps_an_execution_train_to_the_same_weights(data):
    def trained(steps):
        model = TwoTower(data, 4, "xir", jit_compile=False)
        model.compile(optimizer=towers.CoupledAdam(0.01), steps_per_execution=steps)
        history = model.fit(data.train(128), epochs=2, verbose=0).history
        assert int(model.iteration) == 2 * data.steps_per_epoch(128)
        return [*history["loss"], *(v.numpy() for v in model.variables)]

    assert data.steps_per_epoch(128) % 4  # so that an execution is cut short
    for expected, value in zip(trained(1), trained(4), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "options"), [("xir", {"redraw": "drawn"}), ("adasir_u", {}), ("aobpr", {})]
)
def test_evaluation_changes_nothing(data, method, options):
    def trained(evaluated):
        model = TwoTower(data, 4, method, jit_compile=False, **options)
        model.compile(optimizer=towers.CoupledAdam(0.01))
        rows, held_out = data.train(64), data.train(64).take(2) if evaluated else None
        model.fit(rows, epochs=1, verbose=0, validation_data=held_out)
        before = int(model.iteration)
        if evaluated:
            model.evaluate(held_out, verbose=0)
        assert int(model.iteration) == before
        model.fit(rows, epochs=1, verbose=0)
        return [model.query_embeddings(), model.candidate_embeddings()]

    for expected, value in zip(trained(False), trained(True), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_initial_tables(data):
    model = TwoTower(data, 200, init_stddev=0.5)
    for tower in (model.query_tower, model.candidate_tower):
        assert np.std(tower.table) == pytest.approx(0.5, rel=0.02)
    assert not np.allclose(model.query_tower.table[:5], model.candidate_tower.table[:5])


def test_notebook_use(data):
    model = towers.TwoTower(data, dim=8, method="ssl_pop", normalize=True, temperature=0.1)
    model.compile(optimizer=tf_keras.optimizers.Adam(0.05))
    history = model.fit(
        data.train(batch_size=128),
        epochs=3,
        verbose=0,
        callbacks=[
            towers.FullCorpusMetrics(data, ks=(5,)),
            tf_keras.callbacks.EarlyStopping("val_recall@5", mode="max", patience=5),
        ],
    )
    assert set(history.history) == {"loss", "val_recall@5", "val_ndcg@5"}
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_the_names_of_the_command_line(data, name):
    model = TwoTower(data, 4, jit_compile=False)
    model.compile(optimizer=name)
    assert type(model.optimizer) is OPTIMIZERS[name]
    before = model.candidate_tower.table.numpy()
    model.fit(data.train(128).take(2), verbose=0)
    assert (model.candidate_tower.table.numpy() != before).any()
    model.compile(optimizer="sgd")
    assert isinstance(model.optimizer, tf_keras.optimizers.SGD)


def test_metrics_fall_back_to_test_without_a_validation_part(checkerboard):
    model = TwoTower(checkerboard, 4, jit_compile=False)
    model.compile(optimizer=tf_keras.optimizers.Adam())
    callback = towers.FullCorpusMetrics(checkerboard, ks=(1,), metrics=("mrr",))
    history = model.fit(checkerboard.train(32), verbose=0, callbacks=[callback])
    assert set(history.history) == {"loss", "test_mrr@1"}


# On a board this small the hardest of many draws is the pair that is held out: with dot products,
# or where what a query has seen is no negative, half of the methods push it down; else all of them
# rank it first, but for one query of twenty where only the hardest draw counts.
HARDEST = ("dns", "dns_mn", "soft_bpr")


@pytest.mark.parametrize(
    ("method", "normalize"),
    [
        ("ssl_pop", True),
        pytest.param("ssl_pop", False, marks=pytest.mark.long),
        *(
            pytest.param(name, True, marks=pytest.mark.long)
            for name in sorted(set(samplers.METHODS) - {"ssl_pop"})
        ),
    ],
)
def test_checkerboard(checkerboard, method, normalize):
    """Even queries like even candidates: the pair held out of each query must rank first."""
    model = TwoTower(
        checkerboard,
        8,
        method=method,
        normalize=normalize,
        temperature=0.2 if normalize else 1.0,
        exclude_seen_negatives=False,
        jit_compile=False,
    )
    model.compile(optimizer=towers.CoupledAdam(0.05))
    epochs = 30 if method in HARDEST else 20
    model.fit(checkerboard.train(60), epochs=epochs, verbose=0)
    means, _ = HeldOut(checkerboard, "test").measure(
        model.query_embeddings().numpy(), model.candidate_embeddings().numpy(), (1,)
    )
    assert means["recall@1"] >= (0.95 if method in HARDEST else 1)


class Probe(Method):
    """Proposes fixed candidates, looks at the corpus, and counts its calls."""

    def __post_init__(self):
        super().__post_init__()
        self.updates = tf.Variable(0, trainable=False)
        self.epochs = tf.Variable(0, trainable=False)
        self.seed = tf.Variable([0, 0], trainable=False, dtype=tf.int64)

    def refresh(self, encoders, *, seed):
        self.seed.assign(tf.cast(seed, tf.int64))

    def propose(self, query, batch, *, seed):
        ids = tf.constant([[1, 2, 2]], tf.int64) + 0 * batch.query_ids[:, None]
        return Candidates(ids, tf.zeros_like(ids, tf.float32))

    def loss(self, encoders, batch, proposed, *, seed):
        drawn = encoders.candidates(proposed.ids)  # [B, 3, D]
        scores = tf.einsum("bd,bnd->bn", encoders.query, drawn)
        everything = tf.matmul(encoders.query, encoders.corpus(), transpose_b=True)
        one = tf.reduce_sum(encoders.query * encoders.positive, axis=1)
        noise = tf.random.stateless_uniform([], seed)  # another number under XLA
        return tf.reduce_logsumexp(scores, 1) + tf.reduce_logsumexp(everything, 1) - one + noise

    def update(self, batch):
        self.updates.assign_add(1)

    def end_epoch(self, encoders):
        assert encoders.query.shape == [0, 4]
        assert encoders.corpus().shape[1] == 4
        assert encoders.queries(tf.constant([0])).shape == [1, 4]
        self.epochs.assign_add(1)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_methods_may_propose_look_at_the_corpus_and_keep_state(data, monkeypatch, jit_compile):
    monkeypatch.setitem(samplers.METHODS, "probe", Probe)
    model = TwoTower(data, 4, method="probe", init_stddev=1.0, jit_compile=jit_compile)
    batch = batch_of(data, 32)
    _, expected = keras_gradients(model, batch)
    model.compile(optimizer=Recording(0.0), run_eagerly=True)
    model.train_step(batch)
    for ours, theirs in zip(model.optimizer.given, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    model.compile(optimizer=towers.CoupledAdam(0.01))
    model.fit(data.train(256), epochs=2, verbose=0)
    assert int(model.method.updates) == 1 + 2 * data.steps_per_epoch(256)
    assert int(model.method.epochs) == 2


def test_every_step_has_a_seed_of_its_own(data, monkeypatch):
    monkeypatch.setitem(samplers.METHODS, "probe", Probe)

    def seeds(seed):
        model = TwoTower(data, 4, method="probe", seed=seed, jit_compile=False)
        model.compile(optimizer=towers.CoupledAdam(0.01), run_eagerly=True)
        batch, met = batch_of(data, 8), []
        for _ in range(2):
            model.train_step(batch)
            met.append(tuple(model.method.seed.numpy().tolist()))
        return met

    first = seeds(1)
    assert seeds(1) == first
    assert len({*first, *seeds(2)}) == 4


def test_mixed_precision(data):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = TwoTower(data, 8, normalize=True, temperature=0.1, jit_compile=False)
        model.compile(optimizer=towers.CoupledAdam(0.05))
        losses = model.fit(data.train(256), epochs=3, verbose=0).history["loss"]
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert losses[-1] < losses[0]
    assert model.query_tower.table.dtype == tf.float32
    assert model.query_embeddings().dtype == tf.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": 8.0}, "dim must be a number without decimals, got 8.0"),
        ({"temperature": "0.1"}, "temperature must be a number, got '0.1'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"init_stddev": -0.1}, "init_stddev must be at least 0"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"method": "ssl_pops"}, "Did you mean 'ssl_pop'"),
        ({"method": ["ssl"]}, r"method must be one of adasir_p, .* got \['ssl'\]"),
        ({"method": None}, "method must be one of adasir_p, .* got None"),
        ({"popularity_power": "0.1"}, "popularity_power must be a number, got '0.1'"),
        ({"popularity_power": float("nan")}, "popularity_power must be finite, got nan"),
        ({"positive_twise": True}, "Did you mean 'positive_twice'"),
    ],
)
def test_wrong_arguments_are_errors(data, options, text):
    with pytest.raises(ValueError, match=text):
        TwoTower(data, **options)
