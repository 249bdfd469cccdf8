"""Sets up a process that does nothing but serve."""

from __future__ import annotations

import gc
import sys

_SWITCH_SECONDS = 0.001  # how long one thread may keep the others from Python


def settle() -> None:
    """Keeps pauses short; call it once all is imported and before a version is loaded.

    What has been imported is left out of garbage collection from then on: a full collection, which
    stops every request, then takes a few hundredths of a second in place of tenths. Threads take
    turns more often, so that the event loop does not wait for a version that is being loaded.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_SECONDS)
