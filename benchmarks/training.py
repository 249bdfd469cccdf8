"""Times optimizers, whole epochs and input, and how long a model takes to be good.

    python -m benchmarks.training [--quick] [--data PREPARED] [--only PART ...] [--json FILE]

Parts, and what they write:
  sparse  sparse_step_ratio_4m_to_40k: a step of ssl_pop with 4,000,000 candidates by one with
          40,000, the largest over the optimizers of rows; candidates are drawn evenly, so that no
          cache helps. d = 64, B = 2048.
  fused   fused_adam_ratio: an update of both tables of Gowalla's size, d = 64, by CoupledAdam and
          by `tf_keras.optimizers.Adam`, by the same rule; the larger of l2 = 0, where Keras gets
          the sparse gradient, and l2 = 1e-5, where it gets the sum of that and l2 · θ.
  fit     fit_speedup_vs_stock_tfrs: examples a second of `model.fit` over whole epochs of ssl_pop
          with CoupledAdam, by those of stock TFRS with the Adam of Keras; the same batches, d = 32.
  input   input_to_step_ratio: a step of ssl_pop by a batch of `data.train()` alone.
  recall  seconds_to_recall50_264, seconds_to_recall50_302: training time, with making the model
          and compilation, without evaluation, until Recall@50 on the test split is so high, by
          the fastest of `time_to_recall.CONFIGURATIONS`; needs --data, prepared Gowalla, else
          both are null.
  large   only where it is asked for, needs 24 GB: a step of ssl_pop by rowwise_adagrad with 20 M
          candidates by one with 40,000, d = 64, and GiB at most; then seconds and GiB at most
          to rank for 1,000 users, for a bundle, and in processes of their own for a version with
          exact search and for one with a ScaNN index of one tree at recall .8.
  workers worker_overhead: what `benchmarks.worker_overhead` says of two worker processes.

Both sides of a ratio take turns; it is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from benchmarks.record import command, write
from benchmarks.time_to_recall import CONFIGURATIONS, TARGETS, race
from benchmarks.train_step import StockRetrieval, synthetic
from benchmarks.worker_overhead import overhead
from serving.publish.publish import publish
from towers.data.interactions import RetrievalData, Vocabulary, open_data
from towers.legacy_keras import tf_keras
from towers.model.optimizers import make_optimizer
from towers.model.two_tower import TwoTower
from towers.output.bundle import write_model

BATCH, DIM, FIT_DIM = 2048, 64, 32
VERSIONS = {
    "exact_version": {"scann": False},
    "version": {"scann_leaves": 1000, "target_recall": 0.8},
}
SPARSE = ("lazy_adam", "adagrad", "rowwise_adagrad")
GOWALLA = (29_858, 40_988)


class Setting(NamedTuple):
    """What a part is given."""

    data: RetrievalData
    directory: str | None  # of the data; None: synthetic
    quick: bool

    @property
    def rounds(self) -> int:
        """Of a ratio."""
        return 2 if self.quick else 7


def main() -> None:
    """Parses, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="prepared data; synthetic of Gowalla's shape by default")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, one configuration, no workers"
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="only these parts")
    options = parser.parse_args()
    if options.only and "recall" in options.only and not options.data:
        parser.error("recall needs --data, the directory of prepared Gowalla.")
    setting = Setting(
        open_data(options.data) if options.data else synthetic(), options.data, options.quick
    )
    results: dict[str, Any] = {}
    left_out = ["large", *(["workers"] if options.quick else [])]
    for part in options.only or [part for part in PARTS if part not in left_out]:
        results |= PARTS[part](setting)
        gc.collect()  # models that the next part need not share the memory with
        print(json.dumps(results, indent=2), flush=True)
    results["command"] = command("training")
    if options.json:
        write(options.json, results)


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, calls: int) -> float:
    """Median over rounds of (median time of ours) / (median time of theirs), taking turns."""
    both, ratios = (ours, theirs), []
    for call in both:  # traced, and past the first updates
        for _ in range(20):
            call()
    for _ in range(rounds):
        medians = []
        for call in both:
            times = []
            for _ in range(calls):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            medians.append(statistics.median(times))
        ratios.append(medians[0] / medians[1])
    return statistics.median(ratios)


