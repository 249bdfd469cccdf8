"""`twotower audit`: how far each method is from the full softmax, on a trained run and its data."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contract import schema
from pipeline.contract.settings import require_in_corpus
from samplers.methods.by_name import METHODS, build
from samplers.methods.in_batch import CorrectSfx
from samplers.methods.method import Method
from towers.audit import measures
from towers.audit.report import write_reports
from towers.audit.settings import AuditConfig, Spec, Target
from towers.audit.subjects import Batches, Frozen, Stopwatch, Subject
from towers.data.interactions import open_data
from towers.metrics.ranking import MAX_SCORES
from towers.training.failures import compile_quietly
from towers.training.run_directory import open_run

log = logging.getLogger(__name__)

# Draws of each row alone, beside those by default.
DRAWS = "dns_mn:group_size=1", "softmax_v:group_size=1"
_BASELINE = "ssl_pop"  # whose step costs are compared with


def audit(config: AuditConfig) -> dict[str, Any]:
    """Compares the gradients of methods with that of the full softmax, on frozen embeddings.

    Writes audit.json and audit.html, and prints the table.

    Returns:
      {"run", "k", "target", "method": of the run, "batches", "full_softmax_buckets", "ranks",
      "methods": {label: measures with errors (see `measures.summarize`), "buckets",
      "mass_by_rank", "seconds", "cost_ratio", "state"}, "left_out": {label: reason}}.

    Raises:
      ValueError: the run is missing or of other data, or a method or an option is unknown.
    """
    started = time.monotonic()
    for spec in map(Spec.parse, config.methods):  # before anything is read
        if spec.name not in METHODS:
            build(spec.name)  # raises, with the names there are
    compile_quietly()
    bench = Bench(config)
    specs, left_out = bench.choose()
    for spec in specs:
        bench.build(spec)  # wrong options are errors before the first measure
    methods: dict[str, dict[str, Any]] = {}
    for number, spec in enumerate(specs):
        if methods and time.monotonic() - started > config.max_seconds:
            left_out |= {s.label: "max_seconds were over" for s in specs[number:]}
            break
        methods[spec.label] = bench.measure(spec)
        log.info("audit: %s (%d of %d)", spec.label, number + 1, len(specs))
    full = measures.full_softmax_buckets(bench.expected, bench.buckets)
    result = {
        "run": config.run,
        "k": config.k,
        "target": bench.target._asdict(),
        "method": bench.trained.method,
        "batches": {
            "audited": config.batches,
            "pairs": bench.batches.pairs.shape[1],
            "size": bench.batches.batch_size,
            "draws": config.draws,
        },
        "full_softmax_buckets": full.tolist(),
        "ranks": bench.ranks.tolist(),
        "methods": methods,
        "left_out": left_out,
    }
    write_reports(Path(config.output or Path(config.run) / "audit"), result)
    return result


class Bench:
    """What all methods are measured on."""

    def __init__(self, config: AuditConfig) -> None:
        self.config, self.data = config, open_data(config.data)
        require_in_corpus(config, "k", self.data.num_candidates)
        self.model, self.trained = open_run(config.run, self.data)
        if self.trained.refit:
            self.data = self.data.all_as_train()
        rows = self.data.arrays("train")
        self.frozen = Frozen(
            self.model.query_embeddings().numpy(),
            self.model.candidate_embeddings().numpy(),
            np.asarray(rows[schema.QUERY_ID], np.int64),
            np.asarray(rows[schema.CANDIDATE_ID], np.int64),
            self.trained.normalize,
        )
        self.batches = Batches.of(
            self.data.num_rows("train"),
            batches=config.batches,
            pairs=config.pairs,
            batch_size=config.batch_size or self.trained.batch_size,
            seed=config.seed,
        )
        positives, num_candidates = self.data.positives("train"), self.data.num_candidates
        chosen = positives.sizes[self.frozen.query_ids[self.batches.pairs]]
        self.target = Target.of(config.k, float(num_candidates - chosen.mean()))
        self.expected = measures.references(self.frozen, self.batches, positives)
        self.buckets = measures.popularity_buckets(self.data.train_counts)
        spaced = np.geomspace(1, num_candidates, 60).round().astype(int)
        self.ranks = np.unique([*spaced, min(config.k, num_candidates)])
        baseline, _ = self.make(Spec.parse(_BASELINE))
        self.baseline = Stopwatch(baseline, self.batches)

    def choose(self) -> tuple[list[Spec], dict[str, str]]:
        """What to audit, in order, and what is left out with the reason."""
        if self.config.methods:
            return [*map(Spec.parse, self.config.methods)], {}
        options = ",".join(self.trained.options)
        own = f"{self.trained.method}:{options}" if options else self.trained.method
        left_out = {}
        if not self.trained.normalize:
            left_out["sl_at_k"] = "its weights are made for cosines; the run scores by dot products"
        labels = dict.fromkeys(["full_softmax", own, *METHODS, *DRAWS, *self.target.specs])
        return [Spec.parse(label) for label in labels if label not in left_out], left_out

    def build(self, spec: Spec) -> Method:
        """The method of a spec; ValueError where it or an option of it is unknown or wrong."""
        options: dict[str, Any] = dict(spec.options)
        rows, num_candidates = self.batches.batch_size, self.data.num_candidates
        if spec.name == "full_softmax" and rows * num_candidates > MAX_SCORES:
            options.setdefault("block_size", str(max(1, MAX_SCORES // rows)))
        row_by_row = METHODS[spec.name].row_by_row
        return build(
            spec.name,
            frequency=self.model.method.frequency,
            num_candidates=num_candidates,
            num_queries=self.batches.pairs.size if row_by_row else self.data.num_queries,
            fingerprints=self.data.candidate_vocabulary.fingerprints,
            **options,
        )

    def make(self, spec: Spec) -> tuple[Subject, str]:
        """The subject, its state as after some training, and how it came by that state."""
        method = self.build(spec)
        subject = Subject(method, self.frozen, self.batches)
        if not method.variables:
            return subject, ""
        own = (spec.name, spec.options) == (self.trained.method, self.trained.method_options)
        if own and not method.row_by_row:
            for ours, trained in zip(method.variables, self.model.method.variables, strict=True):
                ours.assign(trained)
            return subject, "state of the run"
        if isinstance(method, CorrectSfx):
            self._settle(method)
            return subject, "estimates as after endless training"
        subject.warm_up(self.config.warm_up)
        return subject, f"state after {self.config.warm_up} steps"

    def _settle(self, method: CorrectSfx) -> None:
        """Gives the estimates their limit: a bucket of share p comes every 1 / (1 - (1 - p)^B)."""
        estimates = method.estimates
        size = int(estimates.interval.shape[0]) // method.num_hashes
        counts = np.asarray(self.model.method.frequency, np.float64)
        buckets = estimates.buckets.numpy().T
        shares = np.stack([np.bincount(column, counts, size) for column in buckets])
        misses = np.log1p(-np.minimum(shares / counts.sum(), 1 - 1e-12))  # log(1 - p)
        interval = 1 / np.maximum(-np.expm1(self.batches.batch_size * misses), 1e-12)
        step = 1 << 40
        last_step = step + 1 - np.rint(interval).astype(np.int64)
        estimates.assign(step=step, last_step=np.clip(last_step, 0, step), interval=interval)

    def measure(self, spec: Spec) -> dict[str, Any]:
        """All that is measured of a method."""
        subject, state = self.make(spec)
        fixed = self.frozen, self.expected, self.buckets
        sums = measures.measure(subject, *fixed, self.config.draws)
        is_baseline = spec == Spec.parse(_BASELINE)
        watch = self.baseline if is_baseline else Stopwatch(subject, self.batches)
        seconds, ratio = watch.compare(self.baseline, self.config.timed_steps)
        return {
            "method": spec.name,
            "options": spec.options,
            "state": state,
            **measures.summarize(sums, self.config.k),
            "buckets": _shares(sums.buckets),
            "mass_by_rank": _shares(sums.ranked, self.ranks - 1),
            "seconds": seconds,
            "cost_ratio": 1.0 if is_baseline else ratio,
        }


def _shares(masses: np.ndarray, ranks: np.ndarray | None = None) -> list[float | None]:
    """Shares of the sum over batches; with ranks, those down to each; None for JSON's sake."""
    mass = masses.sum(axis=0)
    with np.errstate(invalid="ignore"):
        shares = mass / mass.sum()
    shares = shares if ranks is None else np.cumsum(shares)[ranks]
    return [share if np.isfinite(share) else None for share in shares.tolist()]
