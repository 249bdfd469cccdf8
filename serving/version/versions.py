"""Versions on disk: finds them, says whether all of one has arrived, loads its SavedModels."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.contract import schema, stores
from pipeline.contract.files import check_files, is_remote
from serving.errors import InvalidRequest
from serving.version.index import import_scann
from serving.version.names import MAX_VERSION
from serving.version.served_model import EMBEDDING_SEARCH

EXTRAS = Path("assets.extra")  # what TensorFlow Serving carries along but does not load
SCANN_MODEL = EXTRAS / "scann"
RETRIEVAL = EXTRAS / "retrieval"
CANDIDATE_MODEL = EXTRAS / "candidate_model"  # embeds candidates that come later
ANN_REPORT = "ann_report.json"
ANN_PAGE = "ann_report.html"
MODEL_CARD = "model_card.md"
SAVED_MODEL = "saved_model.pb"

_FRESH_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Version:
    """One finished model version on disk."""

    number: int
    path: Path
    manifest: schema.Manifest

    @property
    def has_scann(self) -> bool:
        return (self.path / SCANN_MODEL).is_dir()

    def load(self, index: str) -> Any:
        """Loads the SavedModel of "exact" or "scann"; InvalidRequest: it cannot be used here."""
        if index == "exact":
            return tf.saved_model.load(str(self.path))
        if not self.has_scann:
            raise InvalidRequest(
                f"index 'scann' was asked of version {self.number}, which was published without "
                "one: use index 'exact' or export again with scann installed."
            )
        if import_scann() is None:  # its operations must be known before the graph is read
            raise InvalidRequest(
                "index 'scann' needs the package scann, which cannot be imported here: "
                "pip install '.[serve]' in the checkout, or use index 'exact'."
            )
        return tf.saved_model.load(str(self.path / SCANN_MODEL))


def find_version(models: str | Path, name: str, version: int = 0) -> Version:
    """The newest finished version of a model; the one of that number where it is not 0.

    One of a store is copied to this machine.

    Raises:
      ValueError: the version is missing, of a newer format than this program, or damaged.
    """
    if is_remote(models):
        place = f"{str(models).rstrip('/')}/{name}"
        numbers = stores.numbered(stores.finished_below(place))
        if not numbers or version not in (0, *numbers):
            there = ", ".join(map(str, sorted(numbers))) or "none; see `twotower export`"
            raise ValueError(f"{place} has no version {version or ''}; there are: {there}.")
        path = stores.local_copy(f"{place}/{version or max(numbers)}")
        return Version(version or max(numbers), path, schema.read_manifest(path, "version"))
    home = Path(models) / name
    numbered = numbered_directories(home)
    finished = {n: path for n, path in numbered.items() if (path / schema.MANIFEST).is_file()}
    if not finished:
        check_models_directory(models)
        manifests = Path(models).glob(f"*/*/{schema.MANIFEST}")
        names = sorted({path.parents[1].name for path in manifests if path.parent.name.isdecimal()})
        hint = f"it has {', '.join(names)}: change --name, or export" if names else "make one with"
        raise ValueError(
            f"{home} holds no model version; {hint} `twotower export --models {models}"
            + (f" --name {name}`." if name != "twotower" else "`.")
        )
    number = version or max(finished)
    if number not in finished:
        there = ", ".join(str(n) for n in sorted(finished))
        raise ValueError(f"version {number} of {home} does not exist; there are: {there}.")
    manifest = schema.read_manifest(finished[number], "version")
    check_files(finished[number], manifest.files)
    return Version(number, finished[number], manifest)


def check_models_directory(models: str | Path) -> None:
    """Raises ValueError where the path is that of one model, or of one version of it."""
    home = Path(models)
    is_version = home.name.isdecimal() and is_finished(home)
    if is_version or any(map(is_finished, numbered_directories(home).values())):
        what, model = ("a version", home.parent) if is_version else ("a model", home)
        raise ValueError(
            f"{models} is {what}, not the directory of all models: give --models {model.parent}; "
            f"the name of the model is {model.name}."
        )


def numbered_directories(home: Path) -> dict[int, Path]:
    """Directories whose name is an int64, "7" before "007"; {} where `home` is missing."""
    if not home.is_dir():
        return {}
    return {
        int(path.name): path
        for path in sorted(home.iterdir())
        if path.name.isascii() and path.name.isdecimal() and path.is_dir()
        if int(path.name) <= MAX_VERSION
    }


@dataclasses.dataclass(frozen=True)
class VersionFiles:
    """What lies in the directory of a version, of ours or of another framework.

    One of `publish` is complete when its manifest is there and all files have their sizes. The
    SavedModel of another framework has no manifest: it is taken for complete when its files are
    a few seconds old, or two looks in a row find the same ones.
    """

    number: int
    path: Path
    manifest: schema.Manifest | None  # None where another framework made it
    stamp: Hashable  # changes with the files
    problem: str = ""  # why it cannot be loaded; "" where it can
    on_its_way: bool = False  # whether the problem is only that files are still missing

    def is_unchanged(self) -> bool:
        """Whether the files have the names, sizes and times that this look found."""
        return _stamp(self.path) == self.stamp


def look_at(number: int, path: Path, last_stamp: Hashable = None) -> VersionFiles:
    """Looks at the files of a version; `last_stamp` is that of the last look."""
    stamp, problem = _stamp(path), ""
    if (path / schema.MANIFEST).is_file():
        try:
            manifest = schema.read_manifest(path, "version")
            check_files(path, manifest.files)
            return VersionFiles(number, path, manifest, stamp)
        except (ValueError, OSError) as error:
            problem = str(error)
        except (TypeError, LookupError, AttributeError) as error:  # fields of other kinds
            problem = f"{path / schema.MANIFEST} is not a manifest of a version ({error!r})."
        return VersionFiles(number, path, None, stamp, problem)
    newest = max((changed for _, _, changed in stamp), default=0)  # no copy sets it back
    if not (path / SAVED_MODEL).is_file():
        problem = f"{path} has neither {schema.MANIFEST} nor {SAVED_MODEL}: a copy under way?"
    elif _is_ours(path):
        problem = f"{path} has no {schema.MANIFEST}, which arrives last: a copy under way?"
    elif stamp != last_stamp and time.time() - newest / 1e9 < _FRESH_SECONDS:
        problem = f"{path} has just been written; it is loaded when it does not change any more."
    return VersionFiles(number, path, None, stamp, problem, on_its_way=bool(problem))


def is_finished(path: Path) -> bool:
    """Whether somebody has finished writing a version there, sound or not."""
    return (path / schema.MANIFEST).is_file() or (path / SAVED_MODEL).is_file()


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files."""
    files = []
    for directory, _, names in os.walk(path):
        for file in (os.path.join(directory, name) for name in names):
            with contextlib.suppress(OSError):  # removed while we look
                status = os.stat(file)
                files.append((file, status.st_size, status.st_ctime_ns))
    return tuple(sorted(files))


def _is_ours(path: Path) -> bool:
    """Whether a part of what `publish` writes is there."""
    if any((path / part).exists() for part in (ANN_REPORT, SCANN_MODEL, RETRIEVAL)):
        return True
    try:
        return EMBEDDING_SEARCH.encode() in (path / SAVED_MODEL).read_bytes()
    except OSError:
        return False
