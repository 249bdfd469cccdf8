"""Turns a bundle into a model version, written aside and renamed into place once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.contract import schema, stores
from pipeline.contract.bundle import Bundle, read_bundle, read_raw_ids
from pipeline.contract.files import describe_files, held, is_remote
from pipeline.contract.index_plot import plot_index
from pipeline.contract.pages import render
from pipeline.contract.settings import require_in_corpus
from serving.publish import model_card, tuning
from serving.publish.settings import VersionOptions
from serving.version import warmup_requests
from serving.version.delta import ADDED, ADDED_BEFORE
from serving.version.index import ExactIndex, ScannIndex, import_scann
from serving.version.names import MAX_VERSION
from serving.version.served_model import GivenEmbedding, QueryModel, ServedModel
from serving.version.versions import (
    ANN_PAGE,
    ANN_REPORT,
    CANDIDATE_MODEL,
    MODEL_CARD,
    RETRIEVAL,
    SCANN_MODEL,
    find_version,
    numbered_directories,
)

_FORMAT = "1.1"  # 1.1 added wide_search, the plot and warm-up requests; readers of 1.0 read it
_LOCK = ".lock"
PARTIAL = ".partial-"  # neither a reader nor TensorFlow Serving takes this for a version
_TEMPLATE = Path(__file__).with_name("templates") / "ann_report.html"
_log = logging.getLogger(__name__)


def publish(bundle: str | Path, models: str | Path, **options: Any) -> Path | str:
    """Writes `<models>/<name>/<integer>/`, which TensorFlow Serving and `Retriever` open.

    Example:
      >>> publish("run/bundle", "models", name="shop", k=10).as_posix()
      'models/shop/1'

    Args:
      bundle: directory with the artifacts that `pipeline.contract.schema` names BUNDLE_*.
      models: directory of all models, or its place in a store; it is made where it is missing.
      **options: those of `VersionOptions`. ScaNN is tuned to be as fast as `target_recall` allows,
        and default index where it is then faster than exact search; where scann is not
        installed, the report says so.

    Returns:
      The directory of the version, or its place in a store.

    Raises:
      ValueError: an option or the bundle is not valid, ScaNN cannot keep the promise, or the
        version exists. Nothing is left. Or the store fails: the error says where the version is
        kept on this machine.
    """
    chosen = VersionOptions(**options)
    content = read_bundle(bundle)
    require_in_corpus(chosen, "k", len(content.vectors))
    _check_title(content, chosen.title_column)
    with new_version(models, chosen.name, chosen.version) as new:
        _name_lost(models, chosen.name, content)
        write_version(new.partial, content, chosen)
    return new.finished


@dataclasses.dataclass
class NewVersion:
    """A version that is being written: where, and the directory or the place that it gets."""

    partial: Path
    finished: Path | str


class NumberTakenError(Exception):
    """Another machine has published under the number of a version that was being written."""


@contextlib.contextmanager
def new_version(
    models: str | Path, name: str, version: int = 0, *, on_newest: bool = False
) -> Iterator[NewVersion]:
    """A path for a version, which gets its place at the end; where writing fails, it does not.

    One process of a machine at a time has it, the others wait. `version` 0 is the next free number;
    in a store, one that another machine has taken by then gives way to the next. One that is made
    of the newest version, `on_newest`, would then undo the other: it raises NumberTakenError.
    """
    place = f"{str(models).rstrip('/')}/{name}" if is_remote(models) else ""
    home = stores.local_place(place) if place else Path(models) / name
    home.mkdir(parents=True, exist_ok=True)
    waiting = f"Waiting for another export to {place or home}."
    with held(home / _LOCK, waiting, waits=True):
        for leftover in home.glob(f"{PARTIAL}*"):  # nobody is writing it: we hold the lock
            _log.warning("Removing %s, left by an export that did not finish.", leftover)
            shutil.rmtree(leftover)
        number = _free_number(place or home, version)
        new = NewVersion(home / f"{PARTIAL}{number}", home / str(number))
        try:
            yield new
            if place:
                new.finished = _upload(new.partial, place, number, version, on_newest)
            else:
                os.rename(new.partial, new.finished)
        except BaseException:
            shutil.rmtree(new.partial, ignore_errors=True)
            raise


def _upload(partial: Path, home: str, number: int, version: int, on_newest: bool) -> str:
    """Uploads a version under the first number from `number` on that nobody has taken."""
    with stores.kept_on_failure(partial, partial.with_name("kept")):
        while True:
            try:
                copy = stores.upload(partial, f"{home}/{number}", new=True)
            except FileExistsError as error:
                if on_newest:
                    raise NumberTakenError from error
                number = _free_number(home, version)
                continue
            if not copy.exists():
                os.renames(partial, copy)
            return f"{home}/{number}"


def _check_title(bundle: Bundle, column: str) -> None:
    file = bundle.path / schema.BUNDLE_ATTRIBUTES
    names = pq.read_schema(file).names if file.is_file() else []
    if column and column not in names:
        raise ValueError(
            f"title_column must be an attribute of the bundle, got {column!r}: it has "
            f"{', '.join(names) or 'none'}; change title_column."
        )


def _name_lost(models: str | Path, name: str, bundle: Bundle) -> None:
    try:
        newest = find_version(models, name).path
    except ValueError:  # the model has no version, or its newest is damaged
        return
    for file in (newest / ADDED_BEFORE, newest / ADDED):
        added = read_raw_ids(file, schema.CANDIDATE_ID) if file.is_file() else []
        if lost := sorted(set(added).difference(bundle.candidate_ids)):
            first = ", ".join(map(repr, lost[:3])) + (", ..." if len(lost) > 3 else "")
            _log.warning(
                "%d candidates that were added to %s are not in this bundle: %s. Add them again: "
                "twotower items --models %s --name %s --add %s, with embeddings of the new model "
                "if they came with embeddings.",
                *(len(lost), newest, first, models, name, file),
            )


def _free_number(home: Path | str, version: int) -> int:
    remote = stores.finished_below(home) if isinstance(home, str) else ()
    taken = {*stores.numbered(remote), *numbered_directories(Path(home))}
    if version in taken:
        raise ValueError(
            f"version {version} of {home} exists, and a version is never changed: "
            "choose another number, or 0 for the next free one."
        )
    number = version or max(taken, default=0) + 1
    if number > MAX_VERSION:
        raise ValueError(f"{home} has version {MAX_VERSION}, the last one: name a free number.")
    return number


def write_version(path: Path, bundle: Bundle, options: VersionOptions) -> None:
    """Writes all of a version; its manifest comes last."""
    dimensions = bundle.vectors.shape[1]
    query_model = bundle.query_model
    encoder = QueryModel(query_model, dimensions) if query_model else GivenEmbedding(dimensions)
    absence = _why_no_scann(options)
    report, scann = tuning.tune(bundle, options, with_scann=not absence)
    if absence:
        report["scann_is_absent_because"] = absence

    def save(index: ExactIndex | ScannIndex, place: Path) -> None:
        model = ServedModel(encoder, index, bundle.candidate_ids, dimensions)
        warmup_requests.write(place, model.save(place), bundle)

    if scann is not None:
        save(scann, path / SCANN_MODEL)
        scann.release()
        del scann  # the vectors of both together may not fit
    save(ExactIndex(bundle.vectors, options.k), path)
    if bundle.candidate_model is not None:
        shutil.copytree(bundle.candidate_model, path / CANDIDATE_MODEL)
    (path / RETRIEVAL).mkdir(parents=True)
    for name in bundle.retrieval_files:
        shutil.copyfile(bundle.path / name, path / RETRIEVAL / name)
    (path / ANN_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_page(report, path / ANN_PAGE)
    files = describe_files(path)  # without the card, which people may annotate
    manifest = _manifest(bundle, options, report, files)
    (path / MODEL_CARD).write_text(model_card.write(manifest, bundle, report), encoding="utf-8")
    manifest.write(path)


def write_page(report: dict[str, Any], path: Path) -> None:
    """The page of the recall-latency curve; nothing without matplotlib or a tree."""
    with contextlib.suppress(ImportError):
        if plot := plot_index(report):
            page = render(_TEMPLATE, title="Index of a version", plot=plot, **report)
            path.write_text(page, encoding="utf-8")


def _why_no_scann(options: VersionOptions) -> str:
    if not options.scann:
        return "it was switched off (scann=False)"
    if import_scann() is None:
        _log.warning("scann cannot be imported here: the version gets exact search only.")
        return "the package scann could not be imported (pip install '.[serve]' in the checkout)"
    return ""


def _manifest(
    bundle: Bundle, options: VersionOptions, report: dict[str, Any], files: dict[str, Any]
) -> schema.Manifest:
    counts = {"candidates": len(bundle.vectors), "dimensions": bundle.vectors.shape[1]}
    if bundle.num_queries is not None:
        counts["queries"] = bundle.num_queries
    scann = report["scann"] or {}
    details = {
        **{name: report[name] for name in ("k", "default_index", "at")},
        **{name: scann.get(name) for name in ("leaves_to_search", "num_reordered")},
        "input": "query_id" if bundle.query_model else "embedding",
        "bundle_fingerprint": bundle.manifest.fingerprint,
        "bundle": bundle.manifest.details,
    }
    configuration = dataclasses.asdict(options)
    source = bundle.manifest.source
    return schema.Manifest("version", source, configuration, counts, files, details, _FORMAT)
