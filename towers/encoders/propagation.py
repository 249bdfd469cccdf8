"""Embeddings that spread over the graph of the train split: LightGCN and NGCF."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from towers.encoders.bipartite_graph import BipartiteGraph
from towers.encoders.initial import glorot
from towers.legacy_keras import tf_keras

_SLOPE = 0.2  # of LeakyReLU in NGCF, as in its published code


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
        self,
        graph: BipartiteGraph,
        dim: int,
        num_layers: int,
        *,
        jit_compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=tf.float32, **kwargs)
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
        e = e^(0) || e^(1) || … || e^(L), so the embeddings have (L + 1) · D numbers

    Differs: no dropout of messages or nodes. The published code adds a bias
    to both terms, passes each through a LeakyReLU of its own, and scales every layer but the first
    to length 1 before they are put side by side.
    """

    def __init__(
        self,
        graph: BipartiteGraph,
        dim: int,
        num_layers: int,
        *,
        seed: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(graph, dim, num_layers, **kwargs)
        self.dim = (num_layers + 1) * dim
        for number, name in enumerate(("sum_weights", "product_weights"), 1):
            for layer in range(num_layers):
                initial = glorot((seed, 100 * number + layer))
                weight = self.add_weight(
                    name=f"{name}_{layer}", shape=(dim, dim), initializer=initial
                )
                setattr(self, f"{name}_{layer}", weight)  # its name in a checkpoint

    def _propagate(self, queries: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        to_queries, to_candidates = self.graph.messages()
        query_layers, candidate_layers = [queries], [candidates]
        for layer in range(self.num_layers):
            by_sum = getattr(self, f"sum_weights_{layer}")
            by_product = getattr(self, f"product_weights_{layer}")
            queries, candidates = (
                _combine(queries, to_queries(candidates), by_sum, by_product),
                _combine(candidates, to_candidates(queries), by_sum, by_product),
            )
            query_layers.append(queries)
            candidate_layers.append(candidates)
        return tf.concat(query_layers, axis=1), tf.concat(candidate_layers, axis=1)


def _combine(
    own: tf.Tensor, neighbours: tf.Tensor, by_sum: tf.Tensor, by_product: tf.Tensor
) -> tf.Tensor:
    """The next layer of one side: [V, D]."""
    message = tf.matmul(neighbours + own, by_sum) + tf.matmul(neighbours * own, by_product)
    return tf.nn.leaky_relu(message, _SLOPE)
