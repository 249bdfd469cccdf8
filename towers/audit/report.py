"""audit.json, and the page audit.html: where methods look, how far off they are, at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from pipeline.contract.files import write_atomically
from pipeline.contract.pages import BLUE, GREEN, INK, LINE, ORANGE, render, svg_plot
from towers.training.run_directory import write_json

RECORD, PAGE = "audit.json", "audit.html"
_TEMPLATES = Path(__file__).with_name("templates")
_MIN_BIAS = 1e-4  # smaller ones are drawn there
_ABOVE: Any = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 3,
    "borderpad": 0,
}  # the axes
_STYLES = [(colour, line) for line in ("-", "--") for colour in (BLUE, ORANGE, GREEN)]


def write_reports(output: Path, result: dict[str, Any]) -> None:
    """Writes both files, and prints the table; `result` is that of `audit`."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, result)
    title = f"Audit: {Path(result['run']).resolve().name}"
    plots = plot_hardness(result), plot_depth(result), plot_cost(result)
    states = {label: of["state"] for label, of in result["methods"].items() if of["state"]}
    values = result | {"plots": plots, "ratios": _ratios(result), "states": states}
    write_atomically(output / PAGE, render(_TEMPLATES / "audit.html", title=title, **values))
    print(render(_TEMPLATES / "audit.txt.jinja", **result))
    print(f"{output / PAGE} shows all of it, {RECORD} holds it.")


def _ratios(result: dict[str, Any]) -> dict[str, list[float | None]]:
    """Of each method, by bucket: its share ÷ that of the full softmax; None without shares."""
    ratios = {}
    for label, measures in result["methods"].items():
        pairs = zip(measures["buckets"], result["full_softmax_buckets"], strict=True)
        ratios[label] = [
            None if share is None or not full else share / full for share, full in pairs
        ]
    return ratios


def plot_hardness(result: dict[str, Any]) -> Markup:
    """How much of the mass is on hard candidates, and on what the query has chosen."""

    def draw(axes: Axes) -> None:
        for offset, name, colour, label in (
            (-0.2, "top_share", BLUE, f"best {result['k']} not chosen"),
            (0.2, "seen_share", ORANGE, "chosen by the query"),
        ):
            found = [measures[name] for measures in result["methods"].values()]
            values, errors = ([100 * (x[part] or 0) for x in found] for part in ("value", "error"))
            places = np.arange(len(found)) + offset
            axes.barh(places, values, 0.38, xerr=errors, color=colour, label=label, ecolor=INK)
        axes.set_yticks(range(len(found)), map(_name, result["methods"]))
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlabel("% of the negatives' mass")
        axes.grid(axis="x")
        axes.legend(**_ABOVE)

    height = 1.15 + 0.3 * len(result["methods"])
    return svg_plot("Hardness", "hardness", draw, height=height, left=0.24, top=0.35)


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
        axes.legend(**_ABOVE)

    return svg_plot("Depth", "depth", draw, height=3.7, top=0.75)


def plot_cost(result: dict[str, Any]) -> Markup:
    """Bias by cost: what is below and left of another is better in both."""

    found = {label: measures["bias"] for label, measures in result["methods"].items()}
    known = [label for label, bias in found.items() if bias["value"] is not None]

    def draw(axes: Axes) -> None:
        places = {
            label: (result["methods"][label]["cost_ratio"], max(found[label]["value"], _MIN_BIAS))
            for label in known
        }
        for label, place in places.items():
            error = found[label]["error"] or 0.0
            axes.errorbar(*place, yerr=error, fmt="o", markersize=4, color=BLUE, ecolor=LINE)
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=_MIN_BIAS / 2)
        axes.margins(x=0.15)  # for the labels
        axes.autoscale_view()  # from here on places are known
        taken: list[Any] = []  # where labels begin; the next one goes above those that it would hit
        for label in sorted(known, key=lambda label: places[label][1]):
            x, y = axes.transData.transform(places[label]) * 72 / axes.figure.dpi
            top = y
            while any(abs(x - left) < 65 and abs(top - bottom) < 9 for left, bottom in taken):
                top += 1
            taken.append((x, top))
            style: Any = {"textcoords": "offset points", "fontsize": 8}
            style["arrowprops"] = {"arrowstyle": "-", "color": INK, "linewidth": 0.4}
            axes.annotate(_name(label), places[label], (5, top - y), **style)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("time of a step ÷ that of ssl_pop (without the optimizer)")
        axes.set_ylabel("bias")
        axes.grid()

    return svg_plot("Bias and cost", "cost", draw, height=4.5, left=0.19)


def _name(label: str) -> str:
    """A method; a star stands for its options."""
    return label.partition(":")[0] + "*" * (":" in label)
