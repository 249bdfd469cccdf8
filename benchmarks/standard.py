"""Ours and baselines of other libraries on the standard split of Gowalla, tuned with one budget.

    python -m benchmarks.standard --tune ROW ... --data DIR --work DIR [--dataset tafeng]
    python -m benchmarks.standard --test ROW ... --data DIR --work DIR [--seeds 10 11 12]
    python -m benchmarks.standard --check ROW --data DIR --work DIR
    python -m benchmarks.standard --render

DIR of --data holds gowalla_lightgcn/train.parquet and test.parquet of LightGCN's split, with
user_id and item_id in the order of the published files, and tafeng/interactions.parquet. Test is
nearest to the last train rows of a user in the first, as in a split by time: what is set aside for
choosing is therefore the last fifth of each user's train rows, as test is the last fifth of all of
them, in a directory of its own that holds no test rows. Of Ta-Feng the last fifth by time is test,
and an eighth of the rest, by time, is set aside.

--tune gives a row its TRIALS trials, by Recall@20 on what was set aside; a row with one setting has
ONE_SETTING, a row without any has one. A killed command goes on. --test trains the best trial of a
finished search once more, on all train rows, and measures it on test; every such measurement is
added to `standard_test.json`.
--check does the same for a row that is kept, and fails where a metric leaves its interval.

Baselines need `pip install "irspack>=0.5.2,<0.6" "fastprogress<1.1"` (MIT, Apache).
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import tensorflow as tf

from benchmarks.paper_tables import RESULTS, CpuClock, commit, rows_of
from benchmarks.record import command, processor, write
from benchmarks.standard_rows import ROWS, Baseline, Ours, Scores
from pipeline.contract import schema
from towers.data.interactions import RetrievalData, open_data
from towers.metrics.definitions import half_width, mean_metrics
from towers.metrics.held_out import HeldOut, Ranking
from towers.metrics.ranking import find_hits, tie_order

TRIALS, ONE_SETTING, K, METRIC = 12, 6, 20, "recall@20"
DATASETS = "gowalla", "tafeng"
HEAD = 0.05  # share of the items, those with most train rows, that are the head
_NAMES = "_trials", "", "_test", "_tried"
SEARCHES, KEPT, TESTS, TRIED = (RESULTS / f"standard{name}.json" for name in _NAMES)


def main() -> None:
    """Parses, then tunes, tests, checks or renders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tune", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    what.add_argument("--test", nargs="+", choices=ROWS, metavar="ROW", help="after --tune")
    what.add_argument("--check", choices=ROWS, metavar="ROW", help="a row to be trained again")
    what.add_argument("--render", action="store_true", help="write the page and end")
    parser.add_argument("--seeds", nargs="*", type=int, default=[10, 11, 12])
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0])
    parser.add_argument("--data", help="directory of the data sets")
    parser.add_argument("--work", help="directory of prepared data and runs")
    options = parser.parse_args()
    if options.render:
        from benchmarks.standard_page import render

        render(rows_of(KEPT), rows_of(SEARCHES), rows_of(TRIED))
        return
    if not (options.data and options.work):
        parser.error("--data and --work must be given, or --render.")
    options.commit = commit()  # now: the checkout may move on while a run lasts
    for name in options.tune or ():
        tune(options, name)
    try:
        for name in options.test or ():
            for seed in options.seeds if is_seeded(name) else options.seeds[:1]:
                test(options, name, seed)
        if options.check:
            sys.exit(0 if check(options) else 1)
    except LookupError as error:
        parser.error(str(error.args[0]))


def budget(row: Ours | Baseline) -> int:
    """How many trials a row has."""
    return {0: 1, 1: ONE_SETTING}.get(len(row.space), TRIALS)


def is_seeded(name: str) -> bool:
    """Whether a row differs between seeds."""
    row = ROWS[name]
    return isinstance(row, Ours) or row.seeded


