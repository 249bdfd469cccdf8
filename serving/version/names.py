"""What models and versions may be called; free of TensorFlow, so that settings can be checked."""

from __future__ import annotations

import re

from serving.errors import InvalidRequest

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
