"""Feature towers against ids alone on Ta-Feng, for warm and cold items, split by time.

    python -m benchmarks.features [--quick] --data DIR --json FILE

DIR holds interactions.parquet, users.parquet and items.parquet. Of the distinct pairs in the
order of time the first 70 % are train, the next 10 % validation, the rest test; times are days,
and a day is not cut. Cold are items without train rows: those that are new (few in this data),
and a share of all items (`--withheld`), chosen by a hash, whose train rows are left out. Every
run stops by recall@50 on validation; the test split is looked at once, at the end. FILE is
written after every run.

Groups of test rows: all; warm and cold items, ranked among the whole corpus; cold items ranked
among the cold ones alone; and rows of users without train rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.record import command, write
from pipeline.contract import hashing, schema
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from towers.data.interactions import Positives, RetrievalData, open_data
from towers.legacy_keras import tf_keras
from towers.metrics.definitions import mean_metrics
from towers.metrics.held_out import FullCorpusMetrics
from towers.metrics.ranking import (
    find_hits,
    rank_by_popularity,
    rank_corpus,
    tie_order,
)
from towers.model.optimizers import CoupledAdam
from towers.model.two_tower import TwoTower

KS = (10, 20, 50)
# Temperature, rate and dropout were chosen on validation.
SHARED = {"method": "ssl_pop", "dim": 64, "normalize": True, "temperature": 0.25}
LEARNING_RATE, BATCH = 0.002, 2048
ATTRIBUTED = {"tower": "features", "id_dropout": 0.5}
RUNS: dict[str, dict[str, Any]] = {  # name in the results → what differs
    "ids": {},
    "attributes alone": {
        "tower": "features",
        "query_inputs": ("features",),
        "candidate_inputs": ("features",),
    },
    "ids and attributes": ATTRIBUTED
    | {"query_inputs": ("id", "features"), "candidate_inputs": ("id", "features")},
    "history": {
        "tower": "features",
        "query_inputs": ("history",),
        "candidate_inputs": ("id",),
    },
    "history and attributes": ATTRIBUTED,
    "history by attention and attributes": ATTRIBUTED | {"history_pooling": "attention"},
}


def main() -> None:
    """Parses, then trains and measures every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory of the three Parquet files")
    parser.add_argument("--json", required=True, help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="two epochs of each run")
    parser.add_argument("--runs", nargs="*", choices=RUNS, help="only these")
    parser.add_argument("--withheld", type=float, default=0.05, help="share of items made cold")
    parser.add_argument("--epochs", type=int, default=40, help="at most")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": command("features"),
        "settings": SHARED
        | {"learning_rate": LEARNING_RATE, "batch_size": BATCH}
        | {"epochs": 2 if options.quick else options.epochs},
    }
    with tempfile.TemporaryDirectory() as work:
        data = prepared(Path(options.data), Path(work), options.withheld)
        groups = test_groups(data)
        results["rows"] = {name: len(group["queries"]) for name, group in groups.items()}
        results["chance"] = {name: chance(group) for name, group in groups.items()}
        results["popularity"] = {name: popular(data, group) for name, group in groups.items()}
        results["runs"] = {}
        for name in options.runs or RUNS:
            results["runs"][name] = run(data, groups, RUNS[name], results["settings"]["epochs"])
            write(options.json, results)
            print(f"{name}: {results['runs'][name]['epochs']} epochs", flush=True)
    print(table(results))


def prepared(source: Path, work: Path, withheld: float) -> RetrievalData:
    """Splits by time, leaves out train rows of some items, and prepares."""
    rows = pd.read_parquet(source / "interactions.parquet").sort_values("timestamp", kind="stable")
    rows = rows.drop_duplicates(["user_id", "item_id"])[["user_id", "item_id", "timestamp"]]
    cuts = np.quantile(rows["timestamp"], (0.7, 0.8), method="nearest")
    part = np.searchsorted(cuts, rows["timestamp"], side="right")
    hashes = hashing.row_hash(0, "withheld", rows["item_id"].to_numpy(np.int64))
    left_out = (hashes < np.uint64(withheld * 2**64)) & (part == 0)
    (work / "log").mkdir()
    for code, split in enumerate(schema.SPLITS):
        rows[(part == code) & ~left_out].to_parquet(work / "log" / f"{split}.parquet")
    prepare(
        PrepareConfig(
            source=str(work / "log"),
            output=str(work / "prepared"),
            split="given",
            user_features=str(source / "users.parquet"),
            item_features=str(source / "items.parquet"),
        ),
        [],
    )
    return open_data(work / "prepared")


