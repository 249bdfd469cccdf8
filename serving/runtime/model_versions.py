"""The versions of a model: on disk, wanted, served; and which of them a request gets and pins."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Collection, Hashable, Iterator, Sequence
from pathlib import Path

from serving.errors import InvalidRequest, NotFound, Unavailable
from serving.runtime.batched_version import BatchedVersion
from serving.runtime.configuration import ModelConfig
from serving.version.names import MAX_VERSION, State, VersionStatus
from serving.version.versions import VersionFiles, is_finished, look_at, numbered_directories

_SHOWN = 80  # characters of a client's name that a message repeats
_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1.0, 300.0  # before a version is tried again; it doubles


@dataclasses.dataclass(eq=False)
class PinnedVersion:
    """A loaded version and how many requests use it now."""

    model: ModelVersions
    files: VersionFiles
    servable: BatchedVersion
    pins: int = 0
    retired: bool = False


class ModelVersions:
    """Bookkeeping for one model; the manager says when, and holds a lock where that matters."""

    def __init__(self, config: ModelConfig, base_path: Path, root: Path | None = None) -> None:
        """Nobody has looked at it; while `root` is missing the disk is away, not a version gone."""
        self.config, self.base_path = config, base_path
        self._root = root or base_path
        self.available: dict[int, PinnedVersion] = {}  # what requests get, by number
        # Of every version that was looked at, by number; replaced, never changed.
        self.statuses: dict[int, VersionStatus] = {}
        self.settled = False  # whether the last look left nothing to load
        self.absence = ""  # what it means that no wanted version is on disk; "" where one is
        self._wanted: list[int] = []
        self._deleted = False  # whether nothing is left of what is served and wanted
        self._stamps: dict[int, Hashable] = {}  # of the last look at what is not loaded
        # Of what could not be loaded: stamp, seconds of waiting, and until when.
        self._failed: dict[int, tuple[Hashable, float, float]] = {}

    def find(self) -> list[VersionFiles]:
        """Looks at the disk; what is wanted and not loaded, newest first."""
        on_disk = numbered_directories(self.base_path)
        looked_at: dict[int, VersionFiles | None] = {}

        def usable(number: int) -> bool:
            if number in self.available and not self._is_replaced(number, on_disk[number]):
                return True
            if number not in looked_at:
                looked_at[number] = self._look_at(number, on_disk[number])
            return looked_at[number] is not None or number in self.available

        labelled = [number for number in self.config.labels.values() if number in on_disk]
        named = self.config.specific
        self._deleted = False
        self.absence = ""
        if not labelled and not (on_disk.keys() & set(named) if named else on_disk):
            self._deleted = self._root.is_dir() and not on_disk.keys() & self.available.keys()
            what = "is unloaded" if self._deleted else "stays until there is one"
            name = self.config.name
            self.absence = f"Model {name!r} has no wanted version on disk: what is served {what}."
        chosen = self.config.choose(on_disk, usable)
        self._wanted = sorted({*chosen, *filter(usable, labelled)}, reverse=True)
        self._forget(on_disk, looked_at)
        return [files for number in self._wanted if (files := looked_at.get(number))]

    def surplus(self) -> list[int]:
        """What is served and not wanted, once what is wanted is served, or nothing on disk."""
        if self._deleted:
            return list(self.available)
        if not self._wanted or not self.available.keys() >= set(self._wanted):
            return []
        return [number for number in self.available if number not in self._wanted]

    def outcome(self) -> tuple[bool, str]:
        """Whether a reload of the configuration is over, and what is missing, "" for nothing."""
        missing = self.config.named - self.available.keys()
        if self.available and not missing:
            return True, ""
        for number, status in self.statuses.items():
            is_failed = status.state == State.END and status.error_message
            if is_failed and (number in missing or not missing):
                return True, f"Version {status.version} cannot be loaded: {status.error_message}"
        return False, f"Model {self.config.name!r} is still being loaded."

    def failed(self, files: VersionFiles, message: str) -> str:
        """Notes that a version could not be loaded, and when it is tried again: the message.

        That is each time twice as long after, or as soon as its files change.
        """
        last_stamp, last_wait, _ = self._failed.get(files.number, (None, 0.0, 0.0))
        same = last_stamp == files.stamp
        wait = min(2 * last_wait, _MAX_RETRY_SECONDS) if same else _RETRY_SECONDS
        self._failed[files.number] = files.stamp, wait, time.monotonic() + wait
        message = f"{message} (it is tried again in {wait:g} s)"
        self.report(files.number, State.END, message)
        return message

    def report(self, number: int, state: State, error: str = "") -> None:
        """Sets the status of a version; clients see it, and no path of this machine in it."""
        error = error.replace(str(self.base_path), self.base_path.name)
        code = "OK" if not error else "UNAVAILABLE" if state == State.START else "INTERNAL"
        self.statuses = {**self.statuses, number: VersionStatus(number, state, code, error)}

    def removable(self, keep: int) -> list[Path]:
        """Directories that may be deleted, so that the newest `keep` finished ones are left.

        Nothing that is served, wanted or newer than what is served is among them.
        """
        on_disk = numbered_directories(self.base_path)
        finished = sorted((n for n in on_disk if is_finished(on_disk[n])), reverse=True)
        needed = {*self.available, *self._wanted, *self.config.named}
        newest = max(self.available, default=0)
        return [on_disk[n] for n in finished[keep:] if n not in needed and n < newest]

    def _forget(self, on_disk: Collection[int], looked_at: Collection[int]) -> None:
        """Drops what is known of deleted versions and of those not waited for any more.

        Of a model without any other, status goes on to say that they have ended.
        """
        ended, started = State.END, State.START
        self.statuses = {
            number: status
            for number, status in self.statuses.items()
            if not (status.state == ended and number not in on_disk and self.available)
            and not (status.state == started and number not in looked_at)
        }
        self._stamps = {n: stamp for n, stamp in self._stamps.items() if n in on_disk}
        self._failed = {n: failure for n, failure in self._failed.items() if n in on_disk}

    def _is_replaced(self, number: int, path: Path) -> bool:
        """Whether what is served was published anew with other content, under its number."""
        served = self.available[number].files
        if served.manifest is None or served.is_unchanged():  # most looks end here: no file is read
            return False
        return look_at(number, path).manifest not in (None, served.manifest)

    def _look_at(self, number: int, path: Path) -> VersionFiles | None:
        """A version that can be loaded; None, with a status, where it cannot."""
        files = look_at(number, path, self._stamps.get(number))
        self._stamps[number] = files.stamp
        if files.problem:
            self.report(number, State.START if files.on_its_way else State.END, files.problem)
            return None
        stamp, _, until = self._failed.get(number, (None, 0.0, 0.0))
        return None if stamp == files.stamp and time.monotonic() < until else files


class ServedModels:
    """The models by name, under one lock.

    Attributes:
      models: by name; replaced, never changed.
      lock: guards what of them is available, and the pins.
      attention: set when the manager has something to do, such as to free a version whose last
        request is done.
    """

    def __init__(self) -> None:
        self.models: dict[str, ModelVersions] = {}
        self.lock = threading.Lock()
        self.attention = threading.Event()
        self._retired: list[PinnedVersion] = []

    @contextlib.contextmanager
    def pinned(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> Iterator[BatchedVersion]:
        """A version to use, which stays loaded meanwhile; the newest one unless it is named.

        Raises:
          NotFound: no such model or version; the message names those there are.
          Unavailable: it is not loaded yet.
          InvalidRequest: no such label, or both a version and a label are given.
        """
        with self.lock:
            pinned = self._find(self._model(name), version, label)
            pinned.pins += 1
        try:
            yield pinned.servable
        finally:
            with self.lock:
                pinned.pins -= 1
                if pinned.retired and not pinned.pins:
                    self.attention.set()

    def status(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> list[VersionStatus]:
        """State of every version that was looked at, newest first, or of one."""
        model = self._model(name)
        number = self._number(model, version, label)
        statuses = model.statuses
        chosen = sorted(statuses, reverse=True) if number is None else [number]
        if not chosen or chosen[0] not in statuses:
            raise NotFound(f"Could not find any {_which(number)} of model {name!r}.")
        return [statuses[number] for number in chosen]

    def serve(self, model: ModelVersions, files: VersionFiles, servable: BatchedVersion) -> None:
        """Gives a version to requests, in place of the one that had its number, if any."""
        with self.lock:
            if files.number in model.available:
                self._retire(model, files.number)
            model.available[files.number] = PinnedVersion(model, files, servable)
            model.report(files.number, State.AVAILABLE)

    def retire(self, model: ModelVersions, numbers: Sequence[int]) -> None:
        """Takes versions out of service; requests that have pinned one keep it."""
        with self.lock:
            for number in numbers:
                self._retire(model, number)

    def _retire(self, model: ModelVersions, number: int) -> None:
        version = model.available.pop(number)
        version.retired = True
        model.report(number, State.UNLOADING)
        self._retired.append(version)

    def take_unused(self) -> list[PinnedVersion]:
        """The retired versions that no request uses any more, each once; they may be freed."""
        with self.lock:
            unused = [version for version in self._retired if not version.pins]
            self._retired = [version for version in self._retired if version.pins]
        return unused

    def _model(self, name: str) -> ModelVersions:
        if name not in self.models:
            there = ", ".join(sorted(self.models)) or "none"
            raise NotFound(f"Model {name[:_SHOWN]!r} is not served; there are: {there}.")
        return self.models[name]

    def _number(self, model: ModelVersions, version: int | None, label: str | None) -> int | None:
        """The number that is asked for; None for the newest."""
        if (version or 0) > MAX_VERSION:
            raise InvalidRequest(f"A version must be at most {MAX_VERSION}.")
        if label is None:
            return version
        if version is not None:
            raise InvalidRequest("A request may name a version or a label, not both.")
        if label not in model.config.labels:
            there = ", ".join(sorted(model.config.labels)) or "none"
            raise InvalidRequest(
                f"Label {label[:_SHOWN]!r} is not one of model {model.config.name!r}; "
                f"there are: {there}."
            )
        return model.config.labels[label]

    def _find(self, model: ModelVersions, version: int | None, label: str | None) -> PinnedVersion:
        number = self._number(model, version, label)
        name, available = model.config.name, model.available
        if number is None and available:
            return available[max(available)]
        if number in available:
            return available[number]
        status = model.statuses.get(number) if number is not None else None
        coming = status is not None and status.state in (State.START, State.LOADING)
        if number is None or coming or label is not None:
            errors = [status.error_message for _, status in sorted(model.statuses.items())]
            errors = [f": {error}" for error in errors if error]
            why = errors[-1] if errors else ": it is LOADING, ask again when /readyz says ok."
            raise Unavailable(f"Model {name!r} has no {_which(number)} loaded yet{why}")
        there = ", ".join(map(str, sorted(available))) or "none"
        raise NotFound(f"Version {number} of model {name!r} is not served; there are: {there}.")


def _which(number: int | None) -> str:
    return "version" if number is None else f"version {number}"
