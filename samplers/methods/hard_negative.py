"""Methods that draw many negatives for each query and train against the hardest of them."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, at_least_float32, positive_scores
from samplers.losses.pairwise import soft_bpr_loss
from samplers.methods.method import require
from samplers.methods.per_query import GroupedMethod
from samplers.random_numbers import for_rows, uniform_numbers
from samplers.selection.weights import harmonic_number


@dataclasses.dataclass(eq=False, kw_only=True)
class Dns(GroupedMethod):
    """Dynamic negative sampling: bpr with j the highest score among uniform draws.

    Zhang et al., SIGIR 2013, doi:10.1145/2484028.2484126.
    """

    excludes_seen: ClassVar[bool] = True

    num_negatives: int = 10  # N, uniform draws for each pair, of which one is kept

    _num_kept = 1

    def select(self, encoders: Encoders, batch: Batch, proposed: Candidates) -> Candidates:
        """The highest scores of each row; others where too few are valid."""
        scores, proposed = self._scored(encoders, batch, proposed)
        valid = self._valid(batch, proposed.ids)
        if valid is not None:
            scores = tf.where(valid, scores, -float("inf"))
        kept = tf.math.top_k(scores, self._num_kept).indices  # [B, M], ties by column
        return Candidates(*(tf.gather(part, kept, batch_dims=1) for part in proposed[:2]))


@dataclasses.dataclass(eq=False, kw_only=True)
class DnsMn(Dns):
    """Dynamic negative sampling, DNS(M, N): the M highest scores among N uniform draws.

    Shi et al., WWW 2023, doi:10.1145/3543507.3583223, Algorithm 1:
        loss_b = (1/M) Σ_{j in the top M of N} -log σ(s_ui - s_uj)
    With all n₋ negatives for the draws and M = β n₋ it is the estimator of OPAUC(β), eq. (12).

    With `dro` = β it is the loss of eq. (14), distributionally robust by CVaR, over the draws:
        loss_b = min_η η + 1/(β N) Σ_j (L_bj - η)_+, L_bj = -log σ(s_ui - s_uj)
    The minimum is at the ⌈β N⌉-th highest L: the mean of the β N highest, of the last of them only
    a part where β N is not whole, else DNS(β N, N), as Lemma 1 says.

    Differs: eq. (14) prints one η for all pairs; the lemma is about one for each.
    """

    num_negatives: int = 200  # N, uniform draws for each pair
    # G, at most as many rows in sequence share their draws; 1 where N is small, such as 10
    group_size: int = 8
    num_kept: int = 2  # M, the draws with the highest scores that are kept, at most N
    sum_over_kept: bool = False  # the sum over the M, not the mean, as in the published code
    dro: float | None = None  # β of the DRO loss, share of the draws that counts; none: M of them

    def __post_init__(self) -> None:
        super().__post_init__()
        most, share = self.num_negatives, self.dro
        require(self.num_kept <= most, "num_kept", f"at most num_negatives = {most}", self.num_kept)
        self._num_kept = self.num_kept
        if share is not None:
            require(0 < share <= 1, "dro", "above 0 and at most 1", share)
            require(not self.sum_over_kept, "sum_over_kept", "false with dro, a mean", True)
            self._num_kept = math.ceil(share * most)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        usable = tf.ones_like(losses) if valid is None else tf.cast(valid, losses.dtype)
        if self.sum_over_kept:
            return usable
        if self.dro is None:
            return super()._weights(losses, scores, log_q, valid)
        places = tf.range(self._num_kept, dtype=losses.dtype)  # by descending loss, as selected
        parts = tf.clip_by_value(self.dro * self.num_negatives - places, 0, 1) * usable
        return tf.math.divide_no_nan(parts, tf.reduce_sum(parts, axis=1, keepdims=True))


@dataclasses.dataclass(eq=False, kw_only=True)
class SoftBpr(Dns):
    """Dynamic negative sampling with the soft BPR loss, which trusts hard negatives less.

    Shi et al., "Soft BPR Loss for Dynamic Hard Negative Sampling in Recommender Systems",
    Algorithm 1, eq. (10): loss_b = -log σ((1 - α) (s_ui - s_uj)), j as in `dns`.

    With `mix` it is bpr against a synthetic negative, after which the paper makes that loss:
        e_j' = α e_i + (1 - α) e_j, eq. (4)-(5), with a gradient through both embeddings
    `fixed`: α is that of `soft_factor`, and losses and gradients are those of eq. (10). `uniform`:
    1 - α ~ U(0, 2 · soft_factor) for each pair, so that .5 is the U(0, 1) of MixGCF (Huang et al.,
    KDD 2021).
    """

    num_negatives: int = 16  # H, uniform draws for each pair, of which one is kept
    soft_factor: float = 0.1  # 1 - α, above 0 and at most 1, where it is dns
    mix: str = "none"  # bpr against mixes with the positive instead, their α fixed or uniform

    def __post_init__(self) -> None:
        super().__post_init__()
        factor, known = self.soft_factor, ("none", "fixed", "uniform")
        require(0 < factor <= 1, "soft_factor", "above 0 and at most 1", factor)
        require(self.mix in known, "mix", "none, fixed or uniform", repr(self.mix))
        if self.mix == "uniform":
            require(factor <= 0.5, "soft_factor", "at most 0.5 with mix=uniform", factor)
            self.row_by_row = False  # type: ignore[misc]  # α is drawn for the whole batch

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        if self.mix == "none":
            return super().loss(encoders, batch, proposed, seed=seed)
        share = tf.constant(self.soft_factor)  # 1 - α: [], or [B, 1, 1]
        if self.mix == "uniform":
            rows = tf.size(batch.query_ids)
            draws = for_rows(lambda num: uniform_numbers([num], seed), rows, batch.part)
            share = 2 * share * draws[:, None, None]
        positive = at_least_float32(encoders.positive)[:, None]

        def mixed(ids: tf.Tensor) -> tf.Tensor:
            negative = at_least_float32(encoders.candidates(ids))
            return positive + tf.cast(share, negative.dtype) * (negative - positive)

        return super().loss(encoders._replace(candidates=mixed), batch, proposed, seed=seed)

    def _pair_losses(self, positive: tf.Tensor, negative: tf.Tensor) -> tf.Tensor:
        if self.mix != "none":
            return super()._pair_losses(positive, negative)
        return soft_bpr_loss(positive, negative, soft_factor=self.soft_factor)


@dataclasses.dataclass(eq=False, kw_only=True)
class Warp(GroupedMethod):
    """The first of several uniform draws that outranks the positive, by how rare that is.

    Weston, Bengio and Usunier, IJCAI 2011 (WSABIE), with the pairwise loss of bpr:
        loss_b = J(rank_b) · -log σ(s_ui - s_uj), J(r) = Σ_{k ≤ r} 1/k
        rank_b = floor((N - 1) / V) + 1, j the V-th draw, the first with s_uj > s_ui - margin
    The loss is 0 where none of the draws is such a violator. A draw that the masks leave out
    counts as a trial.

    The margin is that of WSABIE: with none, a row whose positive is above all draws teaches
    nothing. Ten trials are those of LightFM (Kula, 2015).
    Differs: all trials are drawn at once; WSABIE takes the hinge.
    """

    num_negatives: int = 10  # the most trials, uniform draws for each pair; one is kept
    margin: float = 1.0  # a violator scores above s_ui - margin

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.margin < float("inf"), "margin", "at least 0 and finite", self.margin)

    def select(self, encoders: Encoders, batch: Batch, proposed: Candidates) -> Candidates:
        """The first violator of each row, and J(rank) of the row, 0 without a violator."""
        scores, proposed = self._scored(encoders, batch, proposed)
        threshold = positive_scores(encoders.query, encoders.positive) - self.margin
        # The positive outranks itself by rounding only, where two kernels sum in other orders.
        violates = proposed.ids != batch.candidate_ids[:, None]
        violates &= scores > threshold[:, None]
        valid = self._valid(batch, proposed.ids)
        violates = violates if valid is None else violates & valid
        # The first violator, or column 0; argmax breaks ties at will.
        first = tf.math.top_k(tf.cast(violates, tf.float32), k=1).indices
        trials = tf.cast(first, tf.int64)[:, 0] + 1
        weight = harmonic_number((self.num_candidates - 1) // trials + 1)
        ids, log_q = (tf.gather(part, first, batch_dims=1) for part in proposed[:2])
        found = tf.reduce_any(violates, axis=1)
        return Candidates(ids, log_q, tf.where(found, weight, tf.zeros_like(weight)))
