"""The ranking that a student learns: that of a trained run, alone or beside the graph of train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import tensorflow as tf
from scipy.sparse.linalg import svds

from samplers.methods.full_softmax import SoftTargets
from towers.data.interactions import Positives, RetrievalData
from towers.metrics.ranking import MAX_SCORES, rank_blocks, tie_order
from towers.model.top_k import vectors
from towers.model.two_tower import TwoTower

_RANK = 256  # of the low-pass filter, as in its paper


def soft_targets(model: TwoTower, data: RetrievalData, k: int, graph: float = 0.0) -> SoftTargets:
    """What a model ranks highest for each query among what the query did not choose in train.

        targets = soft_targets(large, data, 100)
        small = TwoTower(data, 16, "full_softmax", targets=targets)

    Held-out rows are not looked at: where the teacher ranks them high, it has found them.

    Args:
      model: the teacher, a trained model of the data.
      data: whose train split the student is trained on too.
      k: T, candidates of each query; fewer where the corpus is smaller.
      graph: w. Above 0 the scores are those of the model, in standard deviations over the corpus,
        plus w times those of `graph_scores`; then B·N scores are made at a time, and for each query
        as many steps as there are train rows of whoever shares a candidate with it.
    """
    chosen = data.positives("train")
    queries, order = np.arange(data.num_queries), tie_order(data.candidate_vocabulary.fingerprints)
    if graph:
        blocks = _beside_graph(model, chosen, min(k, data.num_candidates), graph, order)
    else:
        embed = functools.partial(vectors, model, "candidate")
        blocks = rank_blocks(model.query_embeddings(), embed, queries, chosen, k=k, order=order)
    ids, scores = zip(*((ids.astype(np.int32), scores) for ids, scores in blocks), strict=True)
    return SoftTargets(
        np.concatenate(ids),
        np.concatenate(scores),
        chosen.candidate_ids.astype(np.int32),
        chosen.offsets,
    )


def graph_scores(train: sp.csr_matrix) -> Callable[[np.ndarray], np.ndarray]:
    """What train rows say without training: a random walk, and half of a low-pass filter.

        scores = graph_scores(sp.csr_matrix(np.eye(3, 4, dtype=np.float32)))
        scores(np.arange(2)).shape  # (2, 4)

    For a row r of the matrix R of what queries chose, D_u and D_i its sums of rows and columns:
        walk = r D_i⁻¹ Rᵀ D_u⁻¹ R, where a walk of three edges from the query ends: P³, Cooper et
          al., WWW 2014, doi:10.1145/2567948.2579244
        low  = r D_i^-½ V Vᵀ D_i^½, V the first 256 right singular vectors of D_u^-½ R D_i^-½: the
          ideal low-pass filter of GF-CF, Shen et al., CIKM 2021, arXiv 2108.07567
    both in standard deviations over the candidates.

    Args:
      train: R, float32 [Q, N] of zeros and ones.

    Returns:
      A function: queries int64 [b] → float32 [b, N].
    """
    by_query, by_item = (np.maximum(train.sum(axis=axis).A1, 1) for axis in (1, 0))
    others = (sp.diags(1 / by_item) @ train.T @ sp.diags(1 / by_query)).astype(np.float32).tocsr()
    scaled = sp.diags(by_query**-0.5) @ train @ sp.diags(by_item**-0.5)
    rank = min(_RANK, min(train.shape) - 1)
    right = svds(scaled.astype(np.float32), k=rank, random_state=0)[2].T
    first = (right / np.sqrt(by_item)[:, None]).astype(np.float32)
    last = (right * np.sqrt(by_item)[:, None]).T.astype(np.float32)

    def scores(queries: np.ndarray) -> np.ndarray:
        rows = train[queries]
        walk = (rows @ others @ train).toarray()
        return _standard(walk) + 0.5 * _standard((rows @ first) @ last)

    return scores


def _beside_graph(
    model: TwoTower, chosen: Positives, k: int, weight: float, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `rank_blocks`, of the scores of the model and of the graph together."""
    shape, ones = (len(chosen.sizes), len(order)), np.ones(len(chosen.candidate_ids), np.float32)
    train = sp.csr_matrix((ones, chosen.candidate_ids, chosen.offsets), shape=shape, copy=True)
    train.sum_duplicates()
    train.data[:] = 1  # however often a query chose a candidate
    of_graph = graph_scores(train)
    queries, corpus = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    size = max(1, MAX_SCORES // shape[1])
    for start in range(0, shape[0], size):
        block = np.arange(start, min(start + size, shape[0]))
        scores = _standard(queries[block] @ corpus.T) + weight * of_graph(block)
        scores[train[block].nonzero()] = -np.inf
        top = tf.math.top_k(scores[:, order], k)
        yield np.where(np.isneginf(top.values), -1, order[top.indices]), top.values.numpy()


def _standard(scores: np.ndarray) -> np.ndarray:
    """In standard deviations of each row, around its mean."""
    spread = scores.std(axis=1, keepdims=True)
    return (scores - scores.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-12)
