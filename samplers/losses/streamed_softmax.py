"""The log-partition of dot-product scores, over all columns at once or block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Valid = Callable[[tf.Tensor], tf.Tensor]  # columns int32 [c] -> bool [B, c]
Counts = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (scores [B, c], columns [c]) -> [B, c]


def dot_logsumexp(
    query: tf.Tensor,
    candidates: tf.Tensor,
    bias: tf.Tensor,
    *,
    own_bias: tf.Tensor | None = None,
    first: tf.Tensor | None = None,
    valid: Valid | None = None,
    counts: Counts | None = None,
    highest: tf.Tensor | None = None,
    block_size: int | None = None,
) -> tf.Tensor:
    """log Σ_j n_bj e^(q_b · v_j + bias_j), with gradients for the queries and the candidates.

    The gradient is written by hand: with p_bj the share of column j in the sum of row b it is
    Σ_j p_bj v_j for q_b and Σ_b p_bj q_b for v_j, two products and no further pass over [B, C].
    With `block_size` the backward pass computes p again, block by block, and the memory taken is
    that of [B, block_size] and not of [B, C]; values and gradients are the same.

    Where `valid` is False, n is 0 or the bias is -inf, a column is not in the sum. A row whose
    sum is empty has the value -inf and, where nothing flows back into it, no gradient.

    Args:
      query: [B, D].
      candidates: [C, D]. Both are used as float32, or float64 where they are.
      bias: [C], without gradient.
      own_bias: [B], the bias of column b in row b where it is not bias[:B]; such a column is
        valid. Not together with `counts`. Needs C >= B.
      first: int32 scalar, the column of row 0 where that of row b is column first + b.
      valid: which columns are in the sum of a row; None for all.
      counts: how often each of them is, without gradient; None for once. Needs `highest`.
      highest: [B], a bound of the exponents with counts above 0 that is at most 60 above the
        largest of them. With it no pass over [B, C] is needed to find the largest.
      block_size: columns scored at once; None for all.

    Returns:
      [B], float32 or float64.
    """
    tf.debugging.assert_shapes([(query, "BD"), (candidates, "CD"), (bias, "C")])
    query, candidates = at_least_float32(query), at_least_float32(candidates)
    bias = tf.stop_gradient(tf.cast(bias, query.dtype))
    terms = _Terms(bias, own_bias, first, valid, counts, highest)
    sums = _all_at_once(terms) if block_size is None else _by_block(terms, block_size)
    return sums(query, candidates)


def logsumexp_of_parts(
    query: tf.Tensor, candidates: tf.Tensor, parts: tf.Tensor, level: tf.Tensor
) -> tf.Tensor:
    """As `dot_logsumexp` with counts, where the terms of the sum are known already.

    Args:
      query: [B, D].
      candidates: [C, D].
      parts: [B, C], n_bj e^(q_b · v_j - level_b), without gradient.
      level: [B].

    Returns:
      [B], level + log Σ_j parts_bj; the gradients are those of log Σ_j n_bj e^(q_b · v_j).
    """

    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        return _log_of_sum(parts, level, query, candidates)

    return sums(at_least_float32(query), at_least_float32(candidates))


def own_scores(query: tf.Tensor, positive: tf.Tensor) -> tf.Tensor:
    """Each query with its positive: [B, D] and [B, D] → [B], float32 or float64."""
    return tf.reduce_sum(at_least_float32(query) * at_least_float32(positive), axis=1)


def target_scores(query: tf.Tensor, candidates: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Each query with the weighted sum of its targets: [B, D], [B, K, D] and [B, K] → [B]."""
    candidates = at_least_float32(candidates)
    summed = tf.linalg.matvec(candidates, tf.cast(weights, candidates.dtype), transpose_a=True)
    return own_scores(query, summed)


def at_least_float32(embeddings: tf.Tensor) -> tf.Tensor:
    """As float32 where they are of half precision: scores and losses are never that."""
    return embeddings if embeddings.dtype == tf.float64 else tf.cast(embeddings, tf.float32)