def test_groups(data: RetrievalData) -> dict[str, dict[str, np.ndarray]]:
    """Rows of the test split by group, and the candidates that are ranked for it."""
    test = data.arrays("test")
    queries, candidates = (np.asarray(test[n]) for n in (schema.QUERY_ID, schema.CANDIDATE_ID))
    cold = data.train_counts == 0
    every, new = np.arange(data.num_candidates), data.positives("train").sizes[queries] == 0
    chosen = {
        "all": (np.full(len(queries), True), every),
        "warm items": (~cold[candidates], every),
        "cold items": (cold[candidates], every),
        "cold items among cold": (cold[candidates], np.flatnonzero(cold)),
        "new users": (new, every),
    }
    return {
        name: {"queries": queries[rows], "candidates": candidates[rows], "corpus": corpus}
        for name, (rows, corpus) in chosen.items()
    }


def run(
    data: RetrievalData,
    groups: dict[str, dict[str, np.ndarray]],
    settings: dict[str, Any],
    epochs: int,
) -> dict[str, Any]:
    """Trains one configuration and measures it on all groups."""
    model = TwoTower(data, **SHARED, **settings)
    model.compile(optimizer=CoupledAdam(LEARNING_RATE))
    stop = tf_keras.callbacks.EarlyStopping(
        "val_recall@50", mode="max", patience=4, restore_best_weights=True
    )
    started = time.monotonic()
    history = model.fit(
        data.train(BATCH),
        epochs=epochs,
        verbose=0,
        callbacks=[FullCorpusMetrics(data, "validation", ks=(50,)), stop],
    ).history["val_recall@50"]
    seconds = round(time.monotonic() - started, 1)
    vectors = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    return {
        "settings": settings,
        "epochs": len(history),
        "best_epoch": int(np.argmax(history)) + 1,
        "validation_recall@50": [round(value, 5) for value in history],
        "seconds": seconds,
        "test": {name: measure(data, group, *vectors) for name, group in groups.items()},
    }


def measure(
    data: RetrievalData, group: dict[str, np.ndarray], queries: np.ndarray, candidates: np.ndarray
) -> dict[str, float]:
    """Metrics of a model on the rows of a group."""
    held_out, known, users, order = _in_corpus(data, group)
    ranked = rank_corpus(queries, candidates[group["corpus"]], users, known, k=max(KS), order=order)
    return _rounded(find_hits(ranked, users, held_out), held_out, users)


def chance(group: dict[str, np.ndarray]) -> dict[str, float]:
    """Recall of a ranking at random, but for the few candidates that a query chose before."""
    size = len(group["corpus"])
    return {f"recall@{k}": round(min(1.0, k / size), 5) for k in KS} | {"corpus": size}


def popular(data: RetrievalData, group: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics of the ranking by train counts."""
    held_out, known, users, order = _in_corpus(data, group)
    counts = data.train_counts[group["corpus"]]
    ranked = rank_by_popularity(counts, users, known, k=max(KS), order=order)
    return _rounded(find_hits(ranked, users, held_out), held_out, users)


def _in_corpus(
    data: RetrievalData, group: dict[str, np.ndarray]
) -> tuple[Positives, Positives, np.ndarray, np.ndarray]:
    """Held out and known positives by place in the corpus of a group; its queries; tie order."""
    corpus = group["corpus"]
    place = np.full(data.num_candidates, -1)
    place[corpus] = np.arange(len(corpus))
    held_out = Positives(group["queries"], place[group["candidates"]], data.num_queries)
    before = data.positives("train", "validation")
    owners = np.repeat(np.arange(data.num_queries), before.sizes)
    inside = place[before.candidate_ids] >= 0
    known = Positives(owners[inside], place[before.candidate_ids[inside]], data.num_queries)
    order = tie_order(data.candidate_vocabulary.fingerprints[corpus])
    return held_out, known, np.flatnonzero(held_out.sizes), order


def _rounded(hits: np.ndarray, held_out: Positives, users: np.ndarray) -> dict[str, float]:
    means, half_widths = mean_metrics(hits, held_out.sizes[users], KS)
    names = [name for name in means if name.split("@")[0] in ("recall", "ndcg")]
    kept = {name: round(means[name], 5) for name in names}
    return kept | {"recall@50 ±": round(half_widths["recall@50"], 5), "users": len(users)}


def table(results: dict[str, Any]) -> str:
    """Recall@50 of every run by group, as plain text."""
    width = max(len(name) for name in [*results["runs"], "popularity"])
    lines = [f"{'recall@50, test':{width}}" + "".join(f"{name:>24}" for name in results["rows"])]
    cells = "".join(f"{group['recall@50']:>15.4f}{'':9}" for group in results["chance"].values())
    lines.append(f"{'chance':{width}}{cells}")
    rows = {name: values["test"] for name, values in results["runs"].items()}
    for name, groups in ({"popularity": results["popularity"]} | rows).items():
        cells = "".join(
            f"{group['recall@50']:>15.4f} ± {group['recall@50 ±']:.4f}" for group in groups.values()
        )
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
