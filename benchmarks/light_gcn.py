"""Trains LightGCN on Tmall with `soft_bpr` and with `dns`: recall and NDCG epoch by epoch.

    python -m benchmarks.light_gcn --data DIR [--method soft_bpr|dns] [--epochs 40] --json FILE

DIR holds train.parquet, validation.parquet and test.parquet with user_id and item_id, or is what
`twotower prepare --split given` made of them. Both methods have one setting: d = 64, three
layers, Adam, B = 2048, pool H = 16, and what the flags say. The curves of both stand in FILE
beside the end values of the paper (Soft BPR, Table 2), which were tuned on validation.

FILE and a checkpoint are written after every epoch: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline import schema
from towers.data import RetrievalData, open_data
from towers.held_out import HeldOut
from towers.optimizers import CoupledAdam
from towers.two_tower import TwoTower

METHODS = ("dns", "soft_bpr")
KS = (10, 20, 50)
# Recall@50 and true NDCG@50 on the test split, LightGCN with d = 64 and three layers.
PAPER = {
    "uniform": {"recall@50": 0.0895, "ndcg@50": 0.0476},
    "dns": {"recall@50": 0.0951, "ndcg@50": 0.0504},
    "mixgcf": {"recall@50": 0.0963, "ndcg@50": 0.0508},
    "soft_bpr": {"recall@50": 0.1051, "ndcg@50": 0.0552},
}


def main() -> None:
    """Parses, trains and measures, and writes the JSON after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory of the split files, or prepared")
    parser.add_argument("--json", required=True, help="where to write the results")
    parser.add_argument("--method", choices=METHODS, help="only this one; both by default")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--layers", type=int, default=3, help="0: matrix factorisation")
    parser.add_argument("--learning_rate", type=float, default=0.005)
    parser.add_argument("--l2", type=float, default=0.0, help="coupled, on every row")
    parser.add_argument("--pool", type=int, default=16, help="H, uniform draws for each pair")
    parser.add_argument("--soft_factor", type=float, default=0.2, help="1 - α of soft_bpr")
    parser.add_argument("--seed", type=int, default=10)
    options = parser.parse_args()
    path = Path(options.json)
    data = prepared(Path(options.data), path.with_suffix(".prepared"))
    for method in [options.method] if options.method else METHODS:
        for curve in train(data, method, options, path.with_suffix(f".{method}")):
            write(path, method, curve, options)
    print(table(json.loads(path.read_text())))


def prepared(source: Path, output: Path) -> RetrievalData:
    """The data, prepared first where it is not yet."""
    if (source / schema.MANIFEST).is_file():
        return open_data(source)
    if not (output / schema.MANIFEST).is_file():
        from pipeline.config import PrepareConfig
        from pipeline.job import prepare

        parts = "{" + ",".join(schema.SPLITS) + "}"
        pattern = str(source / f"{parts}.parquet")
        prepare(PrepareConfig(source=pattern, output=str(output), split="given"), [])
    return open_data(output)


def settings_of(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """What decides a curve."""
    settings = {
        "method": method,
        "dim": 64,
        "batch_size": 2048,
        "num_negatives": options.pool,
        **{name: getattr(options, name) for name in ("layers", "learning_rate", "l2", "seed")},
    }
    return settings | ({"soft_factor": options.soft_factor} if method == "soft_bpr" else {})


def train(data: RetrievalData, method: str, options: argparse.Namespace, directory: Path) -> Any:
    """Yields the curve after every epoch; goes on where a checkpoint of the same settings is."""
    settings = settings_of(method, options)
    knobs = {name: settings[name] for name in ("num_negatives", "soft_factor") if name in settings}
    tower = {"tower": "light_gcn", "num_layers": options.layers} if options.layers else {}
    model = TwoTower(data, dim=64, method=method, seed=options.seed, **tower, **knobs)
    model.compile(optimizer=CoupledAdam(options.learning_rate, options.l2))
    model.optimizer.build(model.trainable_variables)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(directory), max_to_keep=1
    )
    record = directory / "curve.json"
    curve: dict[str, Any] = {"settings": settings, "epochs": []}
    if manager.restore_or_initialize():
        curve = json.loads(record.read_text())
        if curve["settings"] != settings:
            raise SystemExit(f"{directory} holds a run of {curve['settings']}; name another file.")
    splits = {split: HeldOut(data, split) for split in ("validation", "test")}
    steps = data.steps_per_epoch(2048)
    yield curve
    for epoch in range(len(curve["epochs"]), options.epochs):
        started = time.monotonic()
        rows = data.train(2048, seed=options.seed, first_step=epoch * steps)
        loss = model.fit(rows, verbose=0).history["loss"][0]
        seconds = time.monotonic() - started
        point = {"epoch": epoch + 1, "loss": loss, "seconds": round(seconds, 2)}
        curve["epochs"].append(point | {name: measure(model, splits[name]) for name in splits})
        record.parent.mkdir(parents=True, exist_ok=True)
        schema.write_atomically(record, json.dumps(curve))
        manager.save(checkpoint_number=epoch + 1)
        yield curve


def measure(model: TwoTower, held_out: HeldOut) -> dict[str, float]:
    """Recall and NDCG of a split."""
    queries, candidates = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    means, _ = held_out.measure(queries, candidates, KS)
    return {name: round(means[name], 5) for name in means if name.split("@")[0] in _SHOWN}


_SHOWN = ("recall", "ndcg")


def write(path: Path, method: str, curve: dict[str, Any], options: argparse.Namespace) -> None:
    """Puts the curve of a method into the results, and prints its last point."""
    results = json.loads(path.read_text()) if path.exists() else {"curves": {}}
    results["command"] = " ".join(["python -m benchmarks.light_gcn", *sys.argv[1:]])
    results |= {"paper": PAPER, "data": options.data}
    results["curves"][method] = curve
    results["best"] = {name: best(points) for name, points in results["curves"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    schema.write_atomically(path, json.dumps(results, indent=1) + "\n")
    if curve["epochs"]:
        last = curve["epochs"][-1]
        shown = " ".join(f"{name} {last['test'][name]:.4f}" for name in ("recall@50", "ndcg@50"))
        print(f"{method} epoch {last['epoch']}: loss {last['loss']:.4f}, test {shown}", flush=True)


def best(curve: dict[str, Any]) -> dict[str, Any] | None:
    """The point with the best validation recall@50."""
    return max(curve["epochs"], key=lambda point: point["validation"]["recall@50"], default=None)


def table(results: dict[str, Any]) -> str:
    """The best points and the paper's as plain text."""
    lines = [f"{'test split':24}{'recall@50':>10}{'ndcg@50':>10}"]
    for name, point in results["best"].items():
        if point:
            label, values = f"{name}, epoch {point['epoch']}", point["test"]
            lines.append(f"{label:24}{values['recall@50']:10.4f}{values['ndcg@50']:10.4f}")
    for name, values in results["paper"].items():
        label = f"paper: {name}"
        lines.append(f"{label:24}{values['recall@50']:10.4f}{values['ndcg@50']:10.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
