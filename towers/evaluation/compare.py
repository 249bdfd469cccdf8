"""`twotower compare`: runs side by side, with paired tests over the users they were measured on.

Two tests of the mean difference: Student's paired t-test, and the randomisation test, which
supposes nothing about the distribution: where two rankings are equally good, each difference could
as well have the other sign (Fisher; for retrieval Smucker, Allan and Carterette, CIKM 2007,
doi:10.1145/1321440.1321528).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from pipeline.contract import stores
from pipeline.contract.files import checksum, write_text
from towers.evaluation.hits_by_query import HitsByQuery, read_hits
from towers.evaluation.settings import CompareConfig
from towers.metrics.definitions import half_width
from towers.report.pages import comparison_page, p_text
from towers.training.run_directory import CONFIG, HITS, TRAINING, json_text, read_json
from towers.training.settings import parse_metric

_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # field → head, and its form
    "mean": ("mean", "{:.4f}".format),
    "difference": ("difference", "{:+.4f} ±".format),
    "half_width": ("95 %", "{:.4f}".format),
    "p_t_test": ("p t", p_text),
    "p_permutation": ("p signs", p_text),
    "p_holm": ("p Holm", p_text),
    **{name: (name, "{:,.0f}".format) for name in ("better", "worse", "equal")},
}
_MAX_SIGNS = 4_000_000  # of the randomisation test, in memory at a time
_DEFAULT = ("ndcg", "recall")  # at the deepest cut-off that all runs have


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compares evaluated runs with the first of them, user by user, and prints a table.

    The p-values of the randomisation test are corrected (Holm) for the number of runs that are
    compared with the first one, each metric by itself.

    Returns:
      {"split", "users", "resamples", "seed", "runs": of each its name, path and configuration,
      "metrics": {metric: a dict a run}}; that of the first run has its mean alone, others
      `difference`, `half_width`, `p_t_test`, `p_permutation`, `p_holm`, and in `better`, `worse`
      and `equal` numbers of users. --output gets the same, as JSON or as a page.

    Raises:
      ValueError: a run is not evaluated, or runs were evaluated on different data, splits or
        users, or not as deep as a metric needs.
    """
    paths = [stores.local_copy(run) for run in config.runs]
    evaluated = [_open(path) for path in paths]
    _check_alike(paths, evaluated)
    metrics = _metrics(config, paths, evaluated)
    whole = [os.path.abspath(run.replace("://", "/")) for run in config.runs]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    # What tells the runs apart: their paths below what they share.
    names = [os.path.relpath(path, shared) for path in whole]
    values = np.array(  # [runs, metrics, U]
        [[hits.values(*parse_metric(metric)) for metric in metrics] for hits in evaluated]
    )
    result = {
        "split": evaluated[0].split,
        "users": values.shape[2],
        "resamples": config.resamples,
        "seed": config.seed,
        "runs": [
            {"name": name, "path": run} | read_json(path / CONFIG)
            for name, run, path in zip(names, config.runs, paths, strict=True)
        ],
        "metrics": _compare(config, metrics, names, values),
    }
    print(format_comparison(result))
    if config.output:
        as_text = json_text if config.output.endswith(".json") else comparison_page
        write_text(config.output, as_text(result))
        print(f"written: {config.output}")
    return result


