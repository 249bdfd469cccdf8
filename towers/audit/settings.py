"""Settings of `twotower audit`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from pipeline.contract.settings import require, require_all


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Settings of the audit of samplers on a trained run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run, whose embeddings stay as they are
    output: str = ""  # directory for audit.json and audit.html; none: RUN/audit
    # what to audit, as name or name:option=value,...; none: all, other draws of some, and dns_mn
    # and softmax_v with options for k
    methods: tuple[str, ...] = ()
    k: int = 50  # K, the cut-off that you care about
    batches: int = 8  # batches that are audited
    pairs: int = 16  # audited pairs of a batch, at most a quarter of it
    draws: int = 16  # draws of each batch: of its other rows and of the method's negatives
    batch_size: int = 0  # B; 0: that of the run
    warm_up: int = 5  # steps, each an epoch to the method, before a method with state is audited
    timed_steps: int = 5  # steps whose median is the cost
    seed: int = 10  # of pairs and draws
    max_seconds: float = 1800.0  # no further method is begun after this time

    def __post_init__(self) -> None:
        """Raises ValueError where a field breaks its rule; it names rule, value and remedy."""
        object.__setattr__(self, "methods", tuple(self.methods))
        require_all(self, "must be given", "data", "run")
        different = len(set(self.methods)) == len(self.methods)
        require(different, "methods", "must differ", self.methods)
        require_all(self, "must be at least 1", "k", "pairs", "warm_up", "timed_steps")
        require_all(self, "must be at least 2", "batches", "draws")  # an error needs two of each
        size = self.batch_size
        require(size == 0 or size >= 2, "batch_size", "must be 0 or at least 2", size)
        require_all(self, "must be at least 0", "seed")
        require_all(self, "must be above 0", "max_seconds")


class Spec(NamedTuple):
    """A method and its options, as `name` or `name:option=value,...`."""

    label: str
    name: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads `dns_mn:num_kept=1,num_negatives=800`; ValueError where an option has no value."""
        name, _, rest = text.partition(":")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if not all(option and sign for option, sign, _ in pairs):
            raise ValueError(f"methods must be name or name:option=value,..., got {text!r}.")
        options = {option.strip(): value.strip() for option, _, value in pairs}
        return cls(text, name.strip(), options)


class Target(NamedTuple):
    """What K means for the hardness of negatives: Shi et al., WWW 2023, Theorem 3.

    N is 200, as in the paper's experiments on Gowalla, where at least one draw in 200 is to be
    kept; for a smaller β M is 1 and N is 1 / β, at most 1000: more draws cost more than they are
    worth here.
    """

    k: int
    num_negatives: float  # n₋, mean over the audited pairs
    beta: float  # K / n₋, at most 1/2
    num_drawn: int  # N of dns_mn and softmax_v
    num_kept: int  # M of dns_mn, so that M / N is near β
    rho: float  # -log β, but no more than the draws can tell apart
    specs: tuple[str, str]  # dns_mn and softmax_v with these options

    @classmethod
    def of(cls, k: int, num_negatives: float) -> Target:
        """That of a cut-off and n₋."""
        beta = min(k / num_negatives, 0.5)
        num_drawn = min(max(200, round(1 / beta)), 1000)
        num_kept = max(1, round(beta * 200))
        rho = min(-math.log(beta), math.log(num_drawn))
        specs = (
            f"dns_mn:num_kept={num_kept},num_negatives={num_drawn}",
            f"softmax_v:rho={rho:.2f},num_negatives={num_drawn}",
        )
        return cls(k, num_negatives, beta, num_drawn, num_kept, rho, specs)
