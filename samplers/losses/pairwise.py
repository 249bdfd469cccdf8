"""Pairwise losses as pure functions: a positive against each of its negatives.

Bayesian personalised ranking (BPR): Rendle et al., UAI 2009, arXiv 1205.2618.
"""

from __future__ import annotations

import tensorflow as tf


def bpr_loss(positive_scores: tf.Tensor, negative_scores: tf.Tensor) -> tf.Tensor:
    """BPR-OPT: loss_bj = -log σ(s_b - s_bj), from scores [B] and [B, N].

    Returns:
      [B, N], not reduced; log 2 where the scores are equal.
    """
    tf.debugging.assert_shapes([(positive_scores, "B"), (negative_scores, "BN")])
    return tf.nn.softplus(negative_scores - positive_scores[:, None])


def soft_bpr_loss(
    positive_scores: tf.Tensor, negative_scores: tf.Tensor, *, soft_factor: float
) -> tf.Tensor:
    """BPR whose sigmoid is stretched, so that the hardest negatives do not outweigh the others.

    Shi et al., "Soft BPR Loss for Dynamic Hard Negative Sampling", eq. (10):
        loss_bj = -log σ((1 - α) (s_b - s_bj))
    For scores that are dot products it is BPR against the mix α e_i + (1 - α) e_j of positive
    and negative, eq. (5).

    Differs: the paper prints eq. (10) without the minus. `soft_factor` is 1 - α, above 0 and at
    most 1, where it is `bpr_loss`; shapes and start value are those of `bpr_loss`.
    """
    return bpr_loss(soft_factor * positive_scores, soft_factor * negative_scores)
