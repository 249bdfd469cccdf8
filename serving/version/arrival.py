"""Looks at the directory of a version: whether all of it has arrived, and what it is."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Hashable
from pathlib import Path

from pipeline.contract import schema
from pipeline.contract.files import check_files
from serving.version.served_model import EMBEDDING_SEARCH
from serving.version.versions import ANN_REPORT, RETRIEVAL, SCANN_MODEL

SAVED_MODEL = "saved_model.pb"

_FRESH_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Arrival:
    """What lies in the directory of a version.

    One of `publish` is complete when its manifest is there and all files have their sizes. The
    SavedModel of another framework has no manifest: it is taken for complete when its files are
    a few seconds old, or two looks in a row find the same ones.

    Attributes:
      number: of the version.
      path: its directory.
      manifest: None where another framework made it.
      stamp: changes with the files.
      problem: why it cannot be loaded; "" where it can.
      on_its_way: whether the problem is only that files are still missing.
    """

    number: int
    path: Path
    manifest: schema.Manifest | None
    stamp: Hashable
    problem: str = ""
    on_its_way: bool = False


def look(number: int, path: Path, last_stamp: Hashable = None) -> Arrival:
    """Looks at a version.

    Args:
      number: of the version.
      path: its directory.
      last_stamp: what the last look found, None at the first.
    """
    stamp = _stamp(path)
    if (path / schema.MANIFEST).is_file():
        try:
            manifest = schema.read_manifest(path, "version")
            check_files(path, manifest.files)
        except (ValueError, OSError) as error:
            return Arrival(number, path, None, stamp, str(error))
        except (TypeError, LookupError, AttributeError) as error:  # fields of other kinds
            problem = f"{path / schema.MANIFEST} is not a manifest of a version ({error!r})."
            return Arrival(number, path, None, stamp, problem)
        return Arrival(number, path, manifest, stamp)
    if not (path / SAVED_MODEL).is_file():
        problem = f"{path} has neither {schema.MANIFEST} nor {SAVED_MODEL}: a copy under way?"
    elif _is_ours(path):
        problem = f"{path} has no {schema.MANIFEST}, which arrives last: a copy under way?"
    elif stamp != last_stamp and _is_fresh(stamp):
        problem = f"{path} has just been written; it is loaded when it does not change any more."
    else:
        problem = ""
    return Arrival(number, path, None, stamp, problem, on_its_way=bool(problem))


def is_finished(path: Path) -> bool:
    """Whether somebody has finished writing a version there, sound or not."""
    return (path / schema.MANIFEST).is_file() or (path / SAVED_MODEL).is_file()


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files."""
    found = []
    for directory, _, names in os.walk(path):
        for name in names:
            file = os.path.join(directory, name)
            try:
                status = os.stat(file)
            except OSError:  # removed while we look
                continue
            found.append((file, status.st_size, status.st_ctime_ns))
    return tuple(sorted(found))


def _is_fresh(stamp: tuple[tuple[str, int, int], ...]) -> bool:
    """Whether a file has changed in the last seconds; no copy sets this time of it back."""
    newest = max((changed for _, _, changed in stamp), default=0)
    return time.time() - newest / 1e9 < _FRESH_SECONDS


def _is_ours(path: Path) -> bool:
    """Whether a part of what `publish` writes is there."""
    if any((path / part).exists() for part in (ANN_REPORT, SCANN_MODEL, RETRIEVAL)):
        return True
    try:
        return EMBEDDING_SEARCH.encode() in (path / SAVED_MODEL).read_bytes()
    except OSError:
        return False
