"""What a row is to be ranked by: what its query chose, and what a teacher ranks highest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from samplers.candidates import Candidates


class SoftTargets(NamedTuple):
    """What each query chose, and what a teacher ranks highest for it, by dense ids."""

    ids: np.ndarray  # int [Q, T], of the teacher, best first; -1 where it ranks no more
    scores: np.ndarray  # float32 [Q, T], of the teacher, already over its own temperature
    chosen: np.ndarray  # int [n], the train positives of query 0, of query 1, ...
    offsets: np.ndarray  # int64 [Q + 1], where those of each query begin and end


class TargetTable(tf.Module):
    """The distribution over candidates that a softmax is trained towards, for each query.

    Hinton et al., 2015, arXiv 1503.02531, with the teacher cut off after its first T candidates as
    in Tang and Wang, KDD 2018, doi:10.1145/3219819.3220021:
        t_u = (1 - λ) · uniform over what u chose + λ · softmax over those T of score / τ_t
    A query that the teacher ranks nothing for has what it chose alone.

    Args:
      targets: what it is made of.
      weight: λ.
      temperature: τ_t; below 1, the head of the teacher's ranking counts for more.
      num_chosen: S, how many of what a query chose one step looks at: all where it has no more,
        otherwise S neighbours in `chosen` from a random place on, each as likely as any other.

    Raises:
      ValueError: the shapes do not go together.
    """

    def __init__(
        self, targets: SoftTargets, *, weight: float, temperature: float, num_chosen: int
    ) -> None:
        super().__init__(name="target_table")
        ids, scores, chosen, offsets = (np.asarray(part) for part in targets)
        if ids.ndim != 2 or ids.shape != scores.shape or len(offsets) != len(ids) + 1:
            raise ValueError(
                "targets must have ids and scores of shape [Q, T] and Q + 1 offsets, got "
                f"{list(ids.shape)}, {list(scores.shape)} and {len(offsets)}."
            )
        logits = np.where(ids >= 0, scores.astype(np.float64) / temperature, -np.inf)
        highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
        parts = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
        total = parts.sum(axis=1, keepdims=True)
        taught = np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)
        self._ids = tf.constant(np.maximum(ids, 0).astype(np.int64))
        self._taught = tf.constant((weight * taught).astype(np.float32))
        self._share = tf.constant(np.where(total[:, 0] > 0, 1 - weight, 1.0).astype(np.float32))
        self._chosen = tf.constant(np.append(chosen, 0).astype(np.int64))
        self._offsets = tf.constant(offsets.astype(np.int64))
        self._num_chosen = num_chosen

    def of(self, query_ids: tf.Tensor, *, seed: tf.Tensor) -> Candidates:
        """The targets of some rows: ids [B, S + T], and log t as their log_q, -inf for none."""
        first = tf.gather(self._offsets, query_ids)
        sizes = tf.gather(self._offsets, query_ids + 1) - first
        draws = tf.random.stateless_uniform(tf.shape(query_ids), seed, dtype=tf.float64)
        start = tf.cast(draws * tf.cast(sizes, tf.float64), tf.int64)  # below sizes
        step = tf.range(self._num_chosen, dtype=tf.int64)
        places = first[:, None] + (start[:, None] + step) % tf.maximum(sizes, 1)[:, None]
        looked_at = tf.cast(tf.clip_by_value(sizes, 1, self._num_chosen), tf.float32)
        share = (tf.gather(self._share, query_ids) / looked_at)[:, None]
        weights = tf.where(step < sizes[:, None], share, 0.0)
        ids = tf.concat([tf.gather(self._chosen, places), tf.gather(self._ids, query_ids)], axis=1)
        all_weights = tf.concat([weights, tf.gather(self._taught, query_ids)], axis=1)
        return Candidates(ids, tf.math.log(all_weights))
