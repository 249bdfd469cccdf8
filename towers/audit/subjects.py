"""Which methods an audit looks at, with which options, and the state that each starts from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from samplers.methods.by_name import METHODS, build
from samplers.methods.in_batch import CorrectSfx
from samplers.methods.method import Method
from towers.audit.settings import AuditConfig
from towers.audit.weights import Batches, Frozen, Subject
from towers.data.interactions import RetrievalData
from towers.metrics.ranking import MOST_SCORES
from towers.model.two_tower import TwoTower
from towers.training.settings import TrainConfig

BASELINE = "ssl_pop"  # whose step costs are compared with
_MOST_DRAWS = 1000  # of a method for a small K
_PAPER_DRAWS = 200  # N of Shi et al., WWW 2023, on Gowalla


class Target(NamedTuple):
    """What K means for the hardness of negatives: Shi et al., WWW 2023, Theorem 3."""

    k: int
    num_negatives: float  # n₋, mean over the audited pairs
    beta: float  # K / n₋, at most 1/2
    num_drawn: int  # N of dns_mn and softmax_v
    num_kept: int  # M of dns_mn

    @property
    def rho(self) -> float:
        """-log β, but no more than the draws can tell apart."""
        return min(-math.log(self.beta), math.log(self.num_drawn))

    @property
    def specs(self) -> tuple[str, str]:
        """dns_mn and softmax_v with these options."""
        return (
            f"dns_mn:num_kept={self.num_kept},num_negatives={self.num_drawn}",
            f"softmax_v:rho={self.rho:.2f},num_negatives={self.num_drawn}",
        )


def target_of(k: int, num_negatives: float) -> Target:
    """M and N with M / N near β = K / n₋.

    N is 200, as in the paper's experiments, where at least one draw in 200 is to be kept; for a
    smaller β M is 1 and N is 1 / β, at most 1000: more draws cost more than they are worth here.
    """
    beta = min(k / num_negatives, 0.5)
    if beta * _PAPER_DRAWS >= 1:
        return Target(k, num_negatives, beta, _PAPER_DRAWS, round(beta * _PAPER_DRAWS))
    return Target(k, num_negatives, beta, min(_MOST_DRAWS, round(1 / beta)), 1)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A method and its options, as `name` or `name:option=value,...`."""

    label: str
    name: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads one.

        Raises:
          ValueError: an option has no value.
        """
        name, _, rest = text.partition(":")
        options: dict[str, str] = {}
        for part in filter(None, rest.split(",")):
            option, sign, value = part.partition("=")
            if not (option and sign):
                raise ValueError(f"methods must be name or name:option=value,..., got {text!r}.")
            options[option.strip()] = value.strip()
        return cls(text, name.strip(), options)


def check_known(specs: list[Spec]) -> None:
    """Looks at the names, before anything is read.

    Raises:
      ValueError: there is no method of a name, or a spec is there twice.
    """
    for place, spec in enumerate(specs):
        if spec.name not in METHODS:
            build(spec.name)  # raises, with the names there are
        if spec in specs[:place]:
            raise ValueError(f"methods must differ, got {spec.label!r} twice; change --methods.")


def choose(
    config: AuditConfig, trained: TrainConfig, target: Target
) -> tuple[list[Spec], dict[str, str]]:
    """What to audit, in order, and what is left out with the reason."""
    own = trained.method + ":" * bool(trained.options) + ",".join(trained.options)
    if config.methods:
        return [Spec.parse(text) for text in config.methods], {}
    left_out = {}
    if not trained.normalize:
        left_out["sl_at_k"] = "its weights are made for cosines; the run scores by dot products"
    names = dict.fromkeys(["full_softmax", own, *METHODS, *target.specs])
    return [Spec.parse(name) for name in names if name not in left_out], left_out


class Maker:
    """Makes the subject of a spec.

    Args:
      trained: the settings of the run.
      model: its model, for the state of its own method.
      data: what it was trained on.
    """

    def __init__(
        self,
        trained: TrainConfig,
        model: TwoTower,
        data: RetrievalData,
        frozen: Frozen,
        batches: Batches,
    ) -> None:
        self._counts = model.method.frequency
        self._trained, self._model, self._data = trained, model, data
        self._frozen, self._batches = frozen, batches

    def check(self, spec: Spec) -> None:
        """Builds the method, and forgets it.

        Raises:
          ValueError: the method or an option is unknown, or an option has a wrong value.
        """
        self._build(spec)

    def make(self, spec: Spec, *, warm_up: int) -> tuple[Subject, str]:
        """The subject, its state as after some training, and how it came by that state."""
        method = self._build(spec)
        subject = Subject(method, self._frozen, self._batches)
        if not method.variables:
            return subject, ""
        own = (spec.name, spec.options) == (self._trained.method, self._trained.method_options)
        if own and not method.row_by_row:
            for mine, theirs in zip(method.variables, self._model.method.variables, strict=True):
                mine.assign(theirs)
            return subject, "state of the run"
        if isinstance(method, CorrectSfx):
            self._settle(method)
            return subject, "estimates as after endless training"
        subject.warm_up(warm_up)
        return subject, f"state after {warm_up} steps"

    def _build(self, spec: Spec) -> Method:
        options: dict[str, Any] = dict(spec.options)
        if spec.name == "full_softmax" and "block_size" not in options:
            rows = self._batches.batch_size
            if rows * self._data.num_candidates > MOST_SCORES:
                options["block_size"] = str(max(1, MOST_SCORES // rows))
        row_by_row = spec.name in METHODS and METHODS[spec.name].row_by_row
        return build(
            spec.name,
            frequency=self._counts,
            num_candidates=self._data.num_candidates,
            num_queries=self._batches.pairs.size if row_by_row else self._data.num_queries,
            fingerprints=self._data.candidate_vocabulary.fingerprints,
            **options,
        )

    def _settle(self, method: CorrectSfx) -> None:
        """Gives the estimates their limit: a bucket of share p comes every 1 / (1 - (1 - p)^B)."""
        estimates = method.estimates
        hashes = method.num_hashes
        size = int(estimates.interval.shape[0]) // hashes
        counts = np.asarray(self._counts, np.float64)
        shares = np.stack(
            [np.bincount(column, counts, size) for column in estimates.buckets.numpy().T]
        )
        misses = np.log1p(-np.minimum(shares / counts.sum(), 1 - 1e-12))  # log(1 - p)
        seen = -np.expm1(self._batches.batch_size * misses)
        interval = 1 / np.maximum(seen, 1e-12)
        step = 1 << 40
        last_step = step + 1 - np.rint(interval).astype(np.int64)
        estimates.assign(step=step, last_step=np.clip(last_step, 0, step), interval=interval)
