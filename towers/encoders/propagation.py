"""Embeddings that spread over the graph of the train split: LightGCN and NGCF, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from towers.encoders.tower import glorot
from towers.legacy_keras import tf_keras

NeighbourSum = Callable[[tf.Tensor], tf.Tensor]
Make = Callable[[], NeighbourSum]  # in the trace that uses it

_SLOPE = 0.2  # of LeakyReLU in NGCF, as in its published code


class BipartiteGraph:
    """Messages between queries and candidates that share a train row.

    An edge weighs 1 / sqrt(degree of its query · degree of its candidate), which is the symmetric
    normalisation D^-1/2 A D^-1/2 of the adjacency matrix. A node without edges gets zeros. An edge
    counts once, however often its pair is in the rows.

    Two kernels give the same sums. `segments` gathers the rows of the sources and adds them up by
    target, edges in the order of their targets: all shapes are static, so XLA compiles it, on any
    device. Without it, a product with a matrix of compressed sparse rows, for CPUs: 3 to 5 times
    faster there. The gradient of either is the sum in the other direction, a gather and a sum over
    sorted edges as well.

    Args:
      query_ids, candidate_ids: int [n], dense ids of the train rows.
      num_queries, num_candidates, segments: Q, N, and which kernel.
    """

    def __init__(
        self,
        query_ids: np.ndarray,
        candidate_ids: np.ndarray,
        num_queries: int,
        num_candidates: int,
        *,
        segments: bool = True,
    ) -> None:
        pairs = np.unique(np.asarray(query_ids, np.int64) * num_candidates + candidate_ids)
        queries, candidates = np.divmod(pairs, num_candidates)
        self._query_scale = _inverse_root(np.bincount(queries, minlength=num_queries))
        self._candidate_scale = _inverse_root(np.bincount(candidates, minlength=num_candidates))
        kernel = _by_segments if segments else _by_matrix
        self._to_queries = kernel(candidates, queries, (num_queries, num_candidates))
        self._to_candidates = kernel(queries, candidates, (num_candidates, num_queries))

    def messages(self) -> tuple[NeighbourSum, NeighbourSum]:
        """Weighted sums over neighbours, to be used in the trace in which they are made.

        Returns:
          Of the candidates of each query, float32 [N, D] → [Q, D]; of the queries of each
          candidate, [Q, D] → [N, D].
        """
        to_queries = _with_adjoint(self._to_queries, self._to_candidates)
        to_candidates = _with_adjoint(self._to_candidates, self._to_queries)
        return (
            lambda rows: self._query_scale * to_queries(self._candidate_scale * rows),
            lambda rows: self._candidate_scale * to_candidates(self._query_scale * rows),
        )


class Propagation(tf_keras.layers.Layer):
    """The tables of both sides → the embeddings of all queries and all candidates.

    Between the tables and the look-ups of a step, once in it, over the whole graph, as in the
    published code of both.

    Args:
      graph: of the train split.
      dim: D, of the tables.
      num_layers: L, the steps along edges.
      jit_compile: compile with XLA, for a graph of `segments` only.
    """

    def __init__(
        self, graph: BipartiteGraph, dim: int, num_layers: int, *, jit_compile: bool = False
    ) -> None:
        super().__init__(dtype=tf.float32)
        self.graph, self.num_layers = graph, num_layers
        self.dim = dim  # of the embeddings
        self._compiled = tf.function(self._propagate, jit_compile=jit_compile)

    def call(self, tables: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Tables [Q, D] and [N, D] → embeddings of all queries and of all candidates."""
        return self._compiled(*tables)

    def _propagate(self, queries: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        raise NotImplementedError


class LightGcn(Propagation):
    """Neighbours' embeddings summed layer by layer, and the mean over the layers.

    He et al., SIGIR 2020, doi:10.1145/3397271.3401063, eq. (3)-(4) with α_k = 1 / (L + 1):
        e_u^(k+1) = Σ_{i in N_u} e_i^(k) / sqrt(|N_u| |N_i|), and the same for candidates
        e_u = 1/(L+1) Σ_k e_u^(k)
    """

    def _propagate(self, queries: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        to_queries, to_candidates = self.graph.messages()
        query_sum, candidate_sum = queries, candidates
        for _ in range(self.num_layers):
            queries, candidates = to_queries(candidates), to_candidates(queries)
            query_sum, candidate_sum = query_sum + queries, candidate_sum + candidates
        share = 1 / (self.num_layers + 1)
        return share * query_sum, share * candidate_sum


class Ngcf(Propagation):
    """Messages with weights and products of neighbours; all layers side by side.

    Wang et al., SIGIR 2019, doi:10.1145/3331184.3331267, eq. (7)-(9), with L = D^-1/2 A D^-1/2:
        E^(l) = LeakyReLU((L + I) E^(l-1) W1 + (L E^(l-1) ∘ E^(l-1)) W2)
        e = e^(0) || e^(1) / |e^(1)| || … || e^(L) / |e^(L)|, of (L + 1) · D numbers

    The lengths are those of the published code; the paper has e^(l) itself there, with which scores
    grow and overfit within four epochs (docs/paper_tables.md, Tmall). Differs from both: no dropout
    of messages or nodes. The published code also adds a bias to both terms, and passes each through
    a LeakyReLU of its own.
    """

    def __init__(
        self, graph: BipartiteGraph, dim: int, num_layers: int, *, seed: int = 10, **kwargs: Any
    ) -> None:
        super().__init__(graph, dim, num_layers, **kwargs)
        self.dim = (num_layers + 1) * dim
        # Runs of layers without lengths called them "…_weights": with these names they are refused.
        for number, name in enumerate(("sum_kernel", "product_kernel"), 1):
            for layer in range(num_layers):
                initial = glorot((seed, 100 * number + layer))
                weight = self.add_weight(f"{name}_{layer}", (dim, dim), initializer=initial)
                setattr(self, f"{name}_{layer}", weight)  # its name in a checkpoint

    def _propagate(self, queries: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        to_queries, to_candidates = self.graph.messages()
        query_layers, candidate_layers = [queries], [candidates]
        for layer in range(self.num_layers):
            by_sum = getattr(self, f"sum_kernel_{layer}")
            by_product = getattr(self, f"product_kernel_{layer}")
            queries, candidates = (
                _combine(queries, to_queries(candidates), by_sum, by_product),
                _combine(candidates, to_candidates(queries), by_sum, by_product),
            )
            query_layers.append(tf.math.l2_normalize(queries, axis=1))
            candidate_layers.append(tf.math.l2_normalize(candidates, axis=1))
        return tf.concat(query_layers, axis=1), tf.concat(candidate_layers, axis=1)


def _combine(
    own: tf.Tensor, neighbours: tf.Tensor, by_sum: tf.Tensor, by_product: tf.Tensor
) -> tf.Tensor:
    """The next layer of one side: [V, D]."""
    message = tf.matmul(neighbours + own, by_sum) + tf.matmul(neighbours * own, by_product)
    return tf.nn.leaky_relu(message, _SLOPE)


def _by_segments(sources: np.ndarray, targets: np.ndarray, shape: tuple[int, int]) -> Make:
    """Makes sums of rows [sources, D] by target, edge by edge, in the order of the targets."""
    order = np.lexsort((sources, targets))
    source_ids, target_ids = (tf.constant(ids[order], tf.int64) for ids in (sources, targets))
    return lambda: (
        lambda rows: tf.math.unsorted_segment_sum(tf.gather(rows, source_ids), target_ids, shape[0])
    )


def _by_matrix(sources: np.ndarray, targets: np.ndarray, shape: tuple[int, int]) -> Make:
    """Makes the same as the product with a matrix of zeros and ones, [targets, sources]."""
    order = np.lexsort((sources, targets))
    places = tf.constant(np.stack([targets[order], sources[order]], axis=1), tf.int64)

    def make() -> NeighbourSum:
        matrix = tf.raw_ops.SparseTensorToCSRSparseMatrix(
            indices=places, values=tf.ones([len(places)]), dense_shape=tf.constant(shape, tf.int64)
        )
        return lambda rows: tf.ensure_shape(
            tf.raw_ops.SparseMatrixMatMul(a=matrix, b=rows), [shape[0], rows.shape[1]]
        )

    return make


def _inverse_root(degrees: np.ndarray) -> tf.Tensor:
    """1 / sqrt(degree), 0 for a degree of 0: float32 [V, 1]."""
    roots = np.where(degrees > 0, np.maximum(degrees, 1) ** -0.5, 0)
    return tf.constant(roots[:, None], tf.float32)


def _with_adjoint(forward: Make, adjoint: Make) -> NeighbourSum:
    """The sum, whose gradient is the sum in the other direction.

    A graph cannot take a matrix from outside, so each trace makes its own; the gradient is one.
    """
    add_rows = forward()

    @tf.custom_gradient
    def add_up(rows: tf.Tensor) -> Any:
        return add_rows(rows), lambda upstream: adjoint()(tf.convert_to_tensor(upstream))

    return add_up
