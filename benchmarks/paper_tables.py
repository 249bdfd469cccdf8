"""Trains the methods of a published table with its settings, and keeps what comes out.

    python -m benchmarks.paper_tables --table TABLE --data DIR --work DIR
        [--dataset D ...] [--method M ...] [--seeds S ...] [--epochs N] [--patience P]
    python -m benchmarks.paper_tables --render

DIR of --data holds `<dataset>/interactions.parquet`, or train, validation and test files where the
split is given. Under --work stand the prepared data and the runs: the same command goes on where a
killed one stopped, and one that finished costs nothing. Every finished run replaces its row in
`benchmarks/results/paper_<table>_<dataset>.json`, so results can be looked at as they come.

Of Gowalla and Ta-Feng, 80 % of each user's rows are train, the rest test. With --patience, a tenth
of the train rows is set aside and training stops P epochs after the best Recall@50 on it; this
says how many --epochs the whole train split deserves. The test split chooses nothing.

--render writes `docs/paper_tables.md`: ours beside the paper's, and what has not been run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper_settings import FIGURES, TABLES, Row, Table
from benchmarks.record import command, write
from pipeline.contract import schema
from pipeline.contract.files import write_atomically

ALL = {**TABLES, **FIGURES}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTES = ROOT / "benchmarks" / "paper_notes.md"
PAGE = ROOT / "docs" / "paper_tables.md"
KS = (10, 20, 50)
POPULARITY = "popularity"
TEACHER_SEED = 10  # of the one run that runs of all seeds learn from
GIVEN = ("tmall", "taobao")  # data sets whose split is given
_CLOSE = 0.97  # a value is reproduced from this share of the published one on


def main() -> None:
    """Parses, then trains and measures, or renders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the page and end")
    parser.add_argument("--table", choices=sorted({table for table, _ in ALL}))
    parser.add_argument("--dataset", nargs="*", help="all that the table has by default")
    parser.add_argument("--method", nargs="*", help="rows of the table; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[10])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=0, help="epochs; 0: no validation part")
    parser.add_argument("--data", help="directory of the data sets")
    parser.add_argument("--work", help="directory of prepared data and runs")
    options = parser.parse_args()
    if options.render:
        write_atomically(PAGE, render())
        return
    options.commit = commit()  # now: the checkout may move on while a run lasts
    if not (options.table and options.data and options.work):
        parser.error("--table, --data and --work must be given, or --render.")
    for dataset in options.dataset or [name for table, name in ALL if table == options.table]:
        table = ALL[options.table, dataset]
        for method in options.method or table.rows:
            if method not in table.rows:
                parser.error(f"--method must be of {', '.join(table.rows)}, got {method!r}.")
            for seed in options.seeds:
                run(options, dataset, method, seed)


def run(options: argparse.Namespace, dataset: str, method: str, seed: int) -> None:
    """Trains and measures one row with one seed, and notes it."""
    from towers.evaluation.evaluate import evaluate
    from towers.evaluation.settings import EvaluateConfig
    from towers.training.settings import TrainConfig
    from towers.training.train import train

    table = ALL[options.table, dataset]
    data = prepared(options, dataset)
    settings = settings_of(table.rows[method], table, method)
    owner = table.runs or options.table
    place = place_of(options, dataset, method, seed)
    paths = {
        name: str(place_of(options, dataset, settings[name], of))
        for name, of in (("teacher", TEACHER_SEED), ("init_from", seed))
        if name in settings
    }
    config = TrainConfig(
        data=str(data),
        run=str(place),
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        **(settings | paths),
    )
    print(f"{options.table} {dataset} {method} seed {seed}: {place}", flush=True)
    summary = train(config)
    metrics = evaluate(EvaluateConfig(data=str(data), run=str(place), ks=KS))
    shared = {"table": owner, "dataset": dataset, "commit": options.commit}
    shared |= {"date": datetime.date.today().isoformat(), "command": command("paper_tables")}
    shown = {key: value for key, value in settings.items() if key != "method"}
    protocol = {"validation_ratio": 0.1 if options.patience else 0.0}
    rows = [
        {
            "method": method,
            "d": config.dim,
            "seed": seed,
            "epochs": summary["best_epoch"] or summary["epochs"],
            "config": shown | protocol,
            "metrics": rounded(metrics["test"]),
            "train_seconds": round(summary["seconds"], 1),
        }
        | ({"history": by_time(summary["history"])} if options.patience else {}),
        {"method": POPULARITY, "d": 0, "seed": 0, "epochs": 0, "config": protocol}
        | {"metrics": rounded(metrics["popularity"])},
    ]
    note(options.table, dataset, [shared | row for row in rows])


def place_of(options: argparse.Namespace, dataset: str, method: str, seed: int) -> Path:
    """The directory of a run; tables that share runs share it."""
    owner = ALL[options.table, dataset].runs or options.table
    name = f"{owner}-{dataset}-{method}-{seed}".replace(", ", "-").replace(" ", "")
    return Path(options.work) / "runs" / f"{name}{'-validated' if options.patience else ''}"


def by_time(history: Iterable[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(seconds of training so far, Recall@50 on the validation part) after each epoch."""
    seconds = itertools.accumulate(epoch["seconds"] for epoch in history)
    values = (epoch["val_recall@50"] for epoch in history)
    return [(round(t, 1), round(v, 5)) for t, v in zip(seconds, values, strict=True)]


def settings_of(row: Row, table: Table, name: str) -> dict[str, Any]:
    """The fields of `TrainConfig` that a row decides."""
    options = {"options": {key: str(value) for key, value in row.options.items()}}
    return {"method": row.method or name, **table.settings, **row.settings, **options}


def prepared(options: argparse.Namespace, dataset: str) -> Path:
    """The prepared data, made where it is not there yet."""
    from pipeline.job import prepare
    from pipeline.prepare.settings import PrepareConfig

    source, ratio = Path(options.data) / dataset, 0.1 if options.patience else 0.0
    if dataset in GIVEN:
        parts = "{" + ",".join(schema.SPLITS) + "}"
        how: dict[str, Any] = {"source": str(source / f"{parts}.parquet"), "split": "given"}
        output = Path(options.work) / "data" / dataset
    else:
        how = {"source": str(source / "interactions.parquet"), "validation_ratio": ratio}
        output = Path(options.work) / "data" / f"{dataset}{'-validated' if ratio else ''}"
    if not (output / schema.MANIFEST).is_file():
        prepare(PrepareConfig(output=str(output), **how), [])
    return output


def note(table: str, dataset: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts rows into the file of a table, in place of those of the same run."""
    path = results_of(table, dataset)
    kept = rows_of(path)
    for row in rows:
        kept = [other for other in kept if identity(other) != identity(row)] + [dict(row)]
    kept.sort(key=lambda row: (row["method"], row["seed"], row["epochs"]))
    write(path, kept)


def results_of(table: str, dataset: str) -> Path:
    """The file of a table; tables whose rows are the same runs share one."""
    return RESULTS / f"paper_{ALL[table, dataset].runs or table}_{dataset}.json"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a file of results holds; none before the first run."""
    return json.loads(path.read_text()) if path.exists() else []


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two runs apart; settings of a table that have changed since do not."""
    return row["method"], row["seed"], row["epochs"], row["config"].get("validation_ratio", 0.0)


def rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that the papers report."""
    wanted = [f"{name}@{k}" for name in ("recall", "ndcg", "ndcg_xir") for k in KS]
    return {name: round(metrics[name], 5) for name in wanted}


def commit() -> str:
    """The commit of the code that ran, with a mark where anything but results was changed."""
    code = [".", ":!benchmarks/results", ":!docs"]
    short = _git("rev-parse", "--short", "HEAD").stdout.strip()
    return short + ("-dirty" if _git("diff", "--quiet", "HEAD", "--", *code).returncode else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def render() -> str:
    """The page of all tables."""
    notes = noted()
    parts = [
        "# The papers' tables\n",
        "Each cell is ours, beside it in brackets the published value; `±` is the standard "
        "deviation over seeds. Bold: not below it. A value more than 3 % below it carries a `▼`. "
        "Metrics are means over all test users of the ranking of the whole corpus, train items "
        "left out; `ndcg_xir` is what the code of XIR and BMNS calls NDCG.\n",
    ]
    for (name, dataset), table in TABLES.items():
        path = results_of(name, dataset)
        rows = [row for row in rows_of(path) if row["method"] in (POPULARITY, *table.rows)]
        parts.append(section(table, rows, path))
        if rows and f"{name} {dataset}" in notes:
            parts.append(notes[f"{name} {dataset}"] + "\n")
    parts.append(f"## Figures\n\n{notes['figures']}\n")
    return "\n".join(parts)


def noted() -> dict[str, str]:
    """ "table dataset" → what is to be said about it."""
    parts = NOTES.read_text().split("\n## ")[1:]
    return {head: text.strip() for head, _, text in (part.partition("\n") for part in parts)}


def section(table: Table, rows: list[dict[str, Any]], path: Path) -> str:
    """One table, its settings, and what has not been run; of each method the longest runs."""
    longest: dict[str, int] = {}
    for row in rows:
        longest[row["method"]] = max(row["epochs"], longest.get(row["method"], 0))
    rows = [row for row in rows if row["epochs"] == longest[row["method"]]]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    lines = [f"## {table.title}\n", f"In brackets: {table.paper}.\n"]
    if groups:
        heads = ["method", "epochs", "seeds", *table.metrics]
        lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        order = [POPULARITY, *table.rows]
        for method in sorted(groups, key=order.index):
            some, epochs = groups[method], longest[method]
            paper = table.rows[method].paper if method in table.rows else {}
            values = [
                cell([row["metrics"][m] for row in some], paper.get(m)) for m in table.metrics
            ]
            counts = [str(epochs or "–"), str(len(some) if epochs else "–")]
            lines.append(f"| {' | '.join([f'`{method}`', *counts, *values])} |")
        newest = max(rows, key=lambda row: row["date"])
        lines.append(
            f"\n{newest['date']}, commit {newest['commit']}, "
            f"[results](../{path.relative_to(ROOT)}), such as by\n`{newest['command']}`.\n"
        )
    missing = [name for name in table.rows if name not in groups]
    if missing:
        lines.append(f"Not run: {', '.join(f'`{name}`' for name in missing)}.\n")
    return "\n".join(lines)


def cell(values: list[float], paper: float | None) -> str:
    """Ours ± deviation, and the paper's."""
    mean = statistics.mean(values)
    text = f".{round(mean * 10_000):04d}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.4f}".replace("0.", ".", 1)
    if paper is None:
        return text
    mark = "▼" if mean < _CLOSE * paper else ""
    text = f"**{text}**" if mean >= paper else f"{text}{mark}"
    return f"{text} (.{round(paper * 10_000):04d})"


if __name__ == "__main__":
    main()
