"""Tries settings of a row of a published table on the validation part, and keeps what came out.

    python -m benchmarks.paper_search --table TABLE --dataset D --method M --data DIR --work DIR
        [--epochs 40] [--patience 4] [--trials N ...]

The trials of a row stand in SEARCHES, in the order of their running; each is what differs from the
settings of the table and the options of the row. A trial ends --patience epochs after the best
Recall@50 on validation, at most after --epochs. The test split is not read. Directories are as in
`benchmarks.paper_tables`: a command that was killed goes on where it stopped. A trial is written as
it ends, to `benchmarks/results/paper_search_<table>_<dataset>.json`. What wins goes by hand into
`benchmarks.paper_settings`; the page shows all trials.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping
from pathlib import Path

from benchmarks.paper_settings import LIGHT_FM, TABLES, Row
from benchmarks.paper_tables import (
    RESULTS,
    CpuClock,
    commit,
    prepared,
    rows_of,
    settings_of,
)
from benchmarks.record import command, processor, write

Trial = Mapping[str, float]
_OPTIONS = ("num_negatives", "soft_factor", "margin")  # the rest are settings of training

# The grid of Soft BPR, section 4.1: learning rate 5e-4 to 1e-2, H 8 to 64, 1 - α .05 to .4, and
# λ from {0, 1, 10, 100}e-4, a term of the loss, `batch_l2`. The tables have H = 16, .005, 0.
_L2: tuple[Trial, ...] = ({"batch_l2": 1e-3}, {"batch_l2": 1e-4}, {"batch_l2": 1e-2})
_POOLS: tuple[Trial, ...] = ({"num_negatives": 8}, {"num_negatives": 32}, {"num_negatives": 64})
_SOFT: Trial = {"soft_factor": 0.1, "learning_rate": 0.01}
SEARCHES: Mapping[tuple[str, str], tuple[Trial, ...]] = {
    ("bmns", "bmns"): ({"l2": 1e-5}, {"l2": 1e-6}, {"l2": 1e-4}),
    ("bmns", "ssl_pop"): ({"l2": 1e-5}, {"l2": 1e-6}, {"l2": 1e-4}),
    # AdaSIR chooses L2 from .1 to .0001.
    ("adasir", "warp"): ({}, {"l2": 0.1}, LIGHT_FM, {"l2": 0.1} | LIGHT_FM),
    ("adasir", "aobpr"): ({}, {"l2": 0.1}, {"l2": 0.001}),
    ("adasir", "adasir_u"): ({}, {"l2": 0.1}, {"l2": 0.001}),
    ("adasir", "adasir_w"): ({}, {"l2": 0.03}, {"l2": 0.06}, {"l2": 0.1}),
    ("sdns", "bpr"): (
        *({"learning_rate": 0.01}, {}, *_L2, {"learning_rate": 0.001}),
        {"learning_rate": 0.01, "batch_l2": 1e-2},
        {"batch_l2": 1e-3, "init_stddev": 0.01},  # as MixGCF's published code, by Xavier
        {"learning_rate": 0.001, "batch_l2": 1e-3},
    ),
    ("sdns", "dns"): (
        *({}, {"learning_rate": 0.001}, {"learning_rate": 0.01}),
        *_L2,
        *_POOLS,
        *({"learning_rate": 0.001} | l2 for l2 in _L2),
    ),
    ("sdns", "soft_bpr"): (
        _SOFT,
        *(_SOFT | l2 for l2 in _L2),
        *(_SOFT | {"soft_factor": factor} for factor in (0.2, 0.05, 0.4)),
        *({"soft_factor": 0.1, "learning_rate": rate} for rate in (0.005, 0.001)),
        *(_SOFT | pool for pool in _POOLS),
        *(_SOFT | {"learning_rate": rate, "batch_l2": 1e-3} for rate in (0.005, 0.001)),
    ),
}


def main() -> None:
    """Parses, then runs the trials of a row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", required=True, help="a row of the table")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40, help="at most, for each trial")
    parser.add_argument("--patience", type=int, default=4, help="epochs")
    parser.add_argument("--trials", nargs="*", type=int, help="which, from 0; all by default")
    parser.add_argument("--data", required=True, help="directory of the data sets")
    parser.add_argument("--work", required=True, help="directory of prepared data and runs")
    options = parser.parse_args()
    if (options.table, options.method) not in SEARCHES:
        known = ", ".join(" ".join(key) for key in SEARCHES)
        parser.error(f"--table and --method must be one of {known}.")
    options.commit = commit()
    trials = SEARCHES[options.table, options.method]
    for place in range(len(trials)) if options.trials is None else options.trials:
        run_trial(options, trials[place])


def run_trial(options: argparse.Namespace, trial: Trial) -> None:
    """Trains one trial and notes its best epoch on validation."""
    from towers.training.settings import TrainConfig
    from towers.training.train import train

    table = TABLES[options.table, options.dataset]
    settings = settings_of(changed(table.rows[options.method], trial), table, options.method)
    place = place_of_trial(options, trial)
    config = TrainConfig(
        data=str(prepared(options, options.dataset)),
        run=str(place),
        epochs=options.epochs,
        patience=options.patience,
        seed=options.seed,
        **settings,
    )
    print(f"{options.table} {options.dataset} {options.method} {name_of(trial)}", flush=True)
    clock = CpuClock(place)
    summary = train(config, [clock.callback()])
    best = summary["history"][summary["best_epoch"] - 1]
    row = {
        "table": options.table,
        "dataset": options.dataset,
        "method": options.method,
        "trial": dict(trial),
        "seed": options.seed,
        "epochs": summary["epochs"],
        "best_epoch": summary["best_epoch"],
        "validation": {name: round(best[f"val_{name}"], 5) for name in ("recall@50", "ndcg@50")},
        "by_epoch": [round(epoch["val_recall@50"], 5) for epoch in summary["history"]],
        "cpu_seconds": clock.seconds(),
        "processor": processor(),
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
        "command": command("paper_search"),
    }
    path = trials_of(options.table, options.dataset)
    same = ("method", "trial", "seed")
    kept = [other for other in rows_of(path) if any(other[key] != row[key] for key in same)]
    write(path, [*kept, row])


def changed(row: Row, trial: Trial) -> Row:
    """The row of a trial: what won stands in the settings of a row, and is no part of others."""
    options = {name: value for name, value in trial.items() if name in _OPTIONS}
    settings = {name: value for name, value in trial.items() if name not in _OPTIONS}
    return Row(settings, {**row.options, **options}, row.paper, row.method)


def name_of(trial: Trial) -> str:
    """Such as "l2=1e-06"; the settings of the table are "table"."""
    return ", ".join(f"{name}={value:g}" for name, value in trial.items()) or "table"


def place_of_trial(options: argparse.Namespace, trial: Trial) -> Path:
    """The directory of the run of a trial."""
    what = name_of(trial).replace(", ", "-")
    parts = (options.table, options.dataset, options.method, what, str(options.seed))
    return Path(options.work) / "trials" / "-".join(parts)


def trials_of(table: str, dataset: str) -> Path:
    """The file of the trials of a table."""
    return RESULTS / f"paper_search_{table}_{dataset}.json"


if __name__ == "__main__":
    main()
