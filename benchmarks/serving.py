"""Times a published version: its index against exact search, the service against the SavedModel.

    python -m benchmarks.serving [--quick] [--bundle DIR] [--only PART ...] [--json FILE]

The index (`ann`): both sides are the two SavedModels of one version, called in process by
embedding in batches of 64 with two threads; they take turns, and the speed-up is the median of the
ratio within a round. The index was tuned by `publish`; the queries here are others than those it
was tuned with. Other libraries search the same vectors at the same recall.

The service (`network`): `twotower serve` in a process of its own on the same machine, asked through
loopback by clients in this process; both sides, client and service, are paid for by the same cores
that the SavedModel in process has to itself. See `benchmarks.service`. `workers`: two processes of
it against one, and their memory with a larger corpus, searched exactly.

The corpus is synthetic, in clusters; with `--bundle`, the bundle of a trained model is measured
as well, and it is the one that is reloaded under load. With `--only`, the figures of the other part
stay in FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks.ann_opponents import opponents
from benchmarks.record import command, processor, write
from benchmarks.service import (
    NAME,
    RELOADS,
    network,
    synthetic_bundle,
    two_workers,
    worker_memory,
)
from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle
from serving.publish.measuring import BATCH, Judge, Search
from serving.publish.publish import publish
from serving.retrieval.retriever import Retriever
from serving.version.versions import ANN_REPORT

THREADS = 2
CORPUS, QUICK_CORPUS, DIMENSIONS = 1_000_000, 100_000, 64
IN_CLUSTER = 1000  # candidates, on average
SPREAD = 1.0  # standard deviation within a cluster; that of the centres is 1
TARGET_RECALL, K = 0.95, 100
QUERIES, ROUNDS = 1024, 5
PARTS = ["ann", "network", "workers"]
MEMORY_CORPUS = 4_000_000  # candidates of the workers whose memory is compared
HEADLINE = (
    "grpc_fraction",
    "rest_fraction",
    "grpc_cpu_ms",
    "rest_cpu_ms",
    "added_ms_median",
    "added_ms_p99",
    "failed_during_reload",
    "p99_ratio_during_reload",
)


def main() -> None:
    """Parses, measures, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--bundle", help="of a trained model, measured beside the synthetic one")
    parser.add_argument("--quick", action="store_true", help="a tenth of the corpus, less time")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="only these parts")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)
    with tempfile.TemporaryDirectory() as directory:
        results = synthetic(Path(directory), options.only, options.quick, bool(options.bundle))
    if options.bundle:
        with tempfile.TemporaryDirectory() as directory:
            found = trained(Path(options.bundle), Path(directory), options.only, options.quick)
        for name in ("failed_during_reload", "p99_ratio_during_reload"):
            if name in found:
                results[name] = found[name]
        results["trained"] = found
    results["commands"] = dict.fromkeys(options.only, command("serving"))
    results["software"] = {"tensorflow": tf.__version__, "cores": os.cpu_count()}
    results["processor"] = processor()
    if options.json:
        results = _merged(Path(options.json), results)
        write(options.json, results)
    print(json.dumps(results, indent=2))


