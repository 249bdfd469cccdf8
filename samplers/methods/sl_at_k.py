"""SL@K: a softmax loss that counts most for positives near the top K of their query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from samplers.candidates import (
    Batch,
    Candidates,
    Embed,
    Encoders,
    at_least_float32,
    positive_scores,
)
from samplers.losses.softmax import resampled_softmax_loss
from samplers.losses.streamed_softmax import dot_logsumexp
from samplers.methods.method import Method, require, require_above_0
from samplers.proposals.popularity import UniformSampler
from samplers.selection.running_top_k import running_top_k
from samplers.selection.validity import hit_filter, weigh_rows
from samplers.state import state_variable

_BLOCK, _BLOCK_COLUMNS = 1024, 1 << 16  # queries and candidates that are scored at a time


@dataclasses.dataclass(eq=False, kw_only=True)
class SlAtK(Method):
    """Softmax against uniform negatives, weighed by where the positive stands to the top K.

    SL@K, KDD 2025, arXiv 2508.05673, for scores that are cosines over a temperature τ:
        loss = σ((s_ui - β_u) / τ_w) · log Σ_j e^(s_uj - s_ui)
    over the positive and the negatives j, with β_u the K-th best score of query u, estimated
    every few epochs; no gradient flows through the weight. As scores come divided by τ, so is
    `weight_temperature`: τ_w / τ, 10 for the τ_w = 1 and τ = 0.1 of the paper's Gowalla.

    Differs: the negatives are drawn once for the batch, not for each row. β_u is the K-th best
    over the corpus, or, with `num_estimated`, the score at the same quantile of that many
    candidates; the paper takes the positives of u and sampled negatives. Until the first
    estimate, at the end of the first epoch, all weights are 1.
    """

    faster_with_xla: ClassVar[bool] = False
    row_by_row: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("num_candidates", "num_queries")

    num_negatives: int = 1000  # N, uniform candidates, shared by the batch
    k: int = 20  # K of the top K
    weight_temperature: float = 10.0  # τ_w / τ: in units of scores, which are cosines over τ
    refresh_epochs: int = 5  # epochs from one estimate of β to the next
    num_estimated: int | None = None  # candidates that β is estimated from; none: all
    positive_in_sum: bool = True  # false: the sum is over the negatives alone, as published
    weight_gradient: bool = False  # let a gradient flow through the weight, as published
    mask_accidental_hits: bool = False  # leave out draws of the row's own positive
    block_size: int | None = None  # candidates scored at once, to save memory; none: all

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_0("weight_temperature", self.weight_temperature)
        largest = f"at most the size of the corpus, {self.num_candidates}"
        require(self.k <= self.num_candidates, "k", largest, self.k)
        self._sampler = UniformSampler(self.num_candidates)
        self.threshold = state_variable(tf.fill([self.num_queries], -float("inf")), "threshold")
        self.epoch = state_variable(tf.zeros([], tf.int64), "epoch")

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._sampler.sample([self.num_negatives], seed=seed)

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        assert proposed is not None
        first, hits = tf.size(batch.candidate_ids), self.mask_accidental_hits
        log_total = dot_logsumexp(
            encoders.query,
            encoders.candidates(proposed.ids),
            tf.zeros([tf.size(proposed.ids)]),
            valid=hit_filter(batch, proposed.ids, mask_accidental_hits=hits, first=first),
            block_size=self.block_size,
        )
        positive = positive_scores(encoders.query, encoders.positive)
        threshold = tf.cast(tf.gather(self.threshold, batch.query_ids), positive.dtype)
        weight = tf.sigmoid((positive - threshold) / self.weight_temperature)
        if not self.weight_gradient:
            weight = tf.stop_gradient(weight)
        if self.positive_in_sum:
            losses = resampled_softmax_loss(log_total, positive)
        else:
            losses = tf.where(tf.math.is_finite(log_total), log_total - positive, 0.0)
        return weigh_rows(weight * losses, batch)

    def end_epoch(self, encoders: Encoders) -> None:
        """Estimates β after the first epoch and every `refresh_epochs` epochs after it."""
        embed_queries = encoders.queries_for("sl_at_k")
        if int(self.epoch.read_value()) % self.refresh_epochs == 0:
            self._estimate(encoders.candidates, embed_queries)
        self.epoch.assign_add(1)

    def _estimate(self, embed_candidates: Embed, embed_queries: Embed) -> None:
        """Sets β of all queries; a function of its own, so that a traced `end_epoch` follows it."""
        size = min(self.num_estimated or self.num_candidates, self.num_candidates)
        # Evenly spaced in the order of counts, so that every popularity has its share.
        ids = np.arange(size, dtype=np.int64) * self.num_candidates // size
        candidates = at_least_float32(embed_candidates(tf.constant(ids)))
        rank = max(1, round(self.k * size / self.num_candidates))
        best = []
        for start in range(0, self.num_queries, _BLOCK):
            rows = tf.range(start, min(start + _BLOCK, self.num_queries), dtype=tf.int64)
            queries = at_least_float32(embed_queries(rows))
            scores, _ = running_top_k(queries, candidates, rank, block_size=_BLOCK_COLUMNS)
            best.append(scores[:, -1])
        self.threshold.assign(tf.cast(tf.concat(best, axis=0), tf.float32))
