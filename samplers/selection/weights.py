"""How much each negative of a row counts, and each row: weights without gradient.

`valid`, bool [B, N], is False where a candidate is not a negative of the row; None for all valid.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def equal_weights(like: tf.Tensor, *, valid: tf.Tensor | None = None) -> tf.Tensor:
    """1 / the number of valid negatives of the row: [B, N]; all 0 where there are none."""
    mask = tf.ones_like(like) if valid is None else tf.cast(valid, like.dtype)
    return tf.math.divide_no_nan(mask, tf.reduce_sum(mask, axis=1, keepdims=True))


def softmax_weights(logits: tf.Tensor, *, valid: tf.Tensor | None = None) -> tf.Tensor:
    """e^(x_bj) / Σ_k e^(x_bk) over the valid negatives of each row, from finite logits: [B, N].

    Without gradient; rows sum to 1, and to 0 where no negative is valid. Of scores - log_q these
    are self-normalised importance weights: Lian et al., WWW 2020, doi:10.1145/3366423.3380187.
    """
    logits = tf.stop_gradient(logits)
    if valid is None:
        return tf.nn.softmax(logits, axis=1)
    some = tf.reduce_any(valid, axis=1, keepdims=True)
    weights = tf.nn.softmax(tf.where(valid | ~some, logits, -float("inf")), axis=1)
    return tf.where(valid, weights, tf.zeros_like(weights))


def adaptive_temperature(
    losses: tf.Tensor, rho: float, *, valid: tf.Tensor | None = None
) -> tf.Tensor:
    """The temperature at which a softmax of the losses keeps its distance ρ from uniform.

    Shi et al., WWW 2023, doi:10.1145/3543507.3583223, eq. (15)-(16):
        τ_b = sqrt(Var_j L_bj / (2 ρ))
    To second order, the divergence of softmax(L / τ) from uniform is Var_j L / (2 τ²) = ρ.
    ρ is above 0, and -log β for the OPAUC(β) that is meant.

    Returns:
      [B, 1] from losses [B, N], without gradient; 0 for a row whose losses are all equal.
    """
    losses = tf.stop_gradient(losses)
    weights = equal_weights(losses, valid=valid)
    mean = tf.reduce_sum(weights * losses, axis=1, keepdims=True)
    variance = tf.reduce_sum(weights * tf.square(losses - mean), axis=1, keepdims=True)
    return tf.sqrt(variance / (2.0 * rho))


def loss_weights(
    losses: tf.Tensor, temperature: tf.Tensor | float, *, valid: tf.Tensor | None = None
) -> tf.Tensor:
    """softmax_j(L_bj / τ_b): [B, N], without gradient; equal weights where τ is 0."""
    losses = tf.stop_gradient(losses)
    highest = tf.reduce_max(losses, axis=1, keepdims=True)
    return softmax_weights(tf.math.divide_no_nan(losses - highest, temperature), valid=valid)


def harmonic_number(rank: tf.Tensor) -> tf.Tensor:
    """J(r) = Σ_{k=1..r} 1/k, the weight of a positive at rank r: float32, same shape.

    Weston, Bengio and Usunier, IJCAI 2011 (WSABIE). It costs the same at every rank.
    """
    return tf.math.digamma(tf.cast(rank, tf.float32) + 1.0) + np.euler_gamma
