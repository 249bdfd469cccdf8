"""audit.json, the table audit.md, and audit.png: where methods look, how far off, at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pipeline.contract.files import write_atomically, written_aside
from towers.training.run_directory import write_json

RECORD, TABLE, PLOT = "audit.json", "audit.md", "audit.png"
_MAX_LOG2 = 3  # of a ratio, in the colours
_MIN_BIAS = 1e-4  # smaller ones are drawn there
_LEGEND = """\
- bias: 1 - cosine of the mean gradient and that of the full softmax, by the embeddings of the
  audited queries; 0 is the same direction. ± is a standard error, over batches.
- norm: length of the mean gradient ÷ that of the full softmax. Losses have scales of their own.
- noise: variance of the gradient of a pair over draws ÷ its squared mean.
- KL: of the shares of the full softmax from those of the implied negatives, in nats, over
  popularity buckets.
- top K: share of the negatives' mass on the K best candidates that the query has not chosen.
- half: half of that mass is on so many best candidates.
- chosen: share on other candidates that the query has chosen in train.
- step: median milliseconds on this machine, without the optimizer; × its ratio to ssl_pop."""


def write_reports(output: Path, result: dict[str, Any]) -> None:
    """Writes the three files, and prints the table; `result` is that of `audit`."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, result)
    page = as_markdown(result)
    write_atomically(output / TABLE, page)
    with written_aside(output / PLOT) as aside:
        draw(result).savefig(aside, format="png", dpi=100)
    print(page + f"\n{output / RECORD}, {TABLE} and {PLOT} hold all of it.")


def as_markdown(result: dict[str, Any]) -> str:
    """The page, which reads as plain text too."""
    size, methods = result["batches"], result["methods"]
    head = (
        f"{size['audited']} batches of {size['size']} rows, {size['pairs']} audited pairs each, "
        f"{size['draws']} draws; the run was trained with {result['method']}."
    )
    top = f"top {result['k']} %"
    heads = ["method", "bias", "norm", "noise", "KL", top, "half", "chosen %", "step ms", "×"]
    rows = [heads, *(_cells(label, measures) for label, measures in methods.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [f"# Audit for K = {result['k']}", "", head, ""]
    for label, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([label.ljust(widths[0]), *aligned])} |")
    lines += ["", _LEGEND]
    states = {label: measures["state"] for label, measures in methods.items()}
    notes = [f"- {label}: {state}" for label, state in states.items() if state]
    notes += [f"- {label} is left out: {reason}" for label, reason in result["left_out"].items()]
    if notes:
        lines += ["", "## State", "", *notes]
    return "\n".join(lines) + "\n"


def _cells(label: str, measures: dict[str, Any]) -> list[str]:
    def cell(name: str, form: str, factor: int = 1) -> str:
        """A figure; `-` where the draws do not determine it."""
        if measures[name]["value"] is None:
            return "-"
        text = f"{factor * measures[name]['value']:{form}}"
        return text.lstrip("-") if not float(text.replace(",", "")) else text  # no -0.000

    bias, error = cell("bias", ".3f"), measures["bias"]["error"]
    return [
        label,
        bias if bias == "-" or error is None else f"{bias} ± {error:.3f}",
        cell("norm_ratio", ".2f"),
        cell("noise", ".2g"),
        cell("kl", ".3f"),
        cell("top_share", ".1f", 100),
        cell("half_mass_rank", ",.0f"),
        cell("seen_share", ".1f", 100),
        f"{1000 * measures['seconds']:.0f}",
        f"{measures['cost_ratio']:.2f}",
    ]


def draw(result: dict[str, Any]) -> Figure:
    """The picture of an audit."""
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
    return figure


def _buckets(axes: Axes, figure: SubFigure, result: dict[str, Any]) -> None:
    full = np.array(result["full_softmax_buckets"])
    implied = np.array([measures["buckets"] for measures in result["methods"].values()], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(np.log2(implied / full), -_MAX_LOG2, _MAX_LOG2)
    image = axes.imshow(ratio, cmap="RdBu_r", vmin=-_MAX_LOG2, vmax=_MAX_LOG2, aspect="auto")
    axes.set_yticks(range(len(implied)), [_name(label) for label in result["methods"]], fontsize=8)
    heads = [f"{n + 1}\n{100 * share:.0f} %" for n, share in enumerate(full)]
    axes.set_xticks(range(len(full)), heads)
    axes.set_xlabel(
        "popularity bucket of candidates, 1 the most popular; below: share of the full softmax"
    )
    axes.set_title("Implied negatives: share ÷ share of the full softmax")
    ticks = range(-_MAX_LOG2, _MAX_LOG2 + 1)
    bar = figure.colorbar(image, ax=axes, ticks=ticks)
    bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])


def _shares(axes: Axes, result: dict[str, Any]) -> None:
    methods, k = result["methods"], result["k"]
    places = np.arange(len(methods))
    for offset, name, label in (
        (-0.2, "top_share", f"top {k} of what the query has not chosen"),
        (0.2, "seen_share", "chosen by the query"),
    ):
        values = [100 * (measures[name]["value"] or 0) for measures in methods.values()]
        errors = [100 * (measures[name]["error"] or 0) for measures in methods.values()]
        axes.barh(places + offset, values, 0.38, xerr=errors, label=label)
    axes.set_xlabel("% of the negatives' mass")
    axes.set_title("Hardness", pad=24)
    axes.grid(axis="x", alpha=0.3)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
    legend.set_in_layout(False)


def _depth(axes: Axes, result: dict[str, Any]) -> None:
    """The mass on the r best candidates by r; a few methods in colour."""
    coloured = ["full_softmax", result["method"], *result["target"]["specs"], "bpr", "ssl"]
    for label, measures in result["methods"].items():
        if None in measures["mass_by_rank"]:
            continue
        style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
        if label in coloured:
            style = {"label": _name(label), "linewidth": 1.8, "zorder": 2}
        axes.plot(result["ranks"], [100 * share for share in measures["mass_by_rank"]], **style)
    axes.axvline(result["k"], color="black", linestyle=":", linewidth=1)
    axes.text(result["k"], 101, f"K = {result['k']}", ha="center", va="bottom", fontsize=9)
    axes.set(xscale="log", ylim=(0, 100), ylabel="% of the negatives' mass on them")
    axes.set_xlabel("the r best candidates of a query, without what it has chosen")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _cost(axes: Axes, result: dict[str, Any]) -> None:
    """Bias by cost: what is below and left of another is better in both."""
    for label, measures in result["methods"].items():
        bias = measures["bias"]["value"]
        if bias is None:
            continue
        place = (measures["cost_ratio"], max(bias, _MIN_BIAS))
        error = measures["bias"]["error"] or 0.0
        axes.errorbar(*place, yerr=[[min(error, place[1] / 2)], [error]], fmt="o", markersize=4)
        text = label.partition(":")[0] + "*" * (":" in label)
        style: Any = {"textcoords": "offset points", "fontsize": 7, "rotation": 20}
        note = axes.annotate(text, place, xytext=(4, 3), **style)
        note.set_in_layout(False)  # or long names would make the axes small
    axes.loglog()
    axes.margins(x=0.15)  # for the labels
    axes.set_xlabel("time of a step ÷ that of ssl_pop (without the optimizer)")
    axes.set_ylabel("bias: 1 - cosine with the full softmax (* with options)")
    axes.grid(alpha=0.3)


def _name(label: str) -> str:
    """A method, and its options below it."""
    return label.replace(":", "\n").replace(",", ", ")
