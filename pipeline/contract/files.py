"""Files that are whole or absent: written aside, renamed into place, described by checksums.

And locks of directories, which the system frees when their process ends, however it ends. This is
also the one place that knows object stores: a path with `://` in it is read through fsspec, a local
one never is.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import logging
import os
import re
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
    readable = readable_file(path)
    with open(readable, "rb") if isinstance(readable, str) else readable as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a store, such as s3://bucket/log; a local one has no `://`."""
    return "://" in str(path)


def check_no_credentials(path: str) -> None:
    """Raises ValueError for a path with credentials, which would come into manifests and logs."""
    scheme, _, place = path.partition("://")
    if "@" in place.partition("/")[0]:
        raise ValueError(
            f"a path {scheme}://… holds credentials; leave them out, and give them to the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )


def check_local(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a path in a store, of which `Path` would make a folder `s3:`."""
    if re.search(r"(^|/)[a-z][a-z0-9+]+:/", os.fspath(path)):
        raise ValueError(f"{path} must be a local path; copy what is in the store.")


def absolute(path: str) -> str:
    """A path that is the same from every working directory."""
    return path if is_remote(path) else os.path.abspath(path)


def find_files(source: str) -> list[str]:
    """The files that a path or glob names, in order; `**` matches folders at any depth.

    A directory, and each directory that a glob with `/` at its end matches, stands for the files in
    it and in its folders `name=value`, at any depth. Empty where nothing is there.

    Example:
      >>> find_files("*.csv")  # of the shop in README
      ['log.csv', 'products.csv']

    Raises:
      ValueError: the store cannot be asked.
    """
    if is_remote(source):
        return _find_remote(source)
    roots, files = [source], []
    if not os.path.isdir(source):
        files = glob.glob(source, recursive=True)
        roots = [path for path in files if source.endswith("/")]
        files = [path for path in files if path not in set(roots)]
    for root in roots:
        for folder, folders, names in os.walk(Path(root), followlinks=True):
            names += (name for name in folders if "=" not in name)  # such as a folder x.parquet
            folders[:] = (name for name in folders if "=" in name)
            files += (os.path.join(folder, name) for name in names)
    return sorted(set(files))  # `**/` matches a folder and those in it


def is_directory(path: str) -> bool:
    """Whether a path is a directory; of a store, whether files lie below it."""
    if not is_remote(path):
        return os.path.isdir(path)
    with asking_store(path) as (store, key):
        return bool(store.isdir(key))


def readable_file(path: str | os.PathLike[str]) -> str | io.BufferedReader:
    """What readers of files take: a local path itself, or an open file of a store.

    Raises:
      FileNotFoundError: the store has no such file.
      ValueError: the store cannot be asked.
    """
    name = os.fspath(path)
    if not is_remote(name):
        return name
    with asking_store(name) as (store, key):
        file = store.open(key, "rb")
    return io.BufferedReader(_RemoteFile(name, file), 1 << 20)


def stamp_of(path: str) -> tuple[Any, ...]:
    """Size and what else tells that a file changed, without reading it; () without a file."""
    try:
        if is_remote(path):
            with asking_store(path) as (store, key):
                return store.size(key), store.ukey(key)
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _find_remote(source: str) -> list[str]:
    # Suppressed: there is no such bucket.
    with asking_store(source) as (store, key), contextlib.suppress(FileNotFoundError):
        scheme = source.partition("://")[0]
        roots, files = [key], []
        if glob.has_magic(key):
            files = store.glob(key)
            roots = [path for path in files if source.endswith("/") and store.isdir(path)]
            files = [path for path in files if path not in set(roots)]
        for root in roots:
            for path in store.find(root):  # of a file, itself
                folders = path.removeprefix(root).strip("/").split("/")[:-1]
                files += [path] if all("=" in folder for folder in folders) else []
        return [f"{scheme}://{path}" for path in sorted(set(files))]
    return []


@contextlib.contextmanager
def asking_store(path: str) -> Iterator[tuple[Any, str]]:
    """The file system of a path, and the path without its scheme.

    What goes wrong in the block becomes a ValueError of one line; missing and existing files stay
    what they are.
    """
    try:
        import fsspec

        check_no_credentials(path)
        scheme = path.partition("://")[0]
        store = fsspec.filesystem(scheme, use_listings_cache=False)  # others write there, too
        yield store, store._strip_protocol(path)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            known = "s3:// or gs://"
            raise ValueError(f"{path} is in a store of no known kind; expected {known}.") from error
        raise
    except ImportError as error:
        raise ValueError(
            f"{path} needs a package more ({error}): `pip install '.[s3]'` in the checkout for "
            "s3://, '.[gcs]' for gs://."
        ) from error
    except Exception as error:  # each store has errors of its own, and few of them are OSErrors
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(
            f"{path} cannot be reached ({reason}); "
            "check the name, the network and the credentials in the environment."
        ) from error


class _RemoteFile(io.RawIOBase):
    """A file of a store, whatever breaks in it an OSError, as of a local one."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise OSError(f"the store fails, {type(error).__name__}: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file aside and renames it into place, so that no reader sees half of it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_text(path: str, text: str) -> None:
    """Writes a small file to a directory or a place in a store."""
    if is_remote(path):
        with asking_store(path) as (store, key):
            store.pipe_file(key, text.encode())
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), text)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; where writing fails, it is removed."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # workers may share a disk
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def describe_files(
    directory: str | os.PathLike[str],
    rows: dict[str, int] | None = None,
    skip: Container[str] = (),
) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `directory`, for `schema.Manifest.files`.

    But not of hidden files, such as locks.
    """
    root, described = Path(directory), {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name in skip or path.name.startswith("."):
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
      >>> did_you_mean_directory("run/bundle", "training.json")
      ' Did you mean run?'
    """
    place = Path(path)
    for near in (place.parent, *sorted(place.glob("*/"))):
        file = near / holds
        if file.is_file() and with_text in file.read_text(encoding="utf-8", errors="replace"):
            return f" Did you mean {near}?"
    return ""


@contextlib.contextmanager
def made_aside(destination: Path, message: str = "") -> Iterator[Path]:
    """An empty `.<name>.partial` for what `replace_directory` then puts in place; gone at the end.

    One process at a time has it. The others wait, or get a ValueError that says `message`.
    What a killed one left goes first.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    with held(partial.with_name(f"{partial.name}.lock"), message, waits=not message):
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
def held(path: Path, message: str = "", *, waits: bool = False) -> Iterator[None]:
    """Holds a lock file while the block runs, and removes it then.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as run:
      ...     with held(Path(run) / ".lock", "another process trains in run: wait for it."):
      ...         print("alone")
      alone

    Args:
      path: of the lock file; its directory is made.
      message: where another process holds it, the error, or with `waits` a warning before it waits.
      waits: whether to wait until the other one is done.

    Raises:
      ValueError: `message`.
    """
    check_local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waits:
                    raise ValueError(message) from None
                if message:
                    _log.warning(message)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else its holder has removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # it may have gone with its directory
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
