"""`twotower evaluate`: ranks the whole corpus for every query of a held-out split."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from pipeline.contract.files import checksum
from pipeline.contract.settings import require_in_corpus
from towers.data.interactions import RetrievalData, open_data
from towers.evaluation.breakdown import breakdown
from towers.evaluation.examples import examples
from towers.evaluation.hits_by_query import HitsByQuery
from towers.evaluation.settings import EvaluateConfig
from towers.metrics.definitions import METRICS, cut_offs
from towers.metrics.held_out import HeldOut, Means
from towers.model.top_k import candidate_titles, vectors
from towers.model.two_tower import TwoTower
from towers.report.pages import write_report
from towers.training.run_directory import BREAKDOWN, TRAINING, open_run, read_json, write_json
from towers.training.run_directory import METRICS as METRICS_FILE

_MAX_CODES = 1 << 19  # of live histories that are embedded at a time


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a trained run, and the ranking by popularity beside it, on a held-out split.

    Writes metrics.json, breakdown.json, hits_by_query.parquet and report.html into the run
    directory and prints the metrics as a table. A candidate that the query chose in train (before
    test: or in validation) is not ranked.

    Returns:
      {split: metrics, "popularity": metrics, "confidence_95": half-widths, "users": number of
      queries, "seconds": {...}, ...}; metrics have keys such as "recall@50". With `history` live
      also "by_row": see `measure_live`.

    Raises:
      ValueError: the run or the split is missing; live: times are, or a tower that reads histories.
    """
    run, data = Path(config.run), open_data(config.data)
    held_out = HeldOut(data, config.split)
    require_in_corpus(config, "ks", data.num_candidates)
    titles = candidate_titles(data, config.title_column)
    model, training = open_run(run, data)
    if training.refit:
        raise ValueError(
            f"{run} was trained on the rows of all splits, so nothing is held out: evaluate "
            f"{training.refit}."
        )
    by_row: dict[str, Any] = {}
    if config.history == "live":
        by_row = measure_live(model, HeldOut(data, config.split, history="live"), config)
    started = time.monotonic()
    embeddings = model.query_embeddings(), partial(vectors, model, "candidate")
    ranking = held_out.rank(*embeddings, max(config.ks))
    means = held_out.means(ranking, config.ks)
    measured = time.monotonic()
    by_popularity = held_out.rank_by_popularity(max(config.ks))
    popularity = held_out.means(by_popularity, config.ks)
    progress = read_json(run / TRAINING)
    result = {
        config.split: means[0],
        "popularity": popularity[0],
        "confidence_95": means[1],
        "users": len(held_out.query_ids),
        "split": config.split,
        "method": training.method,
        "dim": training.dim,
        "weights": progress["weights"],
        "steps": progress["steps"],
        "seconds": {
            "train": progress["seconds"],
            "evaluate": round(measured - started, 3),
            "popularity": round(time.monotonic() - measured, 3),
        },
    }
    if by_row:
        result["by_row"] = by_row
    rankings = {"model": ranking, "popularity": by_popularity}
    groups = breakdown(held_out, rankings, max(config.ks))
    groups["examples"] = examples(data, config.split, held_out, ranking, titles)
    write_json(run / BREAKDOWN, groups)
    HitsByQuery(
        fingerprints=data.query_vocabulary.fingerprints[held_out.query_ids],
        train_rows=held_out.train_rows,
        num_positives=held_out.num_positives,
        hits=ranking.hits,
        split=config.split,
        ks=config.ks,
        data_fingerprint=data.fingerprint,
        training=checksum(run / TRAINING),
    ).write(run)
    write_json(run / METRICS_FILE, result)
    about = f"{config.split} split, all candidates ranked; ± is a 95 % confidence interval"
    print(format_table(about, {training.method: means, "popularity": popularity}, config.ks))
    key = f"ndcg@{max(config.ks)}"
    if means[0][key] - means[1][key] <= popularity[0][key]:
        new, users = int((held_out.train_rows == 0).sum()), len(held_out.query_ids)
        where = f'see "No better than popularity" in docs/evaluate.md ({new} of {users}'
        print(f"{key} is not clearly above popularity: {where} users have no train rows)")
    by_rows = {"rows": by_row, "rows of users without train rows": by_row.get("unseen")}
    for name, group in by_rows.items():
        if group:
            about = f"\neach of {group['rows']:,} {name} by itself, from the live or stale history"
            names = ("live", "stale", "popularity")
            rows = {name: (group[name]["means"], group[name]["confidence_95"]) for name in names}
            print(format_table(about, rows, config.ks))
    print(f"report: {write_report(run, config.data)}")
    return result


