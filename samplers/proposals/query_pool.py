"""A pool of hard candidates for every query, renewed by importance resampling (AdaSIR)."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from samplers.candidates import Candidates, Embed, Encoders, candidate_scores
from samplers.proposals.popularity import PopularitySampler, UniformSampler
from samplers.random_numbers import HOST, draw_by_mass, split_seed
from samplers.selection.seen import Seen
from samplers.state import renewed_variable

_BLOCK = 1024  # queries renewed at a time: bounds the memory of a renewal


@dataclasses.dataclass(eq=False)
class QueryPool(tf.Module):
    """For every query, candidates that follow the softmax of its scores.

    Chen et al., WWW 2022, doi:10.1145/3485447.3512075, Algorithm 1. A renewal draws K_c from the
    proposal Q, weighs it by w = softmax_{j in K_c}(s_cj - log Q_j), and draws R' from K_c by w,
    with replacement. R' becomes the pool at first, and then the pool becomes a uniform draw, with
    replacement, from the old pool and R' together; candidates keep the w that they came with.

    Attributes:
      ids: int64 [Q, P], the pools.
      log_weights: float32 [Q, P], log w of each.
    """

    num_queries: int  # Q, one pool for each
    pool_size: int  # P, of K_c and of the pool
    proposal: UniformSampler | PopularitySampler  # draws K_c
    _: dataclasses.KW_ONLY
    keep_proposed: bool = False  # remember the last K_c in `proposed`, to estimate ranks with it
    seen: Seen | None = None  # what a pool leaves out, unless all of K_c is; None for nothing

    def __post_init__(self) -> None:
        super().__init__(name="query_pool")
        nothing = tf.zeros([self.num_queries, self.pool_size], tf.int64)  # int32: no GPU kernels
        self.ids = renewed_variable(nothing, "ids")
        self.log_weights = renewed_variable(tf.cast(nothing, tf.float32), "log_weights")
        self.proposed = renewed_variable(nothing, "proposed") if self.keep_proposed else None
        self.filled = renewed_variable(tf.constant(False), "filled")

    def sample(self, query_ids: tf.Tensor, num_negatives: int, *, seed: tf.Tensor) -> Candidates:
        """Uniform draws with replacement from the pools of queries [B]: [B, N]; log_q is log w."""
        shape, size = [tf.size(query_ids), num_negatives], self.pool_size
        places = tf.random.stateless_uniform(shape, seed, minval=0, maxval=size, dtype=tf.int64)
        rows = tf.broadcast_to(query_ids[:, None], tf.shape(places))
        where = tf.stack([rows, places], axis=-1)  # [B, N, 2]
        return Candidates(tf.gather_nd(self.ids, where), tf.gather_nd(self.log_weights, where))

    def renew(self, encoders: Encoders, *, seed: tf.Tensor) -> None:
        """Resamples every pool by the scores of now, in blocks of queries."""
        queries = encoders.queries_for("A pool for each query")

        def renew_block(start: tf.Tensor) -> tuple[tf.Tensor]:
            rows = tf.range(start, tf.minimum(start + _BLOCK, self.num_queries), dtype=tf.int64)
            with tf.device(HOST):
                block_seed = tf.random.experimental.stateless_fold_in(seed, start)
            self._renew_rows(rows, queries(rows), encoders.candidates, block_seed)
            return (start + _BLOCK,)

        start = (tf.constant(0, tf.int64),)
        tf.while_loop(
            lambda start: start < self.num_queries, renew_block, start, parallel_iterations=1
        )
        self.filled.assign(True)

    def _renew_rows(self, rows: tf.Tensor, query: tf.Tensor, embed: Embed, seed: tf.Tensor) -> None:
        """One block of Algorithm 1, lines 4 to 10: queries [b] and their embeddings [b, D]."""
        seeds = split_seed(seed, 3)
        shape = tf.stack([tf.size(rows), self.pool_size])
        drawn = self.proposal.sample(shape, seed=seeds[0])  # K_c
        logits = candidate_scores(query, embed(drawn.ids)) - drawn.log_q
        if self.seen is not None:
            hits = self.seen.holds(rows, drawn.ids)
            hits &= ~tf.reduce_all(hits, axis=1, keepdims=True)
            logits = tf.where(hits, -float("inf"), logits)
        log_weights = tf.nn.log_softmax(logits)
        uniform = tf.random.stateless_uniform(shape, seeds[1])
        places = draw_by_mass(tf.exp(log_weights), uniform)  # R'
        end = 2 * self.pool_size
        old_or_new = tf.random.stateless_uniform(shape, seeds[2], 0, end, tf.int64)
        all_new = tf.range(self.pool_size, 2 * self.pool_size, dtype=tf.int64)
        chosen = tf.where(self.filled, old_or_new, all_new)
        for state, new in ((self.ids, drawn.ids), (self.log_weights, log_weights)):
            new = tf.gather(new, places, batch_dims=1)
            both = tf.concat([tf.gather(state, rows), new], axis=1)  # [b, 2 P]
            _set_rows(state, rows, tf.gather(both, chosen, batch_dims=1))
        if self.proposed is not None:
            _set_rows(self.proposed, rows, drawn.ids)


def _set_rows(variable: tf.Variable, rows: tf.Tensor, values: tf.Tensor) -> None:
    """Writes rows in place, which a variable with a copy on each replica cannot do by itself."""
    copies = tf.distribute.get_strategy().experimental_local_results(variable)
    if len(copies) > 1:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        variable = copies[int(tf.get_static_value(replica))]
    variable.scatter_update(tf.IndexedSlices(values, rows))
