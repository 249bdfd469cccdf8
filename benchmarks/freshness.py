"""What it costs to know the query as it is now, and candidates as they come.

    python -m benchmarks.freshness [--quick] [--work DIR] [--only PART ...] [--json FILE]

The corpus is synthetic, its towers are untrained (`benchmarks.live_corpus`): 1 M candidates × 64,
100,000 queries with 20 chosen candidates and 4 columns each. It is published once and stays below
DIR. Every figure with an opponent comes of turns: both sides, one after the other, in one process.

queries: a batch of 64 queries as a request describes them, made into tensors and embedded, against
  the ScaNN search of a batch (`encode_overhead`); one described query through `Retriever` against
  one query id (`one_query_added_ms`); the largest relative distance between an embedding of a
  request and the one that the towers gave before they were exported (`skew`).
items: `twotower items` adds 1,000 rows of columns beside a running service: seconds from the end of
  its imports to the version (`items_seconds`) and until the service gives one of the rows, which
  looks for versions each second (`found_after_seconds`); what it took to load a version with the
  base of the one before (`reload_ms_with_base`).
delta: batches of 64 query ids through `Retriever` with 1 % and 5 % of the corpus in the delta, half
  of it in place of rows of the base, against those without (`qps_ratio_at_1pct`, `…_5pct`).
where: the same batches with a condition that 10 % and 1 % of the candidates fulfil, against those
  without; the smaller ratio (`filter_qps_ratio`), and the smaller recall of the exact top 10 of
  what fulfils it (`filter_recall`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from benchmarks.live_corpus import LiveCorpus
from benchmarks.live_items import ROWS, publish_under_service
from benchmarks.record import command, processor, write
from pipeline.contract import schema
from serving.publish.items import change_items
from serving.publish.publish import publish
from serving.publish.settings import ItemsConfig
from serving.retrieval.requests import RetrieveRequest
from serving.retrieval.retriever import Retriever
from serving.version.served_model import EMBEDDING, EMBEDDING_SEARCH, REQUEST_EMBEDDING, SCORE

NAME, BASE = "live", 1  # of the model, and of the version without a delta
BATCH, K, TARGET_RECALL = 64, 100, 0.95
SIZES = {False: (1_000_000, 100_000, 64), True: (50_000, 5_000, 32)}  # quick → N, Q, D
ROUNDS, QUICK_ROUNDS = 200, 50
_ROUNDS_A_REPEAT = 40  # so many rounds of a search take as long as a call of `items`
SHARES = (0.01, 0.05)  # of the corpus that lies in a delta
KEPT = (0.1, 0.01)  # of the corpus that a condition keeps
_WARM_UP, _BATCHES = 5, 16  # rounds that do not count; batches that rounds repeat
_RECALL_BATCHES = 4
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
    embed = retriever.index("exact").model.signatures[REQUEST_EMBEDDING]
    search = retriever.index("scann").model.signatures[EMBEDDING_SEARCH]
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


def items(corpus: LiveCorpus, work: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Candidates as they come."""
    repeats = max(1, rounds // _ROUNDS_A_REPEAT)
    with _linked(work) as models:
        figures = publish_under_service(models, NAME, corpus.query_ids, repeats)
    under_load = figures.pop("under_load")
    return figures, {"rows": ROWS, "repeats": repeats, "under_load": under_load}


def delta(corpus: LiveCorpus, work: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Searches of versions with a delta."""
    drawn = np.random.default_rng(5).integers(corpus.num_queries, size=(_BATCHES, BATCH))
    ids = [[f"query {row}" for row in rows] for rows in drawn]
    with _linked(work) as models:
        file, start = models.parent / "added.parquet", 0
        for share in SHARES:
            end = round(share * corpus.num_candidates)
            pq.write_table(_changed_rows(corpus, start, end), file)
            change_items(ItemsConfig(models=str(models), name=NAME, add=str(file)))
            start = end
        versions = [Retriever.load(models, NAME, BASE + n) for n in range(1 + len(SHARES))]
        more: dict[str, Any] = {}
        for k in (10, K):
            seconds = in_turns([partial(_ask, one, ids, k=k) for one in versions], rounds // 2)
            more[f"at_k_{k}"] = {
                "batch_ms": [_ms(times) for times in seconds],
                "qps_ratios": [_ratio(seconds[0], times) for times in seconds[1:]],
            }
        for one in versions:
            one.close()
    names = [f"qps_ratio_at_{100 * share:.0f}pct" for share in SHARES]
    return dict(zip(names, more["at_k_10"]["qps_ratios"], strict=True)), more


def where(corpus: LiveCorpus, work: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Searches among the candidates that fulfil a condition."""
    retriever = Retriever.load(work / "models", NAME, BASE)
    drawn = np.random.default_rng(6).integers(corpus.num_queries, size=(_BATCHES, BATCH))
    ids = [[f"query {row}" for row in rows] for rows in drawn]
    price = corpus.columns["candidate"]["price"]
    limits = [float(np.quantile(price, share)) for share in KEPT]
    filters: list[dict[str, Any]] = [{}, *({"where": {"price": {"max": top}}} for top in limits)]
    seconds = in_turns([partial(_ask, retriever, ids, **one) for one in filters], rounds // 2)
    ratios = [_ratio(seconds[0], times) for times in seconds[1:]]
    recalls = [_recall(work, retriever, drawn, price, top) for top in limits]
    retriever.close()
    return {"filter_qps_ratio": min(ratios), "filter_recall": min(recalls)}, {
        "kept": KEPT,
        "batch_ms": [_ms(times) for times in seconds],
        "qps_ratios": ratios,
        "recalls": recalls,
    }


def _recall(
    work: Path, retriever: Retriever, drawn: np.ndarray, price: np.ndarray, top: float
) -> float:
    """Share of the exact top 10 among the candidates up to a price that a search gives."""
    vectors = np.asarray(retriever.corpus.vectors)[price <= top]
    embeddings = np.load(work / "queries.npy", mmap_mode="r")
    shares = []
    for rows in drawn[:_RECALL_BATCHES]:
        exact = np.partition(embeddings[rows] @ vectors.T, -10, axis=1)[:, -10]
        lowest = exact - 1e-5 * np.abs(exact)
        names = [f"query {row}" for row in rows]
        results = retriever.top_k(names, 10, where={"price": {"max": top}})
        pairs = zip(results, lowest, strict=True)
        shares += [np.count_nonzero(np.array(one.scores) >= low) / 10 for one, low in pairs]
    return round(float(np.mean(shares)), 4)


def _ask(retriever: Retriever, ids: list[list[str]], n: int, **options: Any) -> None:
    retriever.answer(RetrieveRequest(ids[n], **options))


def _changed_rows(corpus: LiveCorpus, start: int, end: int) -> pa.Table:
    """Rows of a delta with embeddings like those of the base; every second replaces one of it."""
    rows = np.arange(start, end)
    names = [f"candidate {row}" if row % 2 else f"new {row}" for row in rows]
    noise = np.random.default_rng(start).standard_normal((len(rows), corpus.dim), np.float32)
    vectors = pa.array(list(corpus.centres(rows) + noise))
    return pa.table({"candidate_id": names, EMBEDDING: vectors})


@contextlib.contextmanager
def _linked(work: Path) -> Iterator[Path]:
    """A directory of models with the base alone, whose files are links."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        models = Path(directory) / "models"
        source = work / "models" / NAME / str(BASE)
        shutil.copytree(source, models / NAME / str(BASE), copy_function=os.link)
        yield models


def skew(corpus: LiveCorpus, work: Path, retriever: Retriever) -> float:
    """The largest relative distance of embeddings of requests from those of the towers."""
    rows = np.random.default_rng(3).integers(corpus.num_queries, size=_CHECKED)
    requests = [{"query_id": f"query {row}"} | corpus.query(row) for row in rows]
    embed = retriever.index("exact").model.signatures[REQUEST_EMBEDDING]
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


PARTS = {"queries": queries, "items": items, "delta": delta, "where": where}

if __name__ == "__main__":
    main()
