"""What a step of a method costs: from the tables to the gradients, without the optimizer."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import tensorflow as tf

from samplers.candidates import Batch, Candidates
from samplers.random_numbers import split_seed
from towers.audit.weights import Batches, Subject


class Stopwatch:
    """Runs whole training steps of a method, all but the optimizer.

    The steps before the loss run as a graph, loss and gradients by XLA where that is the default
    of the method. What a method renews once an epoch is not in it.
    """

    def __init__(self, subject: Subject, batches: Batches) -> None:
        self._subject, self._batches = subject, batches
        self._look_up = tf.function(functools.partial(_look_up, subject))
        self._differentiate = tf.function(
            functools.partial(_differentiate, subject),
            jit_compile=subject.method.faster_with_xla,
        )
        self.seconds(0)  # compiles

    def seconds(self, step: int) -> float:
        """The time of one step on a whole batch."""
        batch = self._subject.batch(step % len(self._batches.pairs), step, whole=True)
        first, second = split_seed(self._batches.draw_seed(0, step))
        started = time.perf_counter()
        found = self._differentiate(batch, *self._look_up(batch, first), second)
        for tensor in tf.nest.flatten(found):
            if tensor is not None:
                tensor.numpy()  # waits for it
        return time.perf_counter() - started


def step_seconds(watch: Stopwatch, baseline: Stopwatch, steps: int) -> tuple[float, float]:
    """The median time of a step, and the median of what a step costs over one of the baseline.

    Each step follows one of the baseline, so that what else the machine does weighs on both.
    """
    pairs = [(baseline.seconds(step), watch.seconds(step)) for step in range(steps)]
    ratio = statistics.median(own / base for base, own in pairs)
    return statistics.median(own for _, own in pairs), ratio


def _look_up(
    subject: Subject, batch: Batch, seed: tf.Tensor
) -> tuple[Candidates | None, list[tf.Tensor]]:
    """The steps before the loss, and the embeddings that get a gradient."""
    encoders, proposed = subject.encoders(batch), subject.propose(batch, seed)
    looked_up = [encoders.query, encoders.positive, encoders.corpus()]
    return proposed, looked_up + ([encoders.candidates(proposed.ids)] if proposed else [])


def _differentiate(
    subject: Subject,
    batch: Batch,
    proposed: Candidates | None,
    looked_up: list[tf.Tensor],
    seed: tf.Tensor,
) -> Any:
    """The loss, and its gradients by what was looked up; None by what it does not need."""
    with tf.GradientTape() as tape:
        tape.watch(looked_up)
        query, positive, corpus, *rows = looked_up
        encoders = subject.encoders(batch)._replace(
            query=query,
            positive=positive,
            corpus=lambda: corpus,
            candidates=lambda ids: rows[0],  # of what was proposed: no loss asks for others
        )
        loss = tf.reduce_mean(subject.method.loss(encoders, batch, proposed, seed=seed))
    return loss, tape.gradient(loss, looked_up)