def sparse(setting: Setting) -> dict[str, Any]:
    """Steps with a huge corpus and with a small one."""
    found = {}
    for name in SPARSE:
        large, small = (_uniform_step(name, size) for size in (4_000_000, 40_000))
        found[name] = round(ratio(large, small, setting.rounds, 20), 3)
        del large, small
        gc.collect()  # tables of gigabytes
    return {"sparse_step_ratio_4m_to_40k": max(found.values()), "sparse_step_ratios": found}


def large(setting: Setting) -> dict[str, Any]:
    """A table that hardly fits: steps, ranking, a bundle, versions in processes of their own."""
    size = 20_000_000 // (1000 if setting.quick else 1)
    found: dict[str, Any] = {"candidates": size}
    with tempfile.TemporaryDirectory() as place:
        versions = [partial(_publish_large, name, kind) for name, kind in VERSIONS.items()]
        for part in (_train_large, *versions):  # each with the memory of a fresh process
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found |= process.submit(part, place, size, setting.rounds).result()
            print(found, flush=True)
    return {"large": found}


def _train_large(place: str, size: int, rounds: int) -> dict[str, Any]:
    model = _uniform_model("rowwise_adagrad", size)
    small = _uniform_step("rowwise_adagrad", 40_000)
    step = _step_of(model, _forever(dict(model.data.arrays("train"))))
    found = {"step_ratio_to_40k": round(ratio(step, small, rounds, 20), 3), "gib": _peak_gib()}
    users, bundle = [str(user) for user in range(1000)], Path(place) / "bundle"
    found["rank"] = _timed(lambda: model.recommend(users, k=100))
    settings = json.loads(model.settings)
    write = partial(write_model, model.data, model, bundle, (), [], configuration=settings)
    return found | {"bundle": _timed(write)}


def _publish_large(
    name: str, options: dict[str, Any], place: str, size: int, rounds: int
) -> dict[str, Any]:
    del size, rounds
    return {name: _timed(lambda: publish(f"{place}/bundle", f"{place}/{name}", **options))}


def _timed(call: Callable[[], Any]) -> dict[str, float]:
    started = time.perf_counter()
    call()
    return {"seconds": round(time.perf_counter() - started, 1), "gib": _peak_gib()}


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _uniform_step(
    optimizer: str, num_candidates: int, method: str = "ssl_pop"
) -> Callable[[], Any]:
    model = _uniform_model(optimizer, num_candidates, method)
    return _step_of(model, _forever(dict(model.data.arrays("train"))))


def _uniform_model(optimizer: str, num_candidates: int, method: str = "ssl_pop") -> TwoTower:
    """A model of users of Gowalla's number and of candidates that are chosen evenly."""
    rng = np.random.default_rng(0)
    columns = {
        "query_id": rng.integers(0, GOWALLA[0], 64 * BATCH),
        "candidate_id": rng.integers(0, num_candidates, 64 * BATCH),
    }
    data = RetrievalData(
        _vocabulary(GOWALLA[0]),
        _vocabulary(num_candidates),
        np.ones(num_candidates, np.int64),
        lambda split: columns if split == "train" else {n: c[:0] for n, c in columns.items()},
        fingerprint="",
    )
    model = TwoTower(data, DIM, method, normalize=True, temperature=0.1)
    model.compile(optimizer=make_optimizer(optimizer, 0.01, 1e-5))
    return model


def _vocabulary(size: int) -> Vocabulary:
    numbers = np.arange(size, dtype=np.int64)
    return Vocabulary(pa.array(numbers).cast(pa.string()), numbers, np.ones(size, np.int64))


