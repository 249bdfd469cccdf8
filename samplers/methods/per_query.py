"""Methods that draw negatives for each query and compare the positive with each of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders
from samplers.checks import check_above_0, check_at_least_1
from samplers.losses.pairwise import bpr_loss, weighted_sum
from samplers.losses.scoring import candidate_scores, positive_scores
from samplers.methods.method import Method
from samplers.proposals.frequency import log_pop
from samplers.proposals.popularity import PopularitySampler
from samplers.proposals.uniform import UniformSampler
from samplers.selection.validity import per_query_mask, weigh_rows
from samplers.selection.weights import (
    adaptive_temperature,
    equal_weights,
    loss_weights,
    softmax_weights,
)


@dataclasses.dataclass(eq=False, kw_only=True)
class PerQueryMethod(Method):
    """What the methods of this file share: loss_b = Σ_j p_bj L_bj over negatives of its own.

    A method draws the negatives in `propose`, may thin them out in `select`, and weighs what is
    left in `_weights`. Where no negative of a row is valid, its loss is 0.
    """

    row_by_row: ClassVar[bool] = True

    mask_accidental_hits: bool = False  # leave out draws of the row's own positive

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        """The batch as it is: draws are looked up in `seen`."""
        del proposed
        return batch

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        """Σ_j p_bj L_bj, times the weight that `select` gave the row: float32 [B]."""
        del seed
        assert proposed is not None
        scores = candidate_scores(encoders.query, encoders.candidates(proposed.ids))
        losses = self._pair_losses(positive_scores(encoders.query, encoders.positive), scores)
        weights = self._weights(losses, scores, proposed.log_q, self._valid(batch, proposed.ids))
        rows = weighted_sum(losses, weights)
        if proposed.row_weight is not None:
            rows *= tf.stop_gradient(proposed.row_weight)
        return weigh_rows(rows, batch)

    def _pair_losses(self, positive: tf.Tensor, negative: tf.Tensor) -> tf.Tensor:
        return bpr_loss(positive, negative)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        """p, [B, N]: the mean of the losses, by default."""
        del scores, log_q
        return equal_weights(losses, valid=valid)

    def _valid(self, batch: Batch, ids: tf.Tensor) -> tf.Tensor | None:
        return per_query_mask(
            batch, ids, mask_accidental_hits=self.mask_accidental_hits, seen=self.seen
        )


@dataclasses.dataclass(eq=False, kw_only=True)
class UniformMethod(PerQueryMethod):
    """A method that draws its negatives uniformly."""

    needs: ClassVar[tuple[str, ...]] = ("num_candidates",)

    num_negatives: int = 1  # N, uniform draws for each pair

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1("num_negatives", self.num_negatives)
        assert self.num_candidates is not None
        self._sampler = UniformSampler(self.num_candidates)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        del query
        return self._sampler.sample([tf.size(batch.query_ids), self.num_negatives], seed=seed)


@dataclasses.dataclass(eq=False, kw_only=True)
class PopularityMethod(PerQueryMethod):
    """A method that draws its negatives by a function of their train rows."""

    needs: ClassVar[tuple[str, ...]] = ("frequency",)

    num_negatives: int = 1  # N, draws for each pair

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1("num_negatives", self.num_negatives)
        counts = np.asarray(self.frequency, np.float64)
        log_pop(counts)  # refuses what are no counts
        self._sampler = PopularitySampler(self._proposal_weights(counts))

    def _proposal_weights(self, counts: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        del query
        return self._sampler.sample([tf.size(batch.query_ids), self.num_negatives], seed=seed)


@dataclasses.dataclass(eq=False, kw_only=True)
class Bpr(UniformMethod):
    """Pairwise ranking against uniform negatives.

    Rendle et al., UAI 2009, arXiv 1205.2618: loss_b = -log σ(s_ui - s_uj), j uniform. The mean
    over the draws where there are several.
    """


@dataclasses.dataclass(eq=False, kw_only=True)
class Pns(PopularityMethod):
    """Pairwise ranking against popular negatives: bpr with j drawn ∝ f_j^0.75.

    The popularity-based sampler of Chen et al., WWW 2022, doi:10.1145/3485447.3512075,
    section 2.2.
    """

    power: float = 0.75  # of the train rows f in the proposal ∝ f^power, above 0

    def __post_init__(self) -> None:
        check_above_0("power", self.power)
        super().__post_init__()

    def _proposal_weights(self, counts: np.ndarray) -> np.ndarray:
        return counts**self.power


@dataclasses.dataclass(eq=False, kw_only=True)
class SoftmaxV(UniformMethod):
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
    rho: float = 1.0  # ρ, hardness: -log β for the OPAUC(β) that is meant, 0 < β < 1
    tau: float | None = None  # weigh by e^(score / tau) instead, whatever ρ; none: by the losses

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho < float("inf"):
            raise ValueError(
                f"rho must be above 0 and finite, got {self.rho}: it is -log β, 0 < β < 1."
            )
        if self.tau is not None:
            check_above_0("tau", self.tau)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        if self.tau is not None:
            return softmax_weights(scores / self.tau, valid=valid)
        temperature = adaptive_temperature(losses, self.rho, valid=valid)
        return loss_weights(losses, temperature, valid=valid)


@dataclasses.dataclass(eq=False, kw_only=True)
class PrisU(UniformMethod):
    """Uniform negatives with importance weights: those that score high count more.

    Lian et al., WWW 2020, doi:10.1145/3366423.3380187, the PRIS(U) of Chen et al., WWW 2022:
        loss_b = Σ_j p_bj L_bj, p_b = softmax_j(s_uj - log Q_j)
    """

    num_negatives: int = 5  # N, draws for each pair

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        return softmax_weights(scores - log_q, valid=valid)


@dataclasses.dataclass(eq=False, kw_only=True)
class PrisP(PopularityMethod):
    """As pris_u, with negatives drawn ∝ log(1 + f_j): Chen et al., WWW 2022, section 4.3."""

    num_negatives: int = 5  # N, draws for each pair

    def _proposal_weights(self, counts: np.ndarray) -> np.ndarray:
        return np.log1p(counts)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        return softmax_weights(scores - log_q, valid=valid)
