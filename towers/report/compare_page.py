"""The page of `twotower compare`: metrics of some runs, their differences, and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.contract.files import write_atomically
from towers.report.html import (
    columns,
    page,
    paragraph,
    section,
    table,
)
from towers.report.plots import plot_differences
from towers.report.settings import differing_settings_html


def p_text(p: float) -> str:
    """A p-value in short."""
    return "< 0.0001" if p < 0.00005 else f"{p:.4f}"


def write_comparison(path: Path, result: dict[str, Any]) -> None:
    """Writes the page, in one step; `result` is from `compare`."""
    names = [run["name"] for run in result["runs"]]
    configurations = [run["configuration"] for run in result["runs"]]
    parts = [
        paragraph(
            f"{result['split']} split, {result['users']:,} users. Differences are those to "
            f"{names[0]}, user by user, with 95 % intervals; the signs test draws "
            f"{result['resamples']:,} times, and Holm's correction is for the number of runs."
        ),
        *(_metric(metric, rows) for metric, rows in result["metrics"].items()),
        section("Settings that differ", differing_settings_html(names, configurations), tall=True),
    ]
    write_atomically(path, page("Comparison of runs", parts))


def _metric(metric: str, rows: list[dict[str, Any]]) -> str:
    first, *others = rows
    means = table(
        ["run", "mean", "difference", "better", "worse", "equal"],
        [
            (first["run"], f"{first['mean']:.4f}", "", "", "", ""),
            *(
                (
                    one["run"],
                    f"{one['mean']:.4f}",
                    f"{one['difference']:+.4f} ±\N{NO-BREAK SPACE}{one['half_width']:.4f}",
                    *(f"{one[name]:,}" for name in ("better", "worse", "equal")),
                )
                for one in others
            ),
        ],
    )
    tests = table(
        ["p-values", "t-test", "signs", "signs, Holm"],
        [
            (one["run"], *(p_text(one[f"p_{name}"]) for name in ("t_test", "permutation", "holm")))
            for one in others
        ],
    )
    differences = [(one["run"], one["difference"], one["half_width"]) for one in others]
    plot = plot_differences(metric, first["run"], differences)
    return section(metric, columns(means + tests, plot))
