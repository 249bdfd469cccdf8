"""What every method is: options, what the data gives it, a loss, and state that checkpoints."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch, Candidates, Encoders
from samplers.random_numbers import split_seed
from samplers.selection.seen import Seen

_DATA = {  # what a method may need of the data → what to pass
    "frequency": "the number of train rows of each candidate, [N].",
    "num_candidates": "the size of the corpus, N.",
    "num_queries": "the number of queries, known or not, with a dense id.",
}
_NOT_GIVEN: Any = None  # of the data, which is there where `needs` has it


def require(holds: bool, name: str, rule: str, got: Any) -> None:
    """Raises a ValueError, "name must be rule, got ...", unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {got}.")


def require_above_0(name: str, value: float) -> None:
    """As `require`."""
    require(0 < value < float("inf"), name, "above 0 and finite", value)


@dataclasses.dataclass(eq=False, kw_only=True)
class Method(tf.Module):
    """Base of the methods: `method(encoders, batch, seed=seed)` is the loss of each row, [B].

    The steps that a method overrides are `refresh`, `propose` and `select`, for candidates beyond
    those of the batch, and `loss`, which alone has a gradient. A trainer that keeps look-ups out
    of its compiled region calls the steps by hand, in the order of `__call__`.

    On several replicas each has the loss of its rows, which are a part of a larger batch. Where
    rows are negatives of each other, the negatives are the positives of all: `Batch.columns`.

    A subclass is a dataclass whose further fields are its options; the comment on the line of a
    field is its documentation, and an int is at least 1. State lives in `tf.Variable`s made in
    `__post_init__`, so that it checkpoints with the model.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # of "frequency", "num_candidates", "num_queries"
    faster_with_xla: ClassVar[bool] = True  # on a CPU; compiled by default where True
    row_by_row: ClassVar[bool] = False  # `select` and `loss` of a row look at no other row
    excludes_seen: ClassVar[bool] = False  # its paper draws no train positive of the query

    frequency: np.ndarray = field(default=_NOT_GIVEN, repr=False)  # [N], train rows
    num_candidates: int = field(default=_NOT_GIVEN, repr=False)  # N
    num_queries: int = field(default=_NOT_GIVEN, repr=False)
    fingerprints: np.ndarray = field(default=_NOT_GIVEN, repr=False)  # int64 [N], of the raw ids
    seen: Seen | None = field(default=_NOT_GIVEN, repr=False)  # is left out of negatives

    def __post_init__(self) -> None:
        super().__init__(name=type(self).__name__.lower())
        for what in self.needs:
            if getattr(self, what) is None:
                raise ValueError(
                    f"{type(self).__name__} needs {what}=, got None: pass {_DATA[what]}"
                )
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None and str(option.type).startswith("int"):
                require(value >= 1, option.name, "at least 1", value)
        for name in ("frequency", "fingerprints"):
            value, size = getattr(self, name), self.num_candidates
            if value is not None and size is not None and np.shape(value) != (size,):
                raise ValueError(
                    f"{name} must have shape [num_candidates] = [{size}], got "
                    f"{list(np.shape(value))}: pass a number, which may be 0, for each candidate."
                )

    def __call__(self, encoders: Encoders, batch: Batch, *, seed: tf.Tensor) -> tf.Tensor:
        """The loss of each row: float32 [B], weighted, 0 for padding, not reduced.

        `seed`, int [2], is the only source of randomness.
        """
        first, second = split_seed(seed)  # of refresh and propose, and of the loss
        detached = without_gradient(encoders)
        self.refresh(detached, seed=first)
        proposed = self.propose(detached.query, batch, seed=first)
        if proposed is not None:
            proposed = self.select(detached, batch, proposed)
        batch = self.with_seen(batch, proposed)
        return self.loss(encoders, batch, proposed, seed=second)

    def refresh(self, encoders: Encoders, *, seed: tf.Tensor) -> None:
        """Renews state that depends on the towers, where it is missing or old.

        The first thing in a step; called again, it writes the same. `query` and `positive` of
        `encoders` are not used.
        """
        return  # AutoGraph cannot read a function that is a docstring alone

    def propose(self, query: tf.Tensor, batch: Batch, *, seed: tf.Tensor) -> Candidates | None:
        """Draws the candidates that the loss embeds beyond those of the batch; None for none.

        Reads state, writes none but a `renewed_variable`. `query` is [B, D], without gradient.
        """
        return None

    def select(self, encoders: Encoders, batch: Batch, proposed: Candidates) -> Candidates:
        """Of the proposed candidates, those that the loss embeds; all of them by default.

        Runs outside the compiled region, with `encoders` that have no gradient, so that the loss
        and its gradient cost as much as the candidates that are left.
        """
        return proposed

    def with_seen(self, batch: Batch, proposed: Candidates | None) -> Batch:
        """The batch as `loss` needs it: with which of the shared columns its queries have seen.

        The columns are those of the batch and what `select` returned. Not to be compiled by XLA.
        """
        if self.seen is None:
            return batch
        ids = batch.columns.candidate_ids
        ids = ids if proposed is None else tf.concat([ids, proposed.ids], axis=0)
        return batch._replace(seen=self.seen.hits(batch.query_ids, ids))

    def loss(
        self, encoders: Encoders, batch: Batch, proposed: Candidates | None, *, seed: tf.Tensor
    ) -> tf.Tensor:
        """The loss of each row, [B], from what `select` returned; may be compiled by XLA.

        Leaves the state as it is, but for a `renewed_variable` where it keeps what `update` needs.
        """
        raise NotImplementedError

    @property
    def counted(self) -> tuple[tf.Variable, ...]:
        """What `loss` counts over its rows, for `update`: of a batch in parts, it is summed."""
        return ()

    def update(self, batch: Batch) -> None:
        """Writes what a method remembers of a batch; called after its training step."""
        return  # as in `refresh`

    def end_epoch(self, encoders: Encoders) -> None:
        """Writes what a method renews between epochs; `query` and `positive` are empty there."""


def without_gradient(encoders: Encoders) -> Encoders:
    """The same towers, through whose embeddings no gradient flows."""

    def detached(part: Any) -> Any:
        if callable(part):
            return lambda *ids: tf.stop_gradient(part(*ids))
        return None if part is None else tf.stop_gradient(part)

    return Encoders(*map(detached, encoders))
