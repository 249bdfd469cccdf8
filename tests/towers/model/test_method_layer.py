"""Methods in a model of Keras 3: training, and the state among the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import samplers
from towers import MethodLayer

QUERIES, CANDIDATES, DIM, BATCH = 24, 32, 8, 64
PAIRS = np.array([(q, c) for q in range(QUERIES) for c in range(CANDIDATES) if q % 2 == c % 2])


def build(name, num_candidates=CANDIDATES):
    return samplers.build(
        name,
        frequency=np.bincount(PAIRS[:, 1], minlength=num_candidates),
        num_candidates=num_candidates,
        num_queries=QUERIES,
    )


class Model(keras.Model):
    """Two tables and a method, trained by the stock step of Keras."""

    def __init__(self, method):
        super().__init__()
        self.queries = keras.layers.Embedding(QUERIES, DIM)
        self.candidates = keras.layers.Embedding(CANDIDATES, DIM)
        self.task = MethodLayer(method, self.embed_candidates, self.embed_queries, seed=5)

    def embed_queries(self, ids):
        return keras.ops.normalize(self.queries(ids), axis=-1) / 0.2

    def embed_candidates(self, ids):
        return keras.ops.normalize(self.candidates(ids), axis=-1)

    def call(self, rows):
        return self.embed_queries(rows["q"]), self.embed_candidates(rows["c"])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        ids = {"query_ids": x["q"], "candidate_ids": x["c"]}
        return keras.ops.mean(self.task(*y_pred, **ids, training=training))


def rows():
    """Six shuffled batches, the same in each pass."""
    order = np.random.default_rng(1).permutation(len(PAIRS))
    columns = {"q": PAIRS[order, 0], "c": PAIRS[order, 1]}
    return tf.data.Dataset.from_tensor_slices(columns).batch(BATCH, drop_remainder=True)


def new_model(name):
    keras.utils.set_random_seed(3)
    model = Model(build(name))
    model({"q": tf.constant([0]), "c": tf.constant([0])})  # makes the tables
    model.compile(optimizer=keras.optimizers.Adam(0.05))
    model.optimizer.build(model.trainable_variables)
    return model


def state(model):
    """What a step writes for later ones; `counted` and its ids are what it writes for itself."""
    method = model.task.method
    own = [getattr(getattr(method, "cache", None), "ids", None)]
    counted = {id(variable) for variable in (*method.counted, *own)}
    kept = [variable for variable in method.variables if id(variable) not in counted]
    return [variable.numpy() for variable in (model.task.iteration, *kept)]


# One with counts of a cache, and one with pools that `refresh` fills.
@pytest.mark.parametrize("name", ["xir", pytest.param("adasir_w", marks=pytest.mark.long)])
def test_a_run_that_goes_on_from_saved_weights_is_that_of_one_without_a_break(name, tmp_path):
    whole = new_model(name)
    losses = whole.fit(rows(), epochs=2, verbose=0).history["loss"]
    begun = new_model(name)
    begun.fit(rows(), epochs=1, verbose=0)
    begun.save_weights(tmp_path / "x.weights.h5")
    resumed = new_model(name)
    resumed.load_weights(tmp_path / "x.weights.h5")
    assert int(resumed.task.iteration) == len(PAIRS) // BATCH
    for saved, loaded in zip(state(begun), state(resumed), strict=True):
        np.testing.assert_array_equal(saved, loaded)
    assert resumed.fit(rows(), epochs=1, verbose=0).history["loss"] == pytest.approx(
        losses[1:], rel=1e-5
    )
    for one, other in zip(state(whole), state(resumed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    np.testing.assert_allclose(
        whole.queries.embeddings, resumed.queries.embeddings, rtol=1e-3, atol=1e-4
    )


@pytest.fixture(scope="module")
def trained():
    model = new_model("xir")
    model.fit(rows(), epochs=3, verbose=0)
    return model


def test_it_learns_and_an_evaluation_leaves_the_state_alone(trained):
    scores = trained.embed_queries(tf.range(QUERIES)) @ tf.transpose(
        trained.embed_candidates(tf.range(CANDIDATES))
    )
    scores = scores.numpy()
    same = np.arange(QUERIES)[:, None] % 2 == np.arange(CANDIDATES) % 2
    assert scores[same].mean() > scores[~same].mean() + 1
    before = state(trained)
    assert len(before) == 3  # steps, occurrences, their sums by block
    trained.evaluate(rows(), verbose=0)
    for one, other in zip(before, state(trained), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_tensorflow_has_the_state(trained, tmp_path):
    path = tf.train.Checkpoint(model=trained).write(str(tmp_path / "x"))
    other = new_model("xir")
    tf.train.Checkpoint(model=other).read(path).expect_partial()
    for one, read in zip(state(trained), state(other), strict=True):
        np.testing.assert_array_equal(one, read)


@pytest.mark.parametrize("method", [build("ssl"), build("xir", CANDIDATES + 1)])
def test_the_state_of_another_method_is_refused(trained, method, tmp_path):
    trained.save_weights(tmp_path / "x.weights.h5")
    other = Model(method)
    other({"q": tf.constant([0]), "c": tf.constant([0])})
    rule = f"the method must be the one that was saved, with its sizes, got {type(method).__name__}"
    with pytest.raises(ValueError, match=rule):
        other.load_weights(tmp_path / "x.weights.h5")


def test_what_it_cannot_do_is_one_line():
    task = MethodLayer(build("mns"))
    with pytest.raises(ValueError, match="candidate_encoder must be given for Mns"):
        task(tf.ones([2, 4]), tf.eye(2, 4), query_ids=[0, 1], candidate_ids=[5, 8])
    with (
        tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        pytest.raises(ValueError, match="strategy must be none for MethodLayer"),
    ):
        task(tf.ones([2, 4]), tf.eye(2, 4), query_ids=[0, 1], candidate_ids=[5, 8])
    task = MethodLayer(samplers.build("ssl", mask_accidental_hits=True))  # as its docstring has it
    losses = task(tf.ones([2, 4]), tf.eye(2, 4), query_ids=[0, 1], candidate_ids=[5, 8])
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
