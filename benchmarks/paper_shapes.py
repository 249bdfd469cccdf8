"""Draws what the papers show of their samplers besides tables: distributions, and quality by time.

    python -m benchmarks.paper_shapes --data PREPARED --run RUN [--json FILE]    # measures, draws
    python -m benchmarks.paper_shapes                                            # draws again

RUN is a run of `xir` on PREPARED. Three panels:
- how the weight that a loss puts on the scores of negatives accumulates over the ranking of the
  model: that of the full softmax, which all others approximate, and theirs (the audit of
  `towers.audit.job`, on the embeddings of RUN; XIR paper, the figure of cumulative distributions);
- what the cache of XIR holds by popularity: its occurrences at the end of RUN beside the train rows
  and a uniform draw, accumulated over candidates, the most popular first;
- Recall@50 on the validation part by training time, of the runs of
  `benchmarks.paper_tables --table time`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_settings import FIGURES
from benchmarks.paper_tables import RESULTS, ROOT, results_of, rows_of
from benchmarks.record import command, write

PLOT = ROOT / "docs" / "paper_shapes.png"
SHAPES = RESULTS / "paper_shapes.json"
METHODS = ("full_softmax", "ssl", "ssl_pop", "bir", "xir", "dns_mn")
COLOURS = dict(
    zip(
        (*METHODS, "mns", "bmns"),
        ("#bbbbbb", "#666666", "#0b5fa5", "#4b7f52", "#c65a11", "#7b3f98", "#3aa6b9", "#b3262b"),
        strict=True,
    )
)
_POINTS = 60


def main() -> None:
    """Measures where a run is given, and draws what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="prepared data")
    parser.add_argument("--run", help="a run of xir on it")
    parser.add_argument("--json", default=str(SHAPES), help="where the numbers are")
    parser.add_argument("--plot", default=str(PLOT), help="where to draw")
    options = parser.parse_args()
    if options.data and options.run:
        found = softmax_by_rank(options.data, options.run) | cache_by_popularity(
            options.data, options.run
        )
        write(options.json, found | {"command": command("paper_shapes")})
    elif options.data or options.run:
        parser.error("--data and --run go together: a run is measured on the data it is of.")
    if not Path(options.json).is_file():
        parser.error(f"there is no {options.json}: give --data and --run.")
    draw(json.loads(Path(options.json).read_text()), by_time(), options.plot)


def softmax_by_rank(data: str, run: str) -> dict[str, Any]:
    """{"ranks", "mass_by_rank": {method: share of the weight on candidates down to each rank}}."""
    from towers.audit.job import audit
    from towers.audit.settings import AuditConfig

    with tempfile.TemporaryDirectory() as place:
        found = audit(AuditConfig(data=data, run=run, output=place, methods=METHODS, warm_up=50))
    masses = {name: found["methods"][name]["mass_by_rank"] for name in METHODS}
    return {"ranks": found["ranks"], "mass_by_rank": masses}


def cache_by_popularity(data: str, run: str) -> dict[str, Any]:
    """{"candidates", "share": {what: mass of so many of the most popular candidates}}.

    Raises:
      ValueError: the run is not one of `xir`.
    """
    from towers.data.interactions import open_data
    from towers.training.run_directory import open_run

    opened = open_data(data)
    model, trained = open_run(run, opened)
    if trained.method != "xir":
        raise ValueError(f"--run must be a run of xir, {run} is one of {trained.method}.")
    counts = np.asarray(opened.train_counts, np.float64)
    occurrences = model.method.cache.occurrences.numpy().astype(np.float64)
    order = np.argsort(-counts, kind="stable")
    sizes = np.unique(np.geomspace(1, len(counts), _POINTS).round().astype(int))
    masses = {
        "train rows": counts,
        "cache of xir": occurrences,
        "uniform": np.ones_like(counts),
    }
    return {
        "candidates": sizes.tolist(),
        "share": {
            name: (np.cumsum(mass[order]) / mass.sum())[sizes - 1].tolist()
            for name, mass in masses.items()
        },
    }


def by_time() -> dict[str, list[list[float]]]:
    """Method → [seconds of training, Recall@50 on the validation part] after each epoch."""
    (dataset,) = (dataset for table, dataset in FIGURES if table == "time")
    rows = rows_of(results_of("time", dataset))
    return {row["method"]: row["history"] for row in rows if "history" in row}


def draw(found: dict[str, Any], timed: dict[str, list[list[float]]], path: str) -> None:
    """Three panels, the last one only where there are runs for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, 3 if timed else 2, figsize=(12 if timed else 8, 3.6))
    ranks, cache, *rest = grid
    for name, mass in found["mass_by_rank"].items():
        # ssl_pop lies on the full softmax
        width = {"full_softmax": 4.0}.get(name, 1.3)
        ranks.plot(found["ranks"], mass, label=name, color=COLOURS[name], linewidth=width)
    ranks.set_xlabel("down to rank, of the model")
    ranks.set_title("weight on negatives, accumulated", fontsize=10, loc="left")
    for (name, share), colour in zip(
        found["share"].items(), ("#0b5fa5", "#c65a11", "#888888"), strict=True
    ):
        cache.plot(found["candidates"], share, label=name, color=colour)
    cache.set_xlabel("candidates, the most popular first")
    cache.set_title("what the cache of XIR holds", fontsize=10, loc="left")
    for axes in (ranks, cache):
        axes.set_xscale("log")
    for axes in rest:
        for name, points in timed.items():
            seconds, values = zip(*points, strict=True)
            axes.plot(seconds, values, "o-", label=name, color=COLOURS[name], markersize=3)
        axes.set_xlabel("seconds of training")
        axes.set_title("Recall@50, validation", fontsize=10, loc="left")
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
