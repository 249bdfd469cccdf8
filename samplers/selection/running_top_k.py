"""The columns of highest score for each query, found block by block."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def running_top_k(
    query: tf.Tensor,
    candidates: tf.Tensor,
    k: tf.Tensor | int,
    *,
    block_size: tf.Tensor | int,
    masked: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The best k columns of each row of `query · candidatesᵀ`; of equal scores the lower column.

    The result is that of `tf.math.top_k` on the whole matrix, of which only [B, block_size] is in
    memory: what is best so far comes before the next block, whose columns are higher.

    Args:
      query: [B, D].
      candidates: [C, D].
      k, block_size: columns of each row, and columns scored at once, at least 1.
      masked: int64 [M, 2], pairs of a row and a column whose score is -inf; None for none.

    Returns:
      Scores, and columns int64, best first: [B, min(k, C)]; -inf where all others are masked.
    """
    num_columns, k = tf.shape(candidates, tf.int64)[0], tf.convert_to_tensor(k)
    block_size = tf.cast(block_size, tf.int64)

    def add(start: tf.Tensor, scores: tf.Tensor, columns: tf.Tensor) -> tuple[tf.Tensor, ...]:
        block = tf.matmul(query, candidates[start : start + block_size], transpose_b=True)
        if masked is not None:
            inside = (masked[:, 1] >= start) & (masked[:, 1] < start + block_size)
            cells = tf.boolean_mask(masked, inside) - [[0, start]]
            nothing = tf.fill([tf.shape(cells)[0]], tf.constant(-float("inf"), block.dtype))
            block = tf.tensor_scatter_nd_update(block, cells, nothing)
        best, places = _top_k(block, k)
        scores = tf.concat([scores, best], axis=1)
        columns = tf.concat([columns, start + places], axis=1)
        scores, places = _top_k(scores, k)
        return start + block_size, scores, tf.gather(columns, places, batch_dims=1)

    empty = tf.zeros([tf.shape(query)[0], 0], query.dtype)
    _, scores, columns = tf.while_loop(
        lambda start, *_: start < num_columns,
        add,
        (tf.constant(0, tf.int64), empty, tf.cast(empty, tf.int64)),
        shape_invariants=(tf.TensorShape([]), *[tf.TensorShape([query.shape[0], None])] * 2),
        parallel_iterations=1,  # or several blocks would be in memory
    )
    return scores, columns


def _top_k(scores: tf.Tensor, k: tf.Tensor) -> Any:
    values, places = tf.math.top_k(scores, tf.minimum(k, tf.shape(scores)[1]))
    return values, tf.cast(places, tf.int64)
