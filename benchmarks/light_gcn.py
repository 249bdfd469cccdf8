"""Trains LightGCN on Tmall with `dns` and with `soft_bpr`: recall and NDCG epoch by epoch.

    python -m benchmarks.light_gcn --data DIR [--search 6] --json FILE [--plot PNG]

DIR holds train.parquet, validation.parquet and test.parquet with user_id and item_id. Both methods
have one setting: d = 64, three layers, Adam, B = 2048, and what the flags say. Their curves stand
in FILE, which is written after every point, beside the end values of the paper (Soft BPR,
Table 2).

With --search both methods are first trained for some epochs at each setting of SEARCHED, and
measured on validation; the curves follow the flags. The grids of the paper: learning rate 5e-4 to
1e-2, H 8 to 64, 1 - α 0.05 to 0.4, L2 0 to 1e-2. Where that L2 is a term of the loss, of the rows
of a batch over B, as in the published code of LightGCN, 1e-3 adds about as much to a gradient as
--l2 1e-7, which adds it to every row at every step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import command, write
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from towers.data.interactions import RetrievalData, open_data
from towers.metrics.held_out import HeldOut
from towers.model.optimizers import CoupledAdam
from towers.model.two_tower import TwoTower

METHODS = ("dns", "soft_bpr")
DIM, LAYERS, BATCH = 64, 3, 2048
KS = (10, 20, 50)
SHOWN = ("recall@50", "ndcg@50")
# Test split, LightGCN with d = 64 and three layers, each method at the best setting of its own.
PAPER = {
    "uniform": {"recall@50": 0.0895, "ndcg@50": 0.0476},
    "dns": {"recall@50": 0.0951, "ndcg@50": 0.0504},
    "mixgcf": {"recall@50": 0.0963, "ndcg@50": 0.0508},
    "soft_bpr": {"recall@50": 0.1051, "ndcg@50": 0.0552},
}
SEARCHED: tuple[dict[str, float], ...] = (  # what differs from the flags
    {},
    {"learning_rate": 0.001, "l2": 0.0},
    {"learning_rate": 0.01, "l2": 0.0},
    *({"l2": l2} for l2 in (1e-6, 1e-5)),
    *({"soft_factor": factor} for factor in (0.05, 0.1, 0.4)),
)


def main() -> None:
    """Parses, trains and measures, and writes the JSON after every point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory of the files of the splits")
    parser.add_argument("--json", required=True, help="where to write the results")
    parser.add_argument("--plot", help="where to write the picture of the curves")
    parser.add_argument("--search", type=int, default=0, help="epochs at each searched setting")
    parser.add_argument("--epochs", type=int, default=40, help="of the curves")
    parser.add_argument("--every", type=int, default=2, help="epochs between two points of a curve")
    parser.add_argument("--learning_rate", type=float, default=0.005)
    parser.add_argument("--l2", type=float, default=1e-7, help="coupled, on every row")
    parser.add_argument("--init_stddev", type=float, default=0.01, help="of the tables at first")
    parser.add_argument("--pool", type=int, default=16, help="H, uniform draws for each pair")
    parser.add_argument("--soft_factor", type=float, default=0.2, help="1 - α of soft_bpr")
    parser.add_argument("--seed", type=int, default=10)
    options = parser.parse_args()
    names = ("learning_rate", "l2", "init_stddev", "pool", "soft_factor", "seed")
    setting = {name: getattr(options, name) for name in names}
    results: dict[str, Any] = {
        "command": command("light_gcn"),
        "setting": {"dim": DIM, "layers": LAYERS, "batch_size": BATCH} | setting,
        "paper": PAPER,
    }
    with tempfile.TemporaryDirectory() as work:
        output = str(Path(work) / "prepared")
        prepare(PrepareConfig(source=options.data, output=output, split="given"), [])
        data = open_data(output)
        results["popularity"] = rounded(HeldOut(data, "test").measure_popularity(KS)[0])
        results["search"], results["curves"] = [], {}
        if options.search:
            search(data, setting, options, results)
        for method in METHODS:
            for curve in train(data, method, setting, options, ("validation", "test")):
                results["curves"][method] = curve
                results["best"] = {name: best(points) for name, points in results["curves"].items()}
                write(options.json, results)
                show(method, curve[-1])
    print(table(results))
    if options.plot:
        draw(results, options.plot)


