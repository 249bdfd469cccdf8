"""The page `report.html` of a run, and that of `twotower compare`.

The first says what was trained, how well it does and for whom, and how its index does. It is made
of the records in the run directory, and of those of the prepared data and of a
published version where their directories are known; what is not there is said in a sentence.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.contract.flags import as_flags
from pipeline.contract.index_plot import plot_index
from pipeline.contract.pages import render
from towers.report.plots import plot_buckets, plot_differences, plots_by_epoch
from towers.training.run_directory import (
    BREAKDOWN,
    CONFIG,
    METRICS,
    REPORT,
    TRAINING,
    default_settings,
    read_json,
)

_TEMPLATES = Path(__file__).with_name("templates")


def write_report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str],
    version: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the report of a run that was evaluated, in one step.

    Args:
      run: its directory, where the page is written.
      data: directory of the prepared data.
      version: directory of the version that was published of it.

    Returns:
      The path of the page.
    """
    root = Path(run)
    configuration = read_json(root / CONFIG)["configuration"]
    training, metrics = read_json(root / TRAINING), read_json(root / METRICS)
    index = json.loads(_text_of(version, "ann_report.json") or "null")
    breakdown = read_json(root / BREAKDOWN) if (root / BREAKDOWN).is_file() else {}
    defaults = default_settings().items()
    changed = {n: value for n, value in configuration.items() if (n, value) not in defaults}
    trained = datetime.datetime.fromtimestamp((root / TRAINING).stat().st_mtime, datetime.UTC)
    seconds = sorted(epoch["seconds"] for epoch in training["history"])
    page = render(
        _TEMPLATES / "run.html",
        title=f"Run report: {root.resolve().name}",
        command=shlex.join(["twotower", "train", *as_flags(changed)]),
        trained=f"{trained:%Y-%m-%d %H:%M} UTC",
        configuration=configuration,
        metrics=metrics,
        training=training,
        k=max(int(name.split("@")[1]) for name in metrics["popularity"]),
        training_plots=plots_by_epoch(training),
        epoch_time=seconds[len(seconds) // 2] if seconds else None,
        time=_time,
        groups=_groups(breakdown) if breakdown else None,
        examples=breakdown.get("examples"),
        index=index,
        index_plot=plot_index(index) if index else None,
        manifest=schema.read_manifest(data, "prepared"),
        card=_text_of(version, "model_card.md"),
        settings=[
            (name, _setting_text(value), (name, value) in defaults)
            for name, value in sorted(configuration.items())
        ],
    )
    write_atomically(root / REPORT, page)
    return root / REPORT


def p_text(p: float) -> str:
    """A p-value in short."""
    return "< 0.0001" if p < 0.00005 else f"{p:.4f}"


def comparison_page(result: dict[str, Any]) -> str:
    """The page of a comparison; `result` is from `compare`."""
    return render(
        _TEMPLATES / "compare.html",
        title="Comparison of runs",
        result=result,
        names=[run["name"] for run in result["runs"]],
        p_text=p_text,
        plot_differences=plot_differences,
        differing=_differing_settings(result["runs"]),
    )


def _setting_text(value: Any) -> str:
    """A setting in a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _groups(breakdown: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Of each part of a breakdown its plot and its labelled buckets."""
    groups = {}
    for part in ("by_popularity", "by_activity"):
        ends = [sorted({bucket["from"], bucket["to"]}) for bucket in breakdown[part]]
        labels = ["–".join(f"{end:,}" for end in both) for both in ends]
        plot = plot_buckets(part.replace("_", "-"), labels, breakdown[part], breakdown["k"])
        groups[part] = plot, list(zip(labels, breakdown[part], strict=True))
    return groups


def _text_of(version: str | os.PathLike[str] | None, name: str) -> str | None:
    """A file of a version; None where it is missing."""
    if version is None or not (Path(version) / name).is_file():
        return None
    return (Path(version) / name).read_text(encoding="utf-8")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _differing_settings(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The settings that are not the same in all runs: name, and the value of each run.

    What the configuration of an older run does not have was as it is by default.
    """
    whole = [default_settings() | run["configuration"] for run in runs]
    rows = []
    for name in sorted({name for settings in whole for name in settings} - {"run"}):
        values = [_setting_text(settings.get(name)) for settings in whole]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return rows