def _merged(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command wrote of the other parts, and these."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    for name in ("commands", "trained"):
        results[name] = before.get(name, {}) | results.get(name, {})
    return before | results


def synthetic(directory: Path, parts: list[str], quick: bool, is_reloaded: bool) -> dict[str, Any]:
    """All figures of a corpus in clusters; without the reload where another model has it."""
    vectors, queries = clustered(QUICK_CORPUS if quick else CORPUS)
    others, mine = queries[:QUERIES], queries[QUERIES:]
    bundle = synthetic_bundle(directory, vectors, mine)
    models = directory / "models"
    results: dict[str, Any] = {}
    published = _publish(bundle, models)
    if "ann" in parts:
        figures, judge = compare_indexes(models, others)
        figures |= published | opponents(vectors, K, judge, TARGET_RECALL, THREADS)
        results = {
            "scann_speedup": figures.pop("speedup"),
            "scann_recall": figures.pop("recall"),
            "ann": {"candidates": len(vectors), "dimensions": DIMENSIONS, "k": K, **figures},
        }
    if "network" in parts:
        ids = read_bundle(bundle).query_ids(1 << 62)
        found = network(models, ids, quick, 0 if is_reloaded else RELOADS)
        results |= {name: found.pop(name) for name in HEADLINE if name in found}
        results["network"] = found
    if "workers" in parts:
        ids = read_bundle(bundle).query_ids(1 << 62)
        found = two_workers(models, ids, quick)
        shutil.rmtree(models)
        size = QUICK_CORPUS if quick else MEMORY_CORPUS
        large = synthetic_bundle(directory / "large", clustered(size)[0], mine)
        publish(large, models, name=NAME, k=K, scann=False)
        shutil.rmtree(directory / "large")
        results["workers"] = found | {"memory": {"candidates": size} | worker_memory(models, ids)}
    return results


def trained(bundle: Path, models: Path, parts: list[str], quick: bool) -> dict[str, Any]:
    """The same of a bundle with a query model, asked with queries of its own."""
    ids = read_bundle(bundle).query_ids(1 << 62)
    results = _publish(bundle, models)
    if "ann" in parts:
        chosen = np.random.default_rng(1).choice(len(ids), min(QUERIES, len(ids)), replace=False)
        model = tf.saved_model.load(str(bundle / schema.BUNDLE_QUERY_MODEL))
        asked = tf.constant([ids[place] for place in chosen])
        queries = model.signatures["serving_default"](query_id=asked)["embedding"].numpy()
        results |= compare_indexes(models, queries)[0]
    if "network" in parts:
        results |= network(models, ids, quick)
    return results


def clustered(num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [N, 64] and queries [2 · 1024, 64] around the same centres, seeded."""
    rng = np.random.default_rng(0)
    num_clusters = num_candidates // IN_CLUSTER
    centres = rng.normal(size=(num_clusters, DIMENSIONS)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        around = centres[rng.integers(0, num_clusters, count)]
        return around + np.float32(SPREAD) * rng.standard_normal(around.shape, np.float32)

    return draw(num_candidates), draw(2 * QUERIES)


def _publish(bundle: Path, models: Path) -> dict[str, Any]:
    """Publishes a bundle; what its report says of the index."""
    start = time.perf_counter()
    version = publish(bundle, models, name=NAME, k=K, target_recall=TARGET_RECALL)
    seconds = time.perf_counter() - start
    report = json.loads((version / ANN_REPORT).read_text())
    chosen = ("num_leaves", "leaves_to_search", "num_reordered", "build_seconds")
    return {
        "publish_seconds": round(seconds, 1),
        "default_index": report["default_index"],
        "recall_reported": report["scann"]["recall"],
        **{name: report["scann"][name] for name in chosen},
    }


def compare_indexes(models: Path, queries: np.ndarray) -> tuple[dict[str, Any], Judge]:
    """Times both indexes of a version, in milliseconds a batch of 64.

    Returns:
      speedup: queries a second of ScaNN by those of exact search in TensorFlow.
      recall: recall@100 of ScaNN on these queries.
      ... and who knows the exact results.
    """
    retriever = Retriever.load(models, name=NAME)
    exact, scann = _searching(retriever, "exact"), _searching(retriever, "scann")
    judge = Judge(queries, exact, K)
    rounds = [(judge.measure(exact), judge.measure(scann)) for _ in range(ROUNDS)]
    retriever.close()
    exact_ms, scann_ms = (
        statistics.median(pair[side].batch_ms for pair in rounds) for side in (0, 1)
    )
    return {
        "speedup": round(statistics.median(e.batch_ms / s.batch_ms for e, s in rounds), 2),
        "recall": round(rounds[0][1].recall, 4),
        "exact_batch_ms": round(exact_ms, 3),
        "scann_batch_ms": round(scann_ms, 3),
        "scann_queries_per_second": round(1000 * BATCH / scann_ms),
    }, judge


def _searching(retriever: Retriever, index: str) -> Search:
    """The signature `embedding_search` of a version, as the judge calls it."""
    signature = retriever.version.load(index).signatures["embedding_search"]
    tuned = {"leaves_to_search": tf.constant(0)} if index == "scann" else {}

    def search(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = signature(embedding=batch, **tuned)
        return outputs["candidate_row"], outputs["score"]

    return search


if __name__ == "__main__":
    main()
