"""State of methods and samplers: variables that are not trained and checkpoint with the model."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def state_variable(initial: tf.Tensor, name: str, **options: Any) -> tf.Variable:
    """A variable of a method's state, with `options` of `tf.Variable`; not trained.

    Every replica of a distribution strategy sees the whole batch and writes the same values.
    """
    first = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return tf.Variable(initial, trainable=False, name=name, aggregation=first, **options)


def renewed_variable(initial: tf.Tensor, name: str, *, shape: Any = None) -> tf.Variable:
    """As `state_variable`, for what `refresh` writes under a condition, or a loss for `update`.

    Replicas cannot meet inside a branch or a function of its own: each writes its own copy.
    `shape` is given where it is to change later, such as [None, None].
    """
    on_read = tf.VariableSynchronization.ON_READ
    return state_variable(initial, name, shape=shape, synchronization=on_read)
