"""The log-partition of dot-product scores, over all columns at once or block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from samplers.candidates import at_least_float32, positive_scores

Valid = Callable[[tf.Tensor], tf.Tensor]  # columns int32 [c] -> bool [B, c]
Exponents = Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
_MAX_SCORE = 40.0  # up to this and down to its negative, e^s is an ordinary float32


class Counted(NamedTuple):
    """How often each column is in a sum, without gradient."""

    counts: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (scores [B, c], columns [c]) -> [B, c]
    # [B], a bound of the exponents with counts above 0 that is at most 60 above the largest of
    # them: with it no pass over [B, C] is needed to find the largest.
    highest: tf.Tensor


def dot_logsumexp(
    query: tf.Tensor,
    candidates: tf.Tensor,
    bias: tf.Tensor,
    *,
    own_bias: tf.Tensor | None = None,
    first: tf.Tensor | None = None,
    valid: Valid | None = None,
    counted: Counted | None = None,
    block_size: int | None = None,
) -> tf.Tensor:
    """log Σ_j n_bj e^(q_b · v_j + bias_j), with gradients for the queries and the candidates.

    The gradient is written by hand: with p_bj the share of column j in the sum of row b it is
    Σ_j p_bj v_j for q_b and Σ_b p_bj q_b for v_j, two products and no further pass over [B, C].
    With `block_size` the backward pass computes p again, block by block, and takes the memory of
    [B, block_size] and not of [B, C].

    Where `valid` is False, n is 0 or the bias is -inf, a column is not in the sum. A row whose
    sum is empty has the value -inf and, where nothing flows back into it, no gradient.

    Args:
      query: [B, D].
      candidates: [C, D]. Both are used as float32, or float64 where they are.
      bias: [C], without gradient.
      own_bias: [B], the bias of column b in row b where it is not bias[:B]; such a column is
        valid. Not together with `counted`. Needs C >= B.
      first: int32 scalar, the column of row 0 where that of row b is column first + b.
      valid: which columns are in the sum of a row; None for all.
      counted: n, how often each of them is; None for once. Needs `block_size`.
      block_size: columns scored at once; None for all.

    Returns:
      [B], float32 or float64.
    """
    tf.debugging.assert_shapes([(query, "BD"), (candidates, "CD"), (bias, "C")])
    query, candidates = at_least_float32(query), at_least_float32(candidates)
    bias = tf.stop_gradient(tf.cast(bias, query.dtype))
    if own_bias is not None:
        own_bias = tf.cast(tf.stop_gradient(own_bias), query.dtype)

    def exponents_of(
        query: tf.Tensor, candidates: tf.Tensor, columns: Any = None, *, biased: bool = True
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Of some columns [c], None for all: embeddings, scores and exponents [B, c]."""
        values, biases = candidates, bias
        if columns is not None:
            values = take_columns(candidates, columns)
            biases = take_columns(bias, columns, -float("inf"))
        scores = tf.matmul(query, values, transpose_b=True)
        exponents = tf.nn.bias_add(scores, biases) if biased else scores
        places = tf.range(tf.shape(scores)[1]) if columns is None else columns
        if valid is not None:
            exponents = tf.where(valid(places), exponents, -float("inf"))
        if own_bias is not None:
            rows = tf.shape(query)[0]
            own = positive_scores(query, own_columns(candidates, rows, first)) + own_bias
            own = own if biased else own - own_columns(bias, rows, first)
            if columns is None and first is None:
                exponents = tf.linalg.set_diag(exponents, own)
            else:
                own_place = tf.range(rows) + (0 if first is None else first)
                is_own = own_place[:, None] == places[None, :]
                exponents = tf.where(is_own, own[:, None], exponents)
        return values, scores, exponents

    if block_size is None:
        return _all_at_once(exponents_of, bias)(query, candidates)
    return _by_block(exponents_of, counted, block_size)(query, candidates)


