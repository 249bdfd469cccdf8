"""Methods whose draws follow the model: pools, ranks by factor, a kernel tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, candidate_scores, positive_scores
from samplers.methods.method import require_above_0
from samplers.methods.per_query import ImportanceMethod, PerQueryMethod, log_frequency_sampler
from samplers.proposals.adaptive_oversampling import AdaptiveOversampler
from samplers.proposals.kernel_tree import KernelTree
from samplers.proposals.popularity import PopularitySampler
from samplers.proposals.query_pool import QueryPool
from samplers.selection.weights import harmonic_number
from samplers.state import renewed_variable


def _run_if(condition: tf.Tensor, action: Callable[[], None]) -> None:
    def run() -> tf.Tensor:
        action()
        return tf.constant(True)

    tf.cond(condition, run, lambda: tf.constant(False))


@dataclasses.dataclass(eq=False, kw_only=True)
class RenewedMethod(ImportanceMethod):
    """Importance weights as in pris_u, over draws from a state that is renewed once an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._due = renewed_variable(tf.constant(True), "due")

    def refresh(self, encoders: Encoders, *, seed: tf.Tensor) -> None:
        """Renews the state in the first step, and in the first one of every epoch."""

        def renew() -> None:
            self._renew(encoders, seed)
            self._due.assign(False)

        _run_if(self._due, renew)

    def end_epoch(self, encoders: Encoders) -> None:
        self._due.assign(True)

    def _renew(self, encoders: Encoders, seed: tf.Tensor) -> None:
        raise NotImplementedError


@dataclasses.dataclass(eq=False, kw_only=True)
class AdaSirU(RenewedMethod):
    """Negatives from a pool for each query that follows the softmax of its scores.

    Chen et al., WWW 2022, doi:10.1145/3485447.3512075, Algorithm 1 with a uniform proposal:
        loss_b = Σ_j p_bj L_bj, p_b = softmax_j(s_uj - log w_uj), eq. (1)
    over uniform draws from the pool of the query; w_uj is the weight with which j came into the
    pool, by the scores at the end of the last epoch, see `QueryPool`.
    """

    needs: ClassVar[tuple[str, ...]] = ("num_candidates", "num_queries")

    pool_size: int = 200  # P, candidates in the pool of each query
    add_log_weights: bool = False  # s + log w for s - log w, as in the published code

    _keep_proposed = False

    def __post_init__(self) -> None:
        super().__post_init__()
        size, proposal, keep = self.pool_size, self._proposal, self._keep_proposed
        self._pool = QueryPool(self.num_queries, size, proposal, keep_proposed=keep, seen=self.seen)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._pool.sample(batch.query_ids, self.num_negatives, seed=seed)

    def _renew(self, encoders: Encoders, seed: tf.Tensor) -> None:
        self._pool.renew(encoders, seed=seed)

    def _weights(
        self, losses: tf.Tensor, scores: tf.Tensor, log_q: tf.Tensor, valid: tf.Tensor | None
    ) -> tf.Tensor:
        log_q = -log_q if self.add_log_weights else log_q
        return super()._weights(losses, scores, log_q, valid)


@dataclasses.dataclass(eq=False, kw_only=True)
class AdaSirP(AdaSirU):
    """As adasir_u, with the proposal ∝ log(1 + f_j): Chen et al., WWW 2022, section 4.3."""

    needs: ClassVar[tuple[str, ...]] = ("frequency", "num_queries")

    def _make_proposal(self) -> PopularitySampler:
        return log_frequency_sampler(self.frequency)


@dataclasses.dataclass(eq=False, kw_only=True)
class AdaSirW(AdaSirU):
    """As adasir_u, with more weight on positives of low rank.

    Chen et al., WWW 2022, doi:10.1145/3485447.3512075, eq. (2)-(3):
        loss_b = J(rank_b) · Σ_j p_bj L_bj, J(r) = Σ_{k ≤ r} 1/k
        rank_b = floor((N - 1) · #{k in K_u: s_uk > s_ui} / |K_u|) + 1
    with the uniform draws K_u that the pool was last renewed from.
    """

    count_below: bool = False  # s_uk < s_ui for s_uk > s_ui, as in the published code

    _keep_proposed = True

    def select(self, encoders: Encoders, batch: Batch, proposed: Candidates) -> Candidates:
        assert self._pool.proposed is not None
        ids = tf.gather(self._pool.proposed, batch.query_ids)  # [B, P]
        scores = candidate_scores(encoders.query, encoders.candidates(ids))
        positive = positive_scores(encoders.query, encoders.positive)[:, None]
        counted = scores < positive if self.count_below else scores > positive
        counted &= ids != batch.candidate_ids[:, None]  # by rounding, see Warp
        if self.seen is not None:
            counted &= ~self.seen.holds(batch.query_ids, ids)
        count = tf.reduce_sum(tf.cast(counted, tf.int64), axis=1)
        rank = (self.num_candidates - 1) * count // self.pool_size + 1
        return proposed._replace(row_weight=harmonic_number(rank))


@dataclasses.dataclass(eq=False, kw_only=True)
class AoBpr(PerQueryMethod):
    """As bpr, against negatives that a factor of the query ranks high: `AdaptiveOversampler`.

    Rendle and Freudenthaler, WSDM 2014, doi:10.1145/2556195.2556248.
    """

    rank_scale: float = 500.0  # λ of the rank r drawn ∝ e^(-r/λ), above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_0("rank_scale", self.rank_scale)
        self._sampler = AdaptiveOversampler(self.num_candidates, rank_scale=self.rank_scale)

    def refresh(self, encoders: Encoders, *, seed: tf.Tensor) -> None:
        """Orders the candidates anew in the first step, and every N log N draws."""
        _run_if(self._sampler.due, lambda: self._sampler.renew(encoders.corpus()))

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._sampler.sample(query, self.num_negatives, seed=seed)

    def update(self, batch: Batch) -> None:
        self._sampler.count(tf.size(batch.query_ids) * self.num_negatives)


@dataclasses.dataclass(eq=False, kw_only=True)
class Kernel(RenewedMethod):
    """Negatives drawn by a quadratic kernel of their scores, with importance weights.

    Blanc and Rendle, ICML 2018, arXiv 1712.00527, as in Chen et al., WWW 2022:
        loss_b = Σ_j p_bj L_bj, p_b = softmax_j(s_uj - log Q_uj)
        Q_uj ∝ α <q_u, v_j>² + 1, through `KernelTree`, with the v_j of the last renewal
    """

    alpha: float = 1.0  # α of the kernel, above 0; the paper takes 100
    leaf_size: int = 32  # candidates in a leaf of the tree: memory falls and time grows with it

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_0("alpha", self.alpha)
        self._tree = KernelTree(self.num_candidates, alpha=self.alpha, leaf_size=self.leaf_size)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._tree.sample(query, self.num_negatives, seed=seed)

    def _renew(self, encoders: Encoders, seed: tf.Tensor) -> None:
        self._tree.renew(encoders.corpus())
