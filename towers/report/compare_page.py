"""The page of `twotower compare`: metrics of some runs, their differences, and their settings."""

from __future__ import annotations

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
    page = render(
        TEMPLATES / "compare.html",
        title="Comparison of runs",
        result=result,
        names=[run["name"] for run in result["runs"]],
        p_text=p_text,
        plot_differences=plot_differences,
        differing=_differing_settings(result["runs"]),
    )
    write_atomically(path, page)


def _differing_settings(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The settings that are not the same in all runs: name, and the value of each run.

    What the configuration of an older run does not have was as it is by default.
    """
    whole = [default_settings() | run["configuration"] for run in runs]
    rows = []
    for name in sorted({name for settings in whole for name in settings} - {"run"}):
        values = [setting_text(settings.get(name)) for settings in whole]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return rows