def prepared(options: argparse.Namespace, split: str) -> str:
    """The prepared data to choose on, with validation and without test, or to test on."""
    from pipeline.job import prepare
    from pipeline.prepare.settings import PrepareConfig

    source = Path(options.data) / "gowalla_lightgcn"
    output = Path(options.work) / "data" / options.dataset / split
    if (output / schema.MANIFEST).is_file():
        return str(output)
    if options.dataset == "tafeng":
        ratio = 0.125 if split == "validation" else 0.0  # of the first four fifths
        log = str(Path(options.data) / "tafeng" / "interactions.parquet")
        by_time = {"split": "global_time", "test_from": "2001-02-05"}
        prepare(
            PrepareConfig(source=log, output=str(output), validation_ratio=ratio, **by_time), []
        )
        return str(output)
    if split == "validation":
        train = pq.read_table(source / "train.parquet")
        last = last_fifth(train["user_id"].to_numpy())
        source = Path(options.work) / "source"
        source.mkdir(parents=True, exist_ok=True)
        parts = train.filter(pa.array(~last)), train.filter(pa.array(last)), train.slice(0, 0)
        for part, rows in zip(schema.SPLITS, parts, strict=True):
            pq.write_table(rows, source / f"{part}.parquet")
    shared = {"split": "given", "allow_empty_files": True}
    prepare(PrepareConfig(source=str(source), output=str(output), **shared), [])
    return str(output)


def last_fifth(users: np.ndarray) -> np.ndarray:
    """Of the rows of each user in their order, the last fifth, rounded, at least one: bool [n]."""
    codes = np.unique(users, return_inverse=True)[1]
    sizes = np.bincount(codes)
    by_user = np.argsort(codes, kind="stable")
    place = np.empty(len(codes), np.int64)
    place[by_user] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place >= (sizes - np.maximum(1, np.round(0.2 * sizes)))[codes]


def tune(options: argparse.Namespace, name: str) -> None:
    """Spends the trials of a row and writes what they gave."""
    row, data = ROWS[name], prepared(options, "validation")
    place = Path(options.work) / "studies" / options.dataset / name
    trials = tune_ours(row, data, place) if isinstance(row, Ours) else tune_other(row, data, place)
    about = {"row": name, "dataset": options.dataset, "metric": METRIC}
    about |= {"commit": options.commit, "processor": processor()}
    about |= {"date": datetime.date.today().isoformat(), "command": command("standard")}
    kept = [study for study in rows_of(SEARCHES) if key_of(study) != key_of(about)]
    write(SEARCHES, [*kept, about | {"trials": trials}])


def tune_ours(row: Ours, data: str, place: Path) -> list[dict[str, Any]]:
    """The trials of `twotower tune`."""
    from towers.tune.settings import TuneConfig
    from towers.tune.study import tune as search

    kept = (place.parent / row.teacher / "trials").glob("*") if row.teacher else ()
    taught = learned_from(row, next(iter(kept), place))  # of a search the best run alone is kept
    config = TuneConfig(
        data=data,
        output=str(place),
        trials=budget(row),
        epochs=row.epochs,
        metric=METRIC,
        space=list(row.space),
        **row.settings,
        **taught,
    )
    names = ("number", "state", "value", "params", "seconds", "values")
    return [{key: trial.get(key) for key in names} for trial in search(config)["trials"]]


def learned_from(row: Ours, run: Path) -> dict[str, str]:
    """The settings by which a row learns from a run of its teacher; a LookupError without one."""
    if not row.teacher:
        return {}
    if not (run / "training.json").is_file():
        raise LookupError(f"{run} holds no run of {row.teacher}: --tune and --test that row first.")
    return {"teacher": str(run), "init_from": str(run)}


def tune_other(row: Baseline, data: str, place: Path) -> list[dict[str, Any]]:
    """The same search for a baseline; a trial that was killed is made again."""
    import optuna

    from towers.tune.space import parse

    place.mkdir(parents=True, exist_ok=True)
    kinds = {"feature_weighting": "str"}
    knobs = [
        parse(key, text, kinds.get(key, "float" if "." in text or key == "reg" else "int"))
        for key, text in row.space.items()
    ]
    study = optuna.create_study(
        storage=f"sqlite:///{(place / 'study.sqlite3').absolute()}",
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
    )
    rows = open_data(data)
    done = (optuna.trial.TrialState.COMPLETE,)
    while (finished := len(study.get_trials(False, done))) < budget(row):
        study.sampler = optuna.samplers.TPESampler(seed=10_000 + finished, n_startup_trials=5)
        trial, started = study.ask(), time.process_time()
        params = {knob.name: knob.suggest(trial) for knob in knobs}
        ranking, held_out = rank(row.fit(matrix(rows), 10, **params), rows, "validation")
        trial.set_user_attr("seconds", round(time.process_time() - started, 1))
        study.tell(trial, held_out.means(ranking, (K,))[0][METRIC])
    return [
        {"number": trial.number, "state": "complete", "value": trial.value, "params": trial.params}
        | {"seconds": trial.user_attrs["seconds"]}
        for trial in study.get_trials(False, done)
    ]


