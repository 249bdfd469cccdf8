"""Locks of directories, which the system frees when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(path: Path, told: str) -> Iterator[None]:
    """Holds a lock file while the block runs; the file stays.

    Example:
      with held(Path("run/.lock"), "another process trains in run: wait for it."):
          train()

    Args:
      path: the lock file, made where it is missing.
      told: the error where another process holds it.

    Raises:
      ValueError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(told) from None
        yield


@contextlib.contextmanager
def lone_holder(path: Path, told: str = "", *, waits: bool = True) -> Iterator[None]:
    """Waits for a lock file and holds it, then removes it; `told` is logged before it waits.

    Raises:
      ValueError: `told`, where another process holds it and this one does not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waits:
                    raise ValueError(told) from None
                if told:
                    _log.warning(told)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else its holder has removed it
                try:
                    yield
                finally:
                    path.unlink()
                return
