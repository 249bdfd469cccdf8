"""Times the index of a published version against exact search in TensorFlow, in one process.

    python -m benchmarks.serving [--quick] [--bundle DIR] [--json FILE]

Both sides are the two SavedModels of one version, called by embedding in batches of 64 with two
threads; they take turns, and the speed-up is the median of the ratio within a round. The index was
tuned by `publish`; the queries here are others than those it was tuned with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks.ann_opponents import opponents
from pipeline import schema
from serving.bundle import read_bundle
from serving.bundle_writer import write_bundle
from serving.measuring import BATCH, Judge, Search
from serving.publish import publish
from serving.retriever import Retriever

THREADS = 2
CORPUS, QUICK_CORPUS, DIMENSIONS = 1_000_000, 100_000, 64
IN_CLUSTER = 1000  # candidates, on average
SPREAD = 1.0  # standard deviation within a cluster; that of the centres is 1
TARGET_RECALL, K = 0.95, 100
QUERIES, ROUNDS = 1024, 5


def main() -> None:
    """Parses, measures, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--bundle", help="of a trained model, measured beside the synthetic one")
    parser.add_argument("--quick", action="store_true", help="a tenth of the corpus")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)
    results = ann(options.quick)
    if options.bundle:
        results["trained"] = trained(Path(options.bundle))
    print(json.dumps(results, indent=2))
    if options.json:
        schema.write_atomically(Path(options.json), json.dumps(results, indent=2) + "\n")


def ann(quick: bool) -> dict[str, Any]:
    """ScaNN on a synthetic corpus in clusters, with other libraries beside it.

    Returns:
      scann_speedup: queries a second by those of exact search in TensorFlow.
      scann_recall: recall@100 on queries that had no part in the tuning.
      ann: the rest, times in milliseconds a batch of 64.
    """
    vectors, queries = clustered(QUICK_CORPUS if quick else CORPUS)
    with tempfile.TemporaryDirectory() as directory:
        bundle = write_bundle(
            Path(directory) / "bundle",
            vectors,
            [f"candidate {row}" for row in range(len(vectors))],
            source="synthetic clusters",
            sample_queries=queries[QUERIES:],
        )
        figures, judge = _measure(bundle, Path(directory) / "models", queries[:QUERIES])
    figures |= opponents(vectors, K, judge, TARGET_RECALL, THREADS)
    return {
        "scann_speedup": figures.pop("speedup"),
        "scann_recall": figures.pop("recall"),
        "ann": {"candidates": len(vectors), "dimensions": DIMENSIONS, "k": K, **figures},
    }


def trained(bundle: Path) -> dict[str, Any]:
    """The same of a bundle with a query model, asked with queries of its own."""
    ids = read_bundle(bundle).query_ids(1 << 62)
    chosen = np.random.default_rng(1).choice(len(ids), min(QUERIES, len(ids)), replace=False)
    model = tf.saved_model.load(str(bundle / schema.BUNDLE_QUERY_MODEL))
    queries = model.signatures["serving_default"](query_id=tf.constant([ids[at] for at in chosen]))
    with tempfile.TemporaryDirectory() as directory:
        figures, _ = _measure(bundle, Path(directory), queries["embedding"].numpy())
    return figures


def clustered(num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [N, 64] and queries [2 · 1024, 64] around the same centres, seeded."""
    rng = np.random.default_rng(0)
    num_clusters = num_candidates // IN_CLUSTER
    centres = rng.normal(size=(num_clusters, DIMENSIONS)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        around = centres[rng.integers(0, num_clusters, count)]
        return around + np.float32(SPREAD) * rng.standard_normal(around.shape, np.float32)

    return draw(num_candidates), draw(2 * QUERIES)


def _measure(bundle: Path, models: Path, queries: np.ndarray) -> tuple[dict[str, Any], Judge]:
    """Publishes a bundle and times both of its indexes; the queries with their exact results."""
    start = time.perf_counter()
    version = publish(bundle, models, k=K, target_recall=TARGET_RECALL)
    seconds = time.perf_counter() - start
    report = json.loads((version / "ann_report.json").read_text())
    retriever = Retriever.load(models)
    exact, scann = _searching(retriever, "exact"), _searching(retriever, "scann")
    judge = Judge(queries, exact, report["at"])
    rounds = [(judge.measure(exact), judge.measure(scann)) for _ in range(ROUNDS)]
    retriever.close()
    exact_ms, scann_ms = (
        statistics.median(pair[side].batch_ms for pair in rounds) for side in (0, 1)
    )
    chosen = ("num_leaves", "leaves_to_search", "num_reordered", "build_seconds")
    return {
        "speedup": round(statistics.median(e.batch_ms / s.batch_ms for e, s in rounds), 2),
        "recall": round(rounds[0][1].recall, 4),
        "recall_reported": report["scann"]["recall"],
        "default_index": report["default_index"],
        "publish_seconds": round(seconds, 1),
        "exact_batch_ms": round(exact_ms, 3),
        "scann_batch_ms": round(scann_ms, 3),
        "scann_queries_per_second": round(1000 * BATCH / scann_ms),
        **{name: report["scann"][name] for name in chosen},
    }, judge


def _searching(retriever: Retriever, index: str) -> Search:
    """The signature `embedding_search` of a version, as the judge calls it."""
    signature = retriever.model(index).signatures["embedding_search"]
    tuned = {"leaves_to_search": tf.constant(0)} if index == "scann" else {}

    def search(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = signature(embedding=batch, **tuned)
        return outputs["candidate_row"], outputs["score"]

    return search


if __name__ == "__main__":
    main()
