"""Softmax over the whole corpus, against the positive of a row or against what a teacher ranks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders, at_least_float32, positive_scores
from samplers.losses.streamed_softmax import Valid, dot_logsumexp
from samplers.methods.method import Method, require
from samplers.selection.seen import Seen, padded
from samplers.selection.validity import hit_filter, weigh_rows


@dataclasses.dataclass(eq=False, kw_only=True)
class FullSoftmax(Method):
    """Softmax over all candidates: what the sampled methods approximate.

    Fan et al., CIKM 2023, doi:10.1145/3583780.3614789, section 3.1:
        loss = log Σ_j e^(s_uj) - s_ui over the corpus j
    Costs B·N scores and a dense gradient of the candidate table in every step.

    With `targets`, `samplers.build` makes a `DistilledSoftmax` of the same options; a model that
    was trained by one opens without its teacher.
    """

    faster_with_xla: ClassVar[bool] = False
    row_by_row: ClassVar[bool] = True

    block_size: int | None = None  # candidates scored at once, to save memory; none: all
    teacher_weight: float = 0.3  # λ, share of a teacher in the targets, in [0, 1]; it needs one
    teacher_temperature: float = 0.4  # τ_t, what the teacher's scores are divided by
    num_chosen: int = 64  # S, with a teacher: what a query chose that one step looks at, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        weight, temperature = self.teacher_weight, self.teacher_temperature
        require(0 <= weight <= 1, "teacher_weight", "between 0 and 1", weight)
        require(temperature > 0, "teacher_temperature", "above 0", temperature)
        self._left_out = self.seen

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        if self._left_out is None:
            return batch
        return batch._replace(seen=padded(self._left_out.pairs(batch.query_ids)))

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        def is_own(columns: tf.Tensor) -> tf.Tensor:
            return batch.candidate_ids[:, None] == tf.cast(columns, tf.int64)[None, :]

        log_total = self._log_total(encoders.query, encoders.corpus(), batch, is_own)
        wanted = positive_scores(encoders.query, encoders.positive)
        return weigh_rows(log_total - wanted, batch)

    def _log_total(
        self, query: tf.Tensor, corpus: tf.Tensor, batch: Batch, kept: Valid
    ) -> tf.Tensor:
        """log Σ_j e^(s_uj) without what `batch.seen` has, unless it is `kept`: [B]."""
        size = tf.shape(corpus, tf.int64)[0]
        unseen = hit_filter(batch, tf.range(size), mask_accidental_hits=False)

        def valid(columns: tf.Tensor) -> tf.Tensor:
            assert unseen is not None
            return kept(columns) | unseen(columns)

        mask = None if unseen is None else valid
        return dot_logsumexp(
            query, corpus, tf.zeros([size]), valid=mask, block_size=self.block_size
        )


class SoftTargets(NamedTuple):
    """What each query chose, and what a teacher ranks highest for it, by dense ids."""

    ids: np.ndarray  # int [Q, T], of the teacher, best first; -1 where it ranks no more
    scores: np.ndarray  # float32 [Q, T], of the teacher, already over its own temperature
    chosen: np.ndarray  # int [n], the train positives of query 0, of query 1, ...
    offsets: np.ndarray  # int64 [Q + 1], where those of each query begin and end


@dataclasses.dataclass(eq=False, kw_only=True)
class DistilledSoftmax(FullSoftmax):
    """Softmax over all candidates towards what a query chose and what a teacher ranks highest.

    Hinton et al., 2015, arXiv 1503.02531, with the teacher cut off after its first T candidates as
    in Tang and Wang, KDD 2018, doi:10.1145/3219819.3220021. A row is not about its own positive
    but about all of its query, so one row for each does:
        loss = log Σ_j e^(s_uj) - Σ_i t_ui s_ui over the corpus j
        t_u = (1 - λ) · uniform over what u chose + λ · softmax over those T of score / τ_t
    With τ_t below 1 the head of the teacher's ranking counts for more. A query that the teacher
    ranks nothing for has what it chose alone. Of that, one step looks at all where there are at
    most S, otherwise at S neighbours in `chosen` from a random place on, each as likely as any
    other. `seen` leaves nothing out: what a query chose is wanted.

    With λ = 1 it is not: what a query chose is then left out of the sum over the corpus as well,
    so that all of the vectors goes to the ranking of what is left, and a query is embedded from
    all that it chose, as it is served.
    """

    targets: SoftTargets

    def __post_init__(self) -> None:
        super().__post_init__()
        ids, scores, chosen, offsets = (np.asarray(part) for part in self.targets)
        if ids.ndim != 2 or ids.shape != scores.shape or len(offsets) != len(ids) + 1:
            raise ValueError(
                "targets must have ids and scores of shape [Q, T] and Q + 1 offsets, got "
                f"{list(ids.shape)}, {list(scores.shape)} and {len(offsets)}."
            )
        logits = np.where(ids >= 0, scores.astype(np.float64) / self.teacher_temperature, -np.inf)
        highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
        parts = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
        total = parts.sum(axis=1, keepdims=True)
        taught = np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)
        self._ids = tf.constant(np.maximum(ids, 0).astype(np.int64))
        self._taught = tf.constant((self.teacher_weight * taught).astype(np.float32))
        share = np.where(total[:, 0] > 0, 1 - self.teacher_weight, 1.0)
        self._share = tf.constant(share.astype(np.float32))
        self._chosen = tf.constant(np.append(chosen, 0).astype(np.int64))
        self._offsets = tf.constant(offsets.astype(np.int64))
        self._left_out = Seen(chosen, offsets) if self.teacher_weight == 1 else None
        self._looked_at = self.num_chosen if self._left_out is None else 1

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates:
        """The targets of some rows: ids [B, S + T], and log t as their log_q, -inf for none."""
        query_ids = batch.query_ids
        first = tf.gather(self._offsets, query_ids)
        sizes = tf.gather(self._offsets, query_ids + 1) - first
        draws = tf.random.stateless_uniform(tf.shape(query_ids), seed, dtype=tf.float64)
        start = tf.cast(draws * tf.cast(sizes, tf.float64), tf.int64)  # below sizes
        step = tf.range(self._looked_at, dtype=tf.int64)
        places = first[:, None] + (start[:, None] + step) % tf.maximum(sizes, 1)[:, None]
        looked_at = tf.cast(tf.clip_by_value(sizes, 1, self._looked_at), tf.float32)
        share = (tf.gather(self._share, query_ids) / looked_at)[:, None]
        weights = tf.where(step < sizes[:, None], share, 0.0)
        ids = tf.concat([tf.gather(self._chosen, places), tf.gather(self._ids, query_ids)], axis=1)
        all_weights = tf.concat([weights, tf.gather(self._taught, query_ids)], axis=1)
        return Candidates(ids, tf.math.log(all_weights))

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        assert proposed is not None
        query = encoders.query
        if batch.seen is not None:
            query = encoders.queries_for("teacher_weight=1")(batch.query_ids)
        untaught = tf.gather(self._share, batch.query_ids)[:, None] > 0
        targets = at_least_float32(encoders.candidates(proposed.ids))
        weights = tf.cast(tf.exp(proposed.log_q), targets.dtype)
        wanted = positive_scores(query, tf.linalg.matvec(targets, weights, transpose_a=True))
        log_total = self._log_total(query, encoders.corpus(), batch, lambda columns: untaught)
        return weigh_rows(log_total - wanted, batch)
