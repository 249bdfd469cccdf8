"""Trains on a GPU and on the CPU beside it: whether both learn the same, how fast, what waits.

    python -m benchmarks.gpu_training [--toy] [--json FILE]

What it writes:
  correctness         by method, tower and optimizer: how far losses and weights after a few steps
                      on the GPU, compiled by XLA, are from those on the CPU, which is not compiled:
                      the largest |a - b| / (|b| + 0.01), at most 1e-4 where they are the same;
                      TF32 is off
  correct             whether all are; a method that chooses by comparing scores may choose
                      otherwise where two are equal but for a last bit
  profile             steps of ssl_pop: bytes a step between host and GPU, and the share of the time
                      that nothing runs there; null without a GPU
  examples_per_second ssl_pop and stock TFRS by the size of the batch, d = 32, tables of Gowalla's
                      size; bpr on 10 M candidates, d = 64
  adam_update_ms      both tables of Gowalla's size, dense, d = 64
  ranking_seconds     the top 100 of all candidates for all queries of Gowalla's size
  large_table         100 M candidates, d = 64, rowwise_adagrad: examples a second and peak memory
  copy_gb_per_second  read and written by a copy on the device, the limit of all that passes a table

What does not fit into the memory of the card says so. `--toy` is small enough for a CPU, to see
that all of it runs before there is a card.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from benchmarks.record import command, processor, write
from benchmarks.train_step import DIM, StockRetrieval, synthetic
from benchmarks.training import BATCH, _forever, _step_of, _uniform_step, _update
from samplers.methods.by_name import METHODS
from towers.data.dataframe import from_dataframe
from towers.data.interactions import Positives, RetrievalData
from towers.encoders.tower_config import TOWERS
from towers.legacy_keras import tf_keras
from towers.metrics.ranking import rank_corpus
from towers.model.optimizers import OPTIMIZERS
from towers.model.two_tower import TwoTower

SAME = 1e-4


class Sizes(NamedTuple):
    """How large the parts are."""

    methods: tuple[str, ...]
    towers: tuple[str, ...]
    rows: int  # train rows
    queries: int
    candidates: int
    batches: tuple[int, ...]  # B
    largest_stock: int  # B whose scores stock TFRS can hold
    bpr_candidates: int
    large_candidates: int
    copied: int  # numbers of 4 bytes


FULL = Sizes(
    *(tuple(METHODS), TOWERS, 822_358, 29_858, 40_988, (2048, 8192, 65_536), 8192),
    *(10_000_000, 100_000_000, 1 << 28),
)
TOY = Sizes(
    *(("ssl_pop", "xir", "bpr"), ("id", "light_gcn"), 3000, 200, 300, (256, 512), 256),
    *(2000, 3000, 1 << 16),
)


def main(arguments: list[str] | None = None) -> int:
    """Parses, measures, prints and writes the JSON; 1 where GPU and CPU differ, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="small, for a machine without a GPU")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args(arguments)
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not options.toy:
        print("There is no GPU that TensorFlow sees: give --toy to try this on a CPU.")
        return 2
    tf.config.experimental.enable_tensor_float_32_execution(False)
    device, sizes = ("GPU:0" if gpus else "CPU:0"), TOY if options.toy else FULL
    started = time.perf_counter()
    differences = correctness(device, sizes)
    data = synthetic(sizes.rows, sizes.queries, sizes.candidates)
    results: dict[str, Any] = {
        "device": _name(gpus),
        "correctness": differences,
        "correct": all(value <= SAME for value in differences.values()),
    }
    with tf.device(device):
        parts: dict[str, Callable[[], Any]] = {
            "profile": lambda: profile(data),
            "examples_per_second": lambda: examples_per_second(data, sizes),
            "adam_update_ms": lambda: round(1e3 * seconds_of(_update("ours", 1e-5)), 3),
            "ranking_seconds": lambda: ranking_seconds(sizes),
            "large_table": lambda: large_table(sizes, device),
            "copy_gb_per_second": lambda: copy_gb_per_second(sizes.copied),
        }
        for name, part in parts.items():
            results[name] = unless_full(part)
            gc.collect()  # tables that the next part needs the memory of
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["command"] = command("gpu_training")
    print(json.dumps(results, indent=2))
    if options.json:
        write(options.json, results)
    return 0 if results["correct"] else 1


