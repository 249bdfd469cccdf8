"""Methods whose negatives come from the whole corpus: all of it, or uniform draws."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders
from samplers.checks import check_at_least_1, check_at_least_1_or_none
from samplers.losses.softmax import in_batch_softmax_loss
from samplers.losses.streamed_softmax import (
    Valid,
    dot_logsumexp,
    own_columns,
    own_scores,
    target_scores,
)
from samplers.methods.method import Method
from samplers.proposals.popularity_table import PopularityTable
from samplers.proposals.soft_targets import TargetTable
from samplers.proposals.uniform import UniformSampler
from samplers.selection.seen import padded
from samplers.selection.validity import (
    hit_filter,
    num_rows,
    weigh_rows,
    without_padding,
)


@dataclasses.dataclass(eq=False, kw_only=True)
class FullSoftmax(Method):
    """Softmax over all candidates: what the sampled methods approximate.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, section 3.1:
        loss = log Σ_j e^(s_uj) - s_ui over the corpus j
    Costs B·N scores and a dense gradient of the candidate table in every step.

    With `targets` it distils: a row is not about its own positive but about all of its query,
        loss = log Σ_j e^(s_uj) - Σ_i t_ui s_ui
    where t_u shares its weight between what u chose and what a teacher ranks highest for it, see
    `soft_targets`. So one row for each query does.
    """

    faster_with_xla: ClassVar[bool] = False
    row_by_row: ClassVar[bool] = True

    block_size: int | None = None  # candidates scored at once, to save memory; none: all
    teacher_weight: float = 0.3  # λ, share of a teacher in the targets, in [0, 1]; it needs one
    teacher_temperature: float = 0.4  # τ_t, what the teacher's scores are divided by
    num_chosen: int = 64  # S, with a teacher: what a query chose that one step looks at, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1_or_none(block_size=self.block_size)
        check_at_least_1("num_chosen", self.num_chosen)
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight must be between 0 and 1, got {self.teacher_weight}.")
        if not self.teacher_temperature > 0:
            raise ValueError(
                f"teacher_temperature must be above 0, got {self.teacher_temperature}."
            )
        self._table = None
        if self.targets is not None:
            self._table = TargetTable(
                self.targets,
                weight=self.teacher_weight,
                temperature=self.teacher_temperature,
                num_chosen=self.num_chosen,
            )

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates | None:
        """With a teacher, the targets and log t_ui: [B, S + T]; otherwise None."""
        del query
        return None if self._table is None else self._table.of(batch.query_ids, seed=seed)

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        """What was seen is a column, but with a teacher, where it is sought."""
        del proposed
        if self.seen is None or self._table is not None:
            return batch
        return batch._replace(seen=padded(self.seen.pairs(batch.query_ids)))

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        """log Σ_j e^(s_uj) over the corpus j, less s_ui or Σ_i t_ui s_ui: float32 [B]."""
        del seed
        query, corpus = encoders.query, encoders.corpus()
        if self._table is None:
            valid = _unseen_or_own(batch, tf.range(tf.shape(corpus, tf.int64)[0]))
            sought = own_scores(query, encoders.positive)
        else:  # what the query chose is sought: `seen` leaves nothing out
            assert proposed is not None
            valid = None
            embedded = encoders.candidates(proposed.ids)
            sought = target_scores(query, embedded, tf.exp(proposed.log_q))
        log_total = dot_logsumexp(
            query,
            corpus,
            tf.zeros([tf.shape(corpus)[0]]),
            valid=valid,
            block_size=self.block_size,
        )
        return weigh_rows(log_total - sought, batch)


def _unseen_or_own(batch: Batch, corpus_ids: tf.Tensor) -> Valid | None:
    """The candidates that stay in the sum of a row; None for all."""
    unseen = hit_filter(batch, corpus_ids, mask_accidental_hits=False)
    if unseen is None:
        return None

    def valid(columns: tf.Tensor) -> tf.Tensor:
        own = batch.candidate_ids[:, None] == tf.cast(columns, tf.int64)[None, :]
        return own | unseen(columns)

    return valid


@dataclasses.dataclass(eq=False, kw_only=True)
class Mns(Method):
    """Mixed negative sampling: the columns of the batch and B′ uniform candidates.

    Yang et al., WWW 2020, doi:10.1145/3366424.3386195, as in Chen et al., NeurIPS 2022: softmax
    over B + B′ columns, every negative j corrected by the mixture that it was drawn from,
        log q_j = log(B / (B + B′) · pop_j + B′ / (B + B′) / N)
    and the positive by log pop_i (`mixture_for_positive`: by the mixture).

    Differs: the published code gives each part the share of the other (`swap_shares`), which is
    the same where B′ = B.
    """

    faster_with_xla: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("frequency", "num_candidates")

    num_uniform: int | None = None  # B′, uniform candidates; none: as many as rows
    mixture_for_positive: bool = False  # correct the positive by the mixture, not by log pop
    swap_shares: bool = False  # exchange the shares of the mixture, as in the published code
    positive_twice: bool = False  # count the positive twice, as the published code does
    mask_accidental_hits: bool = False  # leave out other columns that hold the row's positive
    block_size: int | None = None  # candidates scored at once, to save memory; none: all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1_or_none(num_uniform=self.num_uniform, block_size=self.block_size)
        assert self.num_candidates is not None
        self._popularity = PopularityTable(type(self).__name__, self.frequency)
        self._sampler = UniformSampler(self.num_candidates)

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        """The uniform candidates: [B′]."""
        del query
        size = tf.size(batch.query_ids) if self.num_uniform is None else self.num_uniform
        return self._sampler.sample([size], seed=seed)

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        """log Σ_j e^(s_uj - log q_j) - (s_ui - log pop_i) over B + B′ columns: float32 [B]."""
        del seed
        assert proposed is not None
        whole = batch.columns
        ids = tf.concat([whole.candidate_ids, proposed.ids], axis=0)
        log_pop = self._popularity.of_batch(whole)
        columns = tf.concat([log_pop, self._popularity.of_ids(proposed.ids)], axis=0)
        mixture = self.log_mixture(columns, num_rows(whole), tf.size(proposed.ids))
        rows = tf.size(whole.candidate_ids)
        own = mixture[:rows] if self.mixture_for_positive else log_pop
        losses = in_batch_softmax_loss(
            encoders.query,
            tf.concat([encoders.columns, encoders.candidates(proposed.ids)], axis=0),
            tf.concat([without_padding(mixture[:rows], whole), mixture[rows:]], axis=0),
            positive=encoders.positive,
            first=batch.first,
            positive_log_q=own_columns(own, tf.size(batch.candidate_ids), batch.first),
            valid=hit_filter(batch, ids, mask_accidental_hits=self.mask_accidental_hits),
            positive_twice=self.positive_twice,
            block_size=self.block_size,
        )
        return weigh_rows(losses, batch)

    def log_mixture(
        self, log_pop: tf.Tensor, num_batch: tf.Tensor, num_uniform: tf.Tensor
    ) -> tf.Tensor:
        """log q of candidates with these log pop [C] as draws from the mixture: [C].

        That of a candidate without train rows is its share of the uniform part.
        """
        sizes = tf.cast(tf.stack([num_batch, num_uniform]), tf.float32)
        log_shares = tf.math.log(sizes / tf.reduce_sum(sizes))
        if self.swap_shares:
            log_shares = log_shares[::-1]
        assert self.num_candidates is not None
        from_uniform = log_shares[1] - math.log(self.num_candidates)
        parts = [log_shares[0] + log_pop, tf.fill(tf.shape(log_pop), from_uniform)]
        return tf.reduce_logsumexp(tf.stack(parts), axis=0)
