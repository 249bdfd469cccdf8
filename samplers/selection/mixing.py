"""Virtual negatives: mixtures of the candidates of a batch."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from samplers.candidates import at_least_float32
from samplers.losses.streamed_softmax import Valid, fold_columns, take_columns
from samplers.random_numbers import uniform_numbers


def symmetric_beta(shape: Any, alpha: float, seed: tf.Tensor) -> tf.Tensor:
    """Draws from Beta(α, α): float32 of that shape.

    If T has Student's t distribution with 2α degrees of freedom, (1 + T / sqrt(2α + T²)) / 2 has
    this one, and T² / 2α = R² cos²(2πV) with R² = U^(-1/α) - 1 for uniform U, V (Bailey, Math.
    Comp. 62, 1994, doi:10.2307/2153537). Unlike rejection from gamma draws, it runs under XLA.
    """
    uniform = uniform_numbers(tf.concat([[2], shape], axis=0), seed)
    # U in (0, 1]: its power may overflow to infinity, which is a draw at one of the ends.
    radius = tf.exp(-tf.math.log(1.0 - uniform[0]) / alpha) - 1.0
    cosine = tf.cos(2 * math.pi * uniform[1])
    return 0.5 * (1.0 + tf.sign(cosine) * tf.math.rsqrt(1.0 + 1.0 / (radius * cosine**2)))


def mixing_weights(
    log_q: tf.Tensor, num_mixed: int, seed: tf.Tensor, *, alpha: float | None, correct: bool
) -> tf.Tensor:
    """ŵ_k = softmax_j(w_kj - log q_j), w_kj ~ U(0, 1) or Beta(α, α): float32 [K, C].

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, eq. (5), or eq. (3) where not corrected.
    Without gradient. Columns of log_q [C] with -inf have no part in any mixture; rows add up to
    1, or to 0 if there is nothing to mix.
    """
    shape = [num_mixed, tf.size(log_q)]
    draws = uniform_numbers(shape, seed) if alpha is None else symmetric_beta(shape, alpha, seed)
    used = tf.math.is_finite(log_q)
    correction = tf.where(used, tf.cast(log_q, tf.float32), 0.0) if correct else 0.0
    logits = tf.where(used[None, :], draws - correction, -float("inf"))
    return tf.stop_gradient(tf.where(tf.reduce_any(used), tf.nn.softmax(logits, axis=1), 0.0))


def masked_mixture_scores(
    query: tf.Tensor,
    candidates: tf.Tensor,
    weights: tf.Tensor,
    valid: Valid,
    *,
    block_size: int | None = None,
) -> tf.Tensor:
    """Scores of mixtures from which each row leaves out the columns that it must not use.

        m_bk = Σ_j v_bj ŵ_kj s_bj / Σ_j v_bj ŵ_kj, v_bj 1 where j is valid for b and 0 elsewhere

    Mixtures of scores and not of embeddings, because each row has mixtures of its own: B·C·K
    products in place of C·K·D. The backward pass scores the columns again.

    From queries [B, D], candidates [C, D] and weights [K, C], which get no gradient: float32 or
    float64 [B, K]; -inf for a row without valid columns. `block_size` columns are scored at once.
    """
    num_columns = tf.shape(candidates)[0]
    size = num_columns if block_size is None else block_size
    by_column = tf.transpose(tf.cast(weights, at_least_float32(query).dtype))  # [C, K]

    def parts(candidates: tf.Tensor, columns: tf.Tensor) -> tuple[tf.Tensor, ...]:
        used = valid(columns) & (columns < num_columns)[None, :]
        return take_columns(candidates, columns), take_columns(by_column, columns), used

    @tf.custom_gradient
    def mixtures(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        def add(columns: tf.Tensor, carry: Any) -> Any:
            values, weights, used = parts(candidates, columns)
            scores = tf.matmul(query, values, transpose_b=True)
            scores = tf.where(used, scores, tf.zeros_like(scores))
            mass = tf.matmul(tf.cast(used, scores.dtype), weights)
            return carry[0] + tf.matmul(scores, weights), carry[1] + mass

        nothing = tf.zeros([tf.shape(query)[0], tf.shape(by_column)[1]], query.dtype)
        total, mass = fold_columns(add, (nothing, nothing), num_columns, size)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            upstream = tf.math.divide_no_nan(upstream, mass)

            def add_gradient(columns: tf.Tensor, by_query: tf.Tensor) -> Any:
                values, weights, used = parts(candidates, columns)
                by_score = tf.matmul(upstream, weights, transpose_b=True)
                by_score = tf.where(used, by_score, tf.zeros_like(by_score))
                by_block = tf.matmul(by_score, query, transpose_a=True)
                return by_query + tf.matmul(by_score, values), by_block

            nothing, writes = tf.zeros_like(query), (query.dtype, [None, query.shape[1]])
            by_query, by_candidates = fold_columns(
                add_gradient, nothing, num_columns, size, writes=writes
            )
            return by_query, by_candidates.concat()[:num_columns]

        scores = tf.where(mass > 0, tf.math.divide_no_nan(total, mass), -float("inf"))
        return scores, gradient

    return mixtures(at_least_float32(query), at_least_float32(candidates))
