"""The versions of one model: which are on disk, wanted, served, and what became of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from serving.arrival import Arrival, is_finished, look
from serving.model_config import ModelConfig, State, VersionStatus
from serving.versions import numbered_directories


class Servable(Protocol):
    """What a version is once it is loaded."""

    def close(self) -> None:
        """Frees it."""


S = TypeVar("S", bound=Servable)


@dataclasses.dataclass(eq=False)
class Held(Generic[S]):
    """A loaded version and how many requests use it now."""

    number: int
    servable: S
    pins: int = 0
    retired: bool = False


class ModelVersions(Generic[S]):
    """Bookkeeping for one model; the manager says when, and holds its lock where that matters.

    Attributes:
      config: which versions are wanted.
      base_path: directory of the versions.
      available: what requests get, by number.
      statuses: of every version that was looked at, by number; replaced, never changed.
      settled: whether the last look left nothing to load.
    """

    def __init__(self, config: ModelConfig, base_path: Path) -> None:
        self.config = config
        self.base_path = base_path
        self.available: dict[int, Held[S]] = {}
        self.statuses: dict[int, VersionStatus] = {}
        self.settled = False
        self._wanted: list[int] = []
        self._stamps: dict[int, Hashable] = {}  # of the last look at what is not loaded
        self._failed: dict[int, Hashable] = {}  # stamps of what could not be loaded

    def find(self) -> list[Arrival]:
        """Looks at the disk; what is wanted and not loaded, newest first."""
        on_disk = numbered_directories(self.base_path)
        found: dict[int, Arrival | None] = {}

        def usable(number: int) -> bool:
            if number in self.available:
                return True
            if number not in found:
                found[number] = self._find_one(number, on_disk[number])
            return found[number] is not None

        labelled = [number for number in self.config.labels.values() if number in on_disk]
        chosen = self.config.policy.choose(on_disk, usable)
        self._wanted = sorted({*chosen, *filter(usable, labelled)}, reverse=True)
        self._forget(on_disk, found)
        arrivals = [found.get(number) for number in self._wanted]
        return [arrival for arrival in arrivals if arrival is not None]

    def surplus(self) -> list[int]:
        """What is served and not wanted any more; [] until all that is wanted is served."""
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

    def failed(self, arrival: Arrival, message: str) -> None:
        """Notes that a version could not be loaded; it is not tried before its files change."""
        self._failed[arrival.number] = arrival.stamp
        self.report(arrival.number, State.END, message)

    def report(self, number: int, state: State, error: str = "") -> None:
        """Sets the status of a version."""
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
        """Drops what is known of deleted versions and of those not waited for any more."""
        ended, started = State.END, State.START
        self.statuses = {
            number: status
            for number, status in self.statuses.items()
            if not (status.state == ended and number not in on_disk)
            and not (status.state == started and number not in looked_at)
        }
        for stamps in (self._stamps, self._failed):
            for number in [number for number in stamps if number not in on_disk]:
                del stamps[number]

    def _find_one(self, number: int, path: Path) -> Arrival | None:
        """A version that can be loaded; None, with a status, where it cannot."""
        arrival = look(number, path, self._stamps.get(number))
        self._stamps[number] = arrival.stamp
        if arrival.problem:
            self.report(number, State.START if arrival.on_its_way else State.END, arrival.problem)
            return None
        is_same = number in self._failed and self._failed[number] == arrival.stamp
        return None if is_same else arrival
