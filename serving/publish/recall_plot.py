"""The picture beside `ann_report.json`: recall against queries a second."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from serving.publish.measuring import BATCH

_log = logging.getLogger(__name__)


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the recall-latency curve as PNG; without matplotlib, or a tree to draw it of, nothing.

    Args:
      report: the content of `ann_report.json`.
      path: of the picture.
    """
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
    for num_leaves in sorted({one["num_leaves"] for one in scann["sweep"]}):
        of_tree = [one for one in scann["sweep"] if one["num_leaves"] == num_leaves]
        best = _best_of(of_tree)
        [line] = axes.plot(
            [one["recall"] for one in best],
            [_per_second(one) for one in best],
            marker="o",
            markersize=3,
            label=f"{num_leaves:,} leaves",
        )
        axes.scatter(
            [one["recall"] for one in of_tree],
            [_per_second(one) for one in of_tree],
            s=5,
            alpha=0.35,
            color=line.get_color(),
        )
    axes.scatter(scann["recall"], _per_second(scann), marker="*", s=160, color="black", zorder=3,
                 label="chosen, on held-out queries")  # fmt: skip
    axes.axhline(_per_second(report["exact"]), color="grey", linestyle=":", label="exact search")
    axes.axvline(report["target_recall"], color="black", linewidth=0.8, label="promise")
    axes.set_yscale("log")
    axes.set_xlabel(f"recall@{report['at']}")
    axes.set_ylabel(f"queries a second, batches of {BATCH}")
    axes.set_title(f"{report['candidates']:,} candidates × {report['dimensions']} dimensions")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _best_of(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other one beats in recall and in time, by ascending recall."""
    best: list[dict[str, Any]] = []
    for one in sorted(settings, key=lambda one: (one["batch_ms"], -one["recall"])):
        if not best or one["recall"] > best[-1]["recall"]:
            best.append(one)
    return best


def _per_second(measured: dict[str, Any]) -> float:
    return 1000 * BATCH / measured["batch_ms"]
