"""Draws what the papers show as curves: a metric against one option of a method.

    python -m benchmarks.paper_tables --table FIGURE --data DIR --work DIR --epochs 5   # the runs
    python -m benchmarks.paper_figures                                                  # the plots

FIGURE is a key of `benchmarks.paper_settings.FIGURES`. Each panel has recall at some cut-offs,
each relative to its best value: where the curves peak at different places, the best value of the
option depends on the K that one cares about. Dots are runs of one seed. A second plot has the
trials of `benchmarks.paper_search`, epoch by epoch.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from benchmarks.paper_search import name_of, trials_of
from benchmarks.paper_settings import FIGURES, TABLES, Table
from benchmarks.paper_tables import ROOT, results_of, rows_of

PLOT = ROOT / "docs" / "paper_figures.png"
CURVES = ROOT / "docs" / "paper_trials.png"
COLOURS = {5: "#7b3f98", 10: "#0b5fa5", 20: "#c65a11", 50: "#4b7f52"}  # by cut-off
_COLUMNS = 3


def main() -> None:
    """Draws all figures that have runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", default=str(PLOT), help="where to draw")
    options = parser.parse_args()
    panels = []
    for (name, dataset), table in FIGURES.items():
        points = points_of(table, rows_of(results_of(name, dataset)))
        if len(points) > 1:
            panels.append((table, points))
    draw_trials(CURVES)
    if not panels:
        parser.error("there are no runs to draw: run benchmarks.paper_tables first.")
    draw(panels, options.plot)


def draw_trials(path: Path) -> None:
    """Recall@50 on validation by epoch: a panel a data set, a line a trial, the best ones thick."""
    found = [
        (dataset, rows)
        for (name, dataset), table in TABLES.items()
        if name == "sdns" and (rows := rows_of(trials_of(name, dataset)))
    ]
    if not found:
        return
    figure, grid = pyplot().subplots(1, len(found), figsize=(5.5 * len(found), 3.6), squeeze=False)
    for axes, (dataset, rows) in zip(grid.flat, found, strict=True):
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for row in rows:
            best = max(max(other["by_epoch"]) for other in rows if other["method"] == row["method"])
            first = max(row["by_epoch"]) == best
            axes.plot(
                range(1, len(row["by_epoch"]) + 1),
                row["by_epoch"],
                color=list(COLOURS.values())[methods.index(row["method"])],
                linewidth=2.2 if first else 0.8,
                label=f"{row['method']}, {name_of(row['trial'])}" if first else None,
            )
        axes.set_title(f"Recall@50 on validation, {dataset.capitalize()}", fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def pyplot() -> Any:
    """Matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def points_of(table: Table, rows: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """(value of the option, metrics) of the rows of a table that have run, by value."""
    found = [
        (float(row["method"].partition("=")[2]), row["metrics"])
        for row in rows
        if row["method"] in table.rows and "=" in row["method"]
    ]
    return sorted(found, key=lambda point: point[0])


def draw(panels: list[tuple[Table, list[tuple[float, dict[str, float]]]]], path: str) -> None:
    """One panel a figure."""
    height = -(-len(panels) // _COLUMNS)
    size = (10, 2.7 * height)
    figure, grid = pyplot().subplots(height, _COLUMNS, figsize=size, squeeze=False)
    for axes, (table, points) in zip(grid.flat, panels, strict=False):
        places = range(len(points))
        for metric in table.metrics:
            colour = COLOURS[int(metric.partition("@")[2])]
            values = [metrics[metric] for _, metrics in points]
            best = max(values)
            axes.plot(places, [v / best for v in values], "o-", color=colour, markersize=4)
            top = values.index(best)
            axes.plot([top], [1.0], "o", color=colour, markersize=8)
        axes.set_xticks(list(places), [f"{value:g}" for value, _ in points])
        axes.set_title(table.title, fontsize=10, loc="left")
        _plain(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the best", fontsize=9)
    line = functools.partial(pyplot().Line2D, [], [], marker="o", markersize=4)
    handles = [line(color=colour) for colour in COLOURS.values()]
    labels = [f"Recall@{k}" for k in COLOURS]
    figure.legend(handles, labels, loc="upper right", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / height))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
