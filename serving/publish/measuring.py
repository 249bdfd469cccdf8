"""Recall and time of an index on queries whose exact results are known, and their picture.

Recall at n is the share of the first n results whose score reaches the exact n-th best, so that
it does not matter which of several equal candidates is returned.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

BATCH = 64  # queries in a batch, where milliseconds per batch are reported
_TIMINGS = 9  # at least so many give a median
_SAME_SCORE = 1e-5  # relative; two candidates that close in score are equally right
_log = logging.getLogger(__name__)

Search = Callable[..., tuple[tf.Tensor, tf.Tensor]]


class Measured(NamedTuple):
    """What came out of one setting."""

    recall: float  # mean over the queries
    error: float  # standard error of that mean
    batch_ms: float  # median time of a batch of 64


class Judge:
    """Queries in batches of 64, with the lowest score that belongs into the top of each.

    Args:
      queries: float32 [S, D], S at least 1.
      exact: exact search, [B, D] → rows and scores [B, K].
      at: the rank up to which results count, at most K.
    """

    def __init__(self, queries: np.ndarray, exact: Search, at: int) -> None:
        self.num_queries, self.at = len(queries), at
        whole = -(-len(queries) // BATCH) * BATCH  # the last batch is filled with the first
        filled = np.resize(queries, (whole, queries.shape[1]))
        self._batches = [tf.constant(batch) for batch in np.split(filled, whole // BATCH)]
        last = [exact(batch)[1][:, at - 1 : at].numpy() for batch in self._batches]
        self._lowest = [scores - _SAME_SCORE * np.abs(scores) for scores in last]

    def measure(self, search: Search, *parameters: int, timings: int = _TIMINGS) -> Measured:
        """Recall over all queries, and the median of at least so many timings."""
        inputs = [tf.constant(parameter) for parameter in parameters]
        search(self._batches[0], *inputs)  # what happens once does not count
        shares, times = [], []
        for batch, lowest in zip(self._batches, self._lowest, strict=True):
            start = time.perf_counter()
            rows, scores = search(batch, *inputs)
            best_rows, reached = (part.numpy()[:, : self.at] for part in (rows, scores))
            times.append(time.perf_counter() - start)
            shares.append(((best_rows >= 0) & (reached >= lowest)).mean(axis=1))
        while len(times) < timings:
            times.append(_seconds(search, self._batches[len(times) % len(self._batches)], *inputs))
        share = np.concatenate(shares)[: self.num_queries]
        error = float(share.std() / np.sqrt(len(share)))
        return Measured(float(share.mean()), error, 1000 * statistics.median(times))

    def latency(self, search: Search, *parameters: int) -> dict[str, float]:
        """Median milliseconds of a batch of 64 and of a single query."""
        inputs = [tf.constant(parameter) for parameter in parameters]
        report = {}
        for name, size in (("batch_ms", BATCH), ("single_ms", 1)):
            batches = [batch[:size] for batch in self._batches]
            search(batches[0], *inputs)
            times = [_seconds(search, batches[n % len(batches)], *inputs) for n in range(15)]
            report[name] = round(1000 * statistics.median(times), 4)
        return report


def _seconds(search: Search, batch: tf.Tensor, *inputs: Any) -> float:
    start = time.perf_counter()
    search(batch, *inputs)[1].numpy()
    return time.perf_counter() - start


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the recall-latency curve of a report as PNG; nothing without matplotlib or a tree."""
    scann = report["scann"]
    if scann is None or not scann["num_leaves"]:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("matplotlib cannot be imported: there is no %s.", path.name)
        return
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state
    axes = figure.add_subplot()
    for num_leaves in sorted({setting["num_leaves"] for setting in scann["sweep"]}):
        of_tree = [setting for setting in scann["sweep"] if setting["num_leaves"] == num_leaves]
        label = f"{num_leaves:,} leaves"
        [line] = axes.plot(*_points(best_of(of_tree)), marker="o", markersize=3, label=label)
        axes.scatter(*_points(of_tree), s=5, alpha=0.35, color=line.get_color())
    names = "num_leaves", "leaves_to_search", "num_reordered"
    chosen = [s for s in scann["sweep"] if all(s[name] == scann[name] for name in names)]
    label = f"chosen: recall {scann['recall']:.3f} on held-out queries"
    axes.scatter(*_points(chosen), marker="*", s=160, color="black", zorder=3, label=label)
    [exact] = _points([{"recall": 1.0, **report["exact"]}])[1]
    axes.axhline(exact, color="grey", linestyle=":", label="exact search")
    axes.axvline(report["target_recall"], color="black", linewidth=0.8, label="promise")
    axes.set_yscale("log")
    axes.set_xlabel(f"recall@{report['at']}")
    axes.set_ylabel(f"queries a second, batches of {BATCH}")
    axes.set_title(f"{report['candidates']:,} candidates × {report['dimensions']} dimensions")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def best_of(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other one beats in recall and in time, by ascending recall."""
    best: list[dict[str, Any]] = []
    for setting in sorted(settings, key=lambda setting: (setting["batch_ms"], -setting["recall"])):
        if not best or setting["recall"] > best[-1]["recall"]:
            best.append(setting)
    return best


def _points(settings: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Recalls, and queries a second."""
    recalls = [setting["recall"] for setting in settings]
    return recalls, [1000 * BATCH / setting["batch_ms"] for setting in settings]