def _name(gpus: list[Any]) -> str:
    if not gpus:
        return processor()
    return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU"))


def unless_full(part: Callable[[], Any]) -> Any:
    """What a part gives, or that it needs more memory than the device has."""
    try:
        return part()
    except tf.errors.ResourceExhaustedError as error:
        return f"left out, the memory is full: {str(error).splitlines()[0][:90]}"


def correctness(device: str, sizes: Sizes) -> dict[str, float]:
    """By method, tower and optimizer: how far a device is from the CPU after a few steps."""
    cases: dict[str, dict[str, Any]] = {
        f"method {name}": {"method": name} for name in sizes.methods
    }
    cases |= {f"tower {name}": {"method": "dns", "tower": name} for name in sizes.towers}
    cases |= {f"optimizer {name}": {"method": "ssl_pop", "optimizer": name} for name in OPTIMIZERS}
    data = _small()
    return {name: difference(data, device, case) for name, case in cases.items()}


def difference(data: RetrievalData, device: str, case: dict[str, Any], steps: int = 3) -> float:
    """The largest |a - b| / (|b| + 0.01) of losses and weights on a device and on the CPU."""
    ours = _trained(data, device, case, steps, jit_compile=True)
    theirs = _trained(data, "CPU:0", case, steps, jit_compile=False)
    parts = [np.abs(a - b) / (np.abs(b) + 0.01) for a, b in zip(ours, theirs, strict=True)]
    return float(max(part.max() for part in parts))


def _small() -> RetrievalData:
    rng = np.random.default_rng(0)
    pairs = {"u": rng.integers(0, 90, 1500), "i": (120 * rng.random(1500) ** 2).astype(int)}
    items = pd.DataFrame({"i": np.arange(120), "brand": [f"b{n % 7}" for n in range(120)]})
    options: dict[str, Any] = {"train_ratio": 1.0, "item_features": items}
    return from_dataframe(pd.DataFrame(pairs), user="u", item="i", **options)


def _trained(
    data: RetrievalData, device: str, case: dict[str, Any], steps: int, *, jit_compile: bool
) -> list[np.ndarray]:
    """Losses, then weights, after a few steps."""
    settings: dict[str, Any] = {"normalize": True, "temperature": 0.3, "init_stddev": 0.5} | case
    optimizer = settings.pop("optimizer", None) or tf_keras.optimizers.SGD(1.0)
    with tf.device(device):
        model = TwoTower(data, 8, jit_compile=jit_compile, **settings)
        model.compile(optimizer=optimizer)
        batches = list(data.train(64, seed=3).take(steps))
        step = tf.function(model.train_step, autograph=False).get_concrete_function(batches[0])
        losses = [float(step(batch)["loss"]) for batch in batches]
    return [np.array(losses), *(weight.numpy() for weight in model.trainable_variables)]


def seconds_of(call: Callable[[], Any], warm: int = 5, calls: int = 20) -> float:
    """The median time of a call that waits for its result."""
    times = []
    for _ in range(warm + calls):
        started = time.perf_counter()
        result = call()
        if tf.is_tensor(result):
            result[..., :1].numpy()  # waits for it
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def profile(data: RetrievalData, steps: int = 20) -> dict[str, float] | None:
    """Traffic and idle share of steps of ssl_pop at the first size of batches."""
    model = TwoTower(data, 64, "ssl_pop", normalize=True, temperature=0.1)
    model.compile(optimizer="rowwise_adagrad")
    step = _step_of(model, _forever(_train_rows(data)))
    for _ in range(5):
        step()
    with tempfile.TemporaryDirectory() as scratch:
        with tf.profiler.experimental.Profile(scratch):
            for _ in range(steps):
                step()
        [file] = Path(scratch).rglob("*.xplane.pb")
        return of_profile(file.read_bytes(), steps)