def _forever(columns: dict[str, np.ndarray], size: int = BATCH) -> Iterator[Any]:
    """Batches in memory, so that input costs nothing."""
    rows = min(64, len(columns["query_id"]) // size) * size
    whole = {name: values[:rows].reshape(-1, size) for name, values in columns.items()}
    return iter(tf.data.Dataset.from_tensor_slices(whole).cache().repeat().prefetch(4))


def _step_of(model: Any, batches: Iterator[Any]) -> Callable[[], Any]:
    """A function that does one training step of a compiled model."""
    model.optimizer.build(model.trainable_variables)
    function = model.make_train_function()
    return lambda: float(function(batches)["loss"])


def fused(setting: Setting) -> dict[str, Any]:
    """Updates of two dense tables."""
    found = {
        f"l2={l2:g}": round(ratio(_update("ours", l2), _update("keras", l2), setting.rounds, 20), 3)
        for l2 in (0.0, 1e-5)
    }
    return {"fused_adam_ratio": max(found.values()), "fused_adam_ratios": found}


def _update(whose: str, l2: float) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    tables = [
        tf.Variable(tf.random.stateless_normal([rows, DIM], [0, rows], stddev=0.1))
        for rows in GOWALLA
    ]
    ids = [tf.constant(rng.integers(0, rows, BATCH)) for rows in GOWALLA]
    values = [tf.constant(rng.normal(size=(BATCH, DIM)), tf.float32) for _ in GOWALLA]
    ours = whose == "ours"
    optimizer = make_optimizer("adam", 0.01, l2) if ours else tf_keras.optimizers.Adam(0.01)
    optimizer.build(tables)

    @tf.function
    def update() -> None:
        gradients = []
        for rows, chosen, value, table in zip(GOWALLA, ids, values, tables, strict=True):
            slices = tf.IndexedSlices(value, chosen, tf.constant([rows, DIM], tf.int64))
            coupled = not ours and l2
            gradients.append(tf.convert_to_tensor(slices) + l2 * table if coupled else slices)
        optimizer.apply_gradients(zip(gradients, tables, strict=True))

    return update


def fit(setting: Setting) -> dict[str, Any]:
    """Whole epochs by `model.fit`, input and optimizer included."""
    data = setting.data
    ours = TwoTower(data, FIT_DIM, "ssl_pop")
    ours.compile(optimizer=make_optimizer("adam", 0.01, 0.0))
    theirs = StockRetrieval(data)
    theirs.compile(optimizer=tf_keras.optimizers.Adam(0.01, epsilon=1e-8))
    rates: dict[str, list[float]] = {"ours": [], "stock": []}
    for model in (ours, theirs):
        model.fit(data.train(BATCH).take(20), verbose=0)
    for _ in range(max(2, setting.rounds // 2)):
        for name, model in (("ours", ours), ("stock", theirs)):
            started = time.perf_counter()
            model.fit(data.train(BATCH), epochs=1, verbose=0)
            rates[name].append(data.num_rows("train") / (time.perf_counter() - started))
    speedups = [a / b for a, b in zip(rates["ours"], rates["stock"], strict=True)]
    return {
        "fit_speedup_vs_stock_tfrs": round(statistics.median(speedups), 3),
        "fit_examples_per_second": {k: round(statistics.median(v)) for k, v in rates.items()},
    }


def feeding(setting: Setting) -> dict[str, Any]:
    """Steps on batches in memory, and batches without steps."""
    data = setting.data
    model = TwoTower(data, FIT_DIM, "ssl_pop")
    model.compile(optimizer=make_optimizer("adam", 0.01, 1e-5))
    rows = {name: np.asarray(data.arrays("train")[name]) for name in ("query_id", "candidate_id")}
    epochs = data.train(BATCH).repeat()
    batches = iter(epochs)

    @tf.function
    def take() -> tf.Tensor:
        return next(batches)["query_id"][0]

    found = ratio(_step_of(model, _forever(rows)), take, setting.rounds, 60)
    return {"input_to_step_ratio": round(found, 2)}


def recall(setting: Setting) -> dict[str, Any]:
    """Seconds until Recall@50 is so high, by the fastest configuration."""
    if setting.directory is None:
        return dict.fromkeys(TARGETS)
    return race(setting.data, list(CONFIGURATIONS)[: 1 if setting.quick else None])


def workers(setting: Setting) -> dict[str, Any]:
    """Two worker processes: what they tell each other, as a share of the step."""
    return {"worker_overhead": overhead(setting.directory, quick=setting.quick)}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "sparse": sparse,
    "large": large,
    "fused": fused,
    "fit": fit,
    "input": feeding,
    "recall": recall,
    "workers": workers,
}

if __name__ == "__main__":
    main()