def search(
    data: RetrievalData,
    setting: dict[str, Any],
    options: argparse.Namespace,
    results: dict[str, Any],
) -> None:
    """Adds validation curves of both methods at the searched settings to the results."""
    for changed in SEARCHED:
        for method in METHODS:
            if method == "dns" and "soft_factor" in changed:
                continue
            short = argparse.Namespace(epochs=options.search, every=options.every)
            *_, curve = train(data, method, setting | changed, short, ("validation",))
            values = [point["validation"]["recall@50"] for point in curve]
            results["search"].append({"method": method} | changed | {"recall@50": values})
            write(options.json, results)
            print(f"search: {method} {changed}: validation recall@50 {values[-1]:.4f}", flush=True)


def train(
    data: RetrievalData,
    method: str,
    setting: dict[str, Any],
    length: argparse.Namespace,
    splits: tuple[str, ...],
) -> Iterator[list[dict[str, Any]]]:
    """The curve so far, after every point of it."""
    knobs = {"soft_factor": setting["soft_factor"]} if method == "soft_bpr" else {}
    model = TwoTower(
        data,
        dim=DIM,
        method=method,
        seed=setting["seed"],
        tower="light_gcn",
        num_layers=LAYERS,
        num_negatives=setting["pool"],
        init_stddev=setting["init_stddev"],
        **knobs,
    )
    model.compile(optimizer=CoupledAdam(setting["learning_rate"], setting["l2"]))
    held_out = {split: HeldOut(data, split) for split in splits}
    rows = data.train(BATCH, seed=setting["seed"])
    curve: list[dict[str, Any]] = []
    seconds, every = 0.0, length.every
    for epoch in range(every, length.epochs + 1, every):
        started = time.monotonic()
        losses = model.fit(rows, epochs=every, verbose=0).history["loss"]
        seconds += time.monotonic() - started
        point: dict[str, Any] = {"epoch": epoch, "loss": round(losses[-1], 5)}
        point["training_seconds"] = round(seconds, 1)
        vectors = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
        for split, rows_of in held_out.items():
            point[split] = rounded(rows_of.measure(*vectors, KS)[0])
        curve.append(point)
        yield curve


def rounded(means: dict[str, float]) -> dict[str, float]:
    """Recall and NDCG alone."""
    kept = [name for name in means if name.split("@")[0] in ("recall", "ndcg")]
    return {name: round(means[name], 5) for name in kept}


def best(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """The point with the best validation recall@50."""
    return max(curve, key=lambda point: point["validation"]["recall@50"])


def show(method: str, point: dict[str, Any]) -> None:
    """Prints a point of a curve."""
    shown = " ".join(f"{name} {point['test'][name]:.4f}" for name in SHOWN)
    print(f"{method} epoch {point['epoch']}: loss {point['loss']:.4f}, test {shown}", flush=True)


def table(results: dict[str, Any]) -> str:
    """The best points and the values of the paper as plain text."""
    rows = {
        f"{name}, epoch {point['epoch']}": point["test"] for name, point in results["best"].items()
    }
    rows["popularity"] = results["popularity"]
    rows |= {f"paper: {name}": values for name, values in results["paper"].items()}
    lines = [f"{'test split':24}" + "".join(f"{name:>12}" for name in SHOWN)]
    for label, values in rows.items():
        lines.append(f"{label:24}" + "".join(f"{values[name]:12.4f}" for name in SHOWN))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: str) -> None:
    """The curves of both methods on test, the paper's end values as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, len(SHOWN), figsize=(11, 4), layout="constrained")
    colors = dict(zip(METHODS, ("tab:orange", "tab:blue"), strict=True))
    for axes, metric in zip(places, SHOWN, strict=True):
        for method, curve in results["curves"].items():
            values = [point["test"][metric] for point in curve]
            epochs = [point["epoch"] for point in curve]
            axes.plot(epochs, values, color=colors[method], label=method)
            chosen = results["best"][method]
            axes.plot(chosen["epoch"], chosen["test"][metric], "o", color=colors[method])
            value = results["paper"][method][metric]
            label = f"{method}, paper: {value:.4f}"
            axes.axhline(value, color=colors[method], linestyle="--", label=label)
        axes.set(xlabel="epoch", title=f"{metric}, test split of Tmall")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
