"""The page `report.html` of a run: what was trained, how well it does and for whom, and its index.

It is made of the records in the run directory, and of those of the prepared data and of a
published version where their directories are known; what is not there is said in a sentence.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.contract.files import write_atomically
from towers.report.card import card_html
from towers.report.data import data_html
from towers.report.html import (
    columns,
    page,
    paragraph,
    section,
    table,
    tiles,
)
from towers.report.plots import (
    plot_buckets,
    plot_index,
    plot_loss,
    plot_metric,
)
from towers.report.settings import settings_html
from towers.training.run_directory import (
    BREAKDOWN,
    CONFIG,
    METRICS,
    REPORT,
    TRAINING,
    read_json,
)

_INDEX, _CARD = "ann_report.json", "model_card.md"  # files of a version


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
    path = root / REPORT
    record, training = read_json(root / CONFIG), read_json(root / TRAINING)
    metrics = read_json(root / METRICS)
    index = _read(version, _INDEX)
    parts = [
        _head(record["configuration"], metrics),
        _figures(metrics, training, index),
        _stale(metrics, training),
        section("Metrics", _metrics(metrics)),
        section("Training", _training(training)),
        _breakdown(root / BREAKDOWN),
        section("Index", _index(index)),
        section("Data", data_html(data)),
        section("Model card", _card(_read(version, _CARD)), tall=True),
        section("Configuration", settings_html(record["configuration"]), tall=True),
    ]
    write_atomically(path, page("Run report", parts))
    return path


def _head(configuration: dict[str, Any], metrics: dict[str, Any]) -> str:
    return paragraph(
        f"{configuration['method']}, {configuration['dim']} dimensions; {metrics['split']} split, "
        f"{metrics['users']:,} users, all candidates ranked."
    )


def _figures(
    metrics: dict[str, Any], training: dict[str, Any], index: dict[str, Any] | None
) -> str:
    """The first things to look at."""
    found, split = [], metrics["split"]
    k = max(int(name.split("@")[1]) for name in metrics[split])
    for name in (f"recall@{k}", f"ndcg@{k}"):
        value, popular = metrics[split][name], metrics["popularity"][name]
        interval = f"± {metrics['confidence_95'][name]:.4f}"
        found.append((name, f"{value:.4f}", f"{interval}; popularity {popular:.4f}"))
    stopped = ", stopped early" * training["stopped_early"]
    note = f"{training['epochs']:,} epochs, {training['steps']:,} steps{stopped}"
    found.append(("trained", _time(training["seconds"]), note))
    if index and index["scann"]:
        scann = index["scann"]
        note = f"{scann['batch_ms']:.3g} ms a batch, exact {index['exact']['batch_ms']:.3g} ms"
        found.append((f"index, recall@{index['at']}", f"{scann['recall']:.3f}", note))
    return tiles(found)


def _stale(metrics: dict[str, Any], training: dict[str, Any]) -> str:
    if metrics["steps"] == training["steps"]:
        return ""
    return paragraph(
        f"The metrics are those of step {metrics['steps']:,}; the run has been trained on since, "
        f"to step {training['steps']:,}: evaluate it again."
    )


def _metrics(metrics: dict[str, Any]) -> str:
    found, popular = metrics[metrics["split"]], metrics["popularity"]
    rows = [
        (name, f"{value:.4f}", f"± {metrics['confidence_95'][name]:.4f}", f"{popular[name]:.4f}")
        for name, value in found.items()
    ]
    half = -(-len(rows) // 2)
    header = ["", "model", "95 %", "popularity"]
    return columns(table(header, rows[:half]), table(header, rows[half:])) + paragraph(
        "Means over users. Popularity ranks by train rows, the same for all users but for what "
        "they know. ndcg_xir is for comparison with the tables of two papers only.",
        "soft",
    )


def _training(training: dict[str, Any]) -> str:
    history, best = training["history"], training["best_epoch"]
    text = f"Weights: {training['weights']}."
    if best:
        text += f" Epoch {best} was best on validation, and its weights are used."
    if not history:
        return paragraph(text + " No epoch is finished yet.")
    plots = [plot_loss(history, best)]
    measured = sorted(
        {n[4:].split("@")[0] for n in history[-1] if n.startswith("val_") and "@" in n}
    )
    plots += [plot_metric(history, metric, best) for metric in measured]
    if not measured:
        text += " The data have no validation split, so no metric was measured by epoch."
    seconds = sorted(one["seconds"] for one in history)[len(history) // 2]
    return paragraph(f"{text} An epoch takes {_time(seconds)} (median).") + columns(*plots)


def _breakdown(path: Path) -> str:
    if not path.is_file():
        return section("Recall by group", paragraph("Not measured yet: evaluate the run again."))
    found = read_json(path)
    parts = []
    for key, title, noun, text in (
        (
            "by_popularity",
            "Recall by popularity",
            "items",
            "Items in tenths by their train rows, the rarest first, and the top 1 % apart. Recall "
            "of a user looks at what is held out in the bucket alone; means over users who have "
            "some.",
        ),
        (
            "by_activity",
            "Recall by activity",
            "users",
            "Users in quarters by their train rows, the least active first.",
        ),
    ):
        buckets = found[key]
        labels = [_range(one) for one in buckets]
        plot = plot_buckets(key.replace("_", "-"), labels, buckets, found["k"])
        parts.append(
            section(title, paragraph(text), columns(plot, _bucket_table(noun, buckets, labels)))
        )
    return "\n".join(parts)


def _bucket_table(noun: str, buckets: list[dict[str, Any]], labels: list[str]) -> str:
    number = "candidates" if noun == "items" else "queries"
    rows = [
        (
            label,
            f"{one[number]:,}",
            f"{one['positives']:,}",
            _interval(one["model"]),
            _interval(one["popularity"]),
        )
        for label, one in zip(labels, buckets, strict=True)
    ]
    return table(["train rows", noun, "held out", "model", "popularity"], rows)


def _index(report: dict[str, Any] | None) -> str:
    if report is None:
        return paragraph("Not exported yet: twotower run and twotower export add the index.")
    scann, exact = report["scann"], report["exact"]
    head = paragraph(
        f"{report['candidates']:,} candidates of {report['dimensions']} dimensions; by default "
        f"searched: {report['default_index']}. A batch has 64 queries."
    )
    rows = [("exact search", "1", f"{exact['batch_ms']:.3g}", f"{exact['single_ms']:.3g}")]
    header = ["", f"recall@{report['at']}", "ms a batch", "ms a query"]
    if scann is None:
        reason = report.get("scann_is_absent_because", "none was made")
        return head + paragraph(f"No approximate index: {reason}.") + table(header, rows)
    times = f"{scann['batch_ms']:.3g}", f"{scann['single_ms']:.3g}"
    rows.append((f"ScaNN, {scann['kind']}", f"{scann['recall']:.4f}", *times))
    rows.append(("promised", f"{report['target_recall']:g}", "", ""))
    plot = [plot_index(report)] if scann["num_leaves"] else []
    return head + columns(*plot, table(header, rows))


def _card(card: str | None) -> str:
    if card is None:
        return paragraph("Not exported yet: a card is written with a version.")
    return card_html(card)


def _read(version: str | os.PathLike[str] | None, name: str) -> Any:
    """A file of a version, JSON or text; None where it is not there."""
    if version is None or not (Path(version) / name).is_file():
        return None
    path = Path(version) / name
    return read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")


def _range(bucket: dict[str, Any]) -> str:
    low, high = bucket["from"], bucket["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _interval(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "–"
    spread = found["half_width"]
    return f"{found['mean']:.4f}" + ("" if spread is None else f" ±\N{NO-BREAK SPACE}{spread:.4f}")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
