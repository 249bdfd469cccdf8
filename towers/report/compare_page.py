"""The page of `twotower compare`: metrics of some runs, their differences, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.contract.files import write_atomically
from pipeline.contract.pages import render
from towers.report.plots import plot_differences
from towers.report.run_page import TEMPLATES, default_settings, setting_text


def p_text(p: float) -> str:
    """A p-value in short."""
    return "< 0.0001" if p < 0.00005 else f"{p:.4f}"


def write_comparison(path: Path, result: dict[str, Any]) -> None:
    """Writes the page, in one step; `result` is from `compare`."""
    names = [run["name"] for run in result["runs"]]
    page = render(
        TEMPLATES / "compare.html",
        title="Comparison of runs",
        result=result,
        names=names,
        metrics=[
            (metric, *_cells(rows), plot_differences(metric, rows))
            for metric, rows in result["metrics"].items()
        ],
        differing=_differing_settings([run["configuration"] for run in result["runs"]]),
    )
    write_atomically(path, page)


def _cells(rows: list[dict[str, Any]]) -> list[list[tuple[str, ...]]]:
    """The rows of the table of means, and of that of p-values, from a metric of `compare`."""
    first, *others = rows
    means: list[tuple[str, ...]] = [(first["run"], f"{first['mean']:.4f}", "", "", "", "")]
    p_values: list[tuple[str, ...]] = []
    for row in others:
        difference = f"{row['difference']:+.4f} ±\N{NO-BREAK SPACE}{row['half_width']:.4f}"
        counts = f"{row['better']:,}", f"{row['worse']:,}", f"{row['equal']:,}"
        means.append((row["run"], f"{row['mean']:.4f}", difference, *counts))
        tests = ("p_t_test", "p_permutation", "p_holm")
        p_values.append((row["run"], *(p_text(row[test]) for test in tests)))
    return [means, p_values]


def _differing_settings(configurations: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The settings that are not the same in all runs: name, and the value of each run.

    What the configuration of an older run does not have was as it is by default.
    """
    whole = [default_settings() | configuration for configuration in configurations]
    rows = []
    for name in sorted({name for settings in whole for name in settings} - {"run"}):
        values = [setting_text(settings.get(name)) for settings in whole]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return rows
