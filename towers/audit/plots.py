"""audit.png: where each method looks, how far its gradient is, and what a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pipeline.contract.files import written_aside

_MOST = 3.0  # of a ratio's base-2 logarithm in the colours
_EXACT = 1e-4  # biases below it are drawn there


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of an audit."""
    height = 1.5 + 0.4 * len(result["methods"])
    figure = Figure(figsize=(15, 5 + height), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[height, 5])
    top, bottom = (figure.add_subfigure(grid[row, 0]) for row in (0, 1))  # with widths of their own
    axes = top.subplots(1, 2, sharey=True)
    _buckets(axes[0], top, result)
    _shares(axes[1], result)
    axes = bottom.subplots(1, 2)
    _depth(axes[0], result)
    _cost(axes[1], result)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=100)


def _buckets(axes: Axes, figure: SubFigure, result: dict[str, Any]) -> None:
    full = np.array(result["full_softmax_buckets"])
    implied = np.array([one["buckets"] for one in result["methods"].values()], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(np.log2(implied / full), -_MOST, _MOST)
    shown = axes.imshow(ratio, cmap="RdBu_r", vmin=-_MOST, vmax=_MOST, aspect="auto")
    axes.set_yticks(range(len(implied)), [_name(label) for label in result["methods"]], fontsize=8)
    heads = [f"{n + 1}\n{100 * share:.0f} %" for n, share in enumerate(full)]
    axes.set_xticks(range(len(full)), heads)
    axes.set_xlabel(
        "popularity bucket of candidates, 1 the most popular; below: share of the full softmax"
    )
    axes.set_title("Implied negatives: share ÷ share of the full softmax")
    bar = figure.colorbar(shown, ax=axes, ticks=range(-int(_MOST), int(_MOST) + 1))
    bar.ax.set_yticklabels([f"{2.0**t:g}" for t in range(-int(_MOST), int(_MOST) + 1)])


def _shares(axes: Axes, result: dict[str, Any]) -> None:
    methods, k = result["methods"], result["k"]
    places = np.arange(len(methods))
    for offset, name, label in (
        (-0.2, "top_share", f"top {k} of what the query has not chosen"),
        (0.2, "seen_share", "chosen by the query"),
    ):
        values = [100 * (one[name]["value"] or 0) for one in methods.values()]
        errors = [100 * (one[name]["error"] or 0) for one in methods.values()]
        axes.barh(places + offset, values, 0.38, xerr=errors, label=label)
    axes.set_xlabel("% of the negatives' mass")
    axes.set_title("Hardness", pad=24)
    axes.grid(axis="x", alpha=0.3)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
    legend.set_in_layout(False)


def _depth(axes: Axes, result: dict[str, Any]) -> None:
    """The mass on the r best candidates by r; a few methods in colour."""
    chosen = ["full_softmax", result["method"], *result["target"]["specs"], "bpr", "ssl"]
    chosen += [result["advice"][name] for name in ("focus", "closest")]
    for label, one in result["methods"].items():
        if None in one["mass_by_rank"]:
            continue
        known = label in chosen
        axes.plot(
            result["ranks"],
            [100 * share for share in one["mass_by_rank"]],
            label=_name(label) if known else None,
            color=None if known else "0.8",
            linewidth=1.8 if known else 0.8,
            zorder=2 if known else 1,
        )
    axes.axvline(result["k"], color="black", linestyle=":", linewidth=1)
    axes.text(result["k"], 101, f"K = {result['k']}", ha="center", va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel("the r best candidates of a query, without what it has chosen")
    axes.set_ylabel("% of the negatives' mass on them")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _cost(axes: Axes, result: dict[str, Any]) -> None:
    """Bias by cost: what is below and left of another is better in both."""
    for label, one in result["methods"].items():
        bias = one["bias"]["value"]
        if bias is None:
            continue
        place = (one["cost_ratio"], max(bias, _EXACT))
        error = one["bias"]["error"] or 0.0
        axes.errorbar(*place, yerr=[[min(error, place[1] / 2)], [error]], fmt="o", markersize=4)
        note = axes.annotate(
            label.partition(":")[0] + "*" * (":" in label),
            place,
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            rotation=20,
        )
        note.set_in_layout(False)  # or long names would make the axes small
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.15)  # for the labels
    axes.set_xlabel("time of a step ÷ that of ssl_pop (without the optimizer)")
    axes.set_ylabel("bias: 1 - cosine with the full softmax (* with options)")
    axes.grid(alpha=0.3)


def _name(label: str) -> str:
    """A method, and its options below it."""
    return label.replace(":", "\n").replace(",", ", ")
