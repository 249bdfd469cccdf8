"""`twotower compare`: runs side by side, with paired tests over the users they were measured on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.contract.files import checksum
from towers.evaluation.hits_by_query import HitsByQuery, read_hits
from towers.evaluation.settings import CompareConfig
from towers.evaluation.significance import compare_paired, holm
from towers.report.pages import p_text, write_comparison
from towers.training.run_directory import CONFIG, HITS, TRAINING, read_json, write_json
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
    paths = [Path(run) for run in config.runs]
    evaluated = [_open(path) for path in paths]
    _check_alike(paths, evaluated)
    metrics = _metrics(config, paths, evaluated)
    whole = [os.path.abspath(path) for path in paths]
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
            {"name": name, "path": str(path)} | read_json(path / CONFIG)
            for name, path in zip(names, paths, strict=True)
        ],
        "metrics": _compare(config, metrics, names, values),
    }
    print(format_comparison(result))
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write = write_json if config.output.endswith(".json") else write_comparison
        write(Path(config.output), result)
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
