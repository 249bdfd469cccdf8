"""audit.md: the measures of all methods as a table, what they mean, and the advice."""

from __future__ import annotations

from typing import Any

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


def as_markdown(result: dict[str, Any]) -> str:
    """The page, which reads as plain text too."""
    size = result["batches"]
    head = (
        f"{size['audited']} batches of {size['size']} rows, {size['pairs']} audited pairs each, "
        f"{size['draws']} draws; the run was trained with {result['method']}."
    )
    rows = [_cells(label, one) for label, one in result["methods"].items()]
    top = f"top {result['k']} %"
    heads = ["method", "bias", "norm", "noise", "KL", top, "half", "chosen %", "step ms", "×"]
    lines = [f"# Audit for K = {result['k']}", "", head, "", *_table(heads, rows), "", _LEGEND]
    states = [
        f"- {label}: {one['state']}" for label, one in result["methods"].items() if one["state"]
    ]
    left_out = [f"- {label} is left out: {why}" for label, why in result["left_out"].items()]
    if states or left_out:
        lines += ["", "## State", "", *states, *left_out]
    lines += ["", "## Advice", "", "\n\n".join(result["advice"]["text"])]
    return "\n".join(lines) + "\n"


def _cells(label: str, one: dict[str, Any]) -> list[str]:
    bias, error = one["bias"]["value"], one["bias"]["error"]
    return [
        label,
        _short(bias, ".3f") + ("" if error is None or bias is None else f" ± {error:.3f}"),
        _short(one["norm_ratio"]["value"], ".2f"),
        _short(one["noise"]["value"], ".2g"),
        _short(one["kl"]["value"], ".3f"),
        _percent(one["top_share"]["value"]),
        _short(one["half_mass_rank"]["value"], ",.0f"),
        _percent(one["seen_share"]["value"]),
        f"{1000 * one['seconds']:.0f}",
        f"{one['cost_ratio']:.2f}",
    ]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        shown = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return f"| {' | '.join(shown)} |"

    rule = [
        f"{'-' * width}" if not place else f"{'-' * (width - 1)}:"
        for place, width in enumerate(widths)
    ]
    return [line(heads), f"| {' | '.join(rule)} |", *map(line, rows)]


def _short(value: float | None, form: str) -> str:
    """A figure; `-` where the draws do not determine it."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    return text.lstrip("-") if not float(text.replace(",", "")) else text  # no -0.000


def _percent(value: float | None) -> str:
    return _short(None if value is None else 100 * value, ".1f")
