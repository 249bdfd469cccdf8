"""Times a training step of every method against the stock retrieval task of TFRS, in one process.

    python -m benchmarks.train_step [--quick] [--data PREPARED] [--json FILE]

Both sides: two embedding tables, d = 32, B = 2048, Adagrad (a dense optimizer would hide the
loss), the same batches, the training function that `fit` calls. The opponent is
`tfrs.tasks.Retrieval` with the logQ correction. Methods take turns, round after round, so that a
machine that slows down slows all of them; a ratio is the median over rounds of the ratio within
a round. Memory of large batches is measured in a process of its own for each method.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.record import command, processor, write
from towers.data.dataframe import from_dataframe
from towers.data.interactions import RetrievalData, open_data
from towers.legacy_keras import tf_keras, tfrs

BATCH, DIM = 2048, 32
LARGE_BATCH, LARGE_DIM, BLOCK = 32_768, 64, 1024
LARGE = ("ssl_pop", "bir", "bmns")
# What is timed: name in the results → method and options; every other method has its defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bmns": ("bmns", {"num_mixed": 128}),
    "bmns_full": ("bmns", {"num_mixed": BATCH}),
    "xir": ("xir", {"cache_size": BATCH}),
    "cbns": ("cbns", {"warm_up": 1}),
}


def main() -> None:
    """Parses, measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="prepared data; synthetic of Gowalla's shape by default")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no large batches")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large-batch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large_batch:
        print(json.dumps({"peak_gib": peak_gib(options.large_batch)}))
        return
    data = open_data(options.data) if options.data else synthetic()
    results = {
        "methods": time_methods(
            data, options.methods, *((2, 5) if options.quick else (options.rounds, 20))
        ),
        "large_batch": {} if options.quick else {name: _in_own_process(name) for name in LARGE},
        "batch_size": BATCH,
        "dim": DIM,
        "data": options.data or "synthetic",
        "command": command("train_step"),
        "processor": processor(),
    }
    print(table(results))
    if options.json:
        write(options.json, results)


def synthetic(
    num_rows: int = 822_358, num_queries: int = 29_858, num_candidates: int = 40_988
) -> RetrievalData:
    """Zipf-like interactions of Gowalla's shape."""
    rng = np.random.default_rng(0)
    popularity = 1.0 / (np.arange(num_candidates) + 50.0) ** 0.8
    items = rng.choice(num_candidates, num_rows, p=popularity / popularity.sum())
    users = rng.integers(0, num_queries, num_rows)
    # Every id occurs, so that the tables have the size that is asked for.
    users[:num_queries], items[-num_candidates:] = np.arange(num_queries), np.arange(num_candidates)
    frame = pd.DataFrame({"user_id": users, "item_id": items})
    return from_dataframe(frame, user="user_id", item="item_id", train_ratio=1.0)


class StockRetrieval(tfrs.Model):
    """What the tutorials of TFRS build, with the logQ correction."""

    def __init__(self, data: RetrievalData) -> None:
        super().__init__()
        self.queries = tf_keras.layers.Embedding(data.num_queries, DIM)
        self.candidates = tf_keras.layers.Embedding(data.num_candidates, DIM)
        self.task = tfrs.tasks.Retrieval()
        self.probability = np.float32(data.train_counts / data.train_counts.sum())

    def compute_loss(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """The loss of a batch."""
        import tensorflow as tf

        del training
        return self.task(
            self.queries(inputs["query_id"]),
            self.candidates(inputs["candidate_id"]),
            candidate_sampling_probability=tf.gather(self.probability, inputs["candidate_id"]),
            compute_metrics=False,
        )


def time_methods(
    data: RetrievalData, only: list[str] | None, rounds: int, steps: int
) -> dict[str, dict[str, float]]:
    """{method: {ratio_to_stock_tfrs, median_ms}}, `stock_tfrs` among them."""
    import samplers
    from towers.model.two_tower import TwoTower

    names = only or [*dict.fromkeys([*samplers.METHODS, *VARIANTS])]
    models: dict[str, Any] = {"stock_tfrs": StockRetrieval(data)}
    for name in names:
        method, settings = VARIANTS.get(name, (name, {}))
        settings = settings | {"exclude_seen_negatives": False}  # alike for all methods
        models[name] = TwoTower(data, dim=DIM, method=method, **settings)
    steppers = {name: stepper(model, data) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, step in steppers.items():
            samples = []
            for _ in range(steps):
                started = time.perf_counter()
                step()
                samples.append(time.perf_counter() - started)
            times[name].append(statistics.median(samples) * 1e3)
    stock = times["stock_tfrs"]
    return {
        name: {
            "ratio_to_stock_tfrs": round(
                statistics.median(a / b for a, b in zip(values, stock, strict=True)), 3
            ),
            "median_ms": round(statistics.median(values), 2),
        }
        for name, values in times.items()
    }


def stepper(model: Any, data: RetrievalData) -> Callable[[], Any]:
    """A function that does one training step, warmed up."""
    model.compile(optimizer=tf_keras.optimizers.Adagrad(0.1))
    function = model.make_train_function()
    batches = _forever(data)

    def step() -> None:
        logs = function(batches)
        float(logs["loss"])  # waits for the step

    for _ in range(3):
        step()
    return step


def _forever(data: RetrievalData) -> Iterator[Any]:
    """Batches in memory, so that input costs neither side anything."""
    rows = data.arrays("train")
    import tensorflow as tf

    kept = []
    order = np.random.default_rng(0).permutation(data.num_rows("train"))
    for start in range(0, 16 * BATCH, BATCH):
        chosen = order[start : start + BATCH]
        kept.append({name: np.asarray(rows[name])[chosen] for name in ("query_id", "candidate_id")})
    whole = {name: np.stack([batch[name] for batch in kept]) for name in kept[0]}
    return iter(tf.data.Dataset.from_tensor_slices(whole).cache().repeat().prefetch(4))


def peak_gib(name: str) -> float:
    """Peak memory during three steps at a large batch, minus what was in use before the first."""
    import tensorflow as tf

    from towers.model.two_tower import TwoTower

    data = synthetic(2 * LARGE_BATCH + 70_846)
    model = TwoTower(data, dim=LARGE_DIM, method=name, block_size=BLOCK)
    model.compile(optimizer=tf_keras.optimizers.Adagrad(0.1))
    rows = {key: data.arrays("train")[key][:LARGE_BATCH] for key in ("query_id", "candidate_id")}
    batch = {key: tf.constant(value) for key, value in rows.items()}
    step = tf.function(model.train_step)
    before = peak = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step(batch)
    done.set()
    watcher.join()
    return round((peak - before) / 2**30, 3)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_own_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--large-batch", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The results as plain text."""
    lines = [f"{'method':18}{'ratio':>8}{'ms':>9}"]
    for name, values in results["methods"].items():
        lines.append(f"{name:18}{values['ratio_to_stock_tfrs']:8.2f}{values['median_ms']:9.2f}")
    for name, values in results["large_batch"].items():
        lines.append(f"{name}: {values['peak_gib']:.2f} GiB at B = {LARGE_BATCH}, d = {LARGE_DIM}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
