"""How far the streaming estimates of item frequencies are from the truth.

    python -m benchmarks.estimator_error [--quick] [--json FILE] [--plot FILE.png]

A stream of batches with Zipf-distributed items; half way, popularity is turned upside down. The
error is |log p̂ - log p| of the probability that a step holds the item, by decile of its popularity:
with one hash array and with five, before the change and after it (Yi et al., RecSys 2019, show the
same two questions in their simulation).
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import numpy as np

from benchmarks.record import command, write
from pipeline.contract import hashing
from pipeline.streaming.estimator import STATE, advance

ITEMS, BATCH, ALPHA, ZIPF = 2000, 256, 0.01, 1.0
ARRAYS = (1, 5)
LOOKS = 20  # times the error is measured in each half of the stream


def main() -> None:
    """Parses, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--plot", help="where to draw them (.png)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args()
    results = measure(1000 if options.quick else 10_000)
    results["command"] = command("estimator_error")
    print(json.dumps(results["deciles"], indent=2))
    if options.json:
        write(options.json, results)
    if options.plot:
        draw(results, options.plot)


def measure(steps: int, seed: int = 0) -> dict[str, Any]:
    """Errors over a stationary half of `steps` steps, and over as many after the change.

    Returns:
      `deciles`: arrays → stationary / changed → error of each tenth of the items at the end of that
      half, most popular first; `over_time`: arrays → mean error at `steps`.
    """
    rng = np.random.default_rng(seed)
    zipf = np.arange(1, ITEMS + 1) ** -ZIPF
    halves = [zipf / zipf.sum(), zipf[::-1] / zipf.sum()]
    prints = hashing.fingerprints(str(item).encode() for item in range(ITEMS))
    buckets = hashing.hash_buckets(prints, num_buckets=2 * ITEMS, num_hashes=max(ARRAYS))
    state = np.zeros((max(ARRAYS), 2 * ITEMS), STATE)
    state["interval"] = 1
    looks = np.linspace(0, steps, LOOKS + 1).astype(int)
    deciles: dict[int, dict[str, list[float]]] = {arrays: {} for arrays in ARRAYS}
    over_time: dict[int, list[float]] = {arrays: [] for arrays in ARRAYS}
    for half, (name, q) in enumerate(zip(("stationary", "changed"), halves, strict=True)):
        truth = np.log(-np.expm1(BATCH * np.log1p(-q)))
        by_popularity = np.array_split(np.argsort(-q), 10)
        for start, stop in itertools.pairwise(looks):
            drawn = rng.choice(ITEMS, ((stop - start) * BATCH), p=q)
            when = half * steps + 1 + np.repeat(np.arange(start, stop), BATCH)
            for array in range(max(ARRAYS)):
                state[array] = advance(state[array], buckets[drawn, array], when, ALPHA)
            for arrays in ARRAYS:
                error = np.abs(_log_p(state, buckets, arrays) - truth)
                over_time[arrays].append(float(error.mean()))
        for arrays in ARRAYS:
            error = np.abs(_log_p(state, buckets, arrays) - truth)
            deciles[arrays][name] = [float(error[items].mean()) for items in by_popularity]
    at = [*looks[1:].tolist(), *(steps + looks[1:]).tolist()]
    setting = {"items": ITEMS, "batch": BATCH, "alpha": ALPHA, "buckets": 2 * ITEMS, "seed": seed}
    return {"deciles": deciles, "over_time": over_time, "steps": at, "setting": setting}


def _log_p(state: np.ndarray, buckets: np.ndarray, arrays: int) -> np.ndarray:
    found = np.stack([state["interval"][array, buckets[:, array]] for array in range(arrays)])
    return -np.log(found.max(axis=0))


def draw(results: dict[str, Any], path: str) -> None:
    """Both questions side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = {"stationary": "-", "changed": "--"}
    for arrays, color in zip(ARRAYS, ("tab:orange", "tab:blue"), strict=True):
        word = "array" if arrays == 1 else "arrays"
        for name, style in styles.items():
            errors = results["deciles"][arrays][name]
            label = f"{arrays} hash {word}, {name}"
            left.plot(range(1, 11), errors, style, color=color, marker="o", label=label)
        right.plot(
            results["steps"], results["over_time"][arrays], color=color, label=f"{arrays} {word}"
        )
    left.set(xlabel="decile of popularity, most popular first", xticks=range(1, 11))
    left.set(ylabel="mean |log p̂ - log p|", title="Error at the end of each half")
    right.axvline(results["steps"][LOOKS - 1], color="gray", linestyle=":")
    right.set(xlabel="step", title="Mean error over the stream; popularity reversed at the line")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
