"""Softmax losses as pure functions: embeddings and log probabilities in, a loss per row out."""

from __future__ import annotations

import functools

import tensorflow as tf

from samplers.candidates import positive_scores
from samplers.losses.streamed_softmax import Valid, dot_logsumexp, own_columns


def in_batch_softmax_loss(
    query: tf.Tensor,
    candidates: tf.Tensor,
    log_q: tf.Tensor,
    *,
    positive: tf.Tensor | None = None,
    first: tf.Tensor | None = None,
    positive_log_q: tf.Tensor | None = None,
    valid: Valid | None = None,
    positive_twice: bool = False,
    block_size: int | None = None,
) -> tf.Tensor:
    """Softmax over the candidates of the batch, each corrected by its log-probability.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, eq. (1)-(2), after Yi et al., RecSys
    2019, doi:10.1145/3298689.3346996. The positive of row b is column b, and counts once:
        loss_b = log Σ_j e^(s_bj - log q_j) - (s_bb - log q_b)
    Zeros for log_q give the loss without the correction.

    A column with log q = -inf was never to be sampled: it is no negative, and a row whose
    positive is such a column has loss 0 and no gradient.

    Differs: `positive_twice` reproduces published code that puts the positive in front of all
    columns without taking it out of them: log(e^(s_bb - log q_b) + Σ_j ...).

    Args:
      query: [B, D].
      candidates: [C, D], C >= B; the columns after B are further negatives for every row.
      log_q: [C], log-probability of each column.
      positive: [B, D], the candidates of the own columns, where they are held a second time.
      first: the column of the positive of row 0 where it is not column 0, that of row b being
        first + b.
      positive_log_q: [B], the log-probability of the positive where it is not log_q[:B].
      valid: which columns are negatives of a row; the positive stays. None for all.
      block_size: columns scored at once; None for all.

    Returns:
      [B], not reduced; log C when all corrected scores are equal.
    """
    tf.debugging.assert_shapes([(query, "BD"), (candidates, "CD"), (log_q, "C")])
    rows = tf.shape(query)[0]
    own_log_q = own_columns(log_q, rows, first) if positive_log_q is None else positive_log_q
    own_bias, known = negated(own_log_q), tf.math.is_finite(own_log_q)
    total = dot_logsumexp(
        query,
        candidates,
        negated(log_q),
        # Setting the diagonal is a pass over [B, C]: only where it is not what it would be anyway.
        own_bias=None if positive_log_q is None and valid is None else own_bias,
        first=first,
        valid=valid,
        block_size=block_size,
    )
    own = own_columns(candidates, rows, first) if positive is None else positive
    positive = positive_scores(query, own)
    loss = total - (positive + tf.where(known, own_bias, tf.zeros_like(own_bias)))
    loss = tf.where(known, loss, tf.zeros_like(loss))
    if positive_twice:  # log(e^total + e^positive) - positive
        loss = tf.where(known, tf.math.softplus(loss), tf.zeros_like(loss))
    return loss


def negated(log_q: tf.Tensor) -> tf.Tensor:
    """-log q, the correction of a score, and -inf where log q is: such a column has no part."""
    return tf.where(tf.math.is_finite(log_q), -log_q, -float("inf"))


def positive_corrected_loss(
    query: tf.Tensor,
    candidates: tf.Tensor,
    log_q: tf.Tensor,
    *,
    positive: tf.Tensor | None = None,
    first: tf.Tensor | None = None,
    valid: Valid | None = None,
    block_size: int | None = None,
) -> tf.Tensor:
    """In-batch softmax whose correction knows that the positive is no sample.

    "Correcting the LogQ Correction", RecSys 2025, arXiv 2507.09331:
        loss_b = stopgrad(1 - P_b) · [log Σ_{j≠b} e^(s_bj - log q_j) - s_bb]
        P_b = e^(s_bb) / (e^(s_bb) + mean_{j≠b} e^(s_bj) (1 - q_b) / q_j)

    Args:
      query: [B, D].
      candidates: [C, D], C >= B, the positive of row b in column b.
      log_q, positive, first, block_size: as in `in_batch_softmax_loss`.
      valid: which columns are negatives of a row; False where another column holds its positive;
        None for all but its own.

    Returns:
      [B], not reduced; 0 for a row without negatives; (1 - 1/N)·log(N·(C - 1)) when all scores
      are equal and every q is 1/N.
    """
    tf.debugging.assert_shapes([(query, "BD"), (candidates, "CD"), (log_q, "C")])
    rows = tf.shape(query)[0]
    own_log_q = own_columns(log_q, rows, first)
    log_sum = functools.partial(
        dot_logsumexp,
        own_bias=tf.fill(tf.shape(own_log_q), tf.constant(-float("inf"), log_q.dtype)),
        first=first,
        valid=valid,
        block_size=block_size,
    )
    total = log_sum(query, candidates, negated(log_q))
    # The logarithm of how many negatives there are is the sum over scores of 0 without log q.
    no_bias = tf.where(tf.math.is_finite(log_q), tf.zeros_like(log_q), log_q)
    count = log_sum(tf.zeros_like(query[:, :1]), tf.zeros_like(candidates[:, :1]), no_bias)
    known = tf.math.is_finite(own_log_q) & tf.math.is_finite(count)
    total = tf.where(known, total, tf.zeros_like(total))
    own_q = tf.where(known, tf.exp(own_log_q), tf.zeros_like(own_log_q))
    own = own_columns(candidates, rows, first) if positive is None else positive
    positive = positive_scores(query, own)
    rest = total - count + tf.math.log1p(-own_q)
    weight = tf.stop_gradient(tf.sigmoid(rest - positive))  # 1 - P
    return tf.where(known, weight * (total - positive), tf.zeros_like(positive))


def resampled_softmax_loss(log_total: tf.Tensor, positive: tf.Tensor) -> tf.Tensor:
    """Softmax over a positive and negatives that stand for the corpus, without a correction.

    Chen et al., NeurIPS 2022, eq. (3), with the -log that it lacks in print:
        loss_b = log(e^(s_b) + Σ_j n_bj e^(s_bj)) - s_b
    from log_total_b = log Σ_j n_bj e^(s_bj), -inf for a row without negatives, and s_b: [B] each.

    Returns:
      [B], not reduced; log(1 + Σ_j n_bj) when all scores are equal, 0 without negatives.
    """
    tf.debugging.assert_shapes([(log_total, "B"), (positive, "B")])
    return tf.math.softplus(log_total - positive)
