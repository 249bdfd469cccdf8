"""The page `report.html` of a run, and that of `twotower compare`.

The first says what was trained, how well it does and for whom, and how its index does. It is made
of the records in the run directory, and of those of the prepared data and of a
published version where their directories are known; what is not there is said in a sentence.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.contract.pages import render
from towers.report.plots import (
    plot_buckets,
    plot_differences,
    plot_index,
    plot_loss,
    plot_metric,
)
from towers.training.run_directory import BREAKDOWN, CONFIG, METRICS, REPORT, TRAINING, read_json
from towers.training.settings import TrainConfig

_TEMPLATES = Path(__file__).with_name("templates")
_GROUPS = {  # of the breakdown → title, what is counted, its field, and what it is
    "by_popularity": (
        *("Recall by popularity", "items", "candidates"),
        "Items in tenths by their train rows, the rarest first, and the top 1 % apart. Recall of "
        "a user looks at what is held out in the bucket alone; means over users who have some.",
    ),
    "by_activity": (
        *("Recall by activity", "users", "queries"),
        "Users in quarters by their train rows, the least active first.",
    ),
}


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
    defaults = _default_settings().items()
    seconds = sorted(epoch["seconds"] for epoch in training["history"])
    has_tree = index and index["scann"] and index["scann"]["num_leaves"]
    page = render(
        _TEMPLATES / "run.html",
        title="Run report",
        configuration=configuration,
        metrics=metrics,
        training=training,
        figures=_figures(metrics, training, index),
        training_plots=_training_plots(training),
        epoch_time=_time(seconds[len(seconds) // 2]) if seconds else "",
        groups=_groups(read_json(root / BREAKDOWN)) if (root / BREAKDOWN).is_file() else None,
        index=index,
        index_plot=plot_index(index) if has_tree else "",
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


def write_comparison(path: Path, result: dict[str, Any]) -> None:
    """Writes the page, in one step; `result` is from `compare`."""
    page = render(
        _TEMPLATES / "compare.html",
        title="Comparison of runs",
        result=result,
        names=[run["name"] for run in result["runs"]],
        p_text=p_text,
        plot_differences=plot_differences,
        differing=_differing_settings(result["runs"]),
    )
    write_atomically(path, page)


def _default_settings() -> dict[str, Any]:
    """The defaults of training, as JSON gives them back."""
    values = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return json.loads(json.dumps(values))


def _setting_text(value: Any) -> str:
    """A setting in a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figures(
    metrics: dict[str, Any], training: dict[str, Any], index: dict[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The first things to look at: name, figure, and a note on it."""
    means, popularity = metrics[metrics["split"]], metrics["popularity"]
    k = max(int(name.split("@")[1]) for name in means)
    figures = []
    for name in (f"recall@{k}", f"ndcg@{k}"):
        note = f"± {metrics['confidence_95'][name]:.4f}; popularity {popularity[name]:.4f}"
        figures.append((name, f"{means[name]:.4f}", note))
    stopped = ", stopped early" if training["stopped_early"] else ""
    note = f"{training['epochs']:,} epochs, {training['steps']:,} steps{stopped}"
    figures.append(("trained", _time(training["seconds"]), note))
    if index and index["scann"]:
        scann = index["scann"]
        note = f"{scann['batch_ms']:.3g} ms a batch, exact {index['exact']['batch_ms']:.3g} ms"
        figures.append((f"index, recall@{index['at']}", f"{scann['recall']:.3f}", note))
    return figures


def _training_plots(training: dict[str, Any]) -> list[str]:
    """The loss by epoch, and each metric that was measured on the validation split."""
    history, best = training["history"], training["best_epoch"]
    if not history:
        return []
    names = {found[1] for name in history[-1] if (found := re.match("val_(.+)@", name))}
    plots = [plot_metric(history, metric, best) for metric in sorted(names)]
    return [plot_loss(history, best), *plots]


def _groups(breakdown: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each part of a breakdown its line of `_GROUPS`, its plot, and its labelled buckets."""
    groups = []
    for part, about in _GROUPS.items():
        ends = [sorted({bucket["from"], bucket["to"]}) for bucket in breakdown[part]]
        labels = ["–".join(f"{end:,}" for end in both) for both in ends]
        plot = plot_buckets(part.replace("_", "-"), labels, breakdown[part], breakdown["k"])
        groups.append((about, plot, list(zip(labels, breakdown[part], strict=True))))
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
    whole = [_default_settings() | run["configuration"] for run in runs]
    rows = []
    for name in sorted({name for settings in whole for name in settings} - {"run"}):
        values = [_setting_text(settings.get(name)) for settings in whole]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return rows
