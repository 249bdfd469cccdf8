"""Draws what the papers show as curves: a metric against one option of a method.

    python -m benchmarks.paper_tables --table FIGURE --data DIR --work DIR --epochs 5   # the runs
    python -m benchmarks.paper_figures                                                  # the plots

FIGURE is a key of `benchmarks.paper_settings.FIGURES`. Each panel has recall at some cut-offs,
each relative to its best value: where the curves peak at different places, the best value of the
option depends on the K that one cares about. Dots are runs of one seed. A second plot has Recall
epoch by epoch: of the trials of `benchmarks.paper_search`, of the rows of Soft BPR's tables, and of
its figures `hardness` and `mixing`, which are run with --patience.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper_search import name_of, trials_of
from benchmarks.paper_settings import FIGURES, TABLES, Table
from benchmarks.paper_tables import ROOT, results_of, rows_of

PLOT = ROOT / "docs" / "paper_figures.png"
CURVES = ROOT / "docs" / "paper_trials.png"
COLOURS = {5: "#7b3f98", 10: "#0b5fa5", 20: "#c65a11", 50: "#4b7f52"}  # by cut-off
FIRST_SEED = 10  # of rows that have several, it alone is drawn epoch by epoch
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
    if curves := panels_by_epoch():
        draw_by_epoch(curves, CURVES)
    if not panels:
        parser.error("there are no runs to draw: run benchmarks.paper_tables first.")
    draw(panels, options.plot)


class Line(NamedTuple):
    """One run of a panel."""

    name: str
    values: list[float]  # Recall@50 on validation by epoch
    number: int  # of its colour
    thick: bool = True


def panels_by_epoch() -> dict[str, list[Line]]:
    """Title → the runs that were followed: of each table of Soft BPR, its trials and its curves."""
    panels = {}
    for (name, dataset), table in {**TABLES, **FIGURES}.items():
        if name not in ("sdns", "hardness", "mixing"):
            continue
        rows = [row for row in rows_of(results_of(name, dataset)) if "history" in row]
        title = table.title if name == "sdns" else f"{table.title}, {dataset.capitalize()}"
        panels[title] = [
            Line(method, [v for _, v in row["history"]], number)
            for number, method in enumerate(table.rows)
            for row in rows
            if (row["method"], row["seed"]) == (method, FIRST_SEED)
        ]
        if name == "sdns":
            tried = rows_of(trials_of(name, dataset))
            panels[f"Trials, {dataset.capitalize()}"] = _lines(tried, [*table.rows])
    return {title: lines for title, lines in panels.items() if lines}


def _lines(trials: list[dict[str, Any]], methods: list[str]) -> list[Line]:
    """Trials in the colours of their methods, the best of each thick."""
    lines = []
    for row in trials:
        same = [other for other in trials if other["method"] == row["method"]]
        best = max(same, key=lambda other: max(other["by_epoch"])) is row
        name = f"{row['method']}, {name_of(row['trial'])}"
        lines.append(Line(name, row["by_epoch"], methods.index(row["method"]), best))
    return lines


def draw_by_epoch(panels: dict[str, list[Line]], path: Path) -> None:
    """Recall@50 on validation by epoch: a panel a table, a line a run; thick ones have a name."""
    width = min(2, len(panels))
    height = -(-len(panels) // width)
    size = (5.5 * width, 3.6 * height)
    figure, grid = pyplot().subplots(height, width, figsize=size, squeeze=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line in lines:
            axes.plot(
                range(1, len(line.values) + 1),
                line.values,
                color=f"C{line.number}",
                linewidth=2.2 if line.thick else 0.8,
                label=line.name if line.thick else None,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylabel("Recall@50, validation", fontsize=9)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low - (high - low) / 2, 0), high)  # room for the names
        axes.legend(facecolor="white", edgecolor="none", fontsize=8, loc="lower right")
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
        if row["method"] in table.rows and row["epochs"] == table.epochs and "=" in row["method"]
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
