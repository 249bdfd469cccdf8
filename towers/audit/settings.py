"""Settings of `twotower audit`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses

from pipeline.contract.settings import require


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Settings of the audit of samplers on a trained run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run, whose embeddings stay as they are
    output: str = ""  # directory for audit.json, audit.md and audit.png; none: RUN/audit
    # what to audit, as name or name:option=value,...; none: all, and dns_mn and softmax_v with
    # options for k
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
        for name in ("data", "run"):
            require(bool(getattr(self, name)), name, "must be given", getattr(self, name))
        for name in ("k", "pairs", "warm_up", "timed_steps"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("batches", "draws"):  # an error needs two of each
            require(getattr(self, name) >= 2, name, "must be at least 2", getattr(self, name))
        size = self.batch_size
        require(size == 0 or size >= 2, "batch_size", "must be 0 or at least 2", size)
        require(self.seed >= 0, "seed", "must be at least 0", self.seed)
        require(self.max_seconds > 0, "max_seconds", "must be above 0", self.max_seconds)
