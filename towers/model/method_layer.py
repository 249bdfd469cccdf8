"""The methods of `samplers` in a model of Keras 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras  # Keras 3, whatever tf.keras is in this process
import tensorflow as tf

from samplers.candidates import Batch, Encoders
from samplers.methods.method import Method, require
from samplers.random_numbers import HOST, step_seed
from samplers.state import state_variable

Encoder = Callable[[tf.Tensor], tf.Tensor]  # dense ids int64 [...] → embeddings [..., D]


class MethodLayer(keras.layers.Layer):
    """A method as a layer of Keras 3: embeddings of a batch → the loss of each row, [B].

        task = towers.MethodLayer(samplers.build("ssl", mask_accidental_hits=True))
        losses = task(tf.ones([2, 4]), tf.eye(2, 4), query_ids=[0, 1], candidate_ids=[5, 8])

    `compute_loss` of a `keras.Model` calls it, see `notebooks/5_keras_3.ipynb`. What the method
    remembers, and the number of steps, is saved and loaded with the weights of the model, also by
    `tf.train.Checkpoint`. A callback calls `method.end_epoch` where a method needs that.

    Args:
      method: made by `samplers.build`.
      candidate_encoder: for methods that embed candidates beyond those of the batch.
      query_encoder: for methods that look at other queries; divides by the temperature.
      seed: of all that the method draws, at least 0.

    Raises:
      ValueError: the seed is below 0, or the backend of Keras is not TensorFlow.
    """

    def __init__(
        self,
        method: Method,
        candidate_encoder: Encoder | None = None,
        query_encoder: Encoder | None = None,
        *,
        seed: int = 10,
    ) -> None:
        backend = keras.config.backend()
        require(backend == "tensorflow", "KERAS_BACKEND", "tensorflow for MethodLayer", backend)
        require(seed >= 0, "seed", "at least 0", seed)
        super().__init__(autocast=False)
        self.method, self._seed = method, seed
        self._encode_candidates, self._encode_queries = candidate_encoder, query_encoder
        with tf.device(HOST):
            self.iteration = state_variable(tf.constant(0, tf.int64), "iteration")
        self._state = (self.iteration, *method.variables)
        self.built, self.supports_jit = True, False  # XLA cannot compile all steps of a method

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        *,
        query_ids: tf.Tensor,
        candidate_ids: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """The losses, float32 [B], weighted; in training the method remembers the batch.

        Embeddings are [B, D], those of queries divided by the temperature; ids are dense, [B].
        Raises a ValueError if an encoder is missing that the method needs, or on several replicas.
        """
        require(not tf.distribute.has_strategy(), "strategy", "none for MethodLayer", "one")
        query_ids, candidate_ids = (tf.cast(i, tf.int64) for i in (query_ids, candidate_ids))
        batch = Batch(query_ids, candidate_ids, weight=sample_weight)
        towers = self._candidates, self._candidates, self._encode_queries
        encoders = Encoders(query_embeddings, candidate_embeddings, *towers)
        losses = self.method(encoders, batch, seed=step_seed(self._seed, self.iteration))
        if training:
            with tf.control_dependencies([losses]):
                self.method.update(batch)
                self.iteration.assign_add(1)
        return losses

    def _candidates(self, ids: tf.Tensor | None = None) -> tf.Tensor:
        encode: Any = self._encode_candidates
        require(encode, "candidate_encoder", f"given for {type(self.method).__name__}", encode)
        return encode(tf.range(self.method.num_candidates, dtype=tf.int64) if ids is None else ids)

    def save_own_variables(self, store: Any) -> None:
        for number, variable in enumerate(self._state):
            store[str(number)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        shapes = [tuple(store[str(number)].shape) for number in range(len(store.keys()))]
        fits = map(lambda saved, known: known.shape.is_compatible_with(saved), shapes, self._state)
        same = len(shapes) == len(self._state) and all(fits)
        require(same, "the method", "the one that was saved, with its sizes", self.method)
        for number, variable in enumerate(self._state):
            variable.assign(store[str(number)][...])
