"""The picture beside `ann_report.json`: recall against queries a second."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from serving.publish.measuring import BATCH

_log = logging.getLogger(__name__)


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
    label = "chosen, on held-out queries"
    axes.scatter(*_points([scann]), marker="*", s=160, color="black", zorder=3, label=label)
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
