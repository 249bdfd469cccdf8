"""Finds the fastest ScaNN index that keeps a promised recall, or says that none does.

A tree is built for each number of leaves that is tried, a few at most; how many leaves are
searched and how many candidates are scored exactly are inputs of a search. One half of the
sample queries chooses, the other half has the last word and gives the recall that is reported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.contract.bundle import Bundle
from serving.publish.measuring import Judge, Measured, Search
from serving.publish.settings import VersionOptions
from serving.version.index import ExactIndex, ScannIndex, usual_leaves

_MAX_QUERIES = 1000  # measured with, both halves together
_TREES = (1, 2, 4)  # times the usual number of leaves
_MIN_IN_LEAF = 8  # candidates, on average: no tree has more leaves than that leaves room for
_FASTER = 0.95  # of the time of the last tree: a larger one must gain so much to be worth it
_FINALISTS = 3  # settings that are timed again, side by side
_TIMINGS = 25  # of each of them
_REORDERED = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)  # times K
_MOST_REORDERED = (8.0, 64.0)  # the same with all leaves, where nothing less keeps the promise
_MIN_SPEEDUP = 1.5  # over exact search, for ScaNN to be the default index
_LITTLE = 1e-3  # recall; two steps that gain less together end a row of settings
_TOO_SLOW = 2.0  # times the fastest setting that keeps the promise: ends a row, too
_log = logging.getLogger(__name__)


def tune(
    bundle: Bundle, options: VersionOptions, *, with_scann: bool
) -> tuple[dict[str, Any], ScannIndex | None]:
    """Measures exact search and, where wanted, builds and tunes a ScaNN index against it.

    The bundle has the queries to measure with; without them, candidate vectors are used. The
    promise is `target_recall` at rank `at`.

    Returns:
      The content of `ann_report.json`, times in milliseconds, and the tuned index or None.

    Raises:
      ValueError: no setting keeps the promise on the second half of the queries.
    """
    queries, source = _sample_queries(bundle, options.seed)
    exact = ExactIndex(bundle.vectors, options.k)
    embedding = tf.TensorSpec([None, queries.shape[1]], tf.float32)
    search = tf.function(exact.search, input_signature=[embedding])
    at = min(options.at or options.k, exact.k)
    choosing = Judge(queries[::2], search, at)
    judging = Judge(queries[1::2] if len(queries) > 1 else queries, search, at)
    report: dict[str, Any] = {
        "k": exact.k,
        "at": at,
        "candidates": len(bundle.vectors),
        "dimensions": queries.shape[1],
        "queries": {
            "source": source,
            "count": len(queries),
            "choosing": choosing.num_queries,
            "judging": judging.num_queries,
        },
        "target_recall": options.target_recall,
        "exact": judging.latency(search),
        "scann": None,
        "default_index": "exact",
    }
    if not with_scann:
        return report, None
    del exact, search  # a tree needs the memory while it is built
    scann, report["scann"] = _tune_scann(bundle.vectors, options, choosing, judging)
    faster = _MIN_SPEEDUP * report["scann"]["batch_ms"] <= report["exact"]["batch_ms"]
    report["faster"] = report["default_index"] = "scann" if faster else "exact"
    return report, scann


def _tune_scann(
    vectors: np.ndarray, options: VersionOptions, choosing: Judge, judging: Judge
) -> tuple[ScannIndex, dict[str, Any]]:
    """Tries trees with more leaves while that makes it faster; the best one and its report."""
    seconds: dict[int, float] = {}
    sweeps: list[list[Setting]] = []
    best: Sweep | None = None
    for num_leaves in _trees(len(vectors), options.scann_leaves):
        start = time.perf_counter()
        index = ScannIndex(vectors, options.k, num_leaves)
        seconds[index.num_leaves] = round(time.perf_counter() - start, 2)
        sweep = Sweep(index, choosing, options.target_recall)
        sweeps.append(sweep.settings)
        tree = f"with {num_leaves} leaves" if num_leaves else "without a tree"
        _log.info("ScaNN index %s, built in %.1f s.", tree, seconds[num_leaves])
        if best and sweep.fastest_ms > _FASTER * best.fastest_ms:
            index.release()
            break
        if best:
            best.index.release()
        best = sweep
    assert best is not None, "there is a tree to try"
    chosen, judged = _choose(best, judging, options.target_recall)
    index = best.index
    index.leaves_to_search, index.num_reordered = chosen.parameters
    report = {
        "kind": "tree, quantised" if index.num_leaves else "scan",
        **chosen.described(),
        "recall": round(judged.recall, 4),
        "recall_when_chosen": round(chosen.measured.recall, 4),
        "reaches_target_recall": True,
        **judging.latency(best.search, *chosen.parameters),
        "build_seconds": seconds,
        "sweep": [setting.described() for settings in sweeps for setting in settings],
    }
    return index, report


def _trees(num_candidates: int, wanted: int) -> list[int]:
    """Numbers of leaves to try, the usual one first; [0] where there is to be no tree."""
    usual = usual_leaves(num_candidates)
    if wanted or not usual:
        return [wanted]
    return [times * usual for times in _TREES if times * usual * _MIN_IN_LEAF < num_candidates]


def _choose(sweep: Sweep, judging: Judge, promise: float) -> tuple[Setting, Measured]:
    """The fastest setting that the other half of the queries confirms, and what it gave there.

    Releases the index and raises ValueError where they confirm none.
    """
    finalists = [
        sweep.measure(*setting.parameters, timings=_TIMINGS)
        for setting in sweep.keeping[:_FINALISTS]
    ]
    finalists.sort(key=lambda setting: setting.measured.batch_ms)
    reached = 0.0
    for setting in chain(finalists, sweep.keeping[_FINALISTS:], sweep.strongest()):
        judged = judging.measure(sweep.search, *setting.parameters)
        reached = max(reached, judged.recall)
        if judged.recall >= promise:
            return setting, judged
    sweep.index.release()
    raise ValueError(
        f"target_recall {promise:g} at {judging.at} cannot be kept: ScaNN finds {reached:.4f} of "
        "the exact results of held-out queries. Lower target_recall, or publish exact search "
        "alone: scann false."
    )


def _sample_queries(bundle: Bundle, seed: int) -> tuple[np.ndarray, str]:
    """Up to 1,000 queries float32 [S, D] in random order, and where they come from."""
    rows, source = bundle.sample_queries, "sample_queries"
    if rows is None or not len(rows):
        rows, source = bundle.vectors, "candidate_vectors"
    chosen = np.random.default_rng(seed).permutation(len(rows))[:_MAX_QUERIES]
    return np.asarray(rows[chosen]), source


class Setting(NamedTuple):
    """One way to search, and what it gave."""

    num_leaves: int
    parameters: tuple[int, int]  # leaves searched, candidates reordered
    measured: Measured

    def described(self) -> dict[str, Any]:
        return {
            "num_leaves": self.num_leaves,
            "leaves_to_search": self.parameters[0],
            "num_reordered": self.parameters[1],
            "recall": round(self.measured.recall, 4),
            "batch_ms": round(self.measured.batch_ms, 4),
        }


class Sweep:
    """The settings of an index, measured until more work finds little more.

    Attributes:
      search: the search of the index as a graph, with leaves and reordered candidates as inputs.
    """

    def __init__(self, index: ScannIndex, judge: Judge, promise: float) -> None:
        self.index, self._judge, self._promise = index, judge, promise
        scalar = tf.TensorSpec([], tf.int32)
        embedding = tf.TensorSpec([None, index.dimensions], tf.float32)
        self.search: Search = tf.function(index.search, input_signature=[embedding, scalar, scalar])
        self.settings: list[Setting] = []
        for leaves, num_reordered in self._steps() if index.num_leaves else [(0, 0)]:
            self.settings.append(self.measure(leaves, num_reordered))

    @property
    def keeping(self) -> list[Setting]:
        """The settings with a recall above the promise by its standard error, fastest first."""
        by_time = sorted(self.settings, key=lambda setting: setting.measured.batch_ms)
        return [s for s in by_time if s.measured.recall - s.measured.error >= self._promise]

    @property
    def fastest_ms(self) -> float:
        """Time of a batch with the fastest setting that keeps the promise; inf for none."""
        return self.keeping[0].measured.batch_ms if self.keeping else math.inf

    def strongest(self) -> Iterator[Setting]:
        """Settings with all leaves, slow and good, measured now; the last one finds the most."""
        index = self.index
        if not index.num_leaves:
            yield self.settings[0]
            return
        for share in _MOST_REORDERED:
            self.settings.append(self.measure(index.num_leaves, index.reordering(share)))
            yield self.settings[-1]

    def measure(self, leaves: int, num_reordered: int, **options: int) -> Setting:
        measured = self._judge.measure(self.search, leaves, num_reordered, **options)
        return Setting(self.index.num_leaves, (leaves, num_reordered), measured)

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Leaves searched and candidates reordered; reads what came of the last one."""
        index, steps = self.index, [round(2 ** (power / 2)) for power in range(64)]
        leaf_counts = sorted({min(index.num_leaves, step) for step in steps})  # 1, 2, 3, 4, 6, 8, …
        for share in _REORDERED:
            recalls = [0.0]
            for leaves in leaf_counts:
                yield leaves, index.reordering(share)
                last = self.settings[-1].measured
                recalls.append(last.recall)
                is_enough = last.recall == 1.0 or last.recall - recalls[-3:][0] < _LITTLE
                if is_enough or last.batch_ms > _TOO_SLOW * self.fastest_ms:
                    break
