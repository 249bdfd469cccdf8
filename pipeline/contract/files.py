"""Files that are whole or absent: written aside, renamed into place, described by checksums.

And locks of directories, which the system frees when their process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def checksum(path: str | os.PathLike[str]) -> str:
    """16 bytes of blake2b of the content of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file aside and renames it into place, so that no reader sees half of it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; where writing fails, nothing does."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # workers may share a disk
    yield aside
    os.replace(aside, path)


def describe_files(
    directory: str | os.PathLike[str],
    rows: dict[str, int] | None = None,
    skip: Container[str] = (),
) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `directory`, for `schema.Manifest.files`."""
    root, described = Path(directory), {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name in skip:
            continue
        described[name] = {"bytes": path.stat().st_size, "checksum": checksum(path)}
        if rows and name in rows:
            described[name]["rows"] = rows[name]
    return described


def check_files(
    directory: Path, described: dict[str, dict[str, Any]], *, content: bool = False
) -> None:
    """Compares files with what `describe_files` said: sizes, and with `content` checksums.

    Raises:
      ValueError: a file is missing, cut short or changed.
    """
    for name, description in described.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else "no file"
        if size != description["bytes"]:
            raise ValueError(
                f"{path} must have {description['bytes']} bytes by its manifest, got {size}: "
                "copy or export it again."
            )
        if content and checksum(path) != description["checksum"]:
            raise ValueError(f"{path} was changed after its manifest was written: export it again.")


def did_you_mean_directory(path: str | os.PathLike[str], holds: str, with_text: str = "") -> str:
    """The end of an error about a directory that lacks a file: the one above or below that has it.

    Example:
      did_you_mean_directory("run/checkpoints", "training.json")  # " Did you mean run?"
    """
    place = Path(path)
    for near in (place.parent, *sorted(place.glob("*/"))):
        file = near / holds
        if file.is_file() and with_text in file.read_text(encoding="utf-8", errors="replace"):
            return f" Did you mean {near}?"
    return ""


@contextlib.contextmanager
def made_aside(destination: Path, told: str = "") -> Iterator[Path]:
    """An empty `.<name>.partial` for what `replace_directory` then puts in place; gone at the end.

    One process at a time has it. The others wait, or get a ValueError where `told` is what it says.
    What a killed one left goes first.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    with lone_holder(partial.with_name(f"{partial.name}.lock"), told, waits=not told):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_directory(finished: Path, destination: Path) -> None:
    """Renames a finished directory into place; what stood there before goes away after it.

    On one file system a reader sees the old directory or the new one; between the two renames
    of a replacement it may see none, never a mixture.
    """
    retired = finished.with_name(f"{finished.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)  # of a process that was killed here
    if destination.exists():
        os.rename(destination, retired)
    os.rename(finished, destination)
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def held(path: Path, told: str) -> Iterator[None]:
    """Holds a lock file while the block runs; the file stays.

    Example:
      with held(Path("run/.lock"), "another process trains in run: wait for it."):
          train()

    Raises:
      ValueError: `told`, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(told) from None
        yield


@contextlib.contextmanager
def lone_holder(path: Path, told: str = "", *, waits: bool = True) -> Iterator[None]:
    """Waits for a lock file and holds it, then removes it; `told` is logged before it waits.

    Raises:
      ValueError: `told`, where another process holds it and this one does not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waits:
                    raise ValueError(told) from None
                if told:
                    _log.warning(told)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else its holder has removed it
                try:
                    yield
                finally:
                    path.unlink()
                return


@contextlib.contextmanager
def quiet_standard_error() -> Iterator[None]:
    """Keeps what native code and processes log, and shows it only if an error is raised inside.

    The file descriptor is that of the process: what other threads write meanwhile is kept as well.
    """
    if sys.stderr is None:  # the process was started without descriptor 2
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, os.fdopen(os.dup(2), "wb") as standard_error:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            shutil.copyfileobj(kept, standard_error)
            raise
        finally:
            os.dup2(standard_error.fileno(), 2)
