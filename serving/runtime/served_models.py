"""What is served now: finds the version that a request means, and pins it while it is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from serving.errors import InvalidRequest, NotFound, Unavailable
from serving.runtime.batched_version import BatchedVersion
from serving.runtime.model_versions import ModelVersions, PinnedVersion
from serving.version.names import MAX_VERSION
from serving.version.status import State, VersionStatus

_SHOWN = 80  # characters of a client's name that a message repeats


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

    def serve(self, model: ModelVersions, number: int, servable: BatchedVersion) -> None:
        """Puts a loaded version into service; requests get it from now on."""
        with self.lock:
            model.available[number] = PinnedVersion(model, number, servable)
            model.report(number, State.AVAILABLE)

    def retire(self, model: ModelVersions, numbers: Sequence[int]) -> None:
        """Takes versions out of service; requests that have pinned one keep it."""
        with self.lock:
            for number in numbers:
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
            why = errors[-1] if errors else "."
            raise Unavailable(f"Model {name!r} has no {_which(number)} loaded yet{why}")
        there = ", ".join(map(str, sorted(available))) or "none"
        raise NotFound(f"Version {number} of model {name!r} is not served; there are: {there}.")


def _which(number: int | None) -> str:
    return "version" if number is None else f"version {number}"
