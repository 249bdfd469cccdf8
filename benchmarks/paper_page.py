"""The page of the papers' tables: ours beside the published values, and what has not been run."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_search import name_of, trials_of
from benchmarks.paper_settings import FIGURES, TABLES, Metrics, Table, epoch_seconds
from benchmarks.paper_tables import LOG, NOTES, PHASES, POPULARITY, ROOT, results_of, rows_of

_CLOSE = 0.97  # a value is reproduced from this share of the published one on


def render() -> str:
    """The page of all tables."""
    notes = noted()
    parts = [
        "# The papers' tables\n",
        "Each cell is ours, beside it in brackets the published value; `±` is the standard "
        "deviation over seeds. Bold: not below it. A value more than 3 % below it carries a `▼`. "
        "Metrics are means over all test users of the ranking of the whole corpus, train items "
        "left out; `ndcg_xir` is what the code of XIR and BMNS calls NDCG.\n",
        summary(),
    ]
    for (name, dataset), table in TABLES.items():
        path = results_of(name, dataset)
        parts.append(section(table, dataset, rows_of(path), path))
        parts += trials(name, dataset)
        if (name, dataset) == ("adasir", "gowalla"):
            parts += phases()
        if f"{name} {dataset}" in notes:
            parts.append(notes[f"{name} {dataset}"] + "\n")
    parts.append(f"## Figures\n\n{notes['figures']}\n")
    parts.append(
        f"Not run, with the estimated CPU hours of a seed: {'; '.join(missing_curves())}.\n"
    )
    parts.append(f"## What is left\n\n{notes['left']}\n")
    return "\n".join([*parts, evaluations()])


def summary() -> str:
    """How many rows of each published table come out as published."""
    lines = ["How many rows have every published value within 3 %, or above it:\n"]
    lines += ["| table | rows | as published | further below |", "|" + " --- |" * 4]
    for (name, dataset), table in TABLES.items():
        groups = longest_runs(table, rows_of(results_of(name, dataset)))
        below = {
            method: any(
                is_below([row["metrics"][metric] for row in rows], value)
                for metric, value in table.rows[method].paper.items()
            )
            for method, rows in groups.items()
            if method != POPULARITY and table.rows[method].paper
        }
        if below:
            texts = [f"`{method}`" for method, is_below in below.items() if is_below]
            good = len(below) - len(texts)
            lines.append(f"| {table.title} | {len(below)} | {good} | {', '.join(texts)} |")
    return "\n".join(lines) + "\n"


def noted() -> dict[str, str]:
    """ "table dataset" → what is to be said about it."""
    parts = NOTES.read_text().split("\n## ")[1:]
    return {head: text.strip() for head, _, text in (part.partition("\n") for part in parts)}


def section(table: Table, dataset: str, rows: list[dict[str, Any]], path: Path) -> str:
    """One table, its settings, and what has not been run; of each method the longest runs."""
    groups = longest_runs(table, rows)
    lines = [f"## {table.title}\n", f"In brackets: {table.paper}.\n"]
    if groups or table.published:
        heads = ["method", "epochs", "seeds", *table.metrics, "CPU minutes"]
        lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for method in (name for name in (POPULARITY, *table.rows) if name in groups):
            paper = table.rows[method].paper if method in table.rows else {}
            lines.append(f"| {' | '.join(cells(method, groups[method], table.metrics, paper))} |")
        for method, paper in table.published.items():
            values = [f"({digits(paper[m])})" if m in paper else "" for m in table.metrics]
            lines.append(f"| {' | '.join([method, 'not built', '–', *values, '–'])} |")
        lines.append("")
    if groups:
        own = [row for name, shown in groups.items() if name != POPULARITY for row in shown]
        own = own or groups[POPULARITY]
        newest = max(own, key=lambda row: row["date"])
        machine = newest.get("processor", "processor not noted")
        lines.append(
            f"{newest['date']}, commit {newest['commit']}, {machine}, "
            f"[results](../{path.relative_to(ROOT)}), such as by\n`{newest['command']}`.\n"
        )
    missing = [name for name in table.rows if name not in groups]
    if missing:
        hours = costs(table, dataset, missing)
        lines.append(f"Not run, with the estimated CPU hours of a seed: {hours}.\n")
    return "\n".join(lines)


def longest_runs(table: Table, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Method → its runs that a table shows: those of the most epochs, or that validation ended."""
    longest: dict[str, int] = {}
    for row in rows:
        longest[row["method"]] = max(row["epochs"], longest.get(row["method"], 0))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        method = row["method"]
        is_shown = stopped(row) or row["epochs"] == longest[method]
        if is_shown and method in (POPULARITY, *table.rows):
            groups.setdefault(method, []).append(row)
    if POPULARITY in groups:  # one for runs with a validation part, and one for those without
        del groups[POPULARITY][1:]
    return groups


def stopped(row: dict[str, Any]) -> bool:
    """Whether the validation part said when to stop, for each seed by itself."""
    return bool(row["config"].get("validation_ratio"))