def own_columns(
    values: tf.Tensor, num_rows: tf.Tensor, first: tf.Tensor | None = None
) -> tf.Tensor:
    """The values [C, ...] of the column of each row: [B, ...], from column `first` on, or 0."""
    if first is None:
        return values[:num_rows]
    return tf.gather(values, first + tf.range(num_rows))


def fold_columns(
    step: Callable[[tf.Tensor, tf.Tensor, Any], Any],
    carry: Any,
    num_columns: tf.Tensor,
    block_size: int,
) -> Any:
    """carry = step(block number, columns int32 [block_size], carry), for block after block.

    The last block may hold columns that do not exist, see `take_columns`.
    """
    blocks = num_blocks(num_columns, block_size)

    def body(block: tf.Tensor, carry: Any) -> tuple[tf.Tensor, Any]:
        return block + 1, step(block, block * block_size + tf.range(block_size), carry)

    def more(block: tf.Tensor, carry: Any) -> tf.Tensor:
        del carry
        return block < blocks

    # One at a time: the memory of several blocks together is what this is there to save.
    return tf.while_loop(more, body, (tf.constant(0), carry), parallel_iterations=1)[1]


def num_blocks(num_columns: tf.Tensor, block_size: int) -> tf.Tensor:
    """How many blocks the columns make, the last one filled up."""
    return (num_columns + block_size - 1) // block_size


def take_columns(values: tf.Tensor, columns: tf.Tensor, outside: Any = None) -> tf.Tensor:
    """The values [C, ...] of columns [c]: [c, ...].

    A column that does not exist has the value `outside`, for values [C], or that of the last one.
    """
    last = tf.shape(values)[0] - 1
    taken = tf.gather(values, tf.minimum(columns, last))
    return taken if outside is None else tf.where(columns <= last, taken, outside)


