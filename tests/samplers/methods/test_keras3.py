"""Methods train a model of Keras 3 from a custom training step, without TFRS or Keras 2."""

import keras  # Keras 3, whatever generation tf.keras stands for here
import numpy as np
import pytest
import tensorflow as tf

import samplers
from samplers.candidates import Batch, Encoders

QUERIES, CANDIDATES, DIM, BATCH = 24, 32, 8, 64


def board():
    """Even queries like even candidates, odd ones odd; the last candidate of each is held out."""
    pairs = [(q, c) for q in range(QUERIES) for c in range(CANDIDATES) if q % 2 == c % 2]
    held_out = {q: CANDIDATES - 2 + q % 2 for q in range(0, QUERIES, 3)}
    return np.array([pair for pair in pairs if held_out.get(pair[0]) != pair[1]]), held_out


class TwoTables(keras.Model):
    """Two embedding tables and a method; the method checkpoints apart, Keras 3 does not see it."""

    def __init__(self, method):
        super().__init__()
        self.queries = keras.layers.Embedding(QUERIES, DIM)
        self.candidates = keras.layers.Embedding(CANDIDATES, DIM)
        self.queries.build()
        self.candidates.build()
        self.method = method
        self.step = tf.Variable(0, dtype=tf.int64)
        self.built = True

    def encode(self, layer, ids):
        return tf.math.l2_normalize(layer(ids), axis=-1)

    def encoders(self, queries, candidates):
        return Encoders(
            query=self.encode(self.queries, queries) / 0.2,
            positive=self.encode(self.candidates, candidates),
            candidates=lambda ids: self.encode(self.candidates, ids),
            corpus=lambda: self.encode(self.candidates, tf.range(CANDIDATES)),
            queries=lambda ids: self.encode(self.queries, ids) / 0.2,
        )

    def train_step(self, data):
        batch = Batch(query_ids=data["q"], candidate_ids=data["c"])
        seed = tf.stack([tf.constant(5, tf.int64), self.step])
        with tf.GradientTape() as tape:
            encoders = self.encoders(batch.query_ids, batch.candidate_ids)
            loss = tf.reduce_mean(self.method(encoders, batch, seed=seed))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.method.update(batch)
        self.step.assign_add(1)
        return {"loss": loss}


# One of each way in which a method takes part in a step: columns, update, shared draws, the corpus,
# select, and refresh with end_epoch.
@pytest.mark.parametrize(
    "name",
    [
        "ssl_pop",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("xir", "mns", "full_softmax", "dns_mn", "adasir_w", "sl_at_k")
        ),
    ],
)
def test_custom_step_of_keras_3_ranks_the_held_out_pair_first(name):
    assert keras.__version__.startswith("3.")
    keras.utils.set_random_seed(3)
    pairs, held_out = board()
    method = samplers.build(
        name,
        frequency=np.bincount(pairs[:, 1], minlength=CANDIDATES),
        num_candidates=CANDIDATES,
        num_queries=QUERIES,
    )
    model = TwoTables(method)
    model.compile(optimizer=keras.optimizers.Adam(0.05))
    rows = tf.data.Dataset.from_tensor_slices({"q": pairs[:, 0], "c": pairs[:, 1]})
    rows = rows.shuffle(len(pairs), seed=1).batch(BATCH, drop_remainder=True)
    done = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: method.end_epoch(
            model.encoders(tf.zeros([0], tf.int64), tf.zeros([0], tf.int64))
        )
    )
    model.fit(rows, epochs=25, verbose=0, callbacks=[done])
    scores = (
        model.encode(model.queries, tf.range(QUERIES)).numpy()
        @ model.encode(model.candidates, tf.range(CANDIDATES)).numpy().T
    )
    scores[pairs[:, 0], pairs[:, 1]] = -np.inf
    for query, candidate in held_out.items():
        assert scores[query].argmax() == candidate
