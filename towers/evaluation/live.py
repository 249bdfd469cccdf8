"""Each held-out row predicted from what its query had chosen before it, as a service sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from towers.evaluation.settings import EvaluateConfig
from towers.metrics.held_out import HeldOut
from towers.model.two_tower import TwoTower

_MAX_CODES = 1 << 19  # of histories that are embedded at a time


def measure_live(model: TwoTower, held_out: HeldOut, config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a live `HeldOut` with the live and the stale history, and by popularity.

    Both histories, and popularity, are measured on the same rows, of which the same is not ranked.

    Returns:
      {"rows", "users": numbers of rows and of their queries; "live", "stale" and "popularity":
      {"means": metrics, "confidence_95": half-widths}}, and the same as "unseen" for the rows of
      queries without train rows that have something before them, where there are any.

    Raises:
      ValueError: the tower of queries reads no history.
    """
    candidates, depth = model.candidate_embeddings(), max(config.ks)
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
    """The query of each row with the history before it, over the temperature: float32 [R, D].

    Raises:
      ValueError: the tower of queries reads no history.
    """
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
