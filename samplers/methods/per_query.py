"""Methods that draw negatives for each query and compare the positive with each of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, candidate_scores, positive_scores
from samplers.losses.pairwise import bpr_loss
from samplers.methods.method import Method, require_above_0
from samplers.proposals.popularity import PopularitySampler, UniformSampler, log_pop
from samplers.selection.validity import per_query_mask, weigh_rows
from samplers.selection.weights import (
    adaptive_temperature,
    equal_weights,
    loss_weights,
    softmax_weights,
)


@dataclasses.dataclass(eq=False, kw_only=True)
class PerQueryMethod(Method):
    """What the per-query methods share: loss_b = Σ_j p_bj L_bj over negatives of its own.

    Here they are drawn from the proposal, compared by BPR and weighed equally. Where no negative
    of a row is valid, its loss is 0.
    """

    row_by_row: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("num_candidates",)

    num_negatives: int = 1  # N, draws for each pair
    mask_accidental_hits: bool = False  # leave out draws of the row's own positive

    def __post_init__(self) -> None:
        super().__post_init__()
        self._proposal = self._make_proposal()

    def _make_proposal(self) -> UniformSampler | PopularitySampler:
        return UniformSampler(self.num_candidates)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._proposal.sample([tf.size(batch.query_ids), self.num_negatives], seed=seed)

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        return batch  # draws are looked up in `seen`

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        assert proposed is not None
        scores, proposed = self._scored(encoders, batch, proposed)
        losses = self._pair_losses(positive_scores(encoders.query, encoders.positive), scores)
        weights = self._weights(losses, scores, proposed.log_q, self._valid(batch, proposed.ids))
        rows = tf.reduce_sum(tf.stop_gradient(weights) * losses, axis=1)
        if proposed.row_weight is not None:
            rows *= tf.stop_gradient(proposed.row_weight)
        return weigh_rows(rows, batch)

    def _scored(
        self, encoders: Encoders, batch: Batch, proposed: Candidates
    ) -> tuple[tf.Tensor, Candidates]:
        """The scores of what is proposed, [B, N], and what it is for each row."""
        scores = candidate_scores(encoders.query, encoders.candidates(proposed.ids))
        return scores, proposed.by_row(tf.size(batch.query_ids))

    def _pair_losses(self, positive: tf.Tensor, negative: tf.Tensor) -> tf.Tensor:
        """L: [B] and [B, N] → [B, N]."""
        return bpr_loss(positive, negative)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        """p: [B, N]."""
        return equal_weights(losses, valid=valid)

    def _valid(self, batch: Batch, ids: tf.Tensor) -> tf.Tensor | None:
        hits = self.mask_accidental_hits
        return per_query_mask(batch, ids, mask_accidental_hits=hits, seen=self.seen)


@dataclasses.dataclass(eq=False, kw_only=True)
class GroupedMethod(PerQueryMethod):
    """Draws that rows share: each row has the distribution that it has alone.

    So the expected gradient is that of draws for each row; its variance is larger, as the draws
    of a group come together.
    """

    group_size: int = 1  # G, at most as many rows in sequence share their draws

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        if self.group_size == 1:
            return super().propose(query, batch, seed=seed)
        groups = -(-tf.size(batch.query_ids) // self.group_size)
        return self._proposal.sample([groups, 1, self.num_negatives], seed=seed)


def log_frequency_sampler(frequency: np.ndarray) -> PopularitySampler:
    """The popular proposal of Chen et al., WWW 2022, section 4.3: Q_j ∝ log(1 + f_j)."""
    log_pop(frequency)  # refuses what are no counts
    return PopularitySampler(np.log1p(np.asarray(frequency, np.float64)))


@dataclasses.dataclass(eq=False, kw_only=True)
class Bpr(PerQueryMethod):
    """Pairwise ranking against uniform negatives: the mean over them of -log σ(s_ui - s_uj).

    Rendle et al., UAI 2009, arXiv 1205.2618.
    """


@dataclasses.dataclass(eq=False, kw_only=True)
class Pns(PerQueryMethod):
    """Pairwise ranking against popular negatives: bpr with j drawn ∝ f_j^0.75.

    Chen et al., WWW 2022, doi:10.1145/3485447.3512075, section 2.2.
    """

    needs: ClassVar[tuple[str, ...]] = ("frequency",)

    power: float = 0.75  # of the train rows f in the proposal ∝ f^power, above 0

    def _make_proposal(self) -> PopularitySampler:
        require_above_0("power", self.power)
        log_pop(self.frequency)  # refuses what are no counts
        return PopularitySampler(np.asarray(self.frequency, np.float64) ** self.power)


@dataclasses.dataclass(eq=False, kw_only=True)
class SoftmaxV(GroupedMethod):
    """Uniform negatives, weighed by a softmax of their losses at an adaptive temperature.

    Shi et al., WWW 2023, doi:10.1145/3543507.3583223, Algorithm 2, Softmax-v(ρ, N):
        loss_b = Σ_j p_bj L_bj, L_bj = -log σ(s_ui - s_uj)
        p_b = softmax_j(L_bj / τ_b), τ_b = sqrt(Var_j L_bj / (2 ρ)), eq. (15)-(16)
    A smooth surrogate of OPAUC(β) with ρ = -log β. With `tau` it is the softmax based sampling of
    section 2.1 instead, eq. (1): by the scores, at a fixed temperature,
        p_b = softmax_j(s_uj / τ)
    """

    excludes_seen: ClassVar[bool] = True

    num_negatives: int = 200  # N, uniform draws for each pair
    # G, at most as many rows in sequence share their draws; 1 where N is small, such as 10
    group_size: int = 8
    rho: float = 1.0  # ρ, hardness: -log β for the OPAUC(β) that is meant, 0 < β < 1
    tau: float | None = None  # weigh by e^(score / tau) instead, whatever ρ; none: by the losses

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_0("rho", self.rho)
        if self.tau is not None:
            require_above_0("tau", self.tau)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        if self.tau is not None:
            return softmax_weights(scores / self.tau, valid=valid)
        temperature = adaptive_temperature(losses, self.rho, valid=valid)
        return loss_weights(losses, temperature, valid=valid)


@dataclasses.dataclass(eq=False, kw_only=True)
class ImportanceMethod(PerQueryMethod):
    """Importance weights of the negatives: p_b = softmax_j(s_uj - log Q_j)."""

    num_negatives: int = 5  # N, draws for each pair

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        return softmax_weights(scores - log_q, valid=valid)


@dataclasses.dataclass(eq=False, kw_only=True)
class PrisU(ImportanceMethod, GroupedMethod):
    """Uniform negatives with importance weights: those that score high count more.

    Lian et al., WWW 2020, doi:10.1145/3366423.3380187, the PRIS(U) of Chen et al., WWW 2022:
        loss_b = Σ_j p_bj L_bj, p_b = softmax_j(s_uj - log Q_j)
    """


@dataclasses.dataclass(eq=False, kw_only=True)
class PrisP(PrisU):
    """As pris_u, with negatives drawn ∝ log(1 + f_j): Chen et al., WWW 2022, section 4.3."""

    needs: ClassVar[tuple[str, ...]] = ("frequency",)

    def _make_proposal(self) -> PopularitySampler:
        return log_frequency_sampler(self.frequency)
