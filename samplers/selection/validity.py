"""Which columns of a batch may serve a row as negatives, and which rows are real.

A mask is True where a column may be used. The positive of a row is not a matter of these masks:
the losses always keep it.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from samplers.candidates import Batch
from samplers.selection.seen import Seen


def without_padding(log_q: tf.Tensor, batch: Batch) -> tf.Tensor:
    """log_q [B] of the columns of the batch, -inf for padding: such a column is no negative."""
    return log_q if batch.valid is None else tf.where(batch.valid, log_q, -float("inf"))


def num_rows(batch: Batch) -> tf.Tensor:
    """How many rows of the batch are not padding: int32 scalar."""
    if batch.valid is None:
        return tf.size(batch.candidate_ids)
    return tf.reduce_sum(tf.cast(batch.valid, tf.int32))


def hit_filter(
    batch: Batch, column_ids: tf.Tensor, *, mask_accidental_hits: bool, first: tf.Tensor | int = 0
) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """Which of the columns shared by a batch, ids int64 [C], each row may use as negatives.

    Leaves out, where `batch.seen` is given, what the query of the row has seen; and, with
    `mask_accidental_hits`, columns that hold the row's own positive. `first` is the number of the
    first of these columns in `batch.seen`.

    Returns:
      A function: consecutive columns, int32 [c] → bool [B, c], of which those from C on do not
      exist; or None where every column may be used.
    """
    if not mask_accidental_hits and batch.seen is None:
        return None

    def valid(columns: tf.Tensor) -> tf.Tensor:
        ids = tf.gather(column_ids, tf.minimum(columns, tf.size(column_ids) - 1))
        hits = tf.zeros([tf.size(batch.candidate_ids), tf.size(columns)], tf.bool)
        if mask_accidental_hits:
            hits |= batch.candidate_ids[:, None] == ids[None, :]
        if batch.seen is not None:
            hits |= _marked(batch.seen, first + columns[0], tf.shape(hits, tf.int64))
        return ~hits

    return valid


def _marked(seen: tf.Tensor, first: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """The hits int64 [H, 2] of columns `first`, `first` + 1, ... as bool of a shape, [B, c]."""
    place = seen[:, 1] - tf.cast(first, tf.int64)
    inside = (place >= 0) & (place < shape[1])
    marks = tf.cast(inside, tf.float32)  # of int32, they would be made by the host
    cells = tf.stack([seen[:, 0], tf.where(inside, place, 0)], axis=1)
    # With a row too many: nothing can be scattered into none, which a replica may have.
    return tf.scatter_nd(cells, marks, tf.add(shape, [1, 0]))[:-1] > 0


def per_query_mask(
    batch: Batch, ids: tf.Tensor, *, mask_accidental_hits: bool, seen: Seen | None = None
) -> tf.Tensor | None:
    """The candidates drawn for each query, int64 [B, N], that it may use as negatives.

    Leaves out the row's own positive, what the query has seen, or both: bool [B, N], or None
    where every candidate may be used.
    """
    valid = ids != batch.candidate_ids[:, None] if mask_accidental_hits else None
    if seen is None:
        return valid
    unseen = ~seen.holds(batch.query_ids, ids)
    return unseen if valid is None else valid & unseen


def weigh_rows(loss: tf.Tensor, batch: Batch) -> tf.Tensor:
    """The loss of each row times its weight, and 0 for padding: float32 [B]."""
    if batch.weight is not None:
        loss = loss * tf.cast(batch.weight, loss.dtype)
    if batch.valid is not None:
        loss = tf.where(batch.valid, loss, tf.zeros_like(loss))
    return loss
