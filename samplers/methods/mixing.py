"""Methods that add mixtures of the candidates of the batch to its negatives."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, at_least_float32, positive_scores
from samplers.losses.softmax import negated, resampled_softmax_loss
from samplers.losses.streamed_softmax import dot_logsumexp, own_columns
from samplers.methods.in_batch import SslPop
from samplers.methods.method import require, require_above_0
from samplers.random_numbers import uniform_numbers
from samplers.selection.mixing import masked_mixture_scores, mixing_weights
from samplers.selection.validity import weigh_rows, without_padding


@dataclasses.dataclass(eq=False, kw_only=True)
class MixingMethod(SslPop):
    """What the methods of this file share: eq. (6) of Fan et al., CIKM 2023.

        loss = γ · ssl_pop + (1 - γ) · [log(e^(s_ui - log pop_i) + Σ_k e^(m_uk))
                                        - (s_ui - log pop_i)]
    over K virtual negatives with scores m_uk, shared by all queries.

    Differs: eq. (6) has no positive in the second sum, so that it can fall without bound; the
    published code has it.
    """

    gamma: float = 0.2  # γ, weight of the loss over the batch columns, in [0, 1]
    num_mixed: int = 128  # K, virtual negatives; the published tables take the batch size
    positive_in_mixture: bool = True  # false: the second sum as printed, without the positive

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.gamma <= 1, "gamma", "between 0 and 1", self.gamma)

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        if self.gamma == 1:
            return super().loss(encoders, batch, proposed, seed=seed)
        losses = (1 - self.gamma) * self._mixture_losses(encoders, batch, seed)
        if self.gamma > 0:
            losses += self.gamma * self._batch_losses(encoders, batch)
        return weigh_rows(losses, batch)

    def _mixture_losses(self, encoders: Encoders, batch: Batch, seed: tf.Tensor) -> tf.Tensor:
        log_q = without_padding(self._log_q(batch.columns), batch.columns)
        own_log_q = own_columns(log_q, tf.size(batch.candidate_ids), batch.first)
        known = tf.math.is_finite(own_log_q)
        positive = positive_scores(encoders.query, encoders.positive)
        positive += tf.where(known, negated(own_log_q), tf.zeros_like(own_log_q))
        log_total = self._mixture_logsumexp(encoders, batch, log_q, seed)
        if self.positive_in_mixture:
            losses = resampled_softmax_loss(log_total, positive)
        else:
            known &= tf.math.is_finite(log_total)
            losses = tf.where(known, log_total, positive) - positive
        return tf.where(known, losses, tf.zeros_like(losses))

    def _mixture_logsumexp(
        self, encoders: Encoders, batch: Batch, log_q: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        """log Σ_k e^(m_uk): [B], -inf for a row without virtual negatives."""
        raise NotImplementedError


@dataclasses.dataclass(eq=False, kw_only=True)
class Bmns(MixingMethod):
    """Batch-mix negative sampling: virtual negatives that mix all candidates of the batch.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, Algorithm 1 and eq. (4)-(6):
        m_uk = Σ_j ŵ_kj s_uj, ŵ_k = softmax_j(w_kj - log pop_j), w ~ U(0, 1) or Beta(α, α)
    and the loss of `MixingMethod`. Scores are linear in the embedding of the candidate, so the
    embeddings are mixed once for all queries: m_uk = q_u · Σ_j ŵ_kj v_j.

    Differs: where hits are masked, a row has mixtures of its own, over the columns that it may
    use, and none of its own positive; eq. (4) mixes all columns for every row.
    """

    alpha: float | None = None  # α of Beta(α, α) for the mixing weights; none: U(0, 1)
    correct_weights: bool = True  # take log pop from the mixing weights: eq. (5), else eq. (3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            require_above_0("alpha", self.alpha)

    def _mixture_logsumexp(
        self, encoders: Encoders, batch: Batch, log_q: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        correct, valid = self.correct_weights, self._valid(batch)
        weights = mixing_weights(log_q, self.num_mixed, seed, alpha=self.alpha, correct=correct)
        query, candidates = encoders.query, encoders.columns
        if valid is not None:
            size = self.block_size
            scores = masked_mixture_scores(query, candidates, weights, valid, block_size=size)
            return _logsumexp(scores)
        candidates = at_least_float32(candidates)
        mixed = tf.matmul(tf.cast(weights, candidates.dtype), candidates)  # [K, D]
        nothing = tf.reduce_all(weights == 0)  # no column to mix
        bias = tf.where(nothing, -float("inf"), tf.zeros([self.num_mixed]))
        return dot_logsumexp(query, mixed, bias, block_size=self.block_size)


@dataclasses.dataclass(eq=False, kw_only=True)
class PositiveMixing(MixingMethod):
    """Virtual negatives that mix the positive of a row into one candidate of the batch.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, eq. (8), after MixGCF (Huang et al., KDD
    2021): the loss of `MixingMethod` with
        m_uk = α_k s_ui + (1 - α_k) s_uj(k), α_k ~ U(0, 1), j(k) a uniform column of the batch.
    """

    def _mixture_logsumexp(
        self, encoders: Encoders, batch: Batch, log_q: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        numbers = uniform_numbers([2, self.num_mixed], seed)
        columns = tf.cast(numbers[0] * tf.cast(tf.size(log_q), tf.float32), tf.int32)
        columns = tf.minimum(columns, tf.size(log_q) - 1)  # the product may round up to B
        positive = positive_scores(encoders.query, encoders.positive)
        chosen = tf.gather(at_least_float32(encoders.columns), columns)
        scores = tf.matmul(at_least_float32(encoders.query), chosen, transpose_b=True)  # [B, K]
        share = tf.cast(numbers[1], scores.dtype)[None, :]
        mixed = share * positive[:, None] + (1 - share) * scores
        used = tf.gather(tf.math.is_finite(log_q), columns)[None, :]
        valid = self._valid(batch)
        if valid is not None:
            used &= tf.gather(valid(tf.range(tf.size(log_q))), columns, axis=1)
        return _logsumexp(tf.where(used, mixed, -float("inf")))


def _logsumexp(exponents: tf.Tensor) -> tf.Tensor:
    """log Σ_k e^x_bk: [B]; -inf and no gradient where all are -inf."""
    known = tf.reduce_any(tf.math.is_finite(exponents), axis=1)
    safe = tf.where(known[:, None], exponents, tf.zeros_like(exponents))
    return tf.where(known, tf.reduce_logsumexp(safe, axis=1), -float("inf"))