def matrix(data: RetrievalData) -> sp.csr_matrix:
    """The train rows: float32 [Q, N] of ones; the items stand in the order in which ties rank."""
    rows, order = data.arrays("train"), tie_order(data.candidate_vocabulary.fingerprints)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    pairs = np.asarray(rows[schema.QUERY_ID]), places[np.asarray(rows[schema.CANDIDATE_ID])]
    ones = np.ones(len(pairs[0]), np.float32)
    return sp.csr_matrix((ones, pairs), shape=(data.num_queries, data.num_candidates))


def rank(scores: Scores, data: RetrievalData, split: str) -> tuple[Ranking, HeldOut]:
    """The top K by scores of items in the order of `matrix`, without what a query chose before."""
    held_out, order = HeldOut(data, split), tie_order(data.candidate_vocabulary.fingerprints)
    known, blocks = matrix(data), []
    for start in range(0, len(held_out.query_ids), 2048):
        queries = held_out.query_ids[start : start + 2048]
        block = np.array(scores(queries), np.float32)
        block[known[queries].nonzero()] = -np.inf
        top = tf.math.top_k(block, K)
        blocks.append(np.where(np.isneginf(top.values), -1, order[top.indices]))
    ranked = np.concatenate(blocks)
    hits = find_hits(ranked, held_out.query_ids, data.positives(split))
    return Ranking(ranked, hits), held_out


