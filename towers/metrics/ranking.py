"""The top of the whole corpus for every query, without what the query is known to like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from pipeline.contract import hashing
from samplers.selection.running_top_k import running_top_k
from towers.data.history import Before
from towers.data.interactions import Positives

MAX_SCORES = 1 << 26  # in memory at a time: 256 MiB
_TIES_SEED = 0

# float32, those of a model stay on their device; of candidates also what makes those of dense ids
Embeddings: TypeAlias = np.ndarray | tf.Tensor | Callable[[np.ndarray], tf.Tensor]
Known: TypeAlias = Positives | Before


class Diverged(ValueError):  # noqa: N818 - it names what happened
    """A loss, a gradient or an embedding is no longer finite."""


def tie_order(fingerprints: np.ndarray) -> np.ndarray:
    """Candidates in an order that knows nothing of their counts: int64 [N].

    Equal scores are ranked in this order. Dense ids go by descending count over all splits, so
    the smaller id first would hand a ranking the popularity in the test split.
    """
    return np.argsort(hashing.row_hash(_TIES_SEED, "ties", fingerprints), kind="stable")


def rank_corpus(
    query_embeddings: Embeddings,
    candidate_embeddings: Embeddings,
    query_ids: np.ndarray,
    known: Known,
    *,
    k: int,
    **more: Any,
) -> np.ndarray:
    """The candidates of `rank_blocks`, which says what the arguments are, in one array.

    Returns:
      int64 [U, k], dense ids; -1 at the end of a row with fewer than k candidates left.
    """
    blocks = rank_blocks(query_embeddings, candidate_embeddings, query_ids, known, k=k, **more)
    ranked = np.concatenate([candidates for candidates, _ in blocks])
    return np.pad(ranked, ((0, 0), (0, k - ranked.shape[1])), constant_values=-1)


def rank_blocks(
    query_embeddings: Embeddings,
    candidate_embeddings: Embeddings,
    query_ids: np.ndarray,
    known: Known,
    *,
    k: int,
    order: np.ndarray,
    block_size: int = 256,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The k candidates of highest score for each query, block after block of queries.

    Args:
      query_embeddings: float32 [Q, D] by dense id.
      candidate_embeddings: float32 [N, D] by dense id, or ids [n] → [n, D]: then made in order.
      query_ids: int64 [U], the queries to rank for.
      known: what each query is known to like, which is left out.
      k: candidates to return.
      order: int64 [N], candidates in the order in which ties are ranked.
      block_size: queries at a time, scored against as many candidates as `MAX_SCORES` allows.

    Yields:
      Candidates int64 [b, min(k, N)] and scores float32 of the same shape, best first; -1 and
      -inf at the end of a row with fewer candidates left.
    """
    queries, embed = tf.convert_to_tensor(query_embeddings), candidate_embeddings
    corpus = embed(order) if callable(embed) else tf.gather(embed, order)
    for name, rows in (("query", queries), ("candidate", corpus)):
        if not tf.reduce_all(tf.math.is_finite(rows)):
            raise Diverged(
                f"{name} embeddings must be finite, got NaN or infinity: the training diverged; "
                "train with a smaller learning_rate."
            )
    column_of = np.empty(len(order), np.int64)
    column_of[order] = np.arange(len(order))
    block_columns = tf.constant(max(1, MAX_SCORES // block_size), tf.int64)
    for start in range(0, len(query_ids), block_size):
        block = query_ids[start : start + block_size]
        rows, candidates = _known_pairs(block, known)
        masked = tf.constant(np.stack([rows, column_of[candidates]], axis=1))
        top = _top_k(corpus, tf.gather(queries, block), masked, tf.constant(k), block_columns)
        scores, columns = (part.numpy() for part in top)
        yield np.where(np.isneginf(scores), -1, order[columns]), scores


@tf.function(
    input_signature=[
        *[tf.TensorSpec([None, None], tf.float32)] * 2,
        tf.TensorSpec([None, 2], tf.int64),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.int64),
    ]
)
def _top_k(
    corpus: tf.Tensor, queries: tf.Tensor, masked: tf.Tensor, k: tf.Tensor, block_size: tf.Tensor
) -> Any:
    """Scores and columns of the best k, [b, k], without the (row, column) pairs of `masked`."""
    return running_top_k(queries, corpus, k, block_size=block_size, masked=masked)


def rank_by_popularity(
    train_counts: np.ndarray,
    query_ids: np.ndarray,
    known: Known,
    *,
    k: int,
    order: np.ndarray,
    block_size: int = 1024,
) -> np.ndarray:
    """The k candidates with most train rows that each query is not known to like.

    The ranking is one for all queries but for what is left out, so each query needs only its
    first k + (number left out) places. Arguments and result are those of `rank_corpus`.
    """
    by_count = order[np.argsort(-train_counts[order], kind="stable")]
    place_of = np.empty(len(by_count), np.int64)
    place_of[by_count] = np.arange(len(by_count))
    ranked = np.full((len(query_ids), k), -1, np.int64)
    for start in range(0, len(query_ids), block_size):
        block = query_ids[start : start + block_size]
        places = min(len(by_count), k + int(known.sizes[block].max(initial=0)))
        rows, candidates = _known_pairs(block, known)
        near = place_of[candidates] < places
        free = np.ones((len(block), places), bool)
        free[rows[near], place_of[candidates[near]]] = False
        rank = np.cumsum(free, axis=1)  # of the free places: 1, 2, ...
        rows, columns = np.nonzero(free & (rank <= k))
        ranked[start + rows, rank[rows, columns] - 1] = by_count[columns]
    return ranked


def _known_pairs(query_ids: np.ndarray, known: Known) -> tuple[np.ndarray, np.ndarray]:
    """(row in query_ids, candidate) of everything that these queries are known to like."""
    starts, sizes = known.offsets[query_ids], known.sizes[query_ids]
    rows = np.repeat(np.arange(len(query_ids)), sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rows, known.candidate_ids[np.repeat(starts, sizes) + within]


def find_hits(ranked: np.ndarray, query_ids: np.ndarray, held_out: Positives) -> np.ndarray:
    """Where a ranked candidate is a held-out positive of its query.

    Args:
      ranked: int64 [U, k], dense candidate ids or -1.
      query_ids: int64 [U], the query of each row.
      held_out: the positives to find.

    Returns:
      bool [U, k].
    """
    span = int(max(ranked.max(initial=0), held_out.candidate_ids.max(initial=0))) + 1
    owners = np.repeat(np.arange(len(held_out.sizes)), held_out.sizes)
    keys = owners * span + held_out.candidate_ids
    return np.isin(query_ids[:, None] * span + ranked, keys) & (ranked >= 0)
