"""What models and versions are called, and the life of a version; free of TensorFlow."""

from __future__ import annotations

import dataclasses
import enum
import re

from serving.errors import InvalidRequest

# The variable with the folder of files that workers share; prometheus_client counts there.
WORKERS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
MAX_VERSION = 2**63 - 1  # numbers of versions are int64, here as in TensorFlow Serving

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_name(name: str) -> bool:
    """Whether `name` may be a model: a directory below the models, and only that.

    >>> is_name("shop-2.1"), is_name("../up")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises InvalidRequest, a ValueError, unless `name` may be a model."""
    if not is_name(name):
        raise InvalidRequest(
            f"name must be letters, digits, '.', '_' or '-' and start with a letter or digit, "
            f"got {name!r}: it becomes a directory."
        )


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
