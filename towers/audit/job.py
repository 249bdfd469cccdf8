"""`twotower audit`: how far each method is from the full softmax, on a trained run and its data."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contract.files import write_atomically
from towers.audit.advice import advise
from towers.audit.cost import Stopwatch, step_seconds
from towers.audit.measures import (
    full_softmax_buckets,
    measure,
    popularity_buckets,
    references,
    summarize,
)
from towers.audit.page import as_markdown
from towers.audit.plots import draw
from towers.audit.settings import AuditConfig
from towers.audit.subjects import (
    BASELINE,
    Maker,
    Spec,
    check_known,
    choose,
    target_of,
)
from towers.audit.weights import Batches, Frozen
from towers.data.interactions import open_data
from towers.training.run_directory import open_run, write_json

log = logging.getLogger(__name__)

RECORD, TABLE, PLOT = "audit.json", "audit.md", "audit.png"


def audit(config: AuditConfig) -> dict[str, Any]:
    """Compares the gradients of methods with that of the full softmax, on frozen embeddings.

    Writes audit.json, audit.md and audit.png, and prints the table and the advice.

    Returns:
      {"k", "target", "method": of the run, "batches", "full_softmax_buckets", "ranks",
      "methods": {label: measures with errors (see `audit_measures.summarize`), "buckets",
      "mass_by_rank", "seconds", "cost_ratio", "state"}, "left_out": {label: reason}, "advice"}.

    Raises:
      ValueError: the run is missing or of other data, or a method or an option is unknown.
    """
    started = time.monotonic()
    given = [Spec.parse(text) for text in config.methods]
    check_known(given)
    bench = _Bench(config)
    specs, left_out = choose(config, bench.trained, bench.target)
    for spec in specs:
        bench.maker.check(spec)
    methods: dict[str, dict[str, Any]] = {}
    for place, spec in enumerate(specs):
        if methods and time.monotonic() - started > config.max_seconds:
            left_out |= {s.label: "max_seconds were over" for s in specs[place:]}
            break
        methods[spec.label] = bench.measure(spec)
        log.info("audit: %s (%d of %d)", spec.label, place + 1, len(specs))
    result = bench.description() | {"methods": methods, "left_out": left_out}
    result["advice"] = advise(bench.target, methods)
    _write(config, result)
    return result


class _Bench:
    """What all methods are measured on."""

    def __init__(self, config: AuditConfig) -> None:
        data = open_data(config.data)
        self.model, self.trained = open_run(config.run, data)
        self.config = config
        self.frozen = Frozen.of(self.model, data, normalize=self.trained.normalize)
        self.batches = Batches.of(
            data.num_rows("train"),
            batches=config.batches,
            pairs=config.pairs,
            batch_size=config.batch_size or self.trained.batch_size,
            seed=config.seed,
        )
        positives = data.positives("train")
        chosen = positives.sizes[self.frozen.query_ids[self.batches.pairs]]
        self.target = target_of(config.k, float(data.num_candidates - chosen.mean()))
        self.maker = Maker(self.trained, self.model, data, self.frozen, self.batches)
        self.expected = references(self.frozen, self.batches, positives)
        self.buckets = popularity_buckets(data.train_counts)
        spaced = np.geomspace(1, data.num_candidates, 60).round().astype(int)
        self.ranks = np.unique([*spaced, min(config.k, data.num_candidates)])
        base, _ = self.maker.make(Spec.parse(BASELINE), warm_up=config.warm_up)
        self.baseline = Stopwatch(base, self.batches)

    def description(self) -> dict[str, Any]:
        """What the figures rest on."""
        full = full_softmax_buckets(self.expected, self.buckets)
        return {
            "k": self.config.k,
            "target": self.target._asdict()
            | {"rho": self.target.rho, "specs": list(self.target.specs)},
            "method": self.trained.method,
            "batches": {
                "audited": len(self.batches.pairs),
                "pairs": self.batches.pairs.shape[1],
                "size": self.batches.batch_size,
                "draws": self.config.draws,
            },
            "full_softmax_buckets": full.tolist(),
            "ranks": self.ranks.tolist(),
        }

    def measure(self, spec: Spec) -> dict[str, Any]:
        """All that is measured of a method."""
        subject, state = self.maker.make(spec, warm_up=self.config.warm_up)
        sums = measure(subject, self.frozen, self.expected, self.buckets, self.config.draws)
        watch = Stopwatch(subject, self.batches)
        seconds, ratio = step_seconds(watch, self.baseline, self.config.timed_steps)
        cumulative = np.cumsum(_shares(sums.ranked.sum(axis=0)))
        return {
            "method": spec.name,
            "options": spec.options,
            "state": state,
            **summarize(sums, self.config.k),
            "buckets": _or_none(_shares(sums.buckets.sum(axis=0))),
            "mass_by_rank": _or_none(cumulative[self.ranks - 1]),
            "seconds": seconds,
            "cost_ratio": ratio,
        }


def _shares(mass: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return mass / mass.sum()


def _or_none(values: np.ndarray) -> list[float | None]:
    """For JSON, which knows no NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _write(config: AuditConfig, result: dict[str, Any]) -> None:
    output = Path(config.output or Path(config.run) / "audit")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, result)
    page = as_markdown(result)
    write_atomically(output / TABLE, page)
    draw(result, output / PLOT)
    print(page + f"\n{output / RECORD}, {TABLE} and {PLOT} hold all of it.")
