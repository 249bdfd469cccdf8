"""audit.json, and the page audit.html: where methods look, how far off they are, at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from pipeline.contract.files import write_atomically
from pipeline.contract.pages import ABOVE, BLUE, GREEN, INK, LINE, ORANGE, render, svg_plot
from towers.report.plots import plot_bars
from towers.training.run_directory import write_json

RECORD, PAGE = "audit.json", "audit.html"
_TEMPLATES = Path(__file__).with_name("templates")
_MIN_BIAS = 1e-4  # smaller ones are drawn there
_STYLES = [(colour, line) for line in ("-", "--") for colour in (BLUE, ORANGE, GREEN)]


def write_reports(output: Path, result: dict[str, Any]) -> None:
    """Writes both files, and prints the table; `result` is that of `audit`."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, result)
    title = f"Audit: {Path(result['run']).resolve().name}"
    plots = plot_hardness(result), plot_depth(result), plot_cost(result)
    page = render(_TEMPLATES / "audit.html", title=title, plots=plots, **result)
    write_atomically(output / PAGE, page)
    print(render(_TEMPLATES / "audit.txt.jinja", **result))
    print(f"{output / PAGE} shows all of it, {RECORD} holds it.")


def plot_hardness(result: dict[str, Any]) -> Markup:
    """How much of the mass is on hard candidates, and on what the query has chosen."""
    bars, methods = {}, result["methods"]
    heads = {"top_share": f"best {result['k']} not chosen", "seen_share": "chosen by the query"}
    for name, head in heads.items():
        found = pd.DataFrame([measures[name] for measures in methods.values()], dtype=float)
        bars[head] = 100 * found["value"], 100 * found["error"]
    names = [_name(label) for label in methods]
    return plot_bars("Hardness", "hardness", names, bars, xlabel="% of the negatives' mass")


def plot_depth(result: dict[str, Any]) -> Markup:
    """The mass on the r best candidates by r; a few methods in colour."""
    coloured = ["full_softmax", result["method"], *result["target"]["specs"], "bpr", "ssl"]
    coloured = [label for label in dict.fromkeys(coloured) if label in result["methods"]]

    def draw(axes: Axes) -> None:
        for label, measures in result["methods"].items():
            style: dict[str, Any] = {"color": LINE, "linewidth": 1, "zorder": 1}
            if label in coloured:
                colour, line = _STYLES[coloured.index(label) % len(_STYLES)]
                style = {"color": colour, "linestyle": line, "label": _name(label), "zorder": 2}
            axes.plot(result["ranks"], 100 * np.array(measures["mass_by_rank"], float), **style)
        axes.axvline(result["k"], color=INK, linestyle=":", linewidth=1, label=f"K = {result['k']}")
        axes.set(xscale="log", ylim=(0, 100), ylabel="% of the negatives' mass on them")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("the r best candidates of a query that it has not chosen")
        axes.grid()
        axes.legend(**ABOVE)

    return svg_plot("Depth", "depth", draw, height=3.7, top=0.75)


def plot_cost(result: dict[str, Any]) -> Markup:
    """Bias by cost: what is below and left of another is better in both."""
    points = sorted(
        (max(of["bias"]["value"], _MIN_BIAS), of["cost_ratio"], of["bias"]["error"] or 0.0, label)
        for label, of in result["methods"].items()
        if of["bias"]["value"] is not None
    )

    def draw(axes: Axes) -> None:
        for bias, cost, error, _ in points:
            axes.errorbar(cost, bias, yerr=error, fmt="o", markersize=4, color=BLUE, ecolor=LINE)
        axes.set(xscale="log", ylabel="bias")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=_MIN_BIAS / 2)
        axes.margins(x=0.15)  # for the labels
        axes.autoscale_view()  # from here on places are known
        taken: list[Any] = []  # where labels begin; the next one goes above those that it would hit
        for bias, cost, _, label in points:
            x, y = axes.transData.transform((cost, bias)) * 72 / axes.figure.dpi
            top = y
            while any(abs(x - left) < 65 and abs(top - bottom) < 9 for left, bottom in taken):
                top += 1
            taken.append((x, top))
            style: Any = {"textcoords": "offset points", "fontsize": 8}
            style["arrowprops"] = {"arrowstyle": "-", "color": INK, "linewidth": 0.4}
            axes.annotate(_name(label), (cost, bias), (5, top - y), **style)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("time of a step ÷ that of ssl_pop (without the optimizer)")
        axes.grid()

    return svg_plot("Bias and cost", "cost", draw, height=4.5, left=0.19)


def _name(label: str) -> str:
    """A method; a star stands for its options."""
    return label.partition(":")[0] + "*" * (":" in label)
