"""The methods of `samplers` in place of `tfrs.tasks.Retrieval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Encoders
from samplers.methods.by_name import build
from samplers.methods.method import require
from samplers.random_numbers import HOST, step_seed
from samplers.selection.seen import Seen
from samplers.state import state_variable
from towers.legacy_keras import tfrs

Encoder = Callable[[tf.Tensor], tf.Tensor]  # dense ids [...] -> embeddings [..., D]


class RetrievalTask(tfrs.tasks.Retrieval):
    """A retrieval task whose loss is one of `samplers.METHODS`; the rest is as in TFRS.

    In-batch methods need only what `tfrs.tasks.Retrieval` takes. What others need beyond it:
    methods that embed further candidates `candidate_encoder` and `num_candidates` here, methods
    with state for each query `query_ids` at the call and `num_queries` here. What is missing is
    named in a `ValueError`. The loss is summed over the batch, as TFRS does. What
    `adasir_*`, `kernel` and `sl_at_k` keep is renewed by `end_epoch`, which a callback is to call
    after each epoch: `tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: task.end_epoch())`.

    Embeddings are scored by their dot product over the temperature; normalise them in the towers
    for cosines. A sampling probability is not floored at 1e-6, as it is in TFRS.

    Args:
      method: a name in `samplers.METHODS`.
      temperature: what scores are divided by, above 0.
      frequency: [N], train rows of each candidate by dense id; in-batch methods do without where
        the call gives `candidate_sampling_probability`.
      num_candidates: N, size of the corpus.
      num_queries: the number of dense query ids.
      fingerprints: int64 [N], of the raw ids of the candidates, for `correct_sfx`.
      seen: the train positives of every query, to leave them out of its negatives.
      candidate_encoder: embeds dense candidate ids with gradient, [...] -> [..., D].
      query_encoder: embeds dense query ids, for methods that look at all queries of an epoch.
      metrics, batch_metrics, loss_metrics, name: as in `tfrs.tasks.Retrieval`.
      remove_accidental_hits: the option `mask_accidental_hits` of the method.
      seed: of all that the method draws, at least 0.
      **options: options of the method.

    Raises:
      ValueError: the method or an option is unknown or wrong, or something it needs is missing.
    """

    def __init__(
        self,
        method: str = "ssl_pop",
        *,
        temperature: float = 1.0,
        frequency: np.ndarray | None = None,
        num_candidates: int | None = None,
        num_queries: int | None = None,
        fingerprints: np.ndarray | None = None,
        seen: Seen | None = None,
        candidate_encoder: Encoder | None = None,
        query_encoder: Encoder | None = None,
        metrics: Any = None,
        batch_metrics: Any = None,
        loss_metrics: Any = None,
        remove_accidental_hits: bool = False,
        seed: int = 10,
        name: str | None = None,
        **options: Any,
    ) -> None:
        require(temperature > 0, "temperature", "above 0", temperature)
        super().__init__(
            metrics=metrics,
            batch_metrics=batch_metrics,
            loss_metrics=loss_metrics,
            temperature=temperature,
            name=name,
        )
        if remove_accidental_hits:
            options["mask_accidental_hits"] = True
        self.method = build(
            method,
            frequency=frequency,
            num_candidates=num_candidates,
            num_queries=num_queries,
            fingerprints=fingerprints,
            seen=seen,
            **options,
        )
        self._method_name, self._masks_hits = method, bool(options.get("mask_accidental_hits"))
        self._encode_candidates, self._encode_queries = candidate_encoder, query_encoder
        self._num_candidates, self._seed = num_candidates, seed
        with tf.device(HOST):
            self.iteration = state_variable(tf.constant(0, tf.int64), "iteration")

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        candidate_sampling_probability: tf.Tensor | None = None,
        candidate_ids: tf.Tensor | None = None,
        compute_metrics: bool = True,
        compute_batch_metrics: bool = True,
        query_ids: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tf.Tensor:
        """The summed loss of a batch.

        Args:
          query_embeddings, candidate_embeddings: [B, D], each query and its positive.
          sample_weight: float32 [B], multiplies the loss of the row.
          candidate_sampling_probability: [B], of the positives, where `frequency` was not given.
          candidate_ids: integer [B], dense ids; text is hashed and tells equal ids apart only, so
            not where `frequency`, `num_candidates` or `seen` go by dense ids.
          compute_metrics, compute_batch_metrics: as in TFRS.
          query_ids: integer [B], dense ids.
          training: whether the method remembers the batch and draws anew; None: where the loss
            is differentiated, so not in `evaluate`.

        Returns:
          A scalar.

        Raises:
          ValueError: the method needs an argument that is missing, or dense ids and got text.
        """
        given = (sample_weight, candidate_sampling_probability, candidate_ids, query_ids)
        batch = self._batch(candidate_embeddings, *given)
        query, positive = _no_double(query_embeddings), _no_double(candidate_embeddings)
        encoders = Encoders(
            query=query / tf.cast(self._temperature, query.dtype),
            positive=positive,
            candidates=self._candidates,
            corpus=self._corpus,
            queries=self._queries,
        )
        seed = step_seed(self._seed, self.iteration)
        loss = tf.reduce_sum(self.method(encoders, batch, seed=seed))
        if training is None:
            loss = _when_differentiated(lambda: self._remember(batch), loss)
        elif training:
            with tf.control_dependencies([loss]):
                self._remember(batch)
        # Not by TFRS's `call`, which fails in the rare process where AutoGraph cannot convert it.
        for metric in self._loss_metrics:
            metric.update_state(loss)
        if compute_metrics:
            known = {"true_candidate_ids": candidate_ids, "sample_weight": sample_weight}
            for metric in self._factorized_metrics:
                metric.update_state(query_embeddings, candidate_embeddings, **known)
        if compute_batch_metrics and self._batch_metrics:
            scores = tf.matmul(encoders.query, positive, transpose_b=True)
            for metric in self._batch_metrics:
                metric.update_state(tf.eye(tf.shape(scores)[0]), scores, sample_weight)
        return loss

    def end_epoch(self) -> None:
        """Tells the method that an epoch has ended; only methods renewed by epoch notice."""
        nothing = tf.zeros([0, 1])
        self.method.end_epoch(
            Encoders(nothing, nothing, self._candidates, lambda: nothing, self._queries)
        )

    def _remember(self, batch: Batch) -> None:
        self.method.update(batch)
        self.iteration.assign_add(1)

    def _batch(
        self,
        positives: tf.Tensor,
        weight: tf.Tensor | None,
        probability: tf.Tensor | None,
        candidate_ids: tf.Tensor | None,
        query_ids: tf.Tensor | None,
    ) -> Batch:
        rows = tf.range(tf.shape(positives, tf.int64)[0])
        has_seen = self.method.seen is not None
        by_id = self.method.frequency is not None or self._num_candidates is not None or has_seen
        if self._masks_hits or by_id:
            self._needed(candidate_ids, "candidate_ids= at the call")
        if self.method.num_queries is not None or has_seen:
            self._needed(query_ids, "query_ids= at the call")
        if candidate_ids is not None and candidate_ids.dtype == tf.string:
            rule = "dense where frequency=, num_candidates= or seen= go by them: look text up first"
            require(not by_id, "candidate_ids", rule, "text")
            candidate_ids = tf.strings.to_hash_bucket_fast(candidate_ids, 2**62)
        return Batch(
            query_ids=rows if query_ids is None else tf.cast(query_ids, tf.int64),
            candidate_ids=rows if candidate_ids is None else tf.cast(candidate_ids, tf.int64),
            weight=None if weight is None else tf.cast(weight, tf.float32),
            log_pop=None if probability is None else tf.math.log(tf.cast(probability, tf.float32)),
        )

    def _candidates(self, ids: tf.Tensor) -> tf.Tensor:
        encode = self._needed(self._encode_candidates, "candidate_encoder= at construction")
        return _no_double(encode(ids))

    def _queries(self, ids: tf.Tensor) -> tf.Tensor:
        encode = self._needed(self._encode_queries, "query_encoder= at construction")
        embedded = _no_double(encode(ids))
        return embedded / tf.cast(self._temperature, embedded.dtype)

    def _corpus(self) -> tf.Tensor:
        size = self._needed(self._num_candidates, "num_candidates= at construction")
        return self._candidates(tf.range(size, dtype=tf.int64))

    def _needed(self, value: Any, what: str) -> Any:
        """The value; a ValueError that names it where it is missing."""
        if value is None:
            raise ValueError(f"the method {self._method_name!r} needs {what}, got None; pass it.")
        return value


def _no_double(embeddings: tf.Tensor) -> tf.Tensor:
    """Of float32, where they are of float64: Keras casts the first argument of a call alone."""
    return tf.cast(embeddings, tf.float32) if embeddings.dtype == tf.float64 else embeddings


def _when_differentiated(act: Callable[[], None], loss: tf.Tensor) -> tf.Tensor:
    """The loss, whose gradient acts: a training step takes it, an evaluation does not."""

    def with_gradient(loss: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            act()
            return upstream

        return tf.identity(loss), gradient

    return tf.custom_gradient(with_gradient)(loss)
