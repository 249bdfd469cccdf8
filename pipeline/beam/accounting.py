"""What goes into a step comes out of it, or the job stops: the checks that all jobs share."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

_REPORT = "nothing is written. Please report this with the runner and its version."


class AccountingError(RuntimeError):
    """A runner lost something or made it twice, or a step did: our mistake, not the user's."""

    def __init__(self, what: str) -> None:
        super().__init__(what if _REPORT in what else f"{what}; {_REPORT}")


def lost_in(error: Exception) -> AccountingError | None:
    """What a worker process raised of this kind: it comes here as the text of a stack trace."""
    if isinstance(error, AccountingError):
        return error
    lines = re.findall(rf"^{__name__}\.AccountingError: (.+)$", str(error), re.MULTILINE)
    return AccountingError(lines[-1]) if lines else None


def check_sum(
    where: str, total: int, counts: dict[str, int], names: Iterable[str] = (), unit: str = "rows"
) -> None:
    """What went in must be the sum of what came out: rows kept, dead letters, declared drops.

    Example:
      >>> check_sum("reading the log", 5, {"bad": 1, "rows": 4}, ("bad", "rows"))

    Args:
      where: the step, for people.
      total: what went in.
      counts: holds what came out under `names`, or all names; one that is missing counts as 0.
      unit: what is counted, in the plural.

    Raises:
      AccountingError: it is not.
    """
    came = {name: counts.get(name, 0) for name in names or counts}
    if total != sum(came.values()):
        parts = " + ".join(f"{number} {name}" for name, number in came.items())
        raise AccountingError(
            f"{where}: {total} {unit} went in, {sum(came.values())} came out ({parts}): {unit} "
            "were lost or made twice"
        )


def look_up(ids: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each id among known ones, ascending and each once, and whether it is there: [n].

    Example:
      >>> look_up(np.array([7, 5]), known=np.array([5, 6]))
      (array([2, 0]), array([False,  True]))
    """
    places = np.searchsorted(known, ids)
    there = places < len(known)
    there[there] = known[places[there]] == ids[there]
    return places, there


def places_of(ids: np.ndarray, known: np.ndarray, where: str) -> np.ndarray:
    """As `look_up`, where every id must be there: int64 [n].

    Raises:
      AccountingError: an id is missing.
    """
    places, there = look_up(ids, known)
    if not there.all():
        missing = np.unique(ids[~there])
        raise AccountingError(
            f"{where}: {len(missing)} ids are missing among {len(known)} known ones, such as the "
            f"one with fingerprint {missing[0]}, and with them {len(ids) - there.sum()} of "
            f"{len(ids)} values"
        )
    return places
