"""Other libraries on the corpus of `benchmarks.serving`, at the recall that ScaNN is held to.

Each searches batches of 64 with as many threads as ScaNN, inner products, and the smallest search
effort that reaches the recall. A library that is not installed says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from serving.publish.measuring import BATCH, Judge, Search

_EFFORTS = (10, 16, 24, 32, 48, 64, 100, 128, 200, 300, 400, 600, 800, 1200)
_LINKS, _BUILD_EFFORT = 16, 100  # M and efConstruction of HNSW
_BYTES = 32  # of a vector in IVF-PQ
_REFINED = 4  # times K: what IVF-PQ scores exactly in the end


def opponents(
    vectors: np.ndarray, k: int, judge: Judge, target_recall: float, threads: int
) -> dict[str, Any]:
    """Queries a second, recall and time to build of each opponent.

    Args:
      vectors: float32 [N, D].
      k: results of a query.
      judge: measures recall and time.
      target_recall: at rank k.
      threads: of every library.
    """
    makers = {"faiss_hnsw": _faiss_hnsw, "faiss_ivf_pq": _faiss_ivf_pq, "hnswlib": _hnswlib}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            search, efforts = make(vectors, k, threads)
        except ImportError:
            results[name] = "not installed"
            continue
        seconds = time.perf_counter() - start
        results[name] = _at_recall(judge, search, efforts, target_recall)
        results[name]["build_seconds"] = round(seconds, 1)
    return results


def _at_recall(
    judge: Judge, search: Search, efforts: Sequence[int], target_recall: float
) -> dict[str, Any]:
    for effort in efforts:
        measured = judge.measure(search, effort)
        if measured.recall >= target_recall:
            break
    return {
        "effort": effort,
        "recall": round(measured.recall, 4),
        "batch_ms": round(measured.batch_ms, 3),
        "queries_per_second": round(1000 * BATCH / measured.batch_ms),
    }


def _as_search(find: Callable[[np.ndarray, int], tuple[Any, Any]]) -> Search:
    """NumPy queries and an effort → scores and rows, as the judge calls it."""

    def search(batch: tf.Tensor, effort: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scores, rows = find(batch.numpy(), int(effort))
        return tf.constant(rows.astype(np.int32)), tf.constant(scores)

    return search


def _faiss_hnsw(vectors: np.ndarray, k: int, threads: int) -> tuple[Search, Sequence[int]]:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _BUILD_EFFORT
    index.add(vectors)

    def find(batch: np.ndarray, effort: int) -> tuple[Any, Any]:
        index.hnsw.efSearch = effort
        return index.search(batch, k)

    return _as_search(find), [effort for effort in _EFFORTS if effort >= k]


def _faiss_ivf_pq(vectors: np.ndarray, k: int, threads: int) -> tuple[Search, Sequence[int]]:
    import faiss

    faiss.omp_set_num_threads(threads)
    dimensions = vectors.shape[1]
    leaves = 2 * round(np.sqrt(len(vectors)))
    coarse = faiss.IndexFlatIP(dimensions)
    index = faiss.IndexIVFPQ(
        coarse, dimensions, leaves, min(_BYTES, dimensions), 8, faiss.METRIC_INNER_PRODUCT
    )
    rng = np.random.default_rng(0)
    sample = rng.choice(len(vectors), min(len(vectors), 50 * leaves), replace=False)
    index.train(vectors[sample])
    refined = faiss.IndexRefineFlat(index)
    refined.add(vectors)
    refined.k_factor = _REFINED

    def find(batch: np.ndarray, effort: int) -> tuple[Any, Any]:
        index.nprobe = effort
        return refined.search(batch, k)

    return _as_search(find), (1, 2, 3, 4, 6, 8, *_EFFORTS)


def _hnswlib(vectors: np.ndarray, k: int, threads: int) -> tuple[Search, Sequence[int]]:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(len(vectors), M=_LINKS, ef_construction=_BUILD_EFFORT, random_seed=0)
    index.set_num_threads(threads)
    index.add_items(vectors)

    def find(batch: np.ndarray, effort: int) -> tuple[Any, Any]:
        index.set_ef(effort)
        rows, distances = index.knn_query(batch, k)
        return 1 - distances, rows  # its distance is 1 - inner product

    return _as_search(find), [effort for effort in _EFFORTS if effort >= k]
