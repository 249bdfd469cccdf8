"""Methods whose negatives are the positives of other rows, of earlier batches, uniform draws."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, at_least_float32
from samplers.losses.softmax import in_batch_softmax_loss, positive_corrected_loss
from samplers.losses.streamed_softmax import Valid, own_columns
from samplers.methods.method import Method
from samplers.proposals.popularity import PopularityTable, UniformSampler
from samplers.proposals.streaming_frequency import StreamingFrequency
from samplers.selection.validity import hit_filter, num_rows, weigh_rows, without_padding
from samplers.state import renewed_variable, state_variable


@dataclasses.dataclass(eq=False, kw_only=True)
class Ssl(Method):
    """Sampled softmax over the batch, not corrected: popular candidates are pushed down.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, eq. (1) without eq. (2).
    """

    faster_with_xla: ClassVar[bool] = False

    mask_accidental_hits: bool = False  # leave out other columns that hold the row's positive
    positive_twice: bool = False  # count the positive twice, as the published code does
    block_size: int | None = None  # candidates scored at once, to save memory; none: all

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        return weigh_rows(self._batch_losses(encoders, batch), batch)

    def _batch_losses(self, encoders: Encoders, batch: Batch) -> tf.Tensor:
        whole = batch.columns
        log_q = without_padding(self._log_q(whole), whole)
        return self._softmax(encoders, batch, encoders.columns, log_q, whole.candidate_ids)

    def _softmax(
        self,
        encoders: Encoders,
        batch: Batch,
        columns: tf.Tensor,
        log_q: tf.Tensor,
        ids: tf.Tensor,
        positive_log_q: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """`in_batch_softmax_loss` over columns [C, D] of candidates [C], with the options."""
        return in_batch_softmax_loss(
            encoders.query,
            columns,
            log_q,
            positive=encoders.positive,
            first=batch.first,
            positive_log_q=positive_log_q,
            valid=hit_filter(batch, ids, mask_accidental_hits=self.mask_accidental_hits),
            positive_twice=self.positive_twice,
            block_size=self.block_size,
        )

    def _log_q(self, batch: Batch) -> tf.Tensor:
        """The log-probability of each column, [B]: here 0, which corrects nothing."""
        return tf.zeros_like(batch.candidate_ids, tf.float32)

    def _valid(self, batch: Batch) -> Valid | None:
        ids = batch.columns.candidate_ids
        return hit_filter(batch, ids, mask_accidental_hits=self.mask_accidental_hits)


@dataclasses.dataclass(eq=False, kw_only=True)
class SslPop(Ssl):
    """Sampled softmax over the batch, corrected by the popularity of its candidates.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, eq. (1)-(2): log pop_j is taken from
    every score, because a candidate is in the batch in proportion to its train rows.
    """

    positive_correction: bool = False  # the positive is no sample, in any column: arXiv 2507.09331

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_correction and self.positive_twice:
            raise ValueError(
                "positive_correction takes the positive out of the sum, positive_twice puts it in "
                "twice, got both True: choose one."
            )
        self._popularity = PopularityTable(type(self).__name__, self.frequency)

    def _batch_losses(self, encoders: Encoders, batch: Batch) -> tf.Tensor:
        if not self.positive_correction:
            return super()._batch_losses(encoders, batch)
        return positive_corrected_loss(
            encoders.query,
            encoders.columns,
            without_padding(self._log_q(batch.columns), batch.columns),
            positive=encoders.positive,
            first=batch.first,
            # Q / (1 - Q_i), which the correction is by, is a distribution without candidate i.
            valid=hit_filter(batch, batch.columns.candidate_ids, mask_accidental_hits=True),
            block_size=self.block_size,
        )

    def _log_q(self, batch: Batch) -> tf.Tensor:
        return self._popularity.of_batch(batch)


@dataclasses.dataclass(eq=False, kw_only=True)
class CorrectSfx(Ssl):
    """As ssl_pop, with the popularity estimated from the stream of batches.

    Yi et al., RecSys 2019, doi:10.1145/3298689.3346996, see `StreamingFrequency`. The estimates
    that a loss uses hold its own batch already. They are computed in the loss and written by
    `update` after the step, so that a loss can be taken without a trace.
    """

    needs: ClassVar[tuple[str, ...]] = ("num_candidates",)

    alpha: float = 1e-4  # α, weight of the newest interval in the mean, in (0, 1]
    num_hashes: int = 5  # hash arrays; the largest of their estimates of the interval counts
    num_buckets: int | None = None  # of each hash array; none: twice the number of candidates
    published_buckets: bool = False  # five arrays of 4993 … 5011 buckets, primes, as published
    published_start: bool = False  # estimates start at 1 with full weight, for some 1/α occurrences

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published_buckets and (self.num_buckets is not None or self.num_hashes != 5):
            raise ValueError(
                "num_buckets and num_hashes must be left out with published_buckets, got "
                f"{self.num_buckets} and {self.num_hashes}."
            )
        self.estimates = StreamingFrequency(
            np.arange(self.num_candidates) if self.fingerprints is None else self.fingerprints,
            num_buckets=self.num_buckets or 2 * self.num_candidates,
            num_hashes=self.num_hashes,
            primes=(4993, 4999, 5003, 5009, 5011) if self.published_buckets else None,
            alpha=self.alpha,
            published_start=self.published_start,
        )

    def update(self, batch: Batch) -> None:
        self.estimates.update(batch.candidate_ids, valid=batch.valid)

    def _log_q(self, batch: Batch) -> tf.Tensor:
        return self.estimates.log_q_with(batch.candidate_ids)


@dataclasses.dataclass(eq=False, kw_only=True)
class Cbns(Ssl):
    """Cross-batch negative sampling: the batch and the positives of the last batches, as embedded.

    Wang et al., SIGIR 2021, doi:10.1145/3404835.3463032: ssl_pop over the columns of the batch
    and a queue of the C latest positives before it, with the embeddings that they had in their
    own step and without gradient. At first the towers change too fast for that: the queue stays
    empty for some steps.
    """

    needs: ClassVar[tuple[str, ...]] = ("frequency",)

    num_cached: int = 4096  # C, positives of earlier batches that are negatives too
    warm_up: int = 1000  # first steps, whose positives are not kept

    def __post_init__(self) -> None:
        super().__post_init__()
        self._popularity = PopularityTable(type(self).__name__, self.frequency)
        self._steps = state_variable(tf.constant(0, tf.int64), "steps")
        # Of the queue, the oldest first, and of the batch that `update` adds; id -1: padding.
        nothing, no_ids = tf.zeros([0, 0]), tf.zeros([0], tf.int64)
        self._cached = renewed_variable(nothing, "cached", shape=[None, None])
        self._latest = renewed_variable(nothing, "latest", shape=[None, None])
        self._cached_ids = renewed_variable(no_ids, "cached_ids", shape=[None])
        self._latest_ids = renewed_variable(no_ids, "latest_ids", shape=[None])

    def refresh(self, encoders: Encoders, *, seed: tf.Tensor) -> None:
        self._latest.assign(at_least_float32(encoders.columns))

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> None:
        ids, valid = batch.columns.candidate_ids, batch.columns.valid
        self._latest_ids.assign(ids if valid is None else tf.where(valid, ids, -1))

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        ids = tf.convert_to_tensor(self._cached_ids)
        return super().with_seen(batch, Candidates(ids, tf.zeros_like(ids, tf.float32)))

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        whole, ids = batch.columns, tf.convert_to_tensor(self._cached_ids)
        log_q = tf.where(ids < 0, -float("inf"), self._popularity.of_ids(tf.maximum(ids, 0)))
        own = without_padding(self._popularity.of_batch(whole), whole)
        columns = at_least_float32(encoders.columns)
        columns = tf.concat([columns, tf.cast(self.queued(encoders), columns.dtype)], axis=0)
        log_q = tf.concat([own, log_q], axis=0)
        ids = tf.concat([whole.candidate_ids, ids], axis=0)
        return weigh_rows(self._softmax(encoders, batch, columns, log_q, ids), batch)

    def queued(self, encoders: Encoders) -> tf.Tensor:
        """The embeddings of the queue, as they were in their own step: [Q, D], no gradient."""
        cached = tf.reshape(tf.convert_to_tensor(self._cached), [-1, encoders.columns.shape[1]])
        return tf.stop_gradient(cached)

    def update(self, batch: Batch) -> None:
        latest = tf.convert_to_tensor(self._latest)
        cached = tf.reshape(tf.convert_to_tensor(self._cached), [-1, tf.shape(latest)[1]])
        rows = tf.concat([cached, latest], axis=0)
        ids = tf.concat([self._cached_ids, self._latest_ids], axis=0)
        most = tf.where(self._steps < self.warm_up, 0, self.num_cached)
        first = tf.maximum(tf.size(ids) - most, 0)
        self._cached.assign(rows[first:])
        self._cached_ids.assign(ids[first:])
        self._steps.assign_add(1)


@dataclasses.dataclass(eq=False, kw_only=True)
class Mns(Ssl):
    """Mixed negative sampling: the columns of the batch and B′ uniform candidates.

    Yang et al., WWW 2020, doi:10.1145/3366424.3386195, as in Chen et al., NeurIPS 2022: softmax
    over B + B′ columns, every negative j corrected by the mixture that it was drawn from,
        log q_j = log(B / (B + B′) · pop_j + B′ / (B + B′) / N)
    and the positive by log pop_i (`mixture_for_positive`: by the mixture).

    Differs: the published code gives each part the share of the other (`swap_shares`), which is
    the same where B′ = B.
    """

    needs: ClassVar[tuple[str, ...]] = ("frequency", "num_candidates")

    num_uniform: int | None = None  # B′, uniform candidates; none: as many as rows
    mixture_for_positive: bool = False  # correct the positive by the mixture, not by log pop
    swap_shares: bool = False  # exchange the shares of the mixture, as in the published code

    def __post_init__(self) -> None:
        super().__post_init__()
        self._popularity = PopularityTable(type(self).__name__, self.frequency)
        self._sampler = UniformSampler(self.num_candidates)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        return self._sampler.sample([self.num_uniform or tf.size(batch.query_ids)], seed=seed)

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        assert proposed is not None
        whole = batch.columns
        ids = tf.concat([whole.candidate_ids, proposed.ids], axis=0)
        log_pop = self._popularity.of_batch(whole)
        columns = tf.concat([log_pop, self._popularity.of_ids(proposed.ids)], axis=0)
        mixture = self.log_mixture(columns, num_rows(whole), tf.size(proposed.ids))
        rows = tf.size(whole.candidate_ids)
        own = mixture[:rows] if self.mixture_for_positive else log_pop
        embedded = tf.concat([encoders.columns, encoders.candidates(proposed.ids)], axis=0)
        log_q = tf.concat([without_padding(mixture[:rows], whole), mixture[rows:]], axis=0)
        positive_log_q = own_columns(own, tf.size(batch.candidate_ids), batch.first)
        losses = self._softmax(encoders, batch, embedded, log_q, ids, positive_log_q)
        return weigh_rows(losses, batch)

    def log_mixture(
        self, log_pop: tf.Tensor, num_batch: tf.Tensor, num_uniform: tf.Tensor
    ) -> tf.Tensor:
        """log q of candidates with these log pop [C] as draws from the mixture: [C]."""
        sizes = tf.cast(tf.stack([num_batch, num_uniform]), tf.float32)
        log_shares = tf.math.log(sizes / tf.reduce_sum(sizes))
        log_shares = log_shares[::-1] if self.swap_shares else log_shares
        from_uniform = log_shares[1] - math.log(self.num_candidates)
        parts = [log_shares[0] + log_pop, tf.fill(tf.shape(log_pop), from_uniform)]
        return tf.reduce_logsumexp(tf.stack(parts), axis=0)
