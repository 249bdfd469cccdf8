"""Finds the fastest ScaNN index that keeps a promised recall, or says that none does.

A tree is built for each number of leaves that is tried, a few at most; how many leaves are
searched and how many candidates are scored exactly are inputs of a search. One half of the
sample queries chooses, the other half has the last word and gives the recall that is reported.
"""

from __future__ import annotations

import logging
import time
from itertools import chain
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.contract.bundle import Bundle
from serving.publish.measuring import Judge, Measured
from serving.publish.settings import VersionOptions
from serving.publish.sweep import Setting, Sweep
from serving.version.index import ExactIndex, ScannIndex, usual_leaves

_MOST_QUERIES = 1000  # measured with, both halves together
_TREES = (1, 2, 4)  # times the usual number of leaves
_FEWEST_IN_LEAF = 8  # candidates, on average: no tree has more leaves than that leaves room for
_FASTER = 0.95  # of the time of the last tree: a larger one must gain so much to be worth it
_FINALISTS = 3  # settings that are timed again, side by side
_TIMINGS = 25  # of each of them
_log = logging.getLogger(__name__)


def tune(
    exact: ExactIndex, bundle: Bundle, options: VersionOptions, *, with_scann: bool
) -> tuple[dict[str, Any], ScannIndex | None]:
    """Measures exact search and, where wanted, builds and tunes a ScaNN index.

    Args:
      exact: the reference, in recall and in time.
      bundle: names the queries to measure with; without them, candidate vectors are used.
      options: of the version; `target_recall` at rank `at` is the promise.
      with_scann: whether to build one.

    Returns:
      The content of `ann_report.json`, times in milliseconds, and the tuned index or None.

    Raises:
      ValueError: no setting keeps the promise on the second half of the queries.
    """
    queries, source = _sample_queries(bundle, options.seed)
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
    scann, report["scann"] = _tune_scann(bundle.vectors, options, choosing, judging)
    faster = report["scann"]["batch_ms"] < report["exact"]["batch_ms"]
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
        _log.info("ScaNN with %d leaves: built in %.1f s.", num_leaves, seconds[num_leaves])
        if best is None:
            best = sweep
        elif sweep.fastest_ms > _FASTER * best.fastest_ms:
            index.release()
            break
        else:
            best.index.release()
            best = sweep
    assert best is not None, "there is a tree to try"
    chosen, judged = _choose(best, judging, options.target_recall)
    index = best.index
    index.leaves_to_search, index.num_reordered = chosen.parameters
    report = {
        "kind": index.kind,
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
    return [times * usual for times in _TREES if times * usual * _FEWEST_IN_LEAF < num_candidates]


def _choose(sweep: Sweep, judging: Judge, promise: float) -> tuple[Setting, Measured]:
    """The fastest setting that the other half of the queries confirms, and what it gave there.

    Raises:
      ValueError: it confirms none. The index is released.
    """
    finalists = [
        sweep.measure(*one.parameters, timings=_TIMINGS) for one in sweep.keeping[:_FINALISTS]
    ]
    finalists.sort(key=lambda one: one.measured.batch_ms)
    reached = 0.0
    for setting in chain(finalists, sweep.keeping[_FINALISTS:], sweep.strongest()):
        judged = judging.measure(sweep.search, *setting.parameters)
        reached = max(reached, judged.recall)
        if judged.recall >= promise:
            return setting, judged
    sweep.index.release()
    raise ValueError(
        f"target_recall {promise:g} at {judging.at} cannot be kept: ScaNN finds {reached:.4f} of "
        "the exact results of held-out queries. Lower --target_recall, or publish exact search "
        "alone with --noscann."
    )


def _sample_queries(bundle: Bundle, seed: int) -> tuple[np.ndarray, str]:
    """Up to 1,000 queries float32 [S, D] in random order, and where they come from."""
    rows, source = bundle.sample_queries, "sample_queries"
    if rows is None or not len(rows):
        rows, source = bundle.vectors, "candidate_vectors"
    chosen = np.random.default_rng(seed).permutation(len(rows))[:_MOST_QUERIES]
    return np.asarray(rows[chosen]), source
