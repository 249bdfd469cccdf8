"""Settings of `twotower query`, and the choices that a request has, too."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from pipeline.contract.settings import require, require_all
from serving.version.names import check_name

INDEXES = ("default", "exact", "scann")
UNKNOWN_QUERIES = ("popular", "empty", "error")


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """Settings of one question to a model version."""

    models: str  # directory of all models, as given to `twotower export`
    query: tuple[str, ...] = ()  # raw ids of queries, as in the interaction log
    history: str = ""  # what the query chose until now, in place of what is stored: a,b,c
    set: list[str] = field(default_factory=list)  # attributes of the query now: NAME=VALUE ...
    where: tuple[str, ...] = ()  # attributes of results: kind=tea,milk price:min=1 price:max=2 ...
    k: int = 10  # results to show
    name: str = "twotower"  # name of the model, one directory below MODELS
    version: int = 0  # number of the version; 0: the newest
    index: str = "default"  # default (the faster one at the promised recall), exact or scann
    exclude_seen: bool = False  # leave out the candidates in the query's training history
    json: bool = False  # print JSON instead of a table

    def __post_init__(self) -> None:
        ids = (self.query,) if isinstance(self.query, str) else tuple(self.query)
        object.__setattr__(self, "query", tuple(filter(None, ids)))
        require(bool(self.models), "models", "must be a directory", self.models)
        check_name(self.name)
        require(self.index in INDEXES, "index", f"must be one of {', '.join(INDEXES)}", self.index)
        said = bool(self.query or self.history or self.set)
        rule = "must be raw ids, first of all or after --query, without --history and --set"
        require(said, "query", rule, self.query)
        alone = len(self.query) < 2 or not (self.history or self.set)
        require(alone, "query", "must be one raw id with --history or --set", self.query)
        for pair in self.set:
            require("=" in pair, "set", "must be NAME=VALUE", pair)
        require_all(self, "must be at least 1", "k")
        require_all(self, "must be at least 0", "version")
