"""One ScaNN index under many settings: leaves that are searched, candidates that are reordered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from serving.publish.measuring import Judge, Measured, Search
from serving.version.index import ScannIndex

_REORDERED = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)  # times K
_MOST_REORDERED = (8.0, 64.0)  # the same with all leaves, where nothing less keeps the promise
_LITTLE = 1e-3  # recall; two steps that gain less together end a row of settings
_TOO_SLOW = 2.0  # times the fastest setting that keeps the promise: ends a row, too


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to search, and what it gave."""

    num_leaves: int
    leaves_to_search: int
    num_reordered: int
    measured: Measured

    @property
    def parameters(self) -> tuple[int, int]:
        """What a search takes."""
        return self.leaves_to_search, self.num_reordered

    def keeps(self, promise: float) -> bool:
        """Whether its recall is above a promise by its standard error."""
        return self.measured.recall - self.measured.error >= promise

    def described(self) -> dict[str, Any]:
        """For the report."""
        return {
            "num_leaves": self.num_leaves,
            "leaves_to_search": self.leaves_to_search,
            "num_reordered": self.num_reordered,
            "recall": round(self.measured.recall, 4),
            "batch_ms": round(self.measured.batch_ms, 4),
        }


class Sweep:
    """An index with the settings that were measured.

    Attributes:
      index: the index.
      search: its search as a graph, with leaves and reordered candidates as inputs.
      settings: in the order in which they were measured.
    """

    def __init__(self, index: ScannIndex, judge: Judge, promise: float) -> None:
        """Measures settings on the queries of a judge, until more work finds little more."""
        self.index, self._judge, self._promise = index, judge, promise
        scalar = tf.TensorSpec([], tf.int32)
        embedding = tf.TensorSpec([None, index.dimensions], tf.float32)
        self.search: Search = tf.function(index.search, input_signature=[embedding, scalar, scalar])
        self.settings: list[Setting] = []
        for leaves, num_reordered in self._steps() if index.num_leaves else [(0, 0)]:
            self.settings.append(self.measure(leaves, num_reordered))

    @property
    def keeping(self) -> list[Setting]:
        """The settings that keep the promise, the fastest first."""
        keeping = [one for one in self.settings if one.keeps(self._promise)]
        return sorted(keeping, key=lambda one: one.measured.batch_ms)

    @property
    def fastest_ms(self) -> float:
        """Time of a batch with the fastest setting that keeps the promise; inf for none."""
        return self.keeping[0].measured.batch_ms if self.keeping else math.inf

    def strongest(self) -> Iterator[Setting]:
        """Settings with all leaves, slow and good, measured now; the last one finds the most."""
        if not self.index.num_leaves:
            yield self.settings[0]
        else:
            for share in _MOST_REORDERED:
                self.settings.append(
                    self.measure(self.index.num_leaves, self.index.reordering(share))
                )
                yield self.settings[-1]

    def measure(self, leaves: int, num_reordered: int, **options: int) -> Setting:
        """Measures one setting."""
        measured = self._judge.measure(self.search, leaves, num_reordered, **options)
        return Setting(self.index.num_leaves, leaves, num_reordered, measured)

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Leaves searched and candidates reordered; reads what came of the last one."""
        index = self.index
        for share in _REORDERED:
            recalls = [0.0]
            for leaves in _powers(index.num_leaves):
                yield leaves, index.reordering(share)
                last = self.settings[-1].measured
                recalls.append(last.recall)
                found_all = last.recall == 1.0 or last.recall - recalls[-3:][0] < _LITTLE
                if found_all or last.batch_ms > _TOO_SLOW * self.fastest_ms:
                    break


def _powers(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, ... most: each about √2 of the last."""
    return sorted({min(most, round(2 ** (power / 2))) for power in range(64)})
