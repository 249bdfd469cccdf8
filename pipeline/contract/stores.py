"""Directories in an object store: written whole or not at all, and read by a local copy.

A store has neither renames nor locks. So the files of every upload lie below a name of their own,
`run-…`; the manifest comes last, by one PUT, and says in `folder` which name that is. A reader has
the old content or the new. What a killed upload left is named by no manifest, and the next one
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.files import (
    asking_store,
    check_files,
    describe_files,
    held,
    is_remote,
    made_aside,
    replace_directory,
    write_atomically,
)

_log = logging.getLogger(__name__)
MANIFESTS = (schema.MANIFEST, f"_{schema.MANIFEST}")
_FOLDER = "folder"  # key of a manifest in a store; missing where people copied files there
_PLAIN = "directory"  # kind of what has no manifest of its own, such as a run
_AT_ONCE = 4  # files on their way; each may be 100 MB in memory
_RUN = re.compile(r"run-[0-9a-f]{16}")
_VERSION = re.compile(r"[^/.][^/]*/[0-9]+")  # of a model
_MAX_IDLE_SECONDS = 7 * 24 * 3600  # before a copy goes that no process uses
_DONE = ".done"  # beside a working copy that the store holds as it is
_in_use: dict[Path, int] = {}  # copies that this process uses, and the locks that say so


def cache_directory(*names: str) -> Path:
    """A place in the cache of this user, `$XDG_CACHE_HOME/twotower`; anybody may empty it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "twotower", *names).absolute()


def local_place(output: str | os.PathLike[str]) -> Path:
    """Where an output is made: a local one where it is, one of a store in the cache.

    Example:
      >>> local_place("/data/prepared").as_posix()
      '/data/prepared'
    """
    name = os.fspath(output)
    if not is_remote(name):
        return Path(name).absolute()
    return cache_directory("outputs", _digest(name.rstrip("/")))


def exists(place: str | os.PathLike[str]) -> bool:
    """Whether something is at a local path, or a manifest in a place of a store."""
    name = os.fspath(place)
    return _find_manifest(name) is not None if is_remote(name) else Path(name).exists()


def put_in_place(finished: Path, output: str | os.PathLike[str]) -> None:
    """Renames a finished directory into place, or uploads it to a store.

    Raises:
      ValueError: the store fails; what stood there before stays, and the error says where on this
        machine the output is kept.
    """
    name, kept = os.fspath(output), local_place(output)
    if is_remote(name):
        with kept_on_failure(finished, kept):
            upload(finished, name)
        shutil.rmtree(kept, ignore_errors=True)  # of an upload that failed
    else:
        replace_directory(finished, kept)


@contextlib.contextmanager
def kept_on_failure(made: Path, kept: Path) -> Iterator[None]:
    """Keeps what was made for a store where it fails, and says where on this machine."""
    try:
        yield
    except ValueError as error:
        if made != kept:
            replace_directory(made, kept)
        raise ValueError(f"{error} What was made is kept in {kept}.") from error


def upload(directory: Path, destination: str, *, new: bool = False) -> Path:
    """Writes a finished directory to a place in a store, the manifest last.

    Args:
      directory: with a manifest; without one, it gets one in the store.
      destination: such as s3://bucket/prepared; what stood there before goes away after it.
      new: whether nothing may stand there, also nothing that comes meanwhile.

    Returns:
      Where `local_copy` looks for it.

    Raises:
      FileExistsError: with `new`, another upload was first.
      ValueError: the store fails, or another upload removed the files of this one.
    """
    files = describe_files(directory)
    name = next((name for name in MANIFESTS if name in files), "")
    if name:
        fields = json.loads((directory / name).read_text(encoding="utf-8"))
        del files[name]
    else:
        name, fields = schema.MANIFEST, vars(schema.Manifest(_PLAIN, "", {}, {}, files))
    folder = f"run-{secrets.token_hex(8)}"
    text = _text_of(fields | {_FOLDER: folder})
    with _writing(destination) as (store, root):
        before = []
        with contextlib.suppress(FileNotFoundError):
            paths = store.ls(root, detail=False)
            before = [path for path in paths if _RUN.fullmatch(path.rpartition("/")[2])]
        try:
            places = [f"{root}/{folder}/{path}" for path in files]
            store.put([str(directory / path) for path in files], places, batch_size=_AT_ONCE)
            there = store.find(f"{root}/{folder}", detail=True).values()
            described = sorted(file["bytes"] for file in files.values())
            if sorted(file["size"] for file in there) != described:
                if new:
                    raise FileExistsError(destination)
                raise ValueError(f"another run has written {destination} meanwhile; run it again.")
            mode = "create" if new else "overwrite"
            store.pipe_file(f"{root}/{name}", text.encode(), mode=mode)
        except Exception:
            committed = None
            with contextlib.suppress(Exception):  # the PUT may have been taken all the same
                committed = (_find_manifest(destination) or {}).get(_FOLDER) == folder
                if not committed:
                    store.rm(f"{root}/{folder}", recursive=True)
            if not committed:
                raise
        stale = [f"{root}/{kind}" for kind in MANIFESTS if kind != name]
        for path in [*before, *(path for path in stale if store.exists(path))]:
            store.rm(path, recursive=True)
    return _place_of_copy(fields)