class _Terms:
    """What the exponents of the sum are, but for the two embeddings."""

    def __init__(
        self,
        bias: tf.Tensor,
        own_bias: tf.Tensor | None,
        first: tf.Tensor | None,
        valid: Valid | None,
        counts: Counts | None,
        highest: tf.Tensor | None,
    ) -> None:
        def constant(values: tf.Tensor | None) -> tf.Tensor | None:
            return None if values is None else tf.cast(tf.stop_gradient(values), bias.dtype)

        assert (counts is None) == (highest is None)
        self.bias, self.own_bias, self._highest = bias, constant(own_bias), constant(highest)
        self._valid, self._counts, self._first = valid, counts, first

    def own(self, query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor | None:
        """The exponent of column b in row b, [B], where it is not that of the others."""
        if self.own_bias is None:
            return None
        own = own_columns(candidates, tf.shape(query)[0], self._first)
        return own_scores(query, own) + self.own_bias

    def with_own(
        self, exponents: tf.Tensor, own: tf.Tensor, columns: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Exponents [B, c] of some columns, None for all, that of the own column from `own` [B]."""
        if columns is None and self._first is None:
            return tf.linalg.set_diag(exponents, own)
        places = tf.range(tf.shape(own)[0]) + (0 if self._first is None else self._first)
        columns = tf.range(tf.shape(exponents)[1]) if columns is None else columns
        return tf.where(places[:, None] == columns[None, :], own[:, None], exponents)

    def exponents(
        self, query: tf.Tensor, candidates: tf.Tensor, bias: tf.Tensor, columns: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Exponents [B, c], -inf where not in the sum, and counts; the own column is another."""
        scores = tf.matmul(query, candidates, transpose_b=True)
        exponents = tf.nn.bias_add(scores, bias)
        if self._valid is not None:
            exponents = tf.where(self._valid(columns), exponents, -float("inf"))
        if self._counts is None or self._highest is None:
            return exponents, None
        counts = tf.cast(self._counts(scores, columns), scores.dtype)
        # Only what is counted 0 times can be above the bound; then inf · 0 would be NaN.
        return tf.minimum(exponents, self._highest[:, None]), counts

    def highest(self, exponents: tf.Tensor) -> tf.Tensor:
        """The maximum of each row, [B], or a bound; finite where the row is empty."""
        if self._highest is not None:
            return self._highest
        return tf.maximum(tf.reduce_max(exponents, axis=1), exponents.dtype.min)


def _all_at_once(terms: _Terms) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        columns = tf.range(tf.shape(candidates)[0])
        exponents, counts = terms.exponents(query, candidates, terms.bias, columns)
        own = terms.own(query, candidates)
        if own is not None:
            exponents = terms.with_own(exponents, own)
        highest = terms.highest(exponents)
        parts = tf.exp(exponents - highest[:, None])
        parts = parts if counts is None else parts * counts
        return _log_of_sum(parts, highest, query, candidates)

    return sums


def _log_of_sum(
    parts: tf.Tensor, level: tf.Tensor, query: tf.Tensor, candidates: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """level + log Σ_j parts_bj, and its gradient by the query and the candidates."""
    total = tf.reduce_sum(parts, axis=1)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        share = tf.math.divide_no_nan(upstream, total)[:, None]
        by_candidates = _transposed_product(parts, query * share, candidates)
        return tf.matmul(parts, candidates) * share, by_candidates

    return level + tf.math.log(total), gradient


def _by_block(terms: _Terms, block_size: int) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    def exponents_of(
        query: tf.Tensor, candidates: tf.Tensor, columns: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        block = take_columns(candidates, columns)
        bias = take_columns(terms.bias, columns, -float("inf"))
        exponents, counts = terms.exponents(query, block, bias, columns)
        own = terms.own(query, candidates)
        if own is not None:
            exponents = terms.with_own(exponents, own, columns)
        return block, exponents, counts

    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        num_columns = tf.shape(candidates)[0]

        def add(block: tf.Tensor, columns: tf.Tensor, carry: Any) -> Any:
            del block
            highest, total = carry
            _, exponents, counts = exponents_of(query, candidates, columns)
            higher = tf.maximum(highest, terms.highest(exponents))
            parts = tf.exp(exponents - higher[:, None])
            parts = parts if counts is None else parts * counts
            total = total * tf.exp(highest - higher) + tf.reduce_sum(parts, axis=1)
            return higher, total

        nothing = tf.zeros_like(query[:, 0])
        highest, total = fold_columns(
            add, (nothing + query.dtype.min, nothing), num_columns, block_size
        )
        result = highest + tf.math.log(total)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Nothing is above an empty sum: -inf - -inf would be NaN.
            level = tf.where(tf.math.is_finite(result), result, float("inf"))[:, None]
            weighted = query * upstream[:, None]

            def add_gradient(block: tf.Tensor, columns: tf.Tensor, carry: Any) -> Any:
                by_query, by_candidates = carry
                values, exponents, counts = exponents_of(query, candidates, columns)
                parts = tf.exp(exponents - level)
                parts = parts if counts is None else parts * counts
                by_block = _transposed_product(parts, weighted, values)
                return by_query + tf.matmul(parts, values), by_candidates.write(block, by_block)

            by_candidates = tf.TensorArray(
                query.dtype,
                num_blocks(num_columns, block_size),
                element_shape=[block_size, candidates.shape[1]],
            )
            by_query, by_candidates = fold_columns(
                add_gradient, (tf.zeros_like(query), by_candidates), num_columns, block_size
            )
            return by_query * upstream[:, None], by_candidates.concat()[:num_columns]

        return result, gradient

    return sums


def _transposed_product(parts: tf.Tensor, query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Pᵀ Q: [C, D] from P [B, C] and Q [B, D]."""
    product = tf.matmul(query, parts, transpose_a=True)  # [D, C]
    # On a CPU, XLA is six times slower at Pᵀ Q than at Qᵀ P, and would turn the one into the
    # other. A factor of ones, but for embeddings beyond repair, keeps it from that.
    ones = tf.cast(tf.math.is_finite(candidates[:, 0]), product.dtype)
    return tf.transpose(product * ones[None, :])