def logsumexp_of_parts(
    query: tf.Tensor, candidates: tf.Tensor, parts: tf.Tensor, level: tf.Tensor, factors: tf.Tensor
) -> tf.Tensor:
    """As `dot_logsumexp` with counts, where the terms of the sum are known already.

    From level [B], parts [B, C] and factors [C], n_bj e^(q_b · v_j - level_b) = parts_bj factors_j,
    without gradient, it is level + log of their sum, [B]; the gradients are those of
    log Σ_j n_bj e^(q_b · v_j).
    """

    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        return _log_of_sum(parts, level, query, candidates, factors)

    return sums(at_least_float32(query), at_least_float32(candidates))


def own_columns(
    values: tf.Tensor, num_rows: tf.Tensor, first: tf.Tensor | None = None
) -> tf.Tensor:
    """The values [C, ...] of the column of each row: [B, ...], from column `first` on, or 0."""
    if first is None:
        return values[:num_rows]
    return tf.gather(values, first + tf.range(num_rows))


def fold_columns(
    step: Callable[[tf.Tensor, Any], Any],
    carry: Any,
    num_columns: tf.Tensor,
    block_size: tf.Tensor | int,
    *,
    writes: tuple[tf.DType, Sequence[int | None]] | None = None,
) -> Any:
    """carry = step(columns int32 [block_size], carry), for block after block; the last carry.

    The last block may hold columns that do not exist, see `take_columns`. With `writes`, the type
    and shape of a value, each step returns (carry, value), and all values, a TensorArray, come
    with the last carry.
    """
    blocks = (num_columns + block_size - 1) // block_size
    values: Any = ()
    if writes is not None:
        values = tf.TensorArray(writes[0], blocks, element_shape=writes[1])

    def body(block: tf.Tensor, carry: Any, values: Any) -> tuple[tf.Tensor, Any, Any]:
        carry = step(block * block_size + tf.range(block_size), carry)
        if writes is not None:
            carry, value = carry
            values = values.write(block, value)
        return block + 1, carry, values

    # One at a time: the memory of several blocks together is what this is there to save.
    start = (tf.constant(0), carry, values)
    _, carry, values = tf.while_loop(
        lambda block, *_: block < blocks, body, start, parallel_iterations=1
    )
    return carry if writes is None else (carry, values)


def take_columns(values: tf.Tensor, columns: tf.Tensor, outside: Any = None) -> tf.Tensor:
    """The values [C, ...] of columns [c]: [c, ...].

    A column that does not exist has the value `outside`, for values [C], or that of the last one.
    """
    last = tf.shape(values)[0] - 1
    taken = tf.gather(values, tf.minimum(columns, last))
    return taken if outside is None else tf.where(columns <= last, taken, outside)