def local_copy(source: str | os.PathLike[str], place: Path | None = None) -> Path:
    """Where to read a directory: a local one itself, one of a store in a checked copy.

    Args:
      source: the directory.
      place: where its copy is made, if there is nothing; without it, in the cache by its content,
        where it stays as long as a process uses it, and for a week.

    Raises:
      ValueError: there is no manifest, the files are not what it says, or the store fails.
    """
    source, damage = os.fspath(source), ""
    if not is_remote(source):
        return Path(source)
    for _ in range(3):
        manifest = _find_manifest(source)
        if manifest is None:
            raise ValueError(f"{source} holds nothing finished: there is no {schema.MANIFEST}.")
        folder = manifest.pop(_FOLDER, "")
        copy = place or _place_of_copy(manifest)
        with made_aside(copy) as aside:
            if copy.exists():
                return copy if place else _used(copy)
            _log.info("Copying %s to %s.", source, copy)
            try:
                _download(source, folder, aside)
                _check(aside, manifest["files"])
            except FileNotFoundError as error:  # damaged, or replaced while we read
                damage = str(error)
                continue
            if manifest["kind"] != _PLAIN:
                name = schema.manifest_name(manifest["kind"])
                (aside / name).write_text(_text_of(manifest) + "\n", encoding="utf-8")
            os.rename(aside, copy)
            if place:
                return copy
            _used(copy)
        _remove_idle()
        return copy
    raise ValueError(f"{source} is not what its manifest says; make it again. {damage}")


def finished_below(place: str) -> dict[str, str]:
    """The finished directories below a place, "" for itself, and of each what changes with it."""
    finished = {}
    place = place.rstrip("/")
    with asking_store(place) as (store, root), contextlib.suppress(FileNotFoundError):
        for path, file in store.find(root, detail=True).items():
            directory, _, name = path.removeprefix(root).lstrip("/").rpartition("/")
            if name in MANIFESTS:
                finished[directory] = repr(sorted(file.items()))
    return finished


def newest(place: str) -> str:
    """The last finished directory of a place whose name is a number, such as a snapshot.

    The place itself where it is finished, or there is no such directory.
    """
    finished = finished_below(place)
    names = numbered(finished)
    if "" in finished or not names:
        return place
    return f"{place.rstrip('/')}/{names[max(names)]}"


def numbered(names: Iterable[str]) -> dict[int, str]:
    """The names that are numbers, such as those of versions and snapshots, by their number."""
    return {int(name): name for name in names if name.isascii() and name.isdecimal()}


def follow_versions(place: str, keep: int, named: Collection[str] = ()) -> Path:
    """Makes a local directory like a directory of models in a store, and returns it.

    It has the newest `keep` finished versions of each model, and the `named` ones, such as
    "twotower/3". One that is new appears whole, by a rename; one that is gone from the store, or
    another now, goes. Older ones stay where they are.

    Raises:
      ValueError: the store fails, or a version is not what its manifest says; the others are there.
    """
    place, problem = place.rstrip("/"), None
    home = cache_directory("models", _digest(place))
    record = home / ".held.json"  # which content of the store the copies are
    with held(home / ".lock", waits=True):
        there = {k: v for k, v in finished_below(place).items() if _VERSION.fullmatch(k)}
        copies = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        for name in [name for name in copies if copies[name] != there.get(name)]:
            if name in there and _is_copy(home / name, f"{place}/{name}"):
                copies[name] = there[name]  # such as of another storage class
                continue
            _remove(home / name)
            del copies[name]
        of_model: dict[str, list[str]] = {}
        for name in sorted(there, key=lambda name: -int(name.partition("/")[2])):
            of_model.setdefault(name.partition("/")[0], []).append(name)
        kept = [name for names in of_model.values() for name in names[:keep]]
        for name in [*sorted(there.keys() & {*named}), *kept]:
            if name in copies and (home / name).is_dir():
                continue
            try:
                local_copy(f"{place}/{name}", home / name)
                copies[name] = there[name]
            except ValueError as error:
                problem = error
        write_atomically(record, json.dumps(copies))
    if problem:
        raise problem
    return home


