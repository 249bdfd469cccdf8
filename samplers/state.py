"""State of methods and samplers: variables that are not trained and checkpoint with the model."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def state_variable(initial: tf.Tensor, name: str) -> tf.Variable:
    """A variable of a method's state: not trained, and the same on all replicas.

    Every replica of a distribution strategy sees the whole batch and writes the same values.
    """
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def renewed_variable(initial: tf.Tensor, name: str, *, shape: Any = None) -> tf.Variable:
    """As `state_variable`, for what `refresh` writes under a condition, or `loss` for `update`.

    Replicas cannot meet inside a branch or a function of its own: each writes its own copy.

    Args:
      initial: the first value.
      name: of the variable.
      shape: where it is to change later, such as [None, None].
    """
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        shape=shape,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
