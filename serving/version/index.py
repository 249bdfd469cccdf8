"""Exact and ScaNN search over candidate vectors, as modules that a SavedModel can hold.

Both map embeddings [B, D] to rows of the vectors and scores, [B, K] each, best first. Row -1
stands for "no result"; only ScaNN returns it, where the searched leaves hold fewer than K.
"""

from __future__ import annotations

import logging
import math
from types import ModuleType

import numpy as np
import tensorflow as tf

from pipeline.contract.files import quiet_standard_error

_MAX_SCORES = 1 << 24  # that exact search holds at a time: 64 MB
_GROUP = 32  # scores; a block of rows that starts at a multiple of 16 is not copied
_SMALLEST_TREE = 2000  # fewer candidates than this are scanned one by one
_REORDERED_PER_RESULT = 4  # candidates scored exactly after quantised scoring, for each result
_FEWEST_RESULTS = 25  # for fewer, as many are reordered as for these
_LEAF_SAMPLE = 250_000  # candidates that the centres of the leaves are made from
_BLOCK = 2  # dimensions that are quantised together
_ANISOTROPY = 0.2  # weighs errors along the vector more (Guo et al., ICML 2020, arXiv 1908.10396)


class ExactIndex(tf.Module):
    """Scores every candidate. The vectors are a variable: a GraphDef ends at 2 GB."""

    def __init__(self, vectors: np.ndarray, k: int) -> None:
        super().__init__(name="exact_index")
        self.k = min(k, len(vectors))
        self.vectors = tf.Variable(vectors, trainable=False, name="candidate_vectors")

    def search(
        self, embedding: tf.Tensor, excluded: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows int32 [B, K] and scores; of equal ones the lower row, `excluded` ones are -inf."""
        rows, scores = best_rows(self.vectors.read_value(), embedding, self.k, excluded)
        return tf.ensure_shape(rows, [None, self.k]), tf.ensure_shape(scores, [None, self.k])


def best_rows(
    vectors: tf.Tensor, embedding: tf.Tensor, k: int, excluded: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The k rows of vectors [N, D] that score highest, as many as there are: [B, min(k, N)] each.

    Candidates are scored in blocks, at most `_MAX_SCORES` scores at a time where K is not large. Of
    a block only the k groups with the highest maxima are looked into: a fifth of `top_k` of all.
    """
    num_rows, num_queries = tf.shape(vectors)[0], tf.shape(embedding)[0]
    smallest = 2 * _GROUP * k  # rows that are worth groups
    size = tf.maximum(_MAX_SCORES // tf.maximum(num_queries, 1), smallest) // _GROUP * _GROUP
    if excluded is not None:
        are_excluded = tf.size(excluded) > 0
        places, minus = excluded[:, tf.newaxis], tf.fill(tf.shape(excluded), -math.inf)
        penalty = tf.scatter_nd(places, minus, [tf.where(are_excluded, num_rows, 0)])

    def add(start: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor) -> tuple[tf.Tensor, ...]:
        end = tf.minimum(start + size, num_rows)
        block = tf.matmul(embedding, vectors[start:end], transpose_b=True)  # [B, size]
        if excluded is not None:
            block = tf.cond(are_excluded, lambda: block + penalty[start:end], lambda: block)
        num_groups = tf.where(end - start < smallest, 0, (end - start) // _GROUP)
        grouped, num_chosen = num_groups * _GROUP, tf.minimum(k, num_groups)
        groups = tf.reshape(block[:, :grouped], [num_queries, num_groups, _GROUP])
        maxima = tf.reduce_max(groups, axis=2)
        # Ascending, as of equal scores the lower row comes first.
        chosen = tf.sort(tf.math.top_k(maxima, k=num_chosen, sorted=False).indices)
        of_groups = start + chosen[:, :, tf.newaxis] * _GROUP + tf.range(_GROUP)
        sought, flat = tf.gather(groups, chosen, batch_dims=1), [num_queries, num_chosen * _GROUP]
        others = tf.range(start + grouped, end)
        others = tf.broadcast_to(others, [num_queries, tf.size(others)])
        rows = tf.concat([rows, tf.reshape(of_groups, flat), others], axis=1)
        scores = tf.concat([scores, tf.reshape(sought, flat), block[:, grouped:]], axis=1)
        scores, places = tf.math.top_k(scores, k=tf.minimum(k, end))
        return end, tf.gather(rows, places, batch_dims=1), scores

    nothing = [num_queries, 0]
    _, rows, scores = tf.while_loop(
        lambda start, *_: start < num_rows,
        add,
        (tf.constant(0), tf.zeros(nothing, tf.int32), tf.zeros(nothing, embedding.dtype)),
        shape_invariants=(tf.TensorShape([]), *[tf.TensorShape([None, None])] * 2),
        parallel_iterations=1,
    )
    return rows, scores


class ScannIndex(tf.Module):
    """Approximate search: a tree of leaves, quantised scores, exact scores for the best.

    The module holds the tensors of a built searcher. `search` rebuilds the searcher inside the
    traced function, once per loaded function: a handle itself cannot be saved.

    Attributes:
      num_leaves: leaves of the tree; 0 where the corpus is small and ScaNN scans it.
      leaves_to_search: how many are searched where the caller does not say.
      num_reordered: how many candidates are scored exactly where the caller does not say.
      dimensions: D.
    """

    def __init__(self, vectors: np.ndarray, k: int, num_leaves: int = 0) -> None:
        """Builds the index of vectors [N, D] for K results; `num_leaves` 0 is about the root of N.

        Raises:
          ValueError: more leaves than candidates, or scann cannot be imported.
        """
        super().__init__(name="scann_index")
        self.k = min(k, len(vectors))
        if num_leaves > len(vectors):
            raise ValueError(
                f"scann_leaves must be at most the number of candidates, {len(vectors)}, "
                f"got {num_leaves}; 0 chooses it."
            )
        self.num_leaves = num_leaves or usual_leaves(len(vectors))
        self.leaves_to_search = self.num_leaves
        self._num_candidates, self.dimensions = vectors.shape
        self.num_reordered = self.reordering(_REORDERED_PER_RESULT)
        self._state = _build_searcher(
            np.asarray(vectors), self.k, self.num_leaves, self.num_reordered
        )

    def reordering(self, per_result: float) -> int:
        """So many reordered candidates for each of the K results, as far as there are any."""
        return min(self._num_candidates, math.ceil(per_result * max(self.k, _FEWEST_RESULTS)))

    def search(
        self,
        embedding: tf.Tensor,
        leaves_to_search: tf.Tensor | None = None,
        num_reordered: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows int32 [B, K] and scores float32 [B, K], which are exact for their rows.

        Args:
          embedding: float32 [B, D].
          leaves_to_search, num_reordered: int32 scalars; 0 or less, or None, for those of this
            object. More reordered ones than K are of use only with a tree.
        """
        leaves = _given(leaves_to_search, self.leaves_to_search or -1)
        reordered = _given(num_reordered, self.num_reordered)
        rows, scores = self._find(embedding, tf.constant(self.k), leaves, reordered)
        return tf.ensure_shape(rows, [None, self.k]), tf.ensure_shape(scores, [None, self.k])

    def search_wider(
        self, embedding: tf.Tensor, num_results: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """As `search`, with K to N results, and leaves and reordering in proportion."""
        growth = tf.cast(num_results, tf.float64) / self.k

        def grown(size: int, most: int) -> tf.Tensor:
            return tf.minimum(tf.cast(tf.math.ceil(growth * size), tf.int32), most)

        leaves = grown(self.leaves_to_search, self.num_leaves) if self.num_leaves else -1
        reordered = grown(self.num_reordered, self._num_candidates)
        return self._find(embedding, num_results, leaves, reordered)

    def _find(
        self,
        embedding: tf.Tensor,
        num_results: tf.Tensor,
        leaves: tf.Tensor | int,
        reordered: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        searcher = _scann_ops().searcher_from_module(self._state)
        rows, scores = searcher.search_batched_parallel(
            embedding,
            final_num_neighbors=num_results,
            pre_reorder_num_neighbors=reordered if self.num_leaves else None,
            leaves_to_search=leaves,
        )
        # ScaNN returns as many columns as its fullest row has results, and fills the shorter
        # rows with candidate 0 and score NaN.
        scores = _widen(scores, num_results, math.nan)
        rows = tf.where(tf.math.is_nan(scores), -1, _widen(rows, num_results, -1))
        return rows, tf.where(rows < 0, 0.0, scores)

    def release(self) -> tf.Tensor:
        """Frees the searcher, which outlives the loaded model otherwise; a search rebuilds it."""
        handle = self._state.recreate_handle()
        with tf.control_dependencies([tf.raw_ops.DestroyResourceOp(resource=handle)]):
            return tf.constant(True)


def import_scann() -> ModuleType | None:
    """The package scann with its TensorFlow operations registered, None where it has none."""
    try:
        from scann.scann_ops.py import scann_ops
    except (ImportError, tf.errors.NotFoundError) as error:  # the latter: built for another TF
        logging.getLogger(__name__).info("scann cannot be imported: %s", error)
        return None
    return scann_ops


@tf.autograph.experimental.do_not_convert
def _scann_ops() -> ModuleType:
    if (scann_ops := import_scann()) is None:
        raise ValueError(
            "A ScaNN index needs the package scann: pip install '.[serve]' in the checkout."
        )
    return scann_ops


def usual_leaves(num_candidates: int) -> int:
    """About the square root of the number of candidates; 0, no tree, where they are few."""
    return round(math.sqrt(num_candidates)) if num_candidates >= _SMALLEST_TREE else 0


def _build_searcher(vectors: np.ndarray, k: int, num_leaves: int, reordered: int) -> tf.Module:
    builder = _scann_ops().builder(vectors, k, "dot_product")
    if num_leaves:
        builder = (
            builder.tree(num_leaves, num_leaves, min(len(vectors), _LEAF_SAMPLE))
            .score_ah(_BLOCK, anisotropic_quantization_threshold=_ANISOTROPY)
            .reorder(reordered)
        )
    else:
        builder = builder.score_brute_force()
    with quiet_standard_error():
        searcher = builder.build()
    state = searcher.serialize_to_module()
    tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)  # `state` is all we keep
    return state


def _given(choice: tf.Tensor | None, otherwise: int) -> tf.Tensor:
    """A run-time choice where it is above 0, and else what the index was tuned to."""
    constant = tf.constant(otherwise)
    return constant if choice is None else tf.where(choice > 0, choice, constant)


def _widen(results: tf.Tensor, width: tf.Tensor, filling: float) -> tf.Tensor:
    """Pads [B, at most width] to [B, width]."""
    missing = width - tf.shape(results)[1]
    filling = tf.cast(filling, results.dtype)
    return tf.pad(results, [[0, 0], [0, missing]], constant_values=filling)
