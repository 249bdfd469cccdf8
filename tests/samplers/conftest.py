"""A small problem to compare methods with plain loops: embeddings, a batch, and gradients."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import samplers

SEED = tf.constant([5, 2], tf.int64)


@dataclasses.dataclass
class Problem:
    """B queries with their positives among N candidates; embeddings of every row are its own."""

    query: np.ndarray  # [B, D]
    positive: np.ndarray  # [B, D]
    proposed: np.ndarray  # [C, D]
    batch: samplers.Batch
    counts: np.ndarray  # [N]

    def inputs(self):
        return tuple(tf.constant(x) for x in (self.query, self.positive, self.proposed))

    def run(self, method, proposed=None, *, batch=None, seed=SEED, dtype=None):
        """Losses, and gradients of Σ (b + 1) loss_b by query, positive and proposed rows."""
        batch = self.batch if batch is None else batch
        dtype = tf.float32 if dtype is None else dtype

        def differentiate(query, positive, rows):
            encoders = samplers.Encoders(
                query, positive, candidates=lambda ids: rows, corpus=lambda: rows
            )
            with tf.GradientTape() as tape:
                tape.watch([query, positive, rows])
                losses = method.loss(encoders, batch, proposed, seed=seed)
                total = tf.reduce_sum(losses * tf.range(1.0, len(self.query) + 1))
            gradients = tape.gradient(total, [query, positive, rows], unconnected_gradients="zero")
            return losses, gradients

        losses, gradients = differentiate(*(tf.cast(x, dtype) for x in self.inputs()))
        return losses.numpy(), [np.asarray(x, np.float64) for x in gradients]

    def check(self, method, reference, proposed=None, *, batch=None):
        """The method equals a loop (query, positive, proposed rows) -> [B], as do its gradients.

        Gradients are central differences. In eager mode: `test_by_name` compares it with XLA.
        """
        expected, gradients = self.differences(reference)
        losses, actual = self.run(method, proposed, batch=batch)
        assert losses.dtype == np.float32
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(actual, gradients, strict=True):
            scale = max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)

    def differences(self, reference, step=1e-5):
        arrays = [x.astype(np.float64) for x in (self.query, self.positive, self.proposed)]
        weights = np.arange(1.0, len(self.query) + 1)
        gradients = []
        for array in arrays:
            gradient = np.zeros_like(array)
            for place in np.ndindex(array.shape):
                kept = array[place]
                values = []
                for sign in (1, -1):
                    array[place] = kept + sign * step
                    values.append(weights @ reference(*arrays))
                array[place] = kept
                gradient[place] = (values[0] - values[1]) / (2 * step)
            gradients.append(gradient)
        return reference(*arrays), gradients


@pytest.fixture
def problem():
    """A maker of problems: with `unseen`, candidates without train rows are in the batch."""

    def make(seed=0, rows=7, columns=5, num_candidates=9, dim=3, *, unseen=False):
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 20, num_candidates)
        counts[0] = 0
        ids = rng.integers(1, num_candidates, rows)
        if unseen:
            ids[rows // 2] = 0
        embeddings = [
            rng.normal(size=(size, dim)).astype(np.float32) for size in (rows, rows, columns)
        ]
        batch = samplers.Batch(tf.constant(rng.integers(0, 6, rows)), tf.constant(ids))
        return Problem(*embeddings, batch, counts)

    return make


@pytest.fixture
def log_popularity():
    """log pop of each candidate as float64: -inf without train rows."""

    def of(counts):
        with np.errstate(divide="ignore"):
            return np.log(counts / counts.sum())

    return of
