"""The page `quality.html`: the quality of prepared data for people, as one file without others.

The same numbers give the same bytes: no time, no machine and no name of a source is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pipeline.contract import schema
from pipeline.contract.pages import BLUE, GREEN, ORANGE, RED, render, svg_plot
from pipeline.quality.histogram import quantile_name
from pipeline.quality.report import DROPS, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = {"query": ("users", BLUE), "candidate": ("items", ORANGE)}
_MAX_BARS = 125  # of the plot of days; longer times share bars


def page(quality: dict[str, Any], features: Mapping[str, Any] | None = None) -> str:
    """The page as HTML.

    Args:
      quality: that of the manifest, from `quality.report`.
      features: those of the manifest, by side; None where there are no tables of attributes.
    """
    days = quality["days"]
    degrees = [plot_degrees(quality[side]["bins"], side) for side in schema.SIDES]
    splits = {split: f"of them {split}" for split in schema.SPLITS}
    return render(
        Path(__file__).with_name("templates") / "quality.html",
        title="Data quality",
        **quality,
        features=features or {},
        steps={"read": "read", **DROPS, "rows": "kept", **splits},
        span=span,
        quantile_name=quantile_name,
        days_plot=plot_days(days["rows"]) if days and "rows" in days else "",
        plots=[plot_concentration(quality), *degrees],
    )


def plot_degrees(bins: list[dict[str, Any]], side: str) -> Markup:
    """How many ids of a side have how many rows, in bars of powers of two."""
    noun, color = _SIDES[side]

    def draw(axes: Axes) -> None:
        places = np.arange(len(bins))
        ids = [bar["ids"] for bar in bins]
        bars = axes.bar(places, ids, 0.85, color=color)
        labels = [_short(number, 2) if number else "" for number in ids]
        axes.bar_label(bars, labels, padding=1, fontsize=8 if len(bins) < 15 else 6)
        shown = places[:: 1 + len(bins) // 15]
        axes.set_xticks(shown, [_short(bins[place]["from"], base=1024) for place in shown])
        note = " (1k = 1,024)" if len(bins) > 10 else ""
        axes.set_xlabel(f"rows of one of the {noun}, up to the next bar{note}")
        axes.set_ylabel(noun)
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))

    return svg_plot(f"How many rows {noun} have", noun, draw)


def plot_concentration(quality: dict[str, Any]) -> Markup:
    """The share of the rows that the most frequent users and items have."""

    def draw(axes: Axes) -> None:
        for side, (noun, color) in _SIDES.items():
            points = quality[side]["concentration"]
            axes.plot(
                [100 * point["share_of_ids"] for point in points],
                [100 * point["share_of_rows"] for point in points],
                "o-",
                color=color,
                label=f"{noun}, Gini {quality[side]['gini']:.2f}",
                markersize=4,
            )
        axes.set_xscale("log")
        ticks = [0.1, 1, 10, 100]
        axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
        axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axes.set_ylim(0, 104)
        axes.set_xlabel("top share of the users or items, by their rows")
        axes.set_ylabel("share of the rows")
        axes.legend()
        axes.grid()

    return svg_plot("Concentration", "concentration", draw, left=0.16)


def plot_days(rows: dict[str, int]) -> Markup:
    """Rows by day; what has none is red."""
    known = np.array(list(rows), "datetime64[D]")
    day = (known - known[0]).astype(np.int64)
    width = -(-int(day[-1] + 1) // _MAX_BARS)  # days a bar
    sums = np.zeros(day[-1] // width + 1, np.int64)
    np.add.at(sums, day // width, list(rows.values()))

    def draw(axes: Axes) -> None:
        places = np.arange(len(sums))
        axes.bar(places, sums, 0.9, color=GREEN, linewidth=0)
        for place in places[sums == 0]:
            axes.axvspan(place - 0.5, place + 0.5, color=RED, alpha=0.4, linewidth=0)
        ticks = np.unique(np.linspace(0, len(sums) - 1, 4).astype(int))
        axes.set_xticks(ticks, [str(known[0] + tick * width) for tick in ticks])
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")
        axes.set_xlim(-0.6, len(sums) - 0.4)
        axes.set_ylabel("rows a day" if width == 1 else f"rows in {width} days")
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))

    title = "Good rows by day" if width == 1 else f"Good rows, {width} days a bar"
    title += "; red: days without rows" if 0 in sums else ""
    return svg_plot(title, "days", draw)


def _short(number: float, digits: int = 3, base: int = 1000) -> str:
    """1,234,000 as 1.23M, so that it fits under a bar; to the base 1024 2,048 is 2k."""
    for power, letter in ((3, "G"), (2, "M"), (1, "k")):
        if number >= base**power:
            scaled = number / base**power
            return f"{round(scaled, max(0, digits - len(str(int(scaled))))):g}{letter}"
    return f"{number:g}"
