"""Trains the methods of a published table with its settings, and keeps what comes out.

    python -m benchmarks.paper_tables --table TABLE --data DIR --work DIR
        [--dataset D ...] [--method M ...] [--seeds S ...] [--epochs N] [--patience P]
    python -m benchmarks.paper_tables --check TABLE/DATASET/METHOD[/SEED] --data DIR --work DIR
    python -m benchmarks.paper_tables --render

DIR of --data holds `<dataset>/interactions.parquet`, or train, validation and test files where the
split is given. Under --work stand the prepared data and the runs: the same command goes on where a
killed one stopped, and one that finished costs nothing. Every finished run replaces its row in
`benchmarks/results/paper_<table>_<dataset>.json`, so results can be looked at as they come.

Of Gowalla and Ta-Feng, 80 % of each user's rows are train, the rest test. With --patience, a tenth
of the train rows is set aside and training stops P epochs after the best Recall@50 on it; this
says how many --epochs the whole train split deserves. The test split chooses nothing.

--check trains a row that is kept once more with the code of now, elsewhere, and fails if it comes
out differently.

--render writes `docs/paper_tables.md`: ours beside the paper's, and what has not been run. Each
measurement on test is logged in `benchmarks/results/paper_test_evaluations.json`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper_settings import FIGURES, TABLES, Row, Table
from benchmarks.record import command, processor, write
from pipeline.contract import schema
from pipeline.contract.files import write_atomically

ALL = {**TABLES, **FIGURES}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTES = ROOT / "benchmarks" / "paper_notes.md"
PAGE = ROOT / "docs" / "paper_tables.md"
KS = (5, 10, 20, 50)
POPULARITY = "popularity"
TEACHER_SEED = 10  # of the one run that runs of all seeds learn from
GIVEN = ("tmall", "taobao")  # data sets whose split is given
LOG = RESULTS / "paper_test_evaluations.json"
PHASES = RESULTS / "paper_phases.json"


def main() -> None:
    """Parses, then trains and measures, or renders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the page and end")
    parser.add_argument("--check", help="a row to be trained again: TABLE/DATASET/METHOD[/SEED]")
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
        from benchmarks.paper_page import render

        write_atomically(PAGE, render())
        return
    options.commit = commit()  # now: the checkout may move on while a run lasts
    if not ((options.table or options.check) and options.data and options.work):
        parser.error("--table or --check, --data and --work must be given, or --render.")
    if options.check:
        try:
            sys.exit(0 if check(options) else 1)
        except ValueError as error:
            parser.error(f"--{error}")
    for dataset in options.dataset or [name for table, name in ALL if table == options.table]:
        table = ALL[options.table, dataset]
        for method in options.method or table.rows:
            if method not in table.rows:
                parser.error(f"--method must be of {', '.join(table.rows)}, got {method!r}.")
            for seed in options.seeds:
                run(options, dataset, method, seed)


def run(options: argparse.Namespace, dataset: str, method: str, seed: int) -> None:
    """Trains and measures one row with one seed, and notes it."""
    place = place_of(options, dataset, method, seed)
    rows = measured(options, dataset, method, seed, place)
    note(options.table, dataset, rows)


def measured(
    options: argparse.Namespace, dataset: str, method: str, seed: int, place: Path
) -> list[dict[str, Any]]:
    """Trains one row with one seed in a directory, or goes on there; and popularity's row."""
    from towers.evaluation.evaluate import evaluate_run
    from towers.evaluation.settings import EvaluateConfig
    from towers.training.settings import TrainConfig
    from towers.training.train import train

    table = ALL[options.table, dataset]
    settings = settings_of(table.rows[method], table, method)
    data = prepared(options, dataset, with_features=settings.get("tower") == "features")
    owner = table.runs or options.table
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
    clock = CpuClock(place)
    summary = train(config, [clock.callback()])
    metrics = evaluate_run(EvaluateConfig(data=str(data), run=str(place), ks=KS))
    shared = {"table": owner, "dataset": dataset, "commit": options.commit}
    shared |= {"date": datetime.date.today().isoformat(), "command": command("paper_tables")}
    log_evaluation(shared | {"method": method, "seed": seed, "epochs": summary["epochs"]})
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
            "confidence_95": rounded(metrics["confidence_95"]),
            "train_seconds": round(summary["seconds"], 1),
            "cpu_seconds": clock.seconds(),
            "processor": processor(),
        }
        | ({"history": by_time(summary["history"])} if options.patience else {}),
        {"method": POPULARITY, "d": 0, "seed": 0, "epochs": 0, "config": protocol}
        | {"metrics": rounded(metrics["popularity"])},
    ]
    return [shared | row for row in rows]


