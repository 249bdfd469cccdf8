"""The page `report.html` of a run: what was trained, how well it does and for whom, and its index.

It is made of the records in the run directory, and of those of the prepared data and of a
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
from towers.report.plots import plot_buckets, plot_index, plot_loss, plot_metric
from towers.training.run_directory import BREAKDOWN, CONFIG, METRICS, REPORT, TRAINING, read_json
from towers.training.settings import TrainConfig

TEMPLATES = Path(__file__).with_name("templates")
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
    half_widths, popularity = metrics["confidence_95"], metrics["popularity"]
    index = json.loads(_text_of(version, "ann_report.json") or "null")
    defaults = default_settings().items()
    seconds = sorted(epoch["seconds"] for epoch in training["history"])
    has_tree = index and index["scann"] and index["scann"]["num_leaves"]
    page = render(
        TEMPLATES / "run.html",
        title="Run report",
        configuration=configuration,
        metrics=metrics,
        training=training,
        figures=_figures(metrics, training, index),
        metric_rows=[
            (name, f"{value:.4f}", f"± {half_widths[name]:.4f}", f"{popularity[name]:.4f}")
            for name, value in metrics[metrics["split"]].items()
        ],
        training_plots=_training_plots(training),
        epoch_time=_time(seconds[len(seconds) // 2]) if seconds else "",
        groups=_groups(read_json(root / BREAKDOWN)) if (root / BREAKDOWN).is_file() else None,
        index=index,
        index_rows=_index_rows(index) if index else [],
        index_plot=plot_index(index) if has_tree else "",
        manifest=schema.read_manifest(data, "prepared"),
        card=_text_of(version, "model_card.md"),
        settings=[
            (name, setting_text(value), (name, value) in defaults)
            for name, value in sorted(configuration.items())
        ],
    )
    write_atomically(root / REPORT, page)
    return root / REPORT


def default_settings() -> dict[str, Any]:
    """The defaults of training, as JSON gives them back."""
    values = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return json.loads(json.dumps(values))


def setting_text(value: Any) -> str:
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
    """Title, what is counted, text, plot and rows of each part of a breakdown."""
    groups = []
    for part, (title, noun, count, text) in _GROUPS.items():
        buckets = breakdown[part]
        labels = [_range(bucket) for bucket in buckets]
        plot = plot_buckets(part.replace("_", "-"), labels, buckets, breakdown["k"])
        rows = [
            (
                *(label, f"{bucket[count]:,}", f"{bucket['positives']:,}"),
                *(_interval(bucket[ranking]) for ranking in ("model", "popularity")),
            )
            for label, bucket in zip(labels, buckets, strict=True)
        ]
        groups.append((title, noun, text, plot, rows))
    return groups


def _index_rows(index: dict[str, Any]) -> list[tuple[str, ...]]:
    scann, exact = index["scann"], index["exact"]
    rows: list[tuple[str, ...]] = [
        ("exact search", "1", f"{exact['batch_ms']:.3g}", f"{exact['single_ms']:.3g}")
    ]
    if scann:
        times = f"{scann['batch_ms']:.3g}", f"{scann['single_ms']:.3g}"
        rows.append((f"ScaNN, {scann['kind']}", f"{scann['recall']:.4f}", *times))
        rows.append(("promised", f"{index['target_recall']:g}", "", ""))
    return rows


def _text_of(version: str | os.PathLike[str] | None, name: str) -> str | None:
    """A file of a version; None where it is missing."""
    if version is None or not (Path(version) / name).is_file():
        return None
    return (Path(version) / name).read_text(encoding="utf-8")


def _range(bucket: dict[str, Any]) -> str:
    low, high = bucket["from"], bucket["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _interval(recall: dict[str, Any]) -> str:
    if recall["mean"] is None:
        return "–"
    spread = recall["half_width"]
    return f"{recall['mean']:.4f}" + ("" if spread is None else f" ±\N{NO-BREAK SPACE}{spread:.4f}")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
