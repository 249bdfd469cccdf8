"""Draws what the papers show as curves: a metric against one option of a method.

    python -m benchmarks.paper_tables --table FIGURE --data DIR --work DIR --epochs 5   # the runs
    python -m benchmarks.paper_figures                                                  # the plot

FIGURE is a key of `benchmarks.paper_settings.FIGURES`. Each panel has recall at some cut-offs,
each relative to its best value: where the curves peak at different places, the best value of the
option depends on the K that one cares about. Dots are runs of one seed.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from benchmarks.paper_settings import FIGURES, Table
from benchmarks.paper_tables import ROOT, results_of, rows_of

PLOT = ROOT / "docs" / "paper_figures.png"
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
    if not panels:
        parser.error("there are no runs to draw: run benchmarks.paper_tables first.")
    draw(panels, options.plot)


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(height, _COLUMNS, figsize=(10, 2.7 * height), squeeze=False)
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the best", fontsize=9)
    line = functools.partial(pyplot.Line2D, [], [], marker="o", markersize=4)
    handles = [line(color=colour) for colour in COLOURS.values()]
    labels = [f"Recall@{k}" for k in COLOURS]
    figure.legend(handles, labels, loc="upper right", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / height))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
