"""Turns a bundle into a model version, written aside and renamed into place once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.bundle import Bundle, read_bundle
from pipeline.contract.files import describe_files
from serving.publish import model_card, recall_plot, tuning, warmup_requests
from serving.publish.settings import VersionOptions
from serving.version.index import ExactIndex, import_scann
from serving.version.names import MAX_VERSION
from serving.version.served_model import GivenEmbedding, QueryModel, ServedModel
from serving.version.versions import (
    ANN_PLOT,
    ANN_REPORT,
    MODEL_CARD,
    RETRIEVAL,
    SCANN_MODEL,
    numbered_directories,
)

_FORMAT = "1.1"  # 1.1 added wide_search, the plot and warm-up requests; readers of 1.0 read it
_LOCK = ".lock"
_PARTIAL = ".partial-"  # neither a reader nor TensorFlow Serving takes this for a version
_log = logging.getLogger(__name__)


def publish(
    bundle: str | Path,
    models: str | Path,
    *,
    name: str = "twotower",
    k: int = 100,
    version: int = 0,
    target_recall: float = 0.95,
    scann: bool = True,
    scann_leaves: int = 0,
    seed: int = 10,
    at: int = 0,
) -> Path:
    """Writes `<models>/<name>/<integer>/`, which TensorFlow Serving and `Retriever` open.

    Args:
      bundle: directory with the artifacts that `pipeline.contract.schema` names BUNDLE_*.
      models: directory of all models; it is made where it is missing.
      name: the model, a directory in `models`.
      k: K, results of a version; a corpus of fewer gives all of it.
      version: the integer; 0 for the next free one.
      target_recall: share of the exact top `at` that ScaNN finds. It is tuned to be as fast as
        that allows, and default index where it is then faster than exact search.
      scann: also build a ScaNN index; where scann is not installed, the report says so.
      scann_leaves: leaves of its tree; 0 tries some that fit the size of the corpus.
      seed: chooses the queries that the indexes are measured with.
      at: the rank up to which the promise counts; 0 for K.

    Returns:
      The directory of the version.

    Raises:
      ValueError: an option or the bundle is not valid, ScaNN cannot keep the promise, or the
        version exists. Nothing is left.
    """
    options = VersionOptions(name, k, version, target_recall, scann, scann_leaves, seed, at)
    content = read_bundle(bundle)
    home = Path(models) / name
    home.mkdir(parents=True, exist_ok=True)
    with _only_publisher(home):
        _remove_leftovers(home)
        number = _free_number(home, version)
        partial = home / f"{_PARTIAL}{number}"
        try:
            _write_version(partial, content, options)
            os.rename(partial, home / str(number))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return home / str(number)


@contextlib.contextmanager
def _only_publisher(home: Path) -> Iterator[None]:
    """Holds the lock of a model; the system frees it when the process ends, however it ends."""
    with open(home / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("Waiting for another export to %s.", home)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(home: Path) -> None:
    """Removes what a killed publish left; under the lock nobody is writing it."""
    for leftover in home.glob(f"{_PARTIAL}*"):
        _log.warning("Removing %s, left by an export that did not finish.", leftover)
        shutil.rmtree(leftover)


def _free_number(home: Path, version: int) -> int:
    taken = numbered_directories(home)
    if version in taken:
        raise ValueError(
            f"version {version} of {home} exists, and a version is never changed: "
            "choose another number, or 0 for the next free one."
        )
    number = version or max(taken, default=0) + 1
    if number > MAX_VERSION:
        raise ValueError(f"{home} has version {MAX_VERSION}, the last one: name a free number.")
    return number


def _write_version(path: Path, bundle: Bundle, options: VersionOptions) -> None:
    """Writes all of a version; its manifest comes last."""
    dimensions = bundle.vectors.shape[1]
    encoder = (
        QueryModel(bundle.query_model, dimensions)
        if bundle.query_model
        else GivenEmbedding(dimensions)
    )
    exact = ExactIndex(bundle.vectors, options.k)
    absence = _why_no_scann(options)
    report, scann = tuning.tune(exact, bundle, options, with_scann=not absence)
    if absence:
        report["scann_is_absent_because"] = absence
    served = {path: ServedModel(encoder, exact, bundle.candidate_ids, dimensions)}
    if scann is not None:
        served[path / SCANN_MODEL] = ServedModel(encoder, scann, bundle.candidate_ids, dimensions)
    for place, model in served.items():
        warmup_requests.write(place, model.save(place), bundle)
    if scann is not None:
        scann.release()
    (path / RETRIEVAL).mkdir(parents=True)
    for name in bundle.retrieval_files:
        shutil.copyfile(bundle.path / name, path / RETRIEVAL / name)
    (path / ANN_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    recall_plot.draw(report, path / ANN_PLOT)
    manifest = _describe(bundle, options, report)
    files = describe_files(path)  # without the card, which people may annotate
    (path / MODEL_CARD).write_text(model_card.write(manifest, bundle, report), encoding="utf-8")
    dataclasses.replace(manifest, files=files).write(path)


def _why_no_scann(options: VersionOptions) -> str:
    """The reason why the version gets no ScaNN index; empty where it gets one."""
    if not options.scann:
        return "it was switched off (scann=False)"
    if import_scann() is None:
        _log.warning("scann cannot be imported here: the version gets exact search only.")
        return "the package scann could not be imported (install twotower[serve])"
    return ""


def _describe(bundle: Bundle, options: VersionOptions, report: dict[str, Any]) -> schema.Manifest:
    """The manifest of a version, as yet without its files."""
    counts = {"candidates": len(bundle.vectors), "dimensions": bundle.vectors.shape[1]}
    if bundle.num_queries is not None:
        counts["queries"] = bundle.num_queries
    details = {
        "k": report["k"],
        "input": "query_id" if bundle.query_model else "embedding",
        "default_index": report["default_index"],
        "at": report["at"],
        "leaves_to_search": (report["scann"] or {}).get("leaves_to_search"),
        "num_reordered": (report["scann"] or {}).get("num_reordered"),
        "bundle_fingerprint": bundle.manifest.fingerprint,
    }
    return schema.Manifest(
        kind="version",
        source=bundle.manifest.source,
        configuration=dataclasses.asdict(options),
        counts=counts,
        files={},
        details=details,
        format_version=_FORMAT,
    )
