"""What it costs to know the query as it is now, and candidates as they come.

    python -m benchmarks.freshness [--quick] [--work DIR] [--only PART ...] [--json FILE]

The corpus is synthetic, its towers are untrained (`benchmarks.live_corpus`): 1 M candidates × 64,
100,000 queries with 20 chosen candidates and 4 columns each. It is published once and stays below
DIR. Every figure with an opponent comes of turns: both sides, one after the other, in one process.

queries: a batch of 64 queries as a request describes them, made into tensors and embedded, against
  the ScaNN search of a batch (`encode_overhead`); one described query through `Retriever` against
  one query id (`one_query_added_ms`); the largest relative distance between an embedding of a
  request and the one that the towers gave before they were exported (`skew`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks.live_corpus import LiveCorpus
from benchmarks.record import command, processor, write
from pipeline.contract import schema
from serving.publish.publish import publish
from serving.retrieval.requests import RetrieveRequest
from serving.retrieval.retriever import Retriever
from serving.version.served_model import EMBEDDING, EMBEDDING_SEARCH, REQUEST_EMBEDDING, SCORE

NAME, BASE = "live", 1  # of the model, and of the version without a delta
BATCH, K, TARGET_RECALL = 64, 100, 0.95
SIZES = {False: (1_000_000, 100_000, 64), True: (50_000, 5_000, 32)}  # quick → N, Q, D
ROUNDS, QUICK_ROUNDS = 200, 50
_WARM_UP, _BATCHES = 5, 16  # rounds that do not count; batches that rounds repeat
_CHECKED = 1_024  # queries whose embeddings are compared


def main() -> None:
    """Parses, measures, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="50,000 × 32, fewer rounds")
    parser.add_argument("--work", help="where the published corpus stays; without it, nowhere")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    corpus = LiveCorpus.of(*SIZES[options.quick])
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    headline: dict[str, Any] = {}
    details: dict[str, Any] = {
        "command": command("freshness"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "candidates": corpus.num_candidates,
        "dimensions": corpus.dim,
    }
    with tempfile.TemporaryDirectory() as aside:
        work = Path(options.work or aside) / f"{corpus.num_candidates}x{corpus.dim}"
        published(corpus, work)
        for name in options.only:
            figures, more = PARTS[name](corpus, work, rounds)
            headline |= figures
            details[name] = more
            print(f"{name}: {figures}", flush=True)
            if options.json:
                write(options.json, headline | details)
    print(json.dumps(headline | details, indent=2))


def published(corpus: LiveCorpus, work: Path) -> None:
    """The version of the corpus, with the embeddings of all queries beside it."""
    if (work / "models" / NAME / str(BASE) / schema.MANIFEST).is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "queries.npy", corpus.write_bundle(work / "bundle"))
    publish(work / "bundle", work / "models", name=NAME, k=K, target_recall=TARGET_RECALL)


def queries(corpus: LiveCorpus, work: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Queries as requests describe them."""
    retriever = Retriever.load(work / "models", NAME, BASE)
    embed = retriever.model("exact").signatures[REQUEST_EMBEDDING]
    search = retriever.model("scann").signatures[EMBEDDING_SEARCH]
    tuned = tf.constant(0)  # leaves to search: the tuned number
    drawn = np.random.default_rng(2).integers(corpus.num_queries, size=(_BATCHES, BATCH))
    batches = [[corpus.query(row) for row in rows] for rows in drawn]
    tensors = [retriever.query_inputs.tensors(batch) for batch in batches]
    vectors = [embed(**batch)[EMBEDDING] for batch in tensors]
    made, graph, search_seconds = in_turns(
        [
            lambda n: embed(**retriever.query_inputs.tensors(batches[n]))[EMBEDDING].numpy(),
            lambda n: embed(**tensors[n])[EMBEDDING].numpy(),
            lambda n: search(embedding=vectors[n], leaves_to_search=tuned)[SCORE].numpy(),
        ],
        rounds,
    )
    described = [RetrieveRequest(queries=[query], k=10) for batch in batches for query in batch]
    by_id = [RetrieveRequest([corpus.query_ids[row]], k=10) for row in drawn.ravel()]
    one, one_by_id = in_turns(
        [lambda n: retriever.answer(described[n]), lambda n: retriever.answer(by_id[n])],
        rounds * 2,
    )
    headline = {
        "encode_overhead": _ratio(made, search_seconds),
        "one_query_added_ms": round(_ms(one) - _ms(one_by_id), 3),
        "skew": skew(corpus, work, retriever),
    }
    retriever.close()
    return headline, {
        "encode_batch_ms": _ms(made),
        "encode_graph_batch_ms": _ms(graph),
        "scann_batch_ms": _ms(search_seconds),
        "one_described_ms": _ms(one),
        "one_by_id_ms": _ms(one_by_id),
        "rounds": rounds,
    }


def skew(corpus: LiveCorpus, work: Path, retriever: Retriever) -> float:
    """The largest relative distance of embeddings of requests from those of the towers."""
    rows = np.random.default_rng(3).integers(corpus.num_queries, size=_CHECKED)
    requests = [{"query_id": f"query {row}"} | corpus.query(row) for row in rows]
    embed = retriever.model("exact").signatures[REQUEST_EMBEDDING]
    got = embed(**retriever.query_inputs.tensors(requests))[EMBEDDING].numpy()
    expected = np.load(work / "queries.npy", mmap_mode="r")[rows]
    distances = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(distances.max())


def in_turns(calls: Sequence[Callable[[int], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call by round; they take turns, and all get the number of the round.

    The first rounds do not count.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + _WARM_UP):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call(turn % _BATCHES)
            times.append(time.perf_counter() - start)
    return [times[_WARM_UP:] for times in seconds]


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


def _ms(seconds: Sequence[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


PARTS = {"queries": queries}

if __name__ == "__main__":
    main()
