"""Times the phases of an epoch of AdaSIR: renewing the pools of all queries, and training.

    python -m benchmarks.paper_phases --data PREPARED [--epochs 5] [--beside "what else ran"]

Section 4.5 and Table 3 of the paper, with the settings of its table on Gowalla. Each method is a
run of its own, whose first epoch, in which TensorFlow traces the step, does not count. The first
step of an epoch renews the pools: what it takes longer than the median of the others is sampling,
the rest of the epoch training. `benchmarks/results/paper_phases.json` has the mean and standard
deviation of both over the epochs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

from benchmarks.paper_settings import TABLES
from benchmarks.paper_tables import PHASES, commit, settings_of
from benchmarks.record import command, processor, write

METHODS = ("adasir_u", "adasir_p", "adasir_w")


def main() -> None:
    """Parses, measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared data of Gowalla")
    parser.add_argument("--epochs", type=int, default=5, help="that count, after the first")
    parser.add_argument("--beside", default="nothing", help="what else the machine did")
    options = parser.parse_args()
    result: dict[str, Any] = {"epochs": options.epochs, "beside": options.beside}
    result |= {"processor": processor(), "commit": commit(), "command": command("paper_phases")}
    for method in METHODS:
        result[method] = phases(options.data, method, options.epochs)
        print(method, result[method], flush=True)
    write(PHASES, result)


def phases(data: str, method: str, epochs: int) -> dict[str, list[float]]:
    """{phase: [mean, standard deviation] of its seconds}."""
    from towers.legacy_keras import tf_keras
    from towers.training.settings import TrainConfig
    from towers.training.train import train

    times: dict[str, list[float]] = {"sampling": [], "training": []}

    class Clock(tf_keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._ends = [time.perf_counter()]

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._ends.append(time.perf_counter())

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            first, *others = (after - before for before, after in itertools.pairwise(self._ends))
            times["sampling"].append(first - statistics.median(others))
            times["training"].append(sum(others) + statistics.median(others))

    table = TABLES["adasir", "gowalla"]
    settings = settings_of(table.rows[method], table, method)
    with tempfile.TemporaryDirectory() as run:
        config = TrainConfig(data=data, run=run, epochs=epochs + 1, **settings)
        train(config, [Clock()])
    return {
        phase: [round(f(seconds[1:]), 4) for f in (statistics.mean, statistics.stdev)]
        for phase, seconds in times.items()
    }


if __name__ == "__main__":
    main()
