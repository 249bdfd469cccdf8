"""Gradients of tables: sparse where only gathered rows have one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

MUST_BE_FINITE = "of a training step must be finite"  # what `finite_loss` says when it fails


def sum_gradients(gradients: Iterable[Any]) -> Any:
    """One gradient of several of the same table, or None: dense if one of them is dense.

    Repeated rows of sparse gradients stay repeated: whoever applies them adds them up.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    if len(known) < 2:
        return known[0] if known else None
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in known):
        return tf.IndexedSlices(
            tf.concat([gradient.values for gradient in known], axis=0),
            tf.concat([tf.cast(gradient.indices, tf.int64) for gradient in known], axis=0),
            known[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(gradient) for gradient in known])


def dense_gradient(gradient: Any) -> Any:
    """The gradient as one tensor [V, D]; repeated rows of a sparse one are added up."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = tf.cast(gradient.dense_shape[0], gradient.indices.dtype)
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


def worst_of(gradients: Iterable[Any]) -> tf.Tensor:
    """0, infinity where a gradient has one, NaN where one has that: a scalar, float32.

    Taken in what XLA compiles, so that one number of all gradients goes to the host.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in known]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
    nan = tf.reduce_any([tf.reduce_any(tf.math.is_nan(value)) for value in values])
    return tf.where(nan, float("nan"), tf.where(finite, 0.0, float("inf")))


def finite_loss(loss: tf.Tensor, worst: tf.Tensor | None) -> tf.Tensor:
    """The loss, for a step to wait for before it writes anything; `worst` None: not looked at.

    Raises:
      tf.errors.InvalidArgumentError: at run time, the loss or a gradient is NaN or infinite.
    """
    checks = [tf.debugging.check_numerics(loss, f"the loss {MUST_BE_FINITE}")]
    if worst is not None:
        checks.append(tf.debugging.check_numerics(worst, f"a gradient {MUST_BE_FINITE}"))
    with tf.control_dependencies(checks):
        return tf.identity(loss)
