"""A disk that is full, told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

# TensorFlow has several kinds of errors for them, and the words of the system in their text.
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


@contextlib.contextmanager
def told_when_full(directory: str | os.PathLike[str], then: str = "") -> Iterator[None]:
    """A context in which a directory is written, by whatever library.

    Args:
      directory: what is written.
      then: what giving the same command again will do.

    Raises:
      ValueError: the disk is full, or a quota or the largest size of a file is reached.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = next((words for words in _FULL if words in str(error)), None)
        if reason is None:
            raise
        raise ValueError(
            f"{Path(directory)} cannot be written: {reason.lower()}; make room and give the same "
            f"command again{then}."
        ) from error
