"""Settings of `twotower recommend`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
import os

from pipeline.contract.files import is_remote
from pipeline.contract.settings import require, require_all


@dataclasses.dataclass(frozen=True)
class RecommendConfig:
    """Settings of the top-k of all users, written to files."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run
    output: str = ""  # directory to write: Parquet files of query_id, candidate_ids and scores
    k: int = 100  # K, candidates for each user
    index: str = "exact"  # exact: all candidates are scored; scann: by the index of a version
    queries: str = ""  # in place of all users, a Parquet file: query_id, history, columns, as now
    where: tuple[str, ...] = ()  # attributes of results: kind=tea,milk price:min=1 price:max=2 ...
    models: str = ""  # scann, queries, where: directory of published versions, of this run
    name: str = "twotower"  # name of the model there; its newest version answers
    keep_seen: bool = False  # recommend also what a user chose in train or validation
    block_size: int = 256  # users that are ranked at a time
    shard_size: int = 100_000  # users of a file
    overwrite: bool = False  # replace what is in the output directory

    def __post_init__(self) -> None:
        require_all(self, "must be given", *(() if self.queries else ("data", "run")), "output")
        require_all(self, "must be at least 1", "k", "block_size", "shard_size")
        require(self.index in ("exact", "scann"), "index", "must be exact or scann", self.index)
        rule = "must be given with --index scann, --queries and --where"
        require(bool(self.models) or not self.asks_version, "models", rule, self.models)
        for name in ("data", "run", "models", "queries"):
            output = os.path.abspath(self.output)
            place = os.path.abspath(getattr(self, name) or os.curdir)
            apart = is_remote(self.output) or os.path.commonpath([place, output]) != output
            require(apart, "output", f"must not be or hold {name}", self.output)

    @property
    def asks_version(self) -> bool:
        """Whether a published version answers, in place of the run alone."""
        return bool(self.index == "scann" or self.queries or self.where)
