"""Sets up a process that does nothing but serve."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 8 << 20  # a parameter of glibc's `mallopt`
_SWITCH_SECONDS = 0.001  # how long one thread may keep the others from Python


def settle() -> None:
    """Keeps pauses short; call it once all is imported and before a version is loaded.

    What has been imported is left out of garbage collection from then on: a full collection, which
    stops every request, then takes a few hundredths of a second in place of tenths. Threads take
    turns more often, so that the event loop does not wait for a version that is being loaded.
    """
    gc.collect()
    gc.freeze()
    _give_back_memory()
    sys.setswitchinterval(_SWITCH_SECONDS)


def _give_back_memory() -> None:
    """Large blocks, such as bodies, go back to the system when they are freed.

    After the first of them glibc would keep those that follow: the threshold follows their size.
    """
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