def key_of(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """What tells the rows of a file of results apart, in the order of the page."""
    places = DATASETS.index(row["dataset"]), list(ROWS).index(row["row"])
    return *places, row.get("seed", 0)


def best_of(dataset: str, name: str) -> dict[str, Any]:
    """The best trial of a finished search; a LookupError without one."""
    wanted = {"dataset": dataset, "row": name}
    studies = [study for study in rows_of(SEARCHES) if key_of(study) == key_of(wanted)]
    trials = studies[0]["trials"] if studies else []
    if len(trials) < (needed := budget(ROWS[name])):
        raise LookupError(f"--test {name} needs its {needed} trials, got {len(trials)}: --tune it.")
    complete = [trial for trial in trials if trial["state"] == "complete"]
    return max(complete, key=lambda trial: trial["value"])


def test(options: argparse.Namespace, name: str, seed: int) -> None:
    """Trains a row as its search chose, measures it on test once, and keeps it."""
    row = measured(
        options, name, seed, Path(options.work) / "runs" / f"{options.dataset}-{name}-{seed}"
    )
    kept = [other for other in rows_of(KEPT) if key_of(other) != key_of(row)]
    write(KEPT, sorted([*kept, row], key=key_of))


def measured(options: argparse.Namespace, name: str, seed: int, place: Path) -> dict[str, Any]:
    """A row on test, logged, with what it was trained by."""
    trial, row = best_of(options.dataset, name), ROWS[name]
    path = prepared(options, "test")
    data, epochs = open_data(path), 0
    if isinstance(row, Ours):
        epochs = 1 + int(np.argmax(trial["values"]))
        teacher = Path(options.work) / "runs" / f"{options.dataset}-{row.teacher}-{seed}"
        params = trial["params"] | learned_from(row, teacher)
        ranking, held_out, seconds = rank_ours(row, params, epochs, seed, path, place)
        if row.teacher:
            of = key_of({"dataset": options.dataset, "row": row.teacher, "seed": seed})
            seconds += sum(r["cpu_seconds"] for r in rows_of(KEPT) if key_of(r) == of)
    else:
        started = time.process_time()
        scores = row.fit(matrix(data), seed, **trial["params"])
        seconds = time.process_time() - started
        ranking, held_out = rank(scores, data, "test")
    means, widths = mean_metrics(ranking.hits, held_out.num_positives, (K,))
    further, further_widths = beyond(ranking.candidates, ranking.hits, held_out, data)
    shown = (METRIC, f"ndcg@{K}")
    about = {"row": name, "dataset": options.dataset, "seed": seed, "commit": options.commit}
    about |= {"date": datetime.date.today().isoformat()}
    metrics = {key: round(means[key], 5) for key in shown} | further
    write(TESTS, [*rows_of(TESTS), about | {"metrics": metrics}])
    return about | {
        "params": trial["params"],
        "epochs": epochs,
        "validation": round(trial["value"], 5),
        "metrics": metrics,
        "confidence_95": {key: round(widths[key], 5) for key in shown} | further_widths,
        "cpu_seconds": round(seconds, 1),
        "processor": processor(),
        "command": command("standard"),
    }


def rank_ours(
    row: Ours, params: Mapping[str, Any], epochs: int, seed: int, data: str, place: Path
) -> tuple[Ranking, HeldOut, float]:
    """The top K of a run of `twotower train` and its CPU seconds."""
    from towers.training.run_directory import open_run
    from towers.training.settings import TrainConfig
    from towers.training.train import train

    options = {k[7:]: v for k, v in params.items() if k.startswith("method.")}
    settings = {k: v for k, v in params.items() if not k.startswith("method.")}
    settings = {**row.settings, **settings, "patience": 0}
    settings |= {"epochs": epochs, "seed": seed, "options": settings.get("options", {}) | options}
    clock = CpuClock(place)
    train(TrainConfig(data=data, run=str(place), **settings), [clock.callback()])
    rows = open_data(data)
    model, _ = open_run(place, rows)
    held_out = HeldOut(rows, "test")
    embeddings = model.query_embeddings(), model.candidate_embeddings()
    return held_out.rank(*embeddings, K), held_out, clock.seconds()


def beyond(
    ranked: np.ndarray, hits: np.ndarray, held_out: HeldOut, data: RetrievalData
) -> tuple[dict[str, float], dict[str, float]]:
    """Whom else a ranking serves: means, and 95 % half-widths where users are averaged.

    coverage: share of the corpus that is in some top K. novelty: mean over the top K of -log2 of
    the share of the users who chose the item in train (Vargas and Castells, RecSys 2011). gini: of
    how often items are in a top K, 0 where all are equally often, 1 for one item alone. head and
    tail: recall@K of items of the head, the HEAD of the items with most train rows, and of the
    rest; a mean over users with such items in test.
    """
    counts = np.bincount(ranked[ranked >= 0], minlength=data.num_candidates)
    found = {"coverage": np.count_nonzero(counts) / len(counts), "gini": gini(counts)}
    shares = np.maximum(data.train_counts, 1) / data.num_queries
    novelty = -np.log2(shares[ranked]).mean(axis=1)
    found["novelty"], widths = novelty.mean(), {"novelty": half_width(novelty)}
    head = np.zeros(len(counts) + 1, bool)
    most = np.argsort(-data.train_counts, kind="stable")
    head[most[: math.ceil(HEAD * len(counts))]] = True
    users, items = held_out.pairs
    for name, inside in (("head", head), ("tail", ~head)):
        wanted = np.bincount(users, inside[items], minlength=len(ranked))
        recall = (hits & inside[ranked]).sum(axis=1)[wanted > 0] / wanted[wanted > 0]
        found[name], widths[name] = recall.mean(), half_width(recall)
    return tuple({k: round(float(v), 5) for k, v in part.items()} for part in (found, widths))


def gini(counts: np.ndarray) -> float:
    """Gini's coefficient of counts that are not all 0: Σ (2i - n - 1) c_i / (n Σ c), ascending."""
    ascending, size = np.sort(counts), len(counts)
    return float((2 * np.arange(1, size + 1) - size - 1) @ ascending / (size * ascending.sum()))


def check(options: argparse.Namespace) -> bool:
    """Trains the first seed of a kept row anew; true if its metrics are within the intervals."""
    wanted = {"dataset": options.dataset, "row": options.check}
    kept = [row for row in rows_of(KEPT) if key_of(row)[:2] == key_of(wanted)[:2]]
    if not kept:
        raise LookupError(f"--check {options.check}: {KEPT} has no such row; --test it first.")
    old = kept[0]
    place = Path(options.work) / "checks" / f"{options.check}-{options.commit}"
    new, within = measured(options, options.check, old["seed"], place), True
    for metric, width in old["confidence_95"].items():
        before, now = old["metrics"][metric], new["metrics"][metric]
        inside = abs(now - before) <= width
        within &= inside
        sign = "within" if inside else "OUTSIDE"
        print(f"{metric:12} {now:.5f}, kept {before:.5f} ± {width:.5f}: {sign}")
    return within


if __name__ == "__main__":
    main()
