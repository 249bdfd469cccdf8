"""Initial values of weights, each a function of its seed and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Initializer = Callable[..., tf.Tensor]


def normal(stddev: float, seed: tuple[int, int], *, zero_rows: int = 0) -> Initializer:
    """N(0, stddev²) for a table; its first `zero_rows` rows are 0."""

    def initial(shape: Any, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
        values = tf.random.stateless_normal(shape, seed, stddev=stddev, dtype=dtype)
        kept = tf.range(shape[0]) >= zero_rows
        return tf.where(kept[:, None], values, 0.0) if zero_rows else values

    return initial


def glorot(seed: tuple[int, int]) -> Initializer:
    """Uniform within ±sqrt(6 / (inputs + outputs)), for a matrix [inputs, outputs].

    Glorot and Bengio, AISTATS 2010, eq. (16).
    """

    def initial(shape: Any, dtype: Any = tf.float32, **_: Any) -> tf.Tensor:
        limit = math.sqrt(6 / (shape[0] + shape[1]))
        return tf.random.stateless_uniform(shape, seed, -limit, limit, dtype=dtype)

    return initial
