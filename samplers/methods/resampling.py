"""Methods that resample the columns of a batch for each query, by the softmax of its scores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, positive_scores
from samplers.losses.softmax import resampled_softmax_loss
from samplers.methods.method import Method, require
from samplers.proposals.candidate_cache import CandidateCache
from samplers.proposals.popularity import PopularityTable
from samplers.random_numbers import split_seed_in_step
from samplers.selection.draws import DRAWS, DRAWS_IN_BLOCKS
from samplers.selection.resampling import Resampling
from samplers.selection.validity import hit_filter, num_rows, weigh_rows, without_padding


@dataclasses.dataclass(eq=False, kw_only=True)
class Bir(Method):
    """In-batch importance resampling: each query draws its negatives from the batch.

    Chen et al., NeurIPS 2022, Algorithm 1 and eq. (3), with the -log that it lacks in print:
        n_u ~ Multinomial(m, softmax_j(s_uj - log pop_j)) over the columns j of the batch
        loss = log(e^(s_ui) + Σ_j n_uj e^(s_uj)) - s_ui
    The draws follow the softmax over the corpus as the batch grows. Then equal weights estimate its
    gradient, which is what section 3.1 argues, and eq. (3), as in the published code, weighs the
    draws by e^s a second time: harder negatives than those of the softmax. Theorem 3.2 bounds the
    bias of another loss. The last two are options, with w the softmax above as a constant:
        weights="equal": (1/m) Σ_j n_uj s_uj - s_ui, of any sign, for its gradient
        weights="importance": log(e^(s_ui) + Σ_j n_uj e^(s_uj) / (m w_uj)) - s_ui

    Differs: n · w is rounded down or up at random, see `selection.draws.resample`, with the
    expectation of independent draws and less variance, and m draws only on average;
    `draws="independent"` makes them those of the paper.
    """

    num_resampled: int | None = None  # m, draws for each row; none: as many as rows
    draws: str = "rounded"  # or independent (several times slower), expected
    weights: str = "published"  # of the draws: published, eq. (3); equal; or importance
    mask_accidental_hits: bool = False  # draw no column that holds the row's positive
    block_size: int | None = None  # candidates scored at once, to save memory; none: all

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("published", "equal", "importance")
        require(self.weights in known, "weights", f"one of {', '.join(known)}", repr(self.weights))
        require(self.draws in DRAWS, "draws", f"one of {', '.join(DRAWS)}", repr(self.draws))
        for name, fit in (("draws", DRAWS_IN_BLOCKS), ("weights", ("published",))):
            if self.block_size is not None and (value := getattr(self, name)) not in fit:
                raise ValueError(
                    f"{name} must be {' or '.join(fit)} with block_size, got {value!r}: others "
                    "need all scores of a row; leave one of the two out."
                )
        if self.weights == "equal" and (self.mask_accidental_hits or self.seen is not None):
            raise ValueError(
                "weights must not be equal with mask_accidental_hits or exclude_seen_negatives: "
                "such a loss has the positive as a column that is drawn; leave one of the two out."
            )
        self._popularity = PopularityTable(type(self).__name__, self.frequency)

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        n = self.num_resampled or num_rows(batch.columns)
        losses, _ = self._losses_over_draws(encoders, batch, n, seed)
        return weigh_rows(losses, batch)

    def _losses_over_draws(
        self,
        encoders: Encoders,
        batch: Batch,
        n: tf.Tensor | int,
        seed: tf.Tensor,
        cache: Candidates | None = None,
    ) -> tuple[tf.Tensor, Resampling]:
        """The loss of each row over n draws from the batch, or from a cache: [B]; and the draws."""
        whole, first = batch.columns, 0
        if cache is None:
            ids, candidates = whole.candidate_ids, encoders.columns
            log_q = without_padding(self._popularity.of_batch(whole), whole)
        else:
            ids, candidates = cache.ids, encoders.candidates(cache.ids)
            log_q, first = self._popularity.of_ids(ids), tf.size(whole.candidate_ids)
        hits = self.mask_accidental_hits
        resampling = Resampling(
            encoders.query,
            candidates,
            log_q,
            n,
            seed,
            valid=hit_filter(batch, ids, mask_accidental_hits=hits, first=first),
            draws=self.draws,
            block_size=self.block_size,
            part=batch.part,
        )
        positive = positive_scores(encoders.query, encoders.positive)
        if self.weights == "equal":
            mean, drawn = resampling.mean_score()
            return tf.where(drawn, mean - positive, tf.zeros_like(positive)), resampling
        log_total = resampling.log_total(importance=self.weights == "importance")
        return resampled_softmax_loss(log_total, positive), resampling


@dataclasses.dataclass(eq=False, kw_only=True)
class Xir(Bir):
    """BIR on the batch and on a cache of candidates that were often drawn before.

    Chen et al., NeurIPS 2022, Algorithm 2 and eq. (4), with the -log that it lacks in print:
        loss = λ · (bir on the cache) + (1 - λ) · (bir on the batch)
    with B/2 draws from each, and in the cache with weights softmax_c(s_uc - log pop_c) too.
    The occurrences that the cache is drawn by grow by all draws of the step: `CandidateCache`.
    """

    needs: ClassVar[tuple[str, ...]] = ("frequency",)

    cache_weight: float = 0.2  # λ, weight of the loss on the cache, in [0, 1]
    cache_size: int = 2048  # C, candidates in the cache; the paper takes the batch size
    redraw: str = "corpus"  # where the cache is drawn from: corpus, or drawn (published code)
    num_resampled: int | None = None  # draws for each row from each of the two; none: half of B

    def __post_init__(self) -> None:
        super().__post_init__()
        share, known = self.cache_weight, ("corpus", "drawn")
        require(0 <= share <= 1, "cache_weight", "between 0 and 1", share)
        require(self.redraw in known, "redraw", "corpus or drawn", repr(self.redraw))
        require(self.draws != "expected", "draws", "whole, for the cache counts them", "'expected'")
        self.cache = CandidateCache(self.frequency, from_drawn=self.redraw == "drawn")

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        """The cache of this step: [C]."""
        proposed = self.cache.sample(self.cache_size, seed=seed)
        self.cache.expect(tf.concat([batch.columns.candidate_ids, proposed.ids], axis=0))
        return proposed

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        assert proposed is not None
        n = self.num_resampled or tf.maximum(num_rows(batch.columns) // 2, 1)
        first, second = split_seed_in_step(seed, 2)
        on_batch, from_batch = self._losses_over_draws(encoders, batch, n, first)
        on_cache, from_cache = self._losses_over_draws(encoders, batch, n, second, proposed)
        drawn = [draws.column_sums(batch.valid) for draws in (from_batch, from_cache)]
        self.cache.record(tf.concat(drawn, axis=0))
        losses = self.cache_weight * on_cache + (1 - self.cache_weight) * on_batch
        return weigh_rows(losses, batch)

    @property
    def counted(self) -> tuple[tf.Variable, ...]:
        return (self.cache.drawn,)

    def update(self, batch: Batch) -> None:
        self.cache.update()
