"""Candidates drawn by their rank along one factor of the query (AOBPR)."""

from __future__ import annotations

import math

import tensorflow as tf

from samplers.candidates import Candidates
from samplers.random_numbers import draw_by_mass, split_seed
from samplers.state import renewed_variable


class AdaptiveOversampler(tf.Module):
    """Draws candidates that are likely to score high for the query, in constant time.

    Rendle and Freudenthaler, WSDM 2014, doi:10.1145/2556195.2556248, section 4.3:
        rank r with p(r) ∝ e^(-r / λ), r = 0 … N - 1
        factor f with p(f | q) ∝ |q_f| σ_f, σ_f the deviation of factor f over the candidates
        the candidate at rank r of factor f, from the top if q_f > 0, else from the bottom
    The orders are renewed every N log N draws. `rank_scale` is λ, above 0.

    Attributes:
      orders: int64 [D, N], the candidates by descending value of each factor.
      deviations: float32 [D], σ.
      draws: int64, draws since the orders were made.
    """

    def __init__(self, num_candidates: int, *, rank_scale: float) -> None:
        super().__init__(name="adaptive_oversampler")
        self._num_candidates, self._rank_scale = num_candidates, rank_scale
        self._interval = max(1, math.ceil(num_candidates * math.log(num_candidates)))
        # D is not known before the first embeddings; int32 has no kernels for this on a GPU.
        nothing = tf.zeros([0, 0], tf.int64)
        self.orders = renewed_variable(nothing, "orders", shape=[None, None])
        self.deviations = renewed_variable(tf.zeros([0]), "deviations", shape=[None])
        self.draws = renewed_variable(tf.constant(self._interval, tf.int64), "draws")

    @property
    def due(self) -> tf.Tensor:
        """Whether the orders are missing, or N log N draws old: bool."""
        return self.draws >= self._interval

    def renew(self, corpus: tf.Tensor) -> None:
        """Orders the candidates by each factor of their embeddings, [N, D]."""
        factors = tf.transpose(tf.cast(corpus, tf.float32))  # [D, N]
        order = tf.argsort(factors, axis=1, direction="DESCENDING")
        self.orders.assign(tf.cast(order, tf.int64))
        self.deviations.assign(tf.math.reduce_std(factors, axis=1))
        self.draws.assign(0)

    def count(self, draws: tf.Tensor) -> None:
        self.draws.assign_add(tf.cast(draws, tf.int64))

    def sample(self, query: tf.Tensor, num_negatives: int, *, seed: tf.Tensor) -> Candidates:
        """Draws for each query, [B, D] → [B, N]; log_q is that of both factor and rank."""
        query = tf.cast(query, tf.float32)
        shape = [tf.shape(query)[0], num_negatives]
        for_factor, for_rank = (tf.random.stateless_uniform(shape, s) for s in split_seed(seed))
        weights = tf.abs(query) * self.deviations
        flat = tf.reduce_sum(weights, axis=1, keepdims=True) == 0
        weights = tf.where(flat, tf.ones_like(weights), weights)  # any factor will do
        factor = draw_by_mass(weights, for_factor)
        chosen = tf.gather(weights, factor, batch_dims=1)
        log_factor = tf.math.log(chosen / tf.cumsum(weights, axis=1)[:, -1:])
        scale, last = self._rank_scale, self._num_candidates - 1
        mass = -math.expm1(-self._num_candidates / scale)  # of all ranks, times 1 - e^(-1 / λ)
        rank = tf.minimum(tf.cast(-scale * tf.math.log1p(-for_rank * mass), tf.int64), last)
        log_rank = math.log(-math.expm1(-1.0 / scale) / mass) - tf.cast(rank, tf.float32) / scale
        upwards = tf.gather(query, factor, batch_dims=1) > 0
        place = tf.where(upwards, rank, last - rank)
        ids = tf.gather_nd(self.orders, tf.stack([factor, place], axis=-1))
        return Candidates(ids, log_factor + log_rank)
