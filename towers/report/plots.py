"""The plots of a run report: matplotlib → inline SVG in the colours of the page around it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.contract.pages import ABOVE, BLUE, DASHED, INK, ORANGE, svg_plot

_LINES = ("-", "--", ":")


def plots_by_epoch(training: dict[str, Any]) -> list[Markup]:
    """The loss by epoch, and each metric on the validation split with a line for each cut-off.

    Of the record `training.json`; its best epoch, where there is one, is marked.
    """
    history, best = training["history"], training["best_epoch"]
    epochs = [epoch["epoch"] for epoch in history]
    measured = [re.fullmatch(r"val_(.+)@(\d+)", name) for name in (history or [{}])[-1]]
    cut_offs = sorted((found[1], int(found[2])) for found in measured if found)

    def plot(title: str, label: str, name: str, lines: dict[str, str]) -> Markup:
        def draw(axes: Axes) -> None:
            for number, (field, note) in enumerate(lines.items(), -len(lines)):
                values = [epoch[field] for epoch in history]
                line = _LINES[(-1 - number) % len(_LINES)]  # the deepest is whole
                axes.plot(epochs, values, line, marker="o", color=BLUE, markersize=3)
                end = epochs[-1], values[-1]
                axes.annotate(note, end, (5, 0), textcoords="offset points", va="center")
            if name != "loss":
                axes.set_ylim(bottom=0)
            if best:
                axes.axvline(best, label="best epoch, kept", **DASHED)
                axes.legend()
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set(xlabel="epoch", ylabel=label)
            axes.grid()

        return svg_plot(title, name, draw)

    plots = [plot("Loss", "mean loss of the epoch", "loss", {"loss": ""})] if history else []
    for metric, pairs in itertools.groupby(cut_offs, lambda pair: pair[0]):
        lines = {f"val_{metric}@{k}": f"@{k}" for _, k in pairs}
        about = f"{metric} by epoch", f"{metric} on validation", f"by-epoch-{metric}"
        plots.append(plot(*about, lines))
    return plots


def plot_buckets(name: str, labels: list[str], buckets: list[dict[str, Any]], k: int) -> Markup:
    """Recall in buckets of `breakdown`, with 95 % intervals; `name` is part of the ids in it."""
    bars = {}
    for ranking in ("model", "popularity"):
        recalls = pd.DataFrame([bucket[ranking] for bucket in buckets], dtype=float)
        bars[ranking] = recalls["mean"], recalls["half_width"]
    title = f"Recall@{k} of the model and of popularity"
    note = f"recall@{k}, with 95 % intervals"
    return plot_bars(title, name, labels, bars, xlabel=note, ylabel="train rows")


def plot_bars(
    title: str, name: str, labels: Sequence[str], bars: Mapping[str, Any], **axis_labels: str
) -> Markup:
    """Two bars for each label; `bars` are values and errors, [labels] each, by what they are."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(labels))
        error: Any = {"ecolor": INK, "elinewidth": 1, "capsize": 1.5}
        for (what, (values, errors)), colour, offset in zip(
            bars.items(), (BLUE, ORANGE), (-0.2, 0.2), strict=True
        ):
            axes.barh(
                places + offset, values, 0.36, xerr=errors, color=colour, label=what, error_kw=error
            )
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set(**axis_labels)
        axes.grid(axis="x")
        axes.legend(**ABOVE)  # the bars leave no corner free

    height = 1.15 + 0.32 * len(labels)
    return svg_plot(title, name, draw, height=height, left=0.24, top=0.35)


def plot_differences(metric: str, rows: list[dict[str, Any]]) -> Markup:
    """Differences to the first run with 95 % intervals, from the rows of a metric of `compare`."""
    first, *others = rows

    def draw(axes: Axes) -> None:
        table = pd.DataFrame(others)
        style: Any = {"fmt": "o", "color": BLUE, "capsize": 3}
        axes.errorbar(table["difference"], table.index, xerr=table["half_width"], **style)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(others)), [_shortened(row["run"]) for row in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference of {metric}, with 95 % intervals")
        axes.grid(axis="x")

    name, height = f"difference-{metric.replace('@', '-')}", 1.0 + 0.35 * len(others)
    return svg_plot(f"Difference to {first['run']}", name, draw, height=height, left=0.3)


def _shortened(name: str) -> str:
    """A name that fits beside a plot; between dollars it would be a formula to matplotlib."""
    return (name if len(name) <= 18 else "…" + name[-17:]).replace("$", r"\$")
