"""What passes between a sampler, the towers and a loss: ids, embeddings, scores, log_q."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

Embed = Callable[[tf.Tensor], tf.Tensor]  # dense ids int64 [...] → embeddings [..., D]


class Candidates(NamedTuple):
    """Candidates that a sampler proposes, and how likely it was to propose them."""

    ids: tf.Tensor  # int64 [C], shared by the batch, [B, N], drawn per query, or [R, 1, N]
    log_q: tf.Tensor  # float32, same shape: log probability of one draw, never clipped
    row_weight: tf.Tensor | None = None  # float32 [B], multiplies the loss of the row

    def by_row(self, num_rows: tf.Tensor) -> Candidates:
        """Draws [R, 1, N], which ⌈B/R⌉ rows in sequence share, for each of B rows: [B, N]."""
        if self.ids.shape.rank != 3:
            return self
        size = group_size(num_rows, self.ids)
        ids, log_q = (tf.repeat(x[:, 0], size, axis=0)[:num_rows] for x in self[:2])
        return Candidates(ids, log_q, self.row_weight)


def group_size(num_rows: tf.Tensor, shared: tf.Tensor) -> tf.Tensor:
    """⌈B/R⌉, how many rows in sequence share what is [R, ...]."""
    return -(-num_rows // tf.shape(shared)[0])


class Part(NamedTuple):
    """Rows in sequence of a larger batch, for which random numbers are drawn as for all of it."""

    first: tf.Tensor  # int32 scalar, the place of the first row
    size: tf.Tensor  # int32 scalar, rows of the larger batch


class Batch(NamedTuple):
    """Observed pairs: row b says that query_ids[b] chose candidate_ids[b]."""

    query_ids: tf.Tensor  # int64 [B], dense ids
    candidate_ids: tf.Tensor  # int64 [B], dense ids
    weight: tf.Tensor | None = None  # float32 [B], multiplies the loss of the row
    valid: tf.Tensor | None = None  # bool [B], False for padding, whose loss is 0
    seen: tf.Tensor | None = None  # int64 [H, 2], see `Method.with_seen`
    log_pop: tf.Tensor | None = None  # float32 [B], of candidate_ids, in place of `frequency`
    whole: Batch | None = None  # the batch that these rows are a part of; None: they are all of it
    first: tf.Tensor | None = None  # int32 scalar, the place of the first of them in `whole`

    @property
    def columns(self) -> Batch:
        """The batch whose positives are the columns of the scores: [C], C = B unless a part."""
        return self if self.whole is None else self.whole

    @property
    def part(self) -> Part | None:
        """Which rows of the whole batch these are; None for all."""
        if self.whole is None or self.first is None:
            return None
        return Part(self.first, tf.size(self.whole.candidate_ids))


class Encoders(NamedTuple):
    """The towers, as a method sees them: score = dot(query, candidate), and nothing else.

    The query is already divided by the temperature, and both sides are normalised where the
    score is a cosine, so that no method knows of either.
    """

    query: tf.Tensor  # [B, D], the queries of the batch
    positive: tf.Tensor  # [B, D], the positive of each
    candidates: Embed
    corpus: Callable[[], tf.Tensor]  # () -> [N, D], in the order of the dense ids
    queries: Embed | None = None
    whole: tf.Tensor | None = None  # [C, D], positives of `Batch.whole`; None: `positive`

    @property
    def columns(self) -> tf.Tensor:
        """The embeddings of the positives of `Batch.columns`: [C, D]."""
        return self.positive if self.whole is None else self.whole

    def queries_for(self, user: str) -> Embed:
        """`queries`; a ValueError that names who needs them where they are missing."""
        if self.queries is None:
            raise ValueError(
                f"{user} needs Encoders.queries, got None: pass a callable from dense query ids "
                "to their embeddings."
            )
        return self.queries


def at_least_float32(embeddings: tf.Tensor) -> tf.Tensor:
    """As float32 where they are of half precision: scores and losses are never that."""
    return embeddings if embeddings.dtype == tf.float64 else tf.cast(embeddings, tf.float32)


def positive_scores(query: tf.Tensor, positive: tf.Tensor) -> tf.Tensor:
    """Each query with its positive: [B, D] and [B, D] → [B]."""
    return tf.reduce_sum(at_least_float32(query) * at_least_float32(positive), axis=1)


def candidate_scores(query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Each query with candidates of its own: [B, D] and [B, N, D] → [B, N].

    Or of its group, ⌈B/R⌉ consecutive queries: [B, D] and [R, 1, N, D] → [B, N].
    """
    query, candidates = at_least_float32(query), at_least_float32(candidates)
    if candidates.shape.rank == 3:
        return tf.linalg.matvec(candidates, query)
    candidates = candidates[:, 0]
    rows, groups = tf.shape(query)[0], tf.shape(candidates)[0]
    size = group_size(rows, candidates)
    padded = tf.pad(query, [[0, groups * size - rows], [0, 0]])
    queries = tf.reshape(padded, [groups, size, query.shape[1]])
    scores = tf.matmul(queries, candidates, transpose_b=True)  # [R, ⌈B/R⌉, N]
    return tf.reshape(scores, [groups * size, tf.shape(scores)[2]])[:rows]
