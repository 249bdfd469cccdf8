"""Times the preparation job, and the streaming estimator of item frequencies.

    python -m benchmarks.beam_prepare [--quick] [--data FILE] [--json FILE] [--plot FILE]

Every preparation is a process of its own, from its start to its end, with the FnApiRunner's
default of one worker process. `speedup_vs_row_by_row` is against `benchmarks.row_by_row`: the same
steps with one element a row, the same bytes in the shards (checked). `growth_10x` is the time for
ten times the rows. `peak_gib` is the resident memory of the whole process tree, at the larger size.
`streaming_events_per_second` are rows of the larger log by the seconds of `twotower frequencies
--streaming` in one process, on one core; how good its estimates are shows `estimator_error`.
`s3_ratio` is the time from and to an S3 server (moto's, a process of this machine) by that of the
local disk, in turns. `dask_speedup_2_workers` is the time of a Dask cluster of one worker process
by that of two, `dask_speedup_over_one_process` that of the FnApiRunner, both with the larger log.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from benchmarks import estimator_error
from benchmarks.record import command, write
from tests.support.object_store import running_store

GOWALLA = (29_858, 40_981, 1_027_464)  # users, items, rows
SMALL, LARGE = 1_000_000, 10_000_000
ZIPF = 1.05  # popularity of an item ∝ rank ** -ZIPF
QUIET = "import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'; "


def main() -> None:
    """Parses, measures, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="Parquet with user_id and item_id; synthetic by default")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--plot", help="where to write the plot of the estimator's error (.png)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, once each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = measure(options, Path(directory))
    results["command"] = command("beam_prepare")
    print(json.dumps(results, indent=2))
    if options.json:
        write(options.json, results)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All figures, one after the other on an otherwise idle machine."""
    tenth, rounds = (10, 1) if options.quick else (1, 3)
    log = Path(options.data) if options.data else work / "gowalla.parquet"
    if not options.data:
        users, items, rows = GOWALLA
        write_log(log, rows // tenth, users, items)
    source = work / "source.parquet"
    table = pd.read_parquet(log, columns=["user_id", "item_id"]).iloc[
        :: tenth if options.data else 1
    ]
    table.to_parquet(source)
    results: dict[str, Any] = {"gowalla_rows": len(table)}
    blocks = [run_prepare(source, work / "blocks")[0] for _ in range(rounds)]
    by_row = run_row_by_row(source, work / "rows", work / "blocks")
    results |= {
        "gowalla_seconds": statistics.median(blocks),
        "row_by_row_seconds": by_row,
        "speedup_vs_row_by_row": by_row / statistics.median(blocks),
    }
    results |= store_ratio(source, rounds, work)
    results |= growth(SMALL // tenth, LARGE // tenth, rounds, work)
    results |= dask_speedups(work / f"{LARGE // tenth}.parquet", results["large_seconds"], work)
    results |= frequencies(work / f"{LARGE // tenth}.parquet", LARGE // tenth, work)
    errors = estimator_error.measure(1000 if options.quick else 10_000)
    if options.plot:
        estimator_error.draw(errors, options.plot)
    return results | {"estimator_error": errors["deciles"], "estimator_setting": errors["setting"]}


def frequencies(log: Path, rows: int, work: Path) -> dict[str, Any]:
    """The two jobs of `twotower frequencies`, each in one process, that is on one core."""
    command = [sys.executable, "-m", "twotower", "frequencies", "--source", str(log), "--output"]
    exact, _ = timed([*command, str(work / "counts")])
    streaming, peak = timed([*command, str(work / "stream"), "--streaming"])
    return {
        "count_seconds": exact,
        "streaming_seconds": streaming,
        "streaming_events_per_second": rows / streaming,
        "streaming_peak_gib": peak,
    }


def growth(small: int, large: int, rounds: int, work: Path) -> dict[str, Any]:
    """Seconds at two sizes, memory at the larger, and the time of the count alone in Polars."""
    import polars

    seconds: dict[int, list[float]] = {small: [], large: []}
    peaks = []
    for size in (small, large):
        write_log(work / f"{size}.parquet", size, size // 10, size // 20)
    for _ in range(rounds):
        for size in (small, large):
            taken, peak = run_prepare(work / f"{size}.parquet", work / f"out{size}")
            seconds[size].append(taken)
            peaks.append(peak)
    start = time.perf_counter()
    lazy = polars.scan_parquet(work / f"{large}.parquet")
    lazy.group_by("item_id").len().sort("len").collect()
    return {
        "small_rows": small,
        "small_seconds": statistics.median(seconds[small]),
        "large_rows": large,
        "large_seconds": statistics.median(seconds[large]),
        "growth_10x": statistics.median(
            b / a for a, b in zip(seconds[small], seconds[large], strict=True)
        ),
        "peak_gib": max(peaks),
        "polars_count_seconds": time.perf_counter() - start,
    }


def write_log(path: Path, rows: int, users: int, items: int) -> None:
    """A log whose items are Zipf-distributed and whose users are nearly evenly so."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, items + 1) ** -ZIPF
    table = pd.DataFrame(
        {
            "user_id": rng.integers(0, users, rows),
            "item_id": rng.choice(items, rows, p=weights / weights.sum()),
        }
    )
    table.to_parquet(path, row_group_size=262_144)