def _compare(
    config: CompareConfig, metrics: list[str], names: list[str], values: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each metric; values are [runs, metrics, U]."""
    results: dict[str, list[dict[str, Any]]] = {}
    for metric, of_runs in zip(metrics, values.swapaxes(0, 1), strict=True):
        differences = (of_runs[1:] - of_runs[0]).T
        paired = compare_paired(differences, resamples=config.resamples, seed=config.seed)
        paired["p_holm"] = holm(paired["p_permutation"].to_numpy())
        rows: list[Any] = [{}, *paired.to_dict("records")]
        means = of_runs.mean(axis=1).tolist()
        results[metric] = [
            {"run": name, "mean": mean, **row}
            for name, mean, row in zip(names, means, rows, strict=True)
        ]
    return results


def _open(run: Path) -> HitsByQuery:
    for name in (CONFIG, TRAINING):
        if not (run / name).is_file():
            raise ValueError(f"{run} is no run: there is no {name} in it; see `twotower train`.")
    hits = read_hits(run)
    if hits.training != checksum(run / TRAINING):
        raise ValueError(f"{run} was trained on after its evaluation: evaluate it again.")
    return hits


def _check_alike(paths: list[Path], evaluated: list[HitsByQuery]) -> None:
    """Raises ValueError for runs that cannot be compared user by user."""
    first = evaluated[0]
    for path, hits in zip(paths[1:], evaluated[1:], strict=True):
        both = f"{paths[0]} and {path}"
        if hits.data_fingerprint != first.data_fingerprint:
            raise ValueError(f"{both} are of different prepared data: compare runs of the same.")
        if hits.split != first.split:
            raise ValueError(
                f"{both} were evaluated on the {first.split} and the {hits.split} split: evaluate "
                "both with the same --split."
            )
        for name in ("fingerprints", "num_positives"):
            if not np.array_equal(getattr(hits, name), getattr(first, name)):
                raise ValueError(
                    f"{both} hold other users in {HITS}: evaluate both again on the same data."
                )


def _metrics(config: CompareConfig, paths: list[Path], evaluated: list[HitsByQuery]) -> list[str]:
    depths = [max(hits.ks) for hits in evaluated]
    metrics = list(config.metric) or [f"{name}@{min(depths)}" for name in _DEFAULT]
    for metric, (path, depth) in itertools.product(metrics, zip(paths, depths, strict=True)):
        if (k := parse_metric(metric)[1]) > depth:
            raise ValueError(
                f"{metric} was asked, but {path} was ranked down to {depth} only: evaluate it "
                f"with --ks {k}."
            )
    return metrics


def format_comparison(result: dict[str, Any]) -> str:
    """The comparison as plain text: a block a metric, a line a run."""
    parts = [
        f"{result['split']} split, {result['users']:,} users; differences to the first run, paired "
        f"by user, ± 95 %;\np of the t-test, of {result['resamples']:,} random signs, and the "
        "latter corrected (Holm)"
    ]
    heads = [head for head, _ in _COLUMNS.values()]
    for metric, rows in result["metrics"].items():
        table = pd.DataFrame(rows).set_index("run")[list(_COLUMNS)].set_axis(heads, axis=1)
        table = table.rename_axis(columns=metric, index=None)
        parts.append(table.to_string(formatters=dict(_COLUMNS.values()), na_rep=""))
    return "\n\n".join(parts)


def compare_paired(differences: np.ndarray, *, resamples: int, seed: int) -> pd.DataFrame:
    """Tests the mean of each column of differences against 0.

    Args:
      differences: float [U, M].
      resamples: draws of the randomisation test; all 2^n assignments of signs to the n queries
        that differ are gone through where they are no more.
      seed: of the draws.

    Returns:
      M rows: `difference`, the mean over queries, and `half_width` of its 95 % interval; two-sided
      `p_t_test` and `p_permutation`; numbers of queries that are `better`, `worse` and `equal`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p_t_test = stats.ttest_1samp(differences, 0.0).pvalue
    return pd.DataFrame(
        {
            "difference": differences.mean(axis=0),
            "half_width": half_width(differences),
            "p_t_test": np.where(np.isnan(p_t_test), 1.0, p_t_test),  # one query, or none differs
            "p_permutation": permutation_test(differences, resamples=resamples, seed=seed),
            "better": (differences > 0).sum(axis=0),
            "worse": (differences < 0).sum(axis=0),
            "equal": (differences == 0).sum(axis=0),
        }
    )


def permutation_test(differences: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean under random signs: float64 [M]; arguments as above.

    A drawn p is (1 + b) / (1 + resamples), where b draws are at least as extreme, so that it is
    never 0 and the test keeps its level (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    differing = differences[(differences != 0).any(axis=1)].astype(np.float64)
    count, random = len(differing), np.random.default_rng(seed)
    if count < 2:
        return np.ones(differences.shape[1])
    exact = count <= math.log2(resamples)
    total = 2**count if exact else resamples

    def distances(signs: np.ndarray) -> np.ndarray:
        """Rounded: sums of the same numbers in another order may differ in their last bits."""
        return np.round(np.abs(signs @ differing) / count, 12)

    observed, extreme = distances(np.ones(count)), np.zeros(differing.shape[1])
    batch = max(1, _MAX_SIGNS // count)
    for start in range(0, total, batch):
        numbers = np.arange(start, min(start + batch, total))
        if exact:
            bits = numbers[:, None] >> np.arange(count) & 1
        else:
            bits = random.integers(0, 2, (len(numbers), count), np.int8)
        extreme += (distances(1.0 - 2 * bits) >= observed).sum(axis=0)
    return extreme / total if exact else (1 + extreme) / (1 + total)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, [n]: the step-down procedure of Holm (1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]
