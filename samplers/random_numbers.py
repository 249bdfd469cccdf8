"""Uniform numbers and seeds that are the same with and without XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from samplers.candidates import Part

HOST = "CPU:0"  # where TensorFlow reads seeds, also for a draw on a GPU: they are made there


def uniform_bits(shape: tf.Tensor | Sequence[Any], seed: tf.Tensor) -> tf.Tensor:
    """Uniform integers of 32 bits: uint32 of that shape, a function of the seed, int [2]."""
    # XLA would choose another generator on some devices.
    return tf.random.stateless_uniform(
        shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )


def uniform_numbers(shape: tf.Tensor | Sequence[Any], seed: tf.Tensor) -> tf.Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24: float32 of that shape.

    TensorFlow's own are made of the low bits of the generator and XLA's of the high ones, so a
    compiled step would not draw what another one draws.
    """
    bits = tf.bitwise.right_shift(uniform_bits(shape, seed), tf.constant(8, tf.uint32))
    return tf.cast(bits, tf.float32) * 2.0**-24


def step_seed(run_seed: int, iteration: tf.Variable) -> tf.Tensor:
    """int64 [2], another one at every step of every run."""
    step = iteration.read_value()  # where the variable lies
    with tf.device(HOST):
        return tf.stack([tf.constant(run_seed, tf.int64), step])


def split_seed(seed: tf.Tensor, n: int = 2) -> list[tf.Tensor]:
    """n independent seeds, int [2] each, from one."""
    with tf.device(HOST):
        return tf.unstack(tf.random.experimental.stateless_split(seed, n))


def split_seed_in_step(seed: tf.Tensor, n: int) -> list[tf.Tensor]:
    """As `split_seed`, int64 [2] each, the same in a step that XLA compiles as elsewhere."""
    with tf.device(HOST):
        return tf.unstack(tf.cast(uniform_bits([n, 2], seed), tf.int64))


def for_rows(
    draw: Callable[[tf.Tensor], tf.Tensor], num_rows: tf.Tensor, part: Part | None
) -> tf.Tensor:
    """What `draw(number of rows)` gives [B, ...], or those of a part of more rows: [b, ...]."""
    if part is None:
        return draw(num_rows)
    return tf.gather(draw(part.size), part.first + tf.range(num_rows))


def draw_by_mass(masses: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Columns in proportion to their masses, [..., C] and uniform [..., N] → int64 [..., N]."""
    cumulative = tf.cumsum(masses, axis=-1)
    points = uniform * cumulative[..., -1:]
    places = tf.searchsorted(cumulative, points, side="right", out_type=tf.int64)
    return tf.minimum(places, tf.shape(masses, tf.int64)[-1] - 1)  # it may round up to the total
