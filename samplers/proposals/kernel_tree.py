"""Candidates drawn in proportion to a quadratic kernel of their scores, through a tree."""

from __future__ import annotations

import tensorflow as tf

from samplers.candidates import Candidates
from samplers.random_numbers import draw_by_mass
from samplers.state import renewed_variable

_MAX_ROOTS = 256


class KernelTree(tf.Module):
    """Draws candidate j with probability Q_j ∝ α <q, v_j>² + 1, without scoring the corpus.

    Blanc and Rendle, ICML 2018, arXiv 1712.00527, section 3.2. A node of the binary tree holds
    S = Σ v vᵀ over its candidates, so that their mass is α qᵀ S q + their number. A draw goes
    down from node to child in proportion to mass, and in a leaf from candidate to candidate.

    Differs: the top levels of the tree are one step, a choice among at most 256 subtrees whose
    masses are one matrix product for all draws of a batch; the probabilities are the same.

    The memory is about 4 N D² / leaf_size bytes.

    Attributes:
      leaves: float32 [leaves, leaf_size, D], the embeddings v that the tree was made of.
      sums: for each level float32 [nodes, D (D + 1) / 2], the upper triangles of S, with what
        is off the diagonal doubled.
    """

    def __init__(self, num_candidates: int, *, alpha: float, leaf_size: int) -> None:
        super().__init__(name="kernel_tree")
        self._num_candidates, self._alpha, self._leaf_size = num_candidates, alpha, leaf_size
        leaves, levels = -(-num_candidates // leaf_size), 0
        while -(-leaves // 2**levels) > _MAX_ROOTS:
            levels += 1
        self._num_leaves = -(-leaves // 2**levels) * 2**levels  # the last may be empty
        # D is not known before the first embeddings.
        self.leaves = renewed_variable(tf.zeros([0, 0, 0]), "leaves", shape=[None, None, None])
        self.sums = [
            renewed_variable(tf.zeros([0, 0]), f"sums_{level}", shape=[None, None])
            for level in range(levels + 1)
        ]

    def renew(self, corpus: tf.Tensor) -> None:
        """Makes the tree of the embeddings of the candidates, [N, D]."""
        corpus = tf.cast(corpus, tf.float32)
        missing = self._num_leaves * self._leaf_size - self._num_candidates
        corpus = tf.pad(corpus, [[0, missing], [0, 0]])
        leaves = tf.reshape(corpus, [self._num_leaves, self._leaf_size, corpus.shape[1]])
        self.leaves.assign(leaves)
        # Doubled off the diagonal: a product with a triangle is then that of whole matrices.
        dim = corpus.shape[1]
        doubled = tf.concat([[1.0] + [2.0] * (dim - 1 - row) for row in range(dim)], axis=0)
        sums = _upper_triangle(tf.matmul(leaves, leaves, transpose_a=True)) * doubled
        self.sums[-1].assign(sums)
        for level in reversed(self.sums[:-1]):
            sums = sums[0::2] + sums[1::2]
            level.assign(sums)

    def sample(self, query: tf.Tensor, num_negatives: int, *, seed: tf.Tensor) -> Candidates:
        """Independent draws for each query: [B, D] → [B, N]; log_q is log Q_j."""
        query = tf.cast(query, tf.float32)
        squares = _upper_triangle(query[:, :, None] * query[:, None, :])
        shape = [len(self.sums) + 1, tf.shape(query)[0], num_negatives]
        draws = tf.unstack(tf.random.stateless_uniform(shape, seed))
        roots = tf.range(tf.shape(self.sums[0], tf.int64)[0])
        masses = self._alpha * tf.matmul(squares, self.sums[0], transpose_b=True)
        masses += self._count(roots, 0)
        node = draw_by_mass(masses, draws[0])
        mass = tf.gather(masses, node, batch_dims=1)
        for level in range(1, len(self.sums)):
            node, mass = self._descend(squares, node, mass, level, draws[level])
        ids, masses_of_ids = self._draw_in_leaf(query, node, draws[-1])
        total = tf.reduce_sum(masses, axis=1, keepdims=True)
        return Candidates(ids, tf.math.log(masses_of_ids / total))

    def _count(self, node: tf.Tensor, level: int) -> tf.Tensor:
        """The number of candidates of a node, as float32."""
        width = self._leaf_size * 2 ** (len(self.sums) - 1 - level)
        return tf.cast(tf.clip_by_value(self._num_candidates - node * width, 0, width), tf.float32)

    def _descend(
        self, squares: tf.Tensor, node: tf.Tensor, mass: tf.Tensor, level: int, draws: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """From nodes and their masses, [B, N], to one of the children of each, on `level`."""
        left = 2 * node
        left_mass = tf.linalg.matvec(tf.gather(self.sums[level], left), squares)
        left_mass = self._alpha * left_mass + self._count(left, level)
        to_right = (draws * mass >= left_mass) & (self._count(left + 1, level) > 0)
        mass = tf.where(to_right, mass - left_mass, left_mass)
        return left + tf.cast(to_right, tf.int64), mass

    def _draw_in_leaf(
        self, query: tf.Tensor, leaf: tf.Tensor, draws: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Candidates of leaves, and their masses: [B, N]."""
        scores = tf.linalg.matvec(tf.gather(self.leaves, leaf), query[:, None, :])
        masses = self._alpha * tf.square(scores) + 1.0  # [B, N, leaf_size]
        places = tf.range(self._leaf_size, dtype=tf.int64)
        ids = leaf[:, :, None] * self._leaf_size + places
        masses = tf.where(ids < self._num_candidates, masses, tf.zeros_like(masses))
        place = draw_by_mass(masses, draws[:, :, None])
        ids = tf.gather(ids, place, batch_dims=2)[:, :, 0]
        ids = tf.minimum(ids, self._num_candidates - 1)
        return ids, tf.gather(masses, place, batch_dims=2)[:, :, 0]


def _upper_triangle(matrices: tf.Tensor) -> tf.Tensor:
    """Symmetric matrices [..., D, D] without the repetition: [..., D (D + 1) / 2]."""
    return tf.concat([matrices[..., row, row:] for row in range(matrices.shape[-1])], axis=-1)