def cells(
    method: str, rows: list[dict[str, Any]], metrics: Sequence[str], paper: Metrics
) -> list[str]:
    """One line of a table: the seeds of a method."""
    least, most = (limit(row["epochs"] for row in rows) for limit in (min, max))
    epochs = f"{least}" if least == most else f"{least}-{most}"
    values = [cell([row["metrics"][m] for row in rows], paper.get(m)) for m in metrics]
    minutes = [row["cpu_seconds"] / 60 for row in rows if "cpu_seconds" in row]
    shown = f"{statistics.mean(minutes):.0f}" if minutes else "–"
    if method == POPULARITY:
        return [f"`{method}`", "–", "–", *values, "–"]
    return [f"`{method}`", epochs, str(len(rows)), *values, shown]


def costs(table: Table, dataset: str, names: list[str]) -> str:
    """Names of rows, each with the CPU hours of one seed, as far as an epoch was measured."""
    texts = []
    for name in names:
        hours = table.epochs * epoch_seconds(table, dataset, name) / 3600
        texts.append(f"`{name}` {max(hours, 0.1):.1f}" if hours else f"`{name}`")
    return ", ".join(texts)


def missing_curves() -> list[str]:
    """The curves that lack points, each with what they cost together."""
    texts = []
    for (name, dataset), table in FIGURES.items():
        run = {row["method"] for row in rows_of(results_of(name, dataset))}
        lacking = [row for row in table.rows if row not in run]
        hours = sum(epoch_seconds(table, dataset, row) for row in lacking) * table.epochs / 3600
        if lacking:
            title = (
                table.title if dataset == "gowalla" else f"{table.title}, {dataset.capitalize()}"
            )
            texts.append(
                f"{title}, {len(lacking)} of {len(table.rows)} points, {max(hours, 0.1):.1f}"
            )
    return texts


def trials(table: str, dataset: str) -> list[str]:
    """What was tried on the validation part for the rows of a table."""
    rows = rows_of(trials_of(table, dataset))
    if not rows:
        return []
    lines = ["Tried on the validation part, which alone decides:\n"]
    lines += ["| method | what differs | best epoch | recall@50 | ndcg@50 | CPU minutes |"]
    lines += ["|" + " --- |" * 6]
    best = {row["method"]: row for row in sorted(rows, key=_by_validation)}
    for row in rows:
        recall, ndcg = map(digits, row["validation"].values())
        recall = f"**{recall}**" if best[row["method"]] is row else recall
        shown = (name_of(row["trial"]), str(row["best_epoch"]), recall, ndcg)
        minutes = round(row["cpu_seconds"] / 60)
        lines.append(f"| `{row['method']}` | {' | '.join(shown)} | {minutes} |")
    return ["\n".join(lines) + "\n"]


def _by_validation(row: dict[str, Any]) -> float:
    return row["validation"]["recall@50"]


# Table 3 of the AdaSIR paper, with an accelerator: seconds of sampling and of training.
_PHASES = {
    "adasir_u": (0.0741, 0.7572),
    "adasir_p": (0.0734, 0.7475),
    "adasir_w": (0.0637, 1.3787),
}


def phases() -> list[str]:
    """How long an epoch of AdaSIR samples, and trains; nothing before `paper_phases` has run."""
    if not PHASES.exists():
        return []
    found = json.loads(PHASES.read_text())
    lines = [
        "Seconds of an epoch by phase, in brackets the paper's (Table 3, with an accelerator):\n",
        "| method | sampling | training | sampling ÷ training |",
        "| --- | --- | --- | --- |",
    ]
    for method, paper in _PHASES.items():
        means = [found[method][phase][0] for phase in ("sampling", "training")]
        texts = [
            f"{mean:.2f} ± {found[method][phase][1]:.2f} ({value:.2f})"
            for phase, mean, value in zip(("sampling", "training"), means, paper, strict=True)
        ]
        share = f"{means[0] / means[1]:.2f} ({paper[0] / paper[1]:.2f})"
        lines.append(f"| `{method}` | {' | '.join(texts)} | {share} |")
    lines.append(
        f"\n{found['processor']}, beside it {found['beside']}; commit {found['commit']}, "
        f"[results](../{PHASES.relative_to(ROOT)}), `{found['command']}`.\n"
    )
    return ["\n".join(lines)]


def evaluations() -> str:
    """How often each row was measured on test."""
    rows = rows_of(LOG)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row["table"], row["dataset"]), Counter())[row["method"]] += 1
    lines = [
        "## Measured on test\n",
        "How often, repeated runs and checks included; the code logs each in "
        f"[one file](../{LOG.relative_to(ROOT)}), since 2026-11-28.\n",
        "| table | data set | measurements |",
        "| --- | --- | --- |",
    ]
    for (table, dataset), methods in counts.items():
        text = ", ".join(f"`{method}` {count}" for method, count in methods.items())
        lines.append(f"| {table} | {dataset} | {text} |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], paper: float | None) -> str:
    """Ours ± deviation, and the paper's."""
    mean = statistics.mean(values)
    text = digits(mean)
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.4f}".replace("0.", ".", 1)
    if paper is None:
        return text
    mark = "▼" if is_below(values, paper) else ""
    text = f"**{text}**" if mean >= paper else f"{text}{mark}"
    return f"{text} ({digits(paper)})"


def is_below(values: list[float], paper: float) -> bool:
    """Whether the mean of ours is not near the published value."""
    return statistics.mean(values) < _CLOSE * paper


def digits(value: float) -> str:
    """Four decimals, without the zero before them."""
    return f".{round(value * 10_000):04d}"