def evaluate(
    model: TwoTower, data: RetrievalData, *, split: str = "test", ks: Sequence[int] = (10, 20, 50)
) -> pd.DataFrame:
    """Ranks the whole corpus for every query of a held-out split, and by popularity beside it.

    >>> import pandas as pd, towers
    >>> log = pd.DataFrame({"user": [*"aabb"], "item": ["tea", "milk", "tea", "rye"]})
    >>> data = towers.from_dataframe(log, user="user", item="item", train_ratio=0.5)
    >>> float(evaluate(TwoTower(data, dim=4), data, ks=(2,)).loc["recall@2", "model"])
    1.0

    Args:
      model: trained on `data`, or loaded.
      data: with the rows of the split.
      split: test or validation; what a query chose in the splits before is not ranked.
      ks: cut-offs.

    Returns:
      A row a metric and cut-off, such as recall@10: the mean over queries of `model` and of
      `popularity`, and `model_ci95` and `popularity_ci95`, the half-widths of their 95 %
      confidence intervals.

    Raises:
      ValueError: the data are not those of the model, or have no rows in the split.
    """
    if model.data.fingerprint != data.fingerprint:
        raise ValueError(
            "the model was trained on other data: evaluate it with the data that it was made of."
        )
    held_out = HeldOut(data, split)
    embeddings = model.query_embeddings(), partial(vectors, model, "candidate")
    ks = cut_offs(ks)
    columns = *held_out.measure(*embeddings, ks), *held_out.measure_popularity(ks)
    names = "model", "model_ci95", "popularity", "popularity_ci95"
    return pd.DataFrame(dict(zip(names, columns, strict=True)))


def measure_live(model: TwoTower, held_out: HeldOut, config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a live `HeldOut` with the live and the stale history, and by popularity.

    Both histories, and popularity, are measured on the same rows, of which the same is not ranked.

    Returns:
      {"rows", "users": numbers of rows and of their queries; "live", "stale" and "popularity":
      {"means": metrics, "confidence_95": half-widths}}, and the same as "unseen" for the rows of
      queries without train rows that have something before them, where there are any.
    """
    candidates, depth = partial(vectors, model, "candidate"), max(config.ks)
    embeddings = {
        "live": live_embeddings(model, held_out),
        "stale": tf.gather(model.query_embeddings(), held_out.query_ids),
    }
    rankings = {
        name: held_out.rank(queries, candidates, depth) for name, queries in embeddings.items()
    } | {"popularity": held_out.rank_by_popularity(depth)}
    assert held_out.before is not None, "a live HeldOut"
    all_rows = np.ones(len(held_out.query_ids), bool)
    unseen = (held_out.train_rows == 0) & (held_out.before.sizes > 0)

    def figures(rows: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = {
            "rows": int(rows.sum()),
            "users": len(np.unique(held_out.query_ids[rows])),
        }
        for name, ranking in rankings.items():
            means = held_out.means(ranking, config.ks, rows)
            result[name] = dict(zip(("means", "confidence_95"), means, strict=True))
        return result

    return figures(all_rows) | ({"unseen": figures(unseen)} if unseen.any() else {})


def live_embeddings(model: TwoTower, held_out: HeldOut) -> np.ndarray:
    """The query of each row with the history before it, over the temperature: float32 [R, D]."""
    tower, before = model.query_tower, held_out.before
    assert before is not None, "a live HeldOut"
    if not tower.reads_history:
        raise ValueError(
            "history live is for towers that read a history: features with history among "
            "query_inputs, fism or svdpp."
        )
    embeddings = np.empty((len(before.sizes), tower.dim), np.float32)
    order = np.argsort(before.sizes, kind="stable")
    stop = len(order)
    while stop:  # blocks of about the same length, the longest first
        longest = max(int(before.sizes[order[stop - 1]]), 1)
        block = order[max(0, stop - max(1, _MAX_CODES // longest)) : stop]
        codes = tf.constant(before.codes(block), tf.int64)
        embedded = tower.embed_history(tf.constant(held_out.query_ids[block]), codes)
        embeddings[block] = tf.cast(embedded / model.temperature, tf.float32)
        stop -= len(block)
    return embeddings


def format_table(about: str, rankings: dict[str, Means], ks: Sequence[int]) -> str:
    """The metrics of some rankings as plain text: a block a metric, a column a cut-off."""
    cells = {
        (metric, name): [
            f"{means[f'{metric}@{k}']:.4f} ± {half_widths[f'{metric}@{k}']:.4f}" for k in ks
        ]
        for metric in METRICS
        for name, (means, half_widths) in rankings.items()
    }
    table = pd.DataFrame(cells, index=[f"@{k}" for k in ks]).T
    return f"{about}\n{table.to_string()}"
