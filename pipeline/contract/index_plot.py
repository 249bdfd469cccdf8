"""The plot of an approximate index, for the page of a version and the report of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pipeline.contract.pages import ABOVE, BLUE, DASHED, GREEN, INK, ORANGE, svg_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_index(report: dict[str, Any]) -> Markup | None:
    """Recall against the time of a batch, for each tree of an `ann_report.json`; None without one.

    A line joins what nothing of its tree beats in both; a star is the setting that was chosen.
    """
    scann = report["scann"]
    if not scann or not scann["num_leaves"]:
        return None
    sweep = sorted(scann["sweep"], key=lambda setting: (setting["batch_ms"], -setting["recall"]))
    names = ("num_leaves", "leaves_to_search", "num_reordered", "recall", "batch_ms")
    leaves, searched, reordered, recall, times = np.array([[s[n] for n in names] for s in sweep]).T
    settings = np.array([leaves, searched, reordered]).T
    chosen = (settings == [scann[name] for name in names[:3]]).all(axis=1)
    label = f"chosen: {scann['recall']:.3f} on other queries"

    def draw(axes: Axes) -> None:
        for number, count in enumerate(np.unique(leaves)):
            tree, colour = np.flatnonzero(leaves == count), (BLUE, ORANGE, GREEN)[number % 3]
            axes.scatter(recall[tree], times[tree], 6, colour, alpha=0.35, linewidth=0)
            best = tree[is_best(recall[tree])]
            axes.plot(recall[best], times[best], color=colour, label=f"{count:,.0f} leaves")
        axes.plot(recall[chosen], times[chosen], "*", color=INK, ms=13, zorder=3, label=label)
        axes.axhline(report["exact"]["batch_ms"], color=INK, linestyle=":", label="exact search")
        axes.axvline(report["target_recall"], label="promised recall", **DASHED)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" * (f"{y:e}"[0] in "25"))
        axes.set(xlabel=f"recall of the exact top {report['at']}", ylabel="milliseconds a batch")
        axes.grid()
        axes.legend(fontsize=9, **ABOVE | {"ncols": 2})

    return svg_plot("Recall and latency of the index", "index", draw, height=3.9, top=0.75)


def is_best(recall: np.ndarray) -> np.ndarray:
    """Of settings by time, which recalls are above all before: [.6, .5, .9] gives [1, 0, 1]."""
    return np.diff(np.maximum.accumulate(recall), prepend=-1.0) > 0
