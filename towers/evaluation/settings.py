"""Settings of `twotower evaluate` and `compare`: fields are flags, their comments the help."""

from __future__ import annotations

import dataclasses

from pipeline.contract.settings import require, require_all
from towers.training.settings import parse_metric


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation of a trained run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run; metrics.json is written there
    ks: tuple[int, ...] = (10, 20, 50)  # K, cut-offs
    split: str = "test"  # test or validation
    # stale: queries as the preparation knew them; live: beside it, each row from all that the query
    # chose before it, which needs times
    history: str = "stale"
    title_column: str = ""  # of the items' table, for the report; none: title, if it is there

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(self.ks))
        require_all(self, "must be given", "data", "run")
        positive = bool(self.ks) and min(self.ks) >= 1
        require(positive, "ks", "must be one or more numbers >= 1", self.ks)
        known = self.split in ("test", "validation")
        require(known, "split", "must be test or validation", self.split)
        known = self.history in ("stale", "live")
        require(known, "history", "must be stale or live", self.history)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison of evaluated runs."""

    runs: tuple[str, ...] = ()  # two run directories or more; others are compared with the first
    metric: tuple[str, ...] = ()  # such as ndcg@50; none: ndcg and recall, as deep as can be
    output: str = ""  # file to write beside the table, .html or .json
    resamples: int = 10_000  # random assignments of signs that a p-value is estimated from
    seed: int = 10  # of these

    def __post_init__(self) -> None:
        for name in ("runs", "metric"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(len(self.runs) >= 2, "runs", "must be two or more directories", self.runs)
        for metric in self.metric:
            parse_metric(metric, "metric")
        known = not self.output or self.output.endswith((".html", ".json"))
        require(known, "output", "must end in .html or .json", self.output)
        require(self.resamples >= 100, "resamples", "must be at least 100", self.resamples)
        require_all(self, "must be at least 0", "seed")
