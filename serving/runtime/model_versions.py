"""The versions of one model: which are on disk, wanted, served, and what became of each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Hashable
from pathlib import Path

from serving.runtime.batched_version import BatchedVersion
from serving.runtime.model_config import ModelConfig
from serving.version.status import State, VersionStatus
from serving.version.versions import VersionFiles, is_finished, look_at, numbered_directories

_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1.0, 300.0  # before a version is tried again; it doubles


@dataclasses.dataclass(eq=False)
class PinnedVersion:
    """A loaded version and how many requests use it now."""

    model: ModelVersions
    number: int
    servable: BatchedVersion
    pins: int = 0
    retired: bool = False


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A version that could not be loaded."""

    stamp: Hashable
    wait: float  # seconds
    again: float  # `time.monotonic()` seconds


class ModelVersions:
    """Bookkeeping for one model; the manager says when, and holds a lock where that matters.

    Attributes:
      config: which versions are wanted.
      base_path: directory of the versions.
      available: what requests get, by number.
      statuses: of every version that was looked at, by number; replaced, never changed.
      settled: whether the last look left nothing to load.
      absence: what it means that no wanted version is on disk; "" where one is.
    """

    def __init__(self, config: ModelConfig, base_path: Path, root: Path | None = None) -> None:
        """Nobody has looked at it; while `root` is missing the disk is away, not a version gone."""
        self.config = config
        self.base_path = base_path
        self._root = root or base_path
        self.available: dict[int, PinnedVersion] = {}
        self.statuses: dict[int, VersionStatus] = {}
        self.settled = False
        self.absence = ""
        self._wanted: list[int] = []
        self._deleted = False  # whether nothing is left of what is served and wanted
        self._stamps: dict[int, Hashable] = {}  # of the last look at what is not loaded
        self._failed: dict[int, _Failure] = {}

    def find(self) -> list[VersionFiles]:
        """Looks at the disk; what is wanted and not loaded, newest first."""
        on_disk = numbered_directories(self.base_path)
        looked_at: dict[int, VersionFiles | None] = {}

        def usable(number: int) -> bool:
            if number in self.available:
                return True
            if number not in looked_at:
                looked_at[number] = self._look_at(number, on_disk[number])
            return looked_at[number] is not None

        labelled = [number for number in self.config.labels.values() if number in on_disk]
        named = self.config.policy.specific
        self._deleted = False
        self.absence = ""
        if not labelled and not (on_disk.keys() & set(named) if named else on_disk):
            self._deleted = self._root.is_dir() and not on_disk.keys() & self.available.keys()
            what = "is unloaded" if self._deleted else "stays until there is one"
            self.absence = f"Model {self.config.name!r} has no wanted version on disk: "
            self.absence += f"what is served {what}."
        chosen = self.config.policy.choose(on_disk, usable)
        self._wanted = sorted({*chosen, *filter(usable, labelled)}, reverse=True)
        self._forget(on_disk, looked_at)
        return [files for number in self._wanted if (files := looked_at.get(number))]

    def surplus(self) -> list[int]:
        """What is served and not wanted any more; [] until all that is wanted is served.

        Where no version is left on disk, that is all.
        """
        if self._deleted:
            return list(self.available)
        if not self._wanted or not self.available.keys() >= set(self._wanted):
            return []
        return [number for number in self.available if number not in self._wanted]

    def outcome(self) -> tuple[bool, str]:
        """Whether a reload of the configuration is over, and what is missing, "" for nothing."""
        named = {*self.config.policy.specific, *self.config.labels.values()}
        missing = named - self.available.keys()
        if self.available and not missing:
            return True, ""
        statuses = [self.statuses[n] for n in missing or self.statuses if n in self.statuses]
        for status in statuses:
            if status.state == State.END and status.error_message:
                return True, f"Version {status.version} cannot be loaded: {status.error_message}"
        return False, f"Model {self.config.name!r} is still being loaded."

    def failed(self, files: VersionFiles, message: str) -> str:
        """Notes that a version could not be loaded, and when it is tried again: the message.

        That is each time twice as long after, or as soon as its files change.
        """
        last, wait = self._failed.get(files.number), _RETRY_SECONDS
        if last and last.stamp == files.stamp:
            wait = min(2 * last.wait, _MAX_RETRY_SECONDS)
        again = time.monotonic() + wait
        self._failed[files.number] = _Failure(files.stamp, wait, again)
        message = f"{message} (it is tried again in {wait:g} s)"
        self.report(files.number, State.END, message)
        return message

    def report(self, number: int, state: State, error: str = "") -> None:
        """Sets the status of a version; clients see it, and no path of this machine in it."""
        error = error.replace(str(self.base_path), self.base_path.name)
        code = "OK"
        if error:
            code = "UNAVAILABLE" if state == State.START else "INTERNAL"
        status = VersionStatus(number, state, code, error)
        self.statuses = {**self.statuses, number: status}

    def removable(self, keep: int) -> list[Path]:
        """Directories that may be deleted, so that the newest `keep` finished ones are left.

        Nothing that is served, wanted or newer than what is served is among them.
        """
        on_disk = numbered_directories(self.base_path)
        finished = sorted((n for n in on_disk if is_finished(on_disk[n])), reverse=True)
        needed = {*self.available, *self._wanted, *self.config.labels.values()}
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

    def _look_at(self, number: int, path: Path) -> VersionFiles | None:
        """A version that can be loaded; None, with a status, where it cannot."""
        files = look_at(number, path, self._stamps.get(number))
        self._stamps[number] = files.stamp
        if files.problem:
            self.report(number, State.START if files.on_its_way else State.END, files.problem)
            return None
        failure = self._failed.get(number)
        if failure and failure.stamp == files.stamp and time.monotonic() < failure.again:
            return None
        return files
