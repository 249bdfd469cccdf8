"""How OPAUC(β) goes with recall and NDCG at K, on simulated rankings.

    python -m benchmarks.opauc_simulation [--plot docs/opauc.png] [--json FILE]

Each ranking is one query with 100 positives among 10,000 negatives. Scores of negatives are
standard normal; those of positives are normal with a mean and a deviation drawn for the ranking,
so that some models separate the whole and others only the top. The plot shows the correlation over
rankings of OPAUC(β) / β with recall@K and with NDCG@K: it peaks at small β, far above AUC (β = 1),
and the smaller K, the smaller the best β ("On the Theories behind Hard Negative Sampling", WWW
2023, its simulation).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.record import write
from towers.metrics.definitions import ndcg, recall
from towers.metrics.opauc import opauc

RANKINGS, POSITIVES, NEGATIVES = 2000, 100, 10_000
KS = (5, 10, 20, 50)
BETAS = np.unique(np.round(np.geomspace(2, NEGATIVES, 30))) / NEGATIVES


def main() -> None:
    """Simulates, prints the best β of each metric, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", help="where to draw the curves")
    parser.add_argument("--json", help="where to write the numbers")
    options = parser.parse_args()
    results = correlations(rankings(seed=0))
    for name, curve in results["correlation"].items():
        best = int(np.argmax(curve))
        beta = results["beta"][best]
        print(f"{name}: best at β = {beta:.4f} ({curve[best]:.3f}); AUC {curve[-1]:.3f}")
    if options.json:
        write(options.json, results)
    if options.plot:
        draw(results, options.plot)


def rankings(seed: int) -> np.ndarray:
    """bool [rankings, positives + negatives], best first."""
    rng = np.random.default_rng(seed)
    hits = np.empty((RANKINGS, POSITIVES + NEGATIVES), bool)
    labels = np.arange(POSITIVES + NEGATIVES) < POSITIVES
    for row in hits:
        mean, deviation = rng.uniform(0.0, 2.0), rng.uniform(0.3, 1.7)
        scores = rng.standard_normal(len(labels))
        scores[:POSITIVES] = mean + deviation * scores[:POSITIVES]
        row[:] = labels[np.argsort(-scores)]
    return hits


def correlations(hits: np.ndarray) -> dict[str, Any]:
    """Pearson's correlation over rankings, for each β and each metric at K."""
    positives = np.full(len(hits), POSITIVES)
    partial = [opauc(hits, positives, np.array(NEGATIVES), beta) / beta for beta in BETAS]
    found = {}
    for k in KS:
        for name, metric in (("recall", recall), ("NDCG", ndcg)):
            values = metric(hits, positives, k)
            found[f"{name}@{k}"] = [float(np.corrcoef(values, one)[0, 1]) for one in partial]
    return {"beta": BETAS.tolist(), "correlation": found}


def draw(results: dict[str, Any], path: str) -> None:
    """One panel a metric, one curve a K, a dot at its best β."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, name in zip(panels, ("recall", "NDCG"), strict=True):
        for k in KS:
            curve = results["correlation"][f"{name}@{k}"]
            (line,) = panel.semilogx(results["beta"], curve, label=f"{name}@{k}")
            best = int(np.argmax(curve))
            panel.plot(results["beta"][best], curve[best], "o", color=line.get_color())
        panel.set(xlabel="β", title=f"OPAUC(β) / β and {name}@K")
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("correlation over rankings")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