def _all_at_once(
    exponents_of: Exponents, bias: tf.Tensor
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    # What costs are passes over [B, C]: the bias becomes a factor of the columns, and where all
    # scores are small, and biases near each other, there is no maximum to find.
    known = tf.math.is_finite(bias)
    largest = tf.reduce_max(tf.where(known, bias, bias.dtype.min))
    near = known & (bias >= largest - _MAX_SCORE)
    relative = tf.where(near, bias - largest, tf.zeros_like(bias))

    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        def as_they_are() -> tuple[tf.Tensor, tf.Tensor]:
            *_, exponents = exponents_of(query, candidates, biased=False)
            return exponents, tf.fill(tf.shape(exponents)[:1], largest)

        def below_highest() -> tuple[tf.Tensor, tf.Tensor]:
            *_, exponents = exponents_of(query, candidates)
            top = tf.maximum(tf.reduce_max(exponents, axis=1), exponents.dtype.min)
            return exponents - (top[:, None] + relative), top

        small = tf.reduce_all(near) & scores_are_small(query, candidates)
        exponents, level = tf.cond(small, as_they_are, below_highest)
        return _log_of_sum(tf.exp(exponents), level, query, candidates, tf.exp(relative))

    return sums


def scores_are_small(query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Whether no e^(q_b · v_j) of [B, D] and [C, D] can overflow or vanish: a bool, by lengths."""
    longest = [tf.reduce_max(tf.reduce_sum(tf.square(x), axis=1)) for x in (query, candidates)]
    return longest[0] * longest[1] <= _MAX_SCORE**2


def _log_of_sum(
    parts: tf.Tensor, level: tf.Tensor, query: tf.Tensor, candidates: tf.Tensor, factors: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """level + log Σ_j parts_bj factors_j, and its gradient by the query and the candidates."""
    total = tf.linalg.matvec(parts, factors)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        share = tf.math.divide_no_nan(upstream, total)[:, None]
        by_query = tf.matmul(parts, candidates * factors[:, None]) * share
        by_candidates = _transposed_product(parts, query * share, candidates)
        return by_query, by_candidates * factors[:, None]

    return level + tf.math.log(total), gradient


def _by_block(
    exponents_of: Exponents, counted: Counted | None, block_size: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    def parts_of(
        scores: tf.Tensor, exponents: tf.Tensor, level: tf.Tensor, columns: tf.Tensor
    ) -> tf.Tensor:
        """n_bj e^(exponent_bj - level_b) of the columns of a block."""
        if counted is None:
            return tf.exp(exponents - level[:, None])
        counts = tf.cast(counted.counts(scores, columns), scores.dtype)
        # Only what is counted 0 times can be above the bound; then inf · 0 would be NaN.
        exponents = tf.minimum(exponents, counted.highest[:, None])
        return tf.exp(exponents - level[:, None]) * counts

    @tf.custom_gradient
    def sums(query: tf.Tensor, candidates: tf.Tensor) -> Any:
        num_columns = tf.shape(candidates)[0]

        def add(columns: tf.Tensor, carry: Any) -> Any:
            highest, total = carry
            _, scores, exponents = exponents_of(query, candidates, columns)
            of_block = tf.reduce_max(exponents, axis=1) if counted is None else counted.highest
            higher = tf.maximum(highest, of_block)
            parts = parts_of(scores, exponents, higher, columns)
            total = total * tf.exp(highest - higher) + tf.reduce_sum(parts, axis=1)
            return higher, total

        nothing = tf.zeros_like(query[:, 0])
        start = (nothing + query.dtype.min, nothing)
        highest, total = fold_columns(add, start, num_columns, block_size)
        result = highest + tf.math.log(total)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Nothing is above an empty sum: -inf - -inf would be NaN.
            level = tf.where(tf.math.is_finite(result), result, float("inf"))
            weighted = query * upstream[:, None]

            def add_gradient(columns: tf.Tensor, by_query: tf.Tensor) -> Any:
                values, scores, exponents = exponents_of(query, candidates, columns)
                parts = parts_of(scores, exponents, level, columns)
                by_block = _transposed_product(parts, weighted, values)
                return by_query + tf.matmul(parts, values), by_block

            start, writes = tf.zeros_like(query), (query.dtype, [block_size, candidates.shape[1]])
            by_query, by_candidates = fold_columns(
                add_gradient, start, num_columns, block_size, writes=writes
            )
            return by_query * upstream[:, None], by_candidates.concat()[:num_columns]

        return result, gradient

    return sums


def _transposed_product(parts: tf.Tensor, query: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Pᵀ Q: [C, D] from P [B, C] and Q [B, D]."""
    product = tf.matmul(query, parts, transpose_a=True)  # [D, C]
    # On a CPU, XLA is six times slower at Pᵀ Q than at Qᵀ P, and would turn the one into the
    # other. A factor of ones, unless the embeddings are not finite, keeps it from that.
    ones = tf.cast(tf.math.is_finite(candidates[:, 0]), product.dtype)
    return tf.transpose(product * ones[None, :])