def of_profile(content: bytes, steps: int) -> dict[str, float] | None:
    """What the profiler wrote of the first GPU, by step; None where there was no GPU."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(content)
    plane = next((p for p in space.planes if p.name.startswith("/device:GPU")), None)
    if plane is None:
        return None
    spans, moved = [], {"host_to_device": 0, "device_to_host": 0}
    for line in plane.lines:
        if not line.name.startswith("Stream"):  # others show the same by op
            continue
        for event in line.events:
            start = 1000 * line.timestamp_ns + event.offset_ps
            spans.append((start, start + event.duration_ps))
            for direction, size in _copies(plane, event):
                moved[direction] += size
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    idle = 1 - _covered(spans) / (last - first)
    by_step = {f"{direction}_bytes": size / steps for direction, size in moved.items()}
    return by_step | {"idle_share": round(idle, 4), "ms": round((last - first) / steps / 1e9, 3)}


def _copies(plane: Any, event: Any) -> Iterator[tuple[str, int]]:
    """The bytes that an event copies between host and device."""
    for stat in event.stats:
        if plane.stat_metadata[stat.metadata_id].name != "memcpy_details":
            continue
        text = stat.str_value or plane.stat_metadata[stat.ref_value].name
        kinds = dict(re.findall(r"(\w+):(\S+)", text))
        here, there = (kinds[f"kind_{end}"].startswith("device") for end in ("src", "dst"))
        if here != there:
            yield ("device_to_host" if here else "host_to_device"), int(kinds["size"])


def _covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of spans."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _train_rows(data: RetrievalData) -> dict[str, np.ndarray]:
    return {name: np.asarray(data.arrays("train")[name]) for name in ("query_id", "candidate_id")}


def examples_per_second(data: RetrievalData, sizes: Sizes) -> dict[str, Any]:
    """By method and size of the batch, beside stock TFRS."""

    def rate(model: Any, optimizer: Any, size: int) -> int:
        model.compile(optimizer=optimizer)
        return round(size / seconds_of(_step_of(model, _forever(_train_rows(data), size))))

    def ours(size: int) -> int:
        model = TwoTower(data, DIM, "ssl_pop", normalize=True, temperature=0.1)
        return rate(model, "rowwise_adagrad", size)

    def stock(size: int) -> int:
        model = StockRetrieval(data)
        for table in (model.queries, model.candidates):
            table.build(None)
        return rate(model, tf_keras.optimizers.Adagrad(0.1), size)

    def bpr(candidates: int) -> int:
        return round(BATCH / seconds_of(_uniform_step("rowwise_adagrad", candidates, "bpr")))

    results: dict[str, Any] = {}
    for size in sizes.batches:
        results[f"ssl_pop {size}"] = unless_full(lambda size=size: ours(size))  # type: ignore[misc]
        if size <= sizes.largest_stock:
            results[f"stock_tfrs {size}"] = unless_full(lambda size=size: stock(size))  # type: ignore[misc]
        gc.collect()
    results["bpr 2048"] = unless_full(lambda: bpr(sizes.bpr_candidates))
    return results


def ranking_seconds(sizes: Sizes) -> float:
    """The first 100 of all candidates for all queries, of random embeddings."""
    shapes = [[rows, 64] for rows in (sizes.queries, sizes.candidates)]
    queries, candidates = (tf.random.stateless_normal(shape, [1, 2]) for shape in shapes)
    nothing = np.empty(0, np.int64)
    rest = np.arange(sizes.queries), Positives(nothing, nothing, sizes.queries)
    order = np.arange(sizes.candidates)
    call = lambda: tf.constant(rank_corpus(queries, candidates, *rest, k=100, order=order))  # noqa: E731
    return round(seconds_of(call, warm=1, calls=3), 3)


def large_table(sizes: Sizes, device: str) -> dict[str, Any]:
    """Steps of ssl_pop on a table that takes a good part of the card."""
    seconds = seconds_of(_uniform_step("rowwise_adagrad", sizes.large_candidates))
    results = {"candidates": sizes.large_candidates, "examples_per_second": round(BATCH / seconds)}
    if device.startswith("GPU"):
        results["peak_bytes"] = tf.config.experimental.get_memory_info(device)["peak"]
    return results


def copy_gb_per_second(size: int) -> float:
    """What a pass that reads and writes so many numbers gets out of the memory of the device."""
    numbers = tf.zeros([size])
    copy = tf.function(lambda: numbers + 1.0)
    return round(2 * 4 * size / seconds_of(copy) / 1e9, 2)


if __name__ == "__main__":
    sys.exit(main())