@contextlib.contextmanager
def working_copy(place: str, *, may_be_new: bool) -> Iterator[Path]:
    """A local directory that a command works in; where that changes it, it is uploaded at the end.

    What a command that failed or was killed leaves there is what the next one on this machine goes
    on with, unless the store holds something else by then.

    Raises:
      ValueError: the place is empty and must not be, another command works on it here or has
        written it meanwhile, or the store fails; the error says where the work is kept.
    """
    home = cache_directory("runs", _digest(place.rstrip("/")))
    work = home / place.rstrip("/").rpartition("/")[2]  # its name stands in reports
    stamp = home / ".held.json"  # what the store held when it was last like the working copy
    with held(home / ".lock", f"another command works on {place}; wait for it."):
        _used(home)
        before = _files_at(place)
        if not before and not may_be_new:
            raise ValueError(f"{place} holds nothing finished: there is no {schema.MANIFEST}.")
        if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != before:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(local_copy(place), work) if before else work.mkdir()
            write_atomically(stamp, json.dumps(before))
        (home / _DONE).unlink(missing_ok=True)
        yield work
        if (after := describe_files(work)) != before:
            with kept_on_failure(work, work):
                if _files_at(place) != before:
                    raise ValueError(f"{place} was written by another command meanwhile.")
                upload(work, place)
            write_atomically(stamp, json.dumps(after))
            _log.info("%s is complete.", place)
        (home / _DONE).touch()


def _is_copy(directory: Path, place: str) -> bool:
    """Whether a local directory has the manifest of a place in a store."""
    manifest = _find_manifest(place) or {}
    manifest.pop(_FOLDER, None)
    file = directory / schema.MANIFEST
    return file.is_file() and file.read_text(encoding="utf-8") == _text_of(manifest) + "\n"


def _files_at(place: str) -> Any:
    """What the manifest of a place in a store says of its files; nothing without one."""
    return (_find_manifest(place) or {}).get("files", {})


def _text_of(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)


def _place_of_copy(manifest: dict[str, Any]) -> Path:
    return cache_directory("copies", _digest(_text_of(manifest) + "\n"))


def _used(copy: Path) -> Path:
    """Notes until the end of this process that it uses a copy."""
    if copy not in _in_use:
        _in_use[copy] = os.open(copy, os.O_RDONLY)
        fcntl.flock(_in_use[copy], fcntl.LOCK_SH)
    os.utime(copy)
    return copy


def _remove_idle() -> None:
    """Removes copies, and finished working copies, that no process uses or has used for long."""
    finished = cache_directory("runs").glob(f"*/{_DONE}")
    for path in [*cache_directory("copies").glob("[!.]*"), *finished]:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _MAX_IDLE_SECONDS:
                _remove(path.parent if path.name == _DONE else path)


def _remove(directory: Path) -> None:
    """Removes a directory, all of it at once for those who look; not while a process uses it."""
    with made_aside(directory) as aside, contextlib.suppress(FileNotFoundError, BlockingIOError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.rmdir()
            os.rename(directory, aside)
        finally:
            os.close(handle)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _download(source: str, folder: str, aside: Path) -> None:
    with asking_store(f"{source.rstrip('/')}/{folder}".rstrip("/")) as (store, root):
        names = [path.removeprefix(f"{root}/") for path in store.find(root)]
        names = [n for n in names if n not in MANIFESTS and not {"", ".."} & {*n.split("/")}]
        places = [str(aside / name) for name in names]
        store.get([f"{root}/{name}" for name in names], places, batch_size=_AT_ONCE)


def _check(directory: Path, described: dict[str, dict[str, Any]]) -> None:
    """As `check_files`, but what is not there is a FileNotFoundError."""
    try:
        check_files(directory, described, content=True)
    except ValueError as error:
        raise FileNotFoundError(str(error)) from error


@contextlib.contextmanager
def _writing(place: str) -> Iterator[tuple[Any, str]]:
    """The file system of a place to write to, and the place in it."""
    with asking_store(place.rstrip("/")) as (store, root):
        bucket = root.partition("/")[0]
        if not root.partition("/")[2] or not store.exists(bucket):
            raise ValueError(f"{place} must be a place in a bucket that exists: check the name.")
        yield store, root


def _find_manifest(place: str) -> dict[str, Any] | None:
    """What the manifest of a place in a store says; None without one."""
    for name in MANIFESTS:
        path = f"{place.rstrip('/')}/{name}"
        with contextlib.suppress(FileNotFoundError), asking_store(path) as (store, key):
            content = store.cat_file(key)
            with contextlib.suppress(json.JSONDecodeError):
                manifest = json.loads(content)
                if isinstance(manifest, dict) and {"kind", "files"} <= manifest.keys():
                    return manifest
            raise ValueError(f"{path} is not a manifest of twotower; choose another place.")
    return None
