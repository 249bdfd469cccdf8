"""audit.json, the table audit.md, and audit.png: where methods look, how far off, at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pipeline.contract.files import write_atomically, written_aside
from pipeline.contract.pages import render
from towers.training.run_directory import write_json

RECORD, TABLE, PLOT = "audit.json", "audit.md", "audit.png"
_TEMPLATE = Path(__file__).with_name("templates") / "audit.md.jinja"
_MAX_RATIO = 8  # in the colours
_MIN_BIAS = 1e-4  # smaller ones are drawn there


def write_reports(output: Path, result: dict[str, Any]) -> None:
    """Writes the three files, and prints the table; `result` is that of `audit`."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, result)
    page = render(_TEMPLATE, **result)
    write_atomically(output / TABLE, page)
    with written_aside(output / PLOT) as aside:
        draw(result).savefig(aside, format="png", dpi=100)
    print(page + f"\n{output / RECORD}, {TABLE} and {PLOT} hold all of it.")


def draw(result: dict[str, Any]) -> Figure:
    """The picture of an audit."""
    height = 1.5 + 0.4 * len(result["methods"])
    figure = Figure(figsize=(15, 5 + height), layout="constrained")
    (buckets, shares), (depth, cost) = figure.subplots(2, 2, height_ratios=[height, 5])
    shares.sharey(buckets)
    _buckets(buckets, result)
    _shares(shares, result)
    _depth(depth, result)
    _cost(cost, result)
    return figure


def _buckets(axes: Axes, result: dict[str, Any]) -> None:
    full = np.array(result["full_softmax_buckets"])
    implied = np.array([measures["buckets"] for measures in result["methods"].values()], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(implied / full, 1 / _MAX_RATIO, _MAX_RATIO)
    norm = LogNorm(1 / _MAX_RATIO, _MAX_RATIO)
    image = axes.imshow(ratio, cmap="RdBu_r", norm=norm, aspect="auto")
    ticks = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    axes.figure.colorbar(image, ax=axes, ticks=ticks, format="{x:g}").minorticks_off()
    axes.set_yticks(range(len(implied)), [_name(label) for label in result["methods"]], fontsize=8)
    axes.set_xticks(range(len(full)), [f"{n}\n{s:.0%}" for n, s in enumerate(full, 1)])
    axes.set_xlabel("popularity bucket, 1 the most popular; below: share of the full softmax")
    axes.set_title("Implied negatives: share ÷ share of the full softmax")


def _shares(axes: Axes, result: dict[str, Any]) -> None:
    for offset, name, label in (
        (-0.2, "top_share", f"top {result['k']} of what the query has not chosen"),
        (0.2, "seen_share", "chosen by the query"),
    ):
        found = [measures[name] for measures in result["methods"].values()]
        values, errors = ([100 * (x[part] or 0) for x in found] for part in ("value", "error"))
        axes.barh(np.arange(len(found)) + offset, values, 0.38, xerr=errors, label=label)
    axes.set(xlabel="% of the negatives' mass", title="Hardness")
    axes.tick_params(labelleft=False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()


def _depth(axes: Axes, result: dict[str, Any]) -> None:
    """The mass on the r best candidates by r; a few methods in colour."""
    coloured = ["full_softmax", result["method"], *result["target"]["specs"], "bpr", "ssl"]
    for label, measures in result["methods"].items():
        style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
        if label in coloured:
            style = {"label": _name(label), "linewidth": 1.8, "zorder": 2}
        axes.plot(result["ranks"], 100 * np.array(measures["mass_by_rank"], float), **style)
    axes.axvline(result["k"], color="black", linestyle=":", linewidth=1, label=f"K = {result['k']}")
    axes.set(xscale="log", ylim=(0, 100), ylabel="% of the negatives' mass on them")
    axes.set_xlabel("the r best candidates of a query, without what it has chosen")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _cost(axes: Axes, result: dict[str, Any]) -> None:
    """Bias by cost: what is below and left of another is better in both."""
    for label, measures in result["methods"].items():
        bias, error = (measures["bias"][part] for part in ("value", "error"))
        if bias is None:
            continue
        place = (measures["cost_ratio"], max(bias, _MIN_BIAS))
        axes.errorbar(*place, yerr=error or 0.0, fmt="o", markersize=4)
        text = label.partition(":")[0] + "*" * (":" in label)
        style: Any = {"textcoords": "offset points", "fontsize": 7, "rotation": 20}
        axes.annotate(text, place, xytext=(4, 3), **style)
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom=_MIN_BIAS / 2)
    axes.margins(x=0.15)  # for the labels
    axes.set_xlabel("time of a step ÷ that of ssl_pop (without the optimizer)")
    axes.set_ylabel("bias: 1 - cosine with the full softmax (* with options)")
    axes.grid(alpha=0.3)


def _name(label: str) -> str:
    """A method, and its options below it."""
    return label.replace(":", "\n").replace(",", ", ")