def run_prepare(source: Path | str, output: Path | str, *flags: str) -> tuple[float, float]:
    """Seconds and GiB of `twotower prepare`."""
    command = ["prepare", "--source", str(source), "--output", str(output), "--overwrite", *flags]
    return timed([sys.executable, "-m", "twotower", *command])


def dask_speedups(log: Path, one_process: float, work: Path) -> dict[str, float]:
    """Seconds of one process and of one Dask worker by those of two workers of one thread each."""
    import distributed

    seconds = []
    for workers in (1, 2):
        with distributed.LocalCluster(n_workers=workers, threads_per_worker=1) as cluster:
            address = f"--dask_client_address={cluster.scheduler_address}"
            seconds.append(run_prepare(log, work / "dask", "--runner=DaskRunner", address)[0])
    return {
        "dask_seconds": seconds[1],
        "dask_speedup_2_workers": seconds[0] / seconds[1],
        "dask_speedup_over_one_process": one_process / seconds[1],
    }


def store_ratio(source: Path, rounds: int, work: Path) -> dict[str, float]:
    """Seconds of `twotower prepare` from and to an S3 server, and by those of the local disk."""
    import fsspec

    seconds: dict[str, list[float]] = {"s3": [], "local": []}
    with running_store() as environment:
        os.environ |= environment
        store = fsspec.filesystem("s3")
        store.mkdir("log")
        store.put(str(source), "log/source.parquet")
        for _ in range(rounds):
            seconds["s3"].append(run_prepare("s3://log/source.parquet", "s3://log/out")[0])
            seconds["local"].append(run_prepare(source, work / "out_local")[0])
    median = {place: statistics.median(values) for place, values in seconds.items()}
    return {"s3_seconds": median["s3"], "s3_ratio": median["s3"] / median["local"]}


def run_row_by_row(source: Path, output: Path, expected: Path) -> float:
    """Seconds of the graph with one element a row; its files are those of the other."""
    output.mkdir()
    shards = len(list(expected.glob("interactions-train.*")))
    code = f"{QUIET}from benchmarks.row_by_row import prepare_rows; prepare_rows("
    seconds, _ = timed([sys.executable, "-c", f"{code}{str(source)!r}, {str(output)!r}, {shards})"])
    names = sorted(path.name for path in output.iterdir())
    _, differ, missing = filecmp.cmpfiles(output, expected, names, shallow=False)
    if differ or missing or not names:
        raise RuntimeError(f"the two graphs differ in {differ + missing}")
    return seconds


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of a process, and the largest sum of resident memory of its tree, in GiB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start, peak / 2**30


if __name__ == "__main__":
    main()