def check(options: argparse.Namespace) -> bool:
    """Trains the row of --check anew; true if it is within the interval of the one that is kept.

    The interval is the one of 95 % of the mean over the test users.
    """
    kept: list[dict[str, Any]] = []
    parts = options.check.split("/")
    options.table, dataset, method, seed = [*parts, *("", "", "", "10")[len(parts) :]][:4]
    if (options.table, dataset) in ALL:
        rows = rows_of(results_of(options.table, dataset))
        kept = [row for row in rows if (row["method"], str(row["seed"])) == (method, seed)]
    if not kept or method not in ALL[options.table, dataset].rows:
        raise ValueError(
            f"check must be TABLE/DATASET/METHOD[/SEED] of a kept row, got {options.check!r}: "
            f"{RESULTS} has them."
        )
    old = max(kept, key=lambda row: row["epochs"])
    options.epochs = old["epochs"]
    options.patience = old["epochs"] if old["config"].get("validation_ratio") else 0
    run = place_of(options, dataset, method, int(seed)).name
    place = Path(options.work) / "checks" / f"{run}-{options.commit}"  # or nothing may be trained
    new, _ = measured(options, dataset, method, int(seed), place)
    within, widths = True, old.get("confidence_95", new["confidence_95"])
    for metric, before in old["metrics"].items():
        now, width = new["metrics"][metric], widths[metric]
        inside = abs(now - before) <= width
        within &= inside
        sign = "within" if inside else "OUTSIDE"
        print(f"{metric:12} {now:.5f}, kept {before:.5f} ± {width:.5f}: {sign}")
    return within


class CpuClock:
    """The CPU time of a run by epoch, kept beside it so that a resumed run knows all of it."""

    def __init__(self, place: Path) -> None:
        self._file = place / "cpu_seconds.json"
        self._last = time.process_time()

    def callback(self) -> Any:
        """Notes the time of an epoch at its end."""
        from towers.legacy_keras import tf_keras

        return tf_keras.callbacks.LambdaCallback(on_epoch_end=self._note)

    def _note(self, epoch: int, logs: Any) -> None:
        now = time.process_time()
        write(self._file, self._by_epoch() | {str(epoch): round(now - self._last, 2)})
        self._last = now

    def _by_epoch(self) -> dict[str, float]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def seconds(self) -> float:
        """Of all epochs, their validation and checkpoints included."""
        return round(sum(self._by_epoch().values()), 1)


def log_evaluation(entry: Mapping[str, Any]) -> None:
    """Adds a measurement on test to the log of all of them, which the page shows."""
    write(LOG, [*rows_of(LOG), {key: value for key, value in entry.items() if key != "command"}])


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


def prepared(options: argparse.Namespace, dataset: str, *, with_features: bool = False) -> Path:
    """The prepared data, made where it is not there yet; of items with attributes or without."""
    from pipeline.job import prepare
    from pipeline.prepare.settings import PrepareConfig

    source, ratio = Path(options.data) / dataset, 0.1 if options.patience else 0.0
    if dataset in GIVEN:
        how: dict[str, Any] = {"source": str(source), "split": "given"}
        output = Path(options.work) / "data" / dataset
    else:
        how = {"source": str(source / "interactions.parquet"), "validation_ratio": ratio}
        output = Path(options.work) / "data" / f"{dataset}{'-validated' if ratio else ''}"
    if with_features:
        how |= {"item_features": str(source / "items.parquet")}
        output = output.with_name(f"{output.name}-features")
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
    """What tells two runs apart; settings of a table that have changed since do not.

    Nor do epochs where the validation part says when to stop.
    """
    ratio = row["config"].get("validation_ratio", 0.0)
    return row["method"], row["seed"], 0 if ratio else row["epochs"], ratio


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


if __name__ == "__main__":
    main()
