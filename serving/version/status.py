"""The life of a version, from its files to its end."""

from __future__ import annotations

import dataclasses
import enum


class State(enum.IntEnum):
    """Life of a version, with the numbers of TensorFlow Serving's `ModelVersionStatus.State`."""

    START = 10  # known, not loaded: its files are not complete yet, or others are loaded first
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40  # takes no new request, ends those that it has
    END = 50  # unloaded, or could not be loaded; then there is an error


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """What became of one version."""

    version: int
    state: State
    error_code: str = "OK"  # name of a gRPC status code
    error_message: str = ""  # what went wrong, and when it is tried again
