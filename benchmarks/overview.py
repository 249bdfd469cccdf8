"""Draws the plot of the README, from what the benchmarks have kept.

    python -m benchmarks.overview

Three panels: how well it ranks (Recall@50 on Gowalla, all with vectors of 32 numbers), how fast
it trains (`benchmarks.training`), and how fast it searches (`benchmarks.serving`).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper_figures import pyplot
from benchmarks.paper_settings import TABLES
from benchmarks.paper_tables import RESULTS, ROOT, results_of, rows_of

PLOT = ROOT / "docs" / "overview.png"
_OURS, _OTHER = "#1f6fb4", "#b9bfc8"


class Panel(NamedTuple):
    """Bars of one quantity."""

    title: str
    note: str
    form: str
    bars: list[tuple[str, float, bool]]  # name, value, whether it is this project


def panels() -> list[Panel]:
    """The panels, with the numbers of `benchmarks/results/`."""
    training = json.loads((RESULTS / "training.json").read_text())["fit_examples_per_second"]
    search = json.loads((RESULTS / "serving.json").read_text())["ann"]
    published = TABLES["bmns", "gowalla"].rows
    per_second = {name: search[name]["queries_per_second"] for name in ("faiss_hnsw", "hnswlib")}
    return [
        Panel(
            "How well it ranks",
            "Recall@50 on Gowalla, 32 numbers a vector",
            ".3f",
            [
                ("popularity", _recall("bmns", "popularity"), False),
                ("SSL-Pop, published", published["ssl_pop"].paper["recall@50"], False),
                ("BMNS, published", published["bmns"].paper["recall@50"], False),
                ("twotower, fism", _recall("beyond", "fism by popularity, d = 32"), True),
                ("twotower, distilled", _recall("beyond", "distilled, d = 32"), True),
            ],
        ),
        Panel(
            "How fast it trains",
            "thousand examples a second on 2 cores",
            ",.0f",
            [
                ("TensorFlow Recommenders", training["stock"] / 1000, False),
                ("twotower", training["ours"] / 1000, True),
            ],
        ),
        Panel(
            "How fast it searches",
            "thousand queries a second on 2 cores,\na million candidates, recall .955 to .960",
            ",.1f",
            [
                ("exact, TensorFlow", 64 / search["exact_batch_ms"], False),
                ("faiss HNSW", per_second["faiss_hnsw"] / 1000, False),
                ("hnswlib", per_second["hnswlib"] / 1000, False),
                ("faiss IVF-PQ", search["faiss_ivf_pq"]["queries_per_second"] / 1000, False),
                ("twotower, ScaNN", search["scann_queries_per_second"] / 1000, True),
            ],
        ),
    ]


def draw(path: Path) -> None:
    """One row of panels, of bars with their values."""
    figure, grid = pyplot().subplots(1, 3, figsize=(12, 2.6), dpi=110)
    for axes, panel in zip(grid, panels(), strict=True):
        names, values, ours = zip(*panel.bars, strict=True)
        bars = axes.barh(names, values, 0.7, color=[_OURS if one else _OTHER for one in ours])
        axes.bar_label(bars, [format(value, panel.form) for value in values], padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(values))
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.set_xticks([])
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", x=-0.02)
        axes.set_xlabel(panel.note, fontsize=8.5, color="#555", loc="right")
    figure.tight_layout(w_pad=2)
    figure.savefig(path, metadata={"Software": None})


def _recall(table: str, method: str) -> float:
    """Recall@50 of the longest runs of a method, the mean over seeds."""
    rows: list[dict[str, Any]] = rows_of(results_of(table, "gowalla"))
    rows = [row for row in rows if row["method"] == method]
    longest = max(row["epochs"] for row in rows)
    return statistics.mean(row["metrics"]["recall@50"] for row in rows if row["epochs"] == longest)


if __name__ == "__main__":
    draw(PLOT)
