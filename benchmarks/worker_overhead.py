"""Times what two workers tell each other in a training step, against the whole step.

    python -m benchmarks.worker_overhead [--quick] [--data PREPARED] [--methods M ...] [--json FILE]

Two processes on this machine, one replica and one thread each, under MultiWorkerMirroredStrategy
over the loopback interface: B = 2048 joined, d = 32, CoupledAdam. For each method, in turns:
  step_ms        a step as `fit` takes it, with its input;
  gather_ms      the gathers of such a step alone, of tensors of the same shapes;
  all_reduce_ms  the sum over the workers of sparse gradients of the same shapes, alone;
  alone_ms       a step of one process with the joined batch and two threads.
All are medians over rounds; `share` is (gather_ms + all_reduce_ms) / step_ms. On one machine
there is no network: its time comes on top, see docs/scale.md for the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.record import write

BATCH, DIM = 2048, 32
METHODS = ("ssl_pop", "bpr")  # one whose rows are negatives of each other, one that goes row by row
_WORKERS = 2


def main() -> None:
    """Parses, measures, prints and writes the JSON; a worker prints its part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="prepared data; synthetic of Gowalla's shape by default")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--worker", choices=("alone", "joined"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_measure(options.data, options.methods, options.quick, options.worker)))
        return
    results = overhead(options.data, options.methods, quick=options.quick)
    print(json.dumps(results, indent=2))
    if options.json:
        write(options.json, results)


def overhead(
    data: str | None = None, methods: tuple[str, ...] = METHODS, *, quick: bool = False
) -> dict[str, Any]:
    """What the head of this file says: method → name → milliseconds, and `share`.

    Args:
      data: directory of prepared data; None: synthetic of Gowalla's shape.
      methods: names in `samplers.METHODS`.
      quick: fewer rounds.

    Raises:
      RuntimeError: a worker failed; its last words are in the message.
    """
    arguments = ["--methods", *methods, *(["--data", data] if data else [])]
    arguments += ["--quick"] if quick else []
    addresses = _free_addresses(_WORKERS)
    tasks = [
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        for index in range(_WORKERS)
    ]
    joined = _run([json.dumps(task) for task in tasks], [*arguments, "--worker", "joined"])
    alone = _run([""], [*arguments, "--worker", "alone"])
    for name, times in joined.items():
        times["alone_ms"] = alone[name]["step_ms"]
        told = times["gather_ms"] + times["all_reduce_ms"]
        times["share"] = round(told / times["step_ms"], 3)
    return joined


def _run(tasks: list[str], arguments: list[str]) -> dict[str, Any]:
    """Runs a process for each task; what the first one printed."""
    command = [sys.executable, "-m", "benchmarks.worker_overhead", *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"TF_CONFIG": task, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in tasks
    ]
    try:
        answers = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            raise RuntimeError(f"a worker failed: {errors[-2000:]}")
    return json.loads(answers[0][0].strip().splitlines()[-1])


def _free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in sockets]
    for server in sockets:
        server.close()
    return addresses


def _measure(
    directory: str | None, methods: list[str], quick: bool, worker: str
) -> dict[str, dict[str, float]]:
    """Times one worker, or the process that is alone."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1 if worker == "joined" else 2)
    tf.config.threading.set_intra_op_parallelism_threads(1 if worker == "joined" else 2)
    strategy = tf.distribute.get_strategy()
    if worker == "joined":
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    from benchmarks.train_step import synthetic
    from towers.data.interactions import open_data

    data = open_data(directory) if directory else synthetic()
    rounds, steps = (3, 10) if quick else (9, 20)
    results = {}
    for method in methods:
        parts = {"step_ms": _steps(data, method, strategy)}
        if worker == "joined":
            parts |= _messages(method, strategy)
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(rounds + 1):
            for name, take in parts.items():
                started = time.perf_counter()
                take(steps)
                times[name].append(1000 * (time.perf_counter() - started) / steps)
        # The first round makes the functions.
        results[method] = {name: round(statistics.median(t[1:]), 3) for name, t in times.items()}
    return results


def _steps(data: Any, method: str, strategy: Any) -> Callable[[int], None]:
    from towers.model.distribution import split_batches
    from towers.model.optimizers import CoupledAdam
    from towers.model.two_tower import TwoTower

    with strategy.scope():
        model = TwoTower(data, DIM, method, normalize=True, temperature=0.1)
        model.compile(optimizer=CoupledAdam(0.01, 1e-5))
    train = model.make_train_function()
    batches = data.train(BATCH)
    if strategy.num_replicas_in_sync > 1:
        batches = split_batches(batches, strategy, steps=10**6)
    else:
        batches = batches.repeat()
    batches = iter(batches)

    def take(steps: int) -> None:
        for _ in range(steps):
            logs = train(batches)
        logs["loss"].numpy()

    return take


def _messages(method: str, strategy: Any) -> dict[str, Callable[[int], None]]:
    """What the replicas tell each other in a step, by tensors of the same shapes alone."""
    import tensorflow as tf

    import samplers

    rows = BATCH // _WORKERS
    by_row = samplers.METHODS[method].row_by_row
    drawn = rows if by_row else 0  # bpr draws one negative a row
    columns = tf.zeros([rows, 3], tf.int64)
    embeddings = tf.zeros([rows, DIM])
    ids = tf.range(rows + drawn, dtype=tf.int64)
    gradients = [
        tf.IndexedSlices(tf.zeros([size, DIM]), ids[:size], tf.constant([40_988, DIM], tf.int64))
        for size in (rows, rows + drawn)
    ]

    def gather() -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        columns_of_all = context.all_gather(columns, axis=0)
        with tf.control_dependencies([columns_of_all]):
            return tf.reduce_sum(context.all_gather(embeddings, axis=0))

    def all_reduce() -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        total = tf.add_n([tf.reduce_sum(gradient.values) for gradient in summed])
        if not by_row:
            by_columns = tf.zeros([rows * _WORKERS, DIM])
            total += tf.reduce_sum(context.all_reduce(tf.distribute.ReduceOp.SUM, by_columns))
        return total + context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))

    def repeated(what: Callable[[], tf.Tensor]) -> Callable[[int], None]:
        once = tf.function(lambda: strategy.run(what))

        def take(steps: int) -> None:
            for _ in range(steps):
                done = once()
            done.numpy()

        return take

    return {"gather_ms": repeated(gather), "all_reduce_ms": repeated(all_reduce)}


if __name__ == "__main__":
    main()
