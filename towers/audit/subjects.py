"""A method on frozen towers: the gradient of its loss by the scores of some pairs, and its cost.

The towers are frozen: their embeddings are two tables. A method sees no more of them than its
encoders, and a score is a dot product, so columns can be added that change no score: the query
of audited pair a gets the unit vector e_a, every candidate gets zeros. The gradient of the loss
by the zeros of candidate j is then Σ_u (∂loss_u / ∂s_uj) e_u: its entry a is the weight that the
loss of pair a puts on candidate j. One backward pass gives all of them, for any method.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from typing import Any

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders
from samplers.methods.adaptive import AdaSirU
from samplers.methods.in_batch import Cbns
from samplers.methods.method import Method
from samplers.random_numbers import split_seed

_WARM = 1 << 30  # draws from here on are those of the warm-up


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """The embeddings of a trained run, and the train rows that it learned from."""

    query: np.ndarray  # float32 [U, D], over the temperature; of queries as they are served
    candidate: np.ndarray  # float32 [N, D]
    query_ids: np.ndarray  # int64 [n], of the train rows
    candidate_ids: np.ndarray  # int64 [n]
    normalize: bool = False  # scores are cosines, so that a gradient along a query does nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches that all methods are measured on, a function of the seed.

    A batch holds A audited pairs and, in every draw, other rows beside them: what an in-batch
    method samples is the rest of the batch.
    """

    pairs: np.ndarray  # int64 [T, A], the audited train rows of each batch
    num_rows: int  # n, train rows
    batch_size: int  # B
    seed: int

    @classmethod
    def of(cls, num_rows: int, *, batches: int, pairs: int, batch_size: int, seed: int) -> Batches:
        """Draws the audited pairs; at most a quarter of a batch is audited."""
        batch_size = min(batch_size, num_rows)
        shape = batches, max(1, min(pairs, batch_size // 4))
        scarce = num_rows < shape[0] * shape[1]
        rows = np.random.default_rng(seed).choice(num_rows, shape, replace=scarce)
        return cls(rows, num_rows, batch_size, seed)

    def rows(self, number: int, draw: int) -> np.ndarray:
        """The train rows of one draw of a batch, the audited pairs first: int64 [B]."""
        rng = np.random.default_rng([self.seed, number, draw])
        audited = np.unique(self.pairs[number])
        rest = rng.choice(self.num_rows, self.batch_size, replace=False)
        rest = rest[~np.isin(rest, audited)]
        return np.concatenate([self.pairs[number], rest])[: self.batch_size]

    def draw_seed(self, number: int, draw: int) -> tf.Tensor:
        """What the method draws with: int64 [2]."""
        return tf.constant([self.seed, (number << 32) + draw], tf.int64)


def _queued_now(ids: tf.Variable, encoders: Encoders) -> tf.Tensor:
    """`Cbns.queued` of what the candidates are now, with a gradient, so that they have weights."""
    return encoders.candidates(tf.maximum(ids, 0))


class Subject:
    """A method with its state, on frozen towers.

    A method that looks at each row alone gets the audited pairs and no further rows, with query
    ids of their own, so that its state for each query is small.

    Args:
      method: the method; where it goes row by row, made for `batches.pairs.size` queries.
      frozen: the towers.
      batches: what it is measured on.
    """

    def __init__(self, method: Method, frozen: Frozen, batches: Batches) -> None:
        self.method, self._frozen, self._batches = method, frozen, batches
        self._measured = method
        if isinstance(method, Cbns):
            method.warm_up = 0  # or its queue would be empty
            self._measured = copy.copy(method)  # of the same state
            now = functools.partial(_queued_now, method._cached_ids)
            self._measured.queued = now  # type: ignore[method-assign]
        audited = frozen.query_ids[batches.pairs.reshape(-1)]
        self._query = tf.constant(frozen.query[audited] if method.row_by_row else frozen.query)
        self._candidate = tf.constant(frozen.candidate)
        self._num_audited = batches.pairs.shape[1]
        self._gradient = tf.function(self._weights_of)
        self._step = tf.function(self._step_of)

    def batch(self, number: int, draw: int, *, whole: bool = False) -> Batch:
        """The rows of one draw; `whole`: B of them, whatever the method looks at."""
        rows = self._batches.rows(number, draw)
        query_ids = self._frozen.query_ids[rows]
        if self.method.row_by_row:
            rows = rows if whole else self._batches.pairs[number]
            first = number * self._num_audited
            query_ids = (first + np.arange(len(rows))) % self._batches.pairs.size
        return Batch(tf.constant(query_ids), tf.constant(self._frozen.candidate_ids[rows]))

    def warm_up(self, steps: int) -> None:
        """Brings state to life: so many steps without an optimizer, each the end of an epoch."""
        if not self.method.variables:
            return
        for step in range(steps):
            number, draw = step % len(self._batches.pairs), _WARM + step
            self._step(self.batch(number, draw), self._batches.draw_seed(number, draw))
            self._end_epoch()

    def weights(self, number: int, draw: int) -> np.ndarray:
        """∂loss_a / ∂s_aj of the audited pairs a of a batch: float32 [A, N]."""
        if isinstance(self.method, AdaSirU):
            self._end_epoch()  # the pool is a draw too, made once an epoch
        seed = self._batches.draw_seed(number, draw)
        return self._gradient(self.batch(number, draw), seed).numpy()

    def encoders(self, batch: Batch) -> Encoders:
        """The frozen towers."""
        return Encoders(
            query=tf.gather(self._query, batch.query_ids),
            positive=tf.gather(self._candidate, batch.candidate_ids),
            candidates=lambda ids: tf.gather(self._candidate, ids),
            corpus=lambda: self._candidate,
            queries=lambda ids: tf.gather(self._query, ids),
        )

    def propose(self, batch: Batch, seed: tf.Tensor) -> Candidates | None:
        """The steps before the loss."""
        encoders = self.encoders(batch)
        self.method.refresh(encoders, seed=seed)
        proposed = self.method.propose(encoders.query, batch, seed=seed)
        return None if proposed is None else self.method.select(encoders, batch, proposed)

    def _end_epoch(self) -> None:
        nothing = tf.zeros([0], tf.int64)
        self.method.end_epoch(self.encoders(Batch(nothing, nothing)))

    def _step_of(self, batch: Batch, seed: tf.Tensor) -> None:
        self.method(self.encoders(batch), batch, seed=seed)
        self.method.update(batch)

    def _weights_of(self, batch: Batch, seed: tf.Tensor) -> tf.Tensor:
        first, second = split_seed(seed)
        proposed = self.propose(batch, first)
        zeros = tf.zeros([self._candidate.shape[0], self._num_audited])
        with tf.GradientTape() as tape:
            tape.watch(zeros)
            losses = self._measured.loss(self._marked(batch, zeros), batch, proposed, seed=second)
            total = tf.reduce_sum(losses)
        gradient = tape.gradient(total, zeros, unconnected_gradients="zero")
        return tf.transpose(tf.convert_to_tensor(gradient))

    def _marked(self, batch: Batch, zeros: tf.Tensor) -> Encoders:
        """The same scores, from embeddings with the columns that tell the pairs apart."""
        plain = self.encoders(batch)
        unit = tf.eye(tf.size(batch.query_ids), self._num_audited)

        def mark(ids: tf.Tensor) -> tf.Tensor:
            return tf.concat([plain.candidates(ids), tf.gather(zeros, ids)], axis=-1)

        return plain._replace(
            query=tf.concat([plain.query, unit], axis=1),
            positive=mark(batch.candidate_ids),
            candidates=mark,
            corpus=lambda: tf.concat([self._candidate, zeros], axis=1),
        )


class Stopwatch:
    """Times training steps of a method, from the tables to the gradients, without the optimizer.

    The steps before the loss run as a graph, loss and gradients by XLA where that is the default
    of the method. What a method renews once an epoch is not in it.
    """

    def __init__(self, subject: Subject, batches: Batches) -> None:
        self._subject, self._batches = subject, batches
        xla = subject.method.faster_with_xla
        self._graph = tf.function(self._look_up)
        self._compiled = tf.function(self._differentiate, jit_compile=xla)
        self.seconds(0)  # compiles

    def seconds(self, step: int) -> float:
        """The time of one step on a whole batch."""
        batch = self._subject.batch(step % len(self._batches.pairs), step, whole=True)
        first, second = split_seed(self._batches.draw_seed(0, step))
        started = time.perf_counter()
        results = self._compiled(batch, *self._graph(batch, first), second)
        for tensor in filter(tf.is_tensor, tf.nest.flatten(results)):
            tensor.numpy()  # waits for it
        return time.perf_counter() - started

    def compare(self, baseline: Stopwatch, steps: int) -> tuple[float, float]:
        """The median time of a step, and the median of what a step costs over one of the baseline.

        Each step follows one of the baseline, so that what else the machine does weighs on both.
        """
        pairs = [(baseline.seconds(step), self.seconds(step)) for step in range(steps)]
        ratio = statistics.median(own / base for base, own in pairs)
        return statistics.median(own for _, own in pairs), ratio

    def _look_up(self, batch: Batch, seed: tf.Tensor) -> tuple[Candidates | None, list[tf.Tensor]]:
        """The steps before the loss, and the embeddings that get a gradient."""
        encoders, proposed = self._subject.encoders(batch), self._subject.propose(batch, seed)
        looked_up = [encoders.query, encoders.positive, encoders.corpus()]
        return proposed, looked_up + ([encoders.candidates(proposed.ids)] if proposed else [])

    def _differentiate(
        self, batch: Batch, proposed: Candidates | None, looked_up: list[tf.Tensor], seed: tf.Tensor
    ) -> Any:
        """The loss, and its gradients by what was looked up; None by what it does not need."""
        with tf.GradientTape() as tape:
            tape.watch(looked_up)
            query, positive, corpus, *rows = looked_up
            encoders = self._subject.encoders(batch)._replace(
                query=query,
                positive=positive,
                corpus=lambda: corpus,
                candidates=lambda ids: rows[0],  # of what was proposed: no loss asks for others
            )
            loss = tf.reduce_mean(self._subject.method.loss(encoders, batch, proposed, seed=seed))
        return loss, tape.gradient(loss, looked_up)
