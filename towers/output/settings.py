"""Settings of `twotower recommend`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
import os

from pipeline.contract.settings import require, require_all


@dataclasses.dataclass(frozen=True)
class RecommendConfig:
    """Settings of the top-k of all users, written to files."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run
    output: str = ""  # directory to write: Parquet files of query_id, candidate_ids and scores
    k: int = 100  # K, candidates for each user
    index: str = "exact"  # exact: all candidates are scored; scann: by the index of a version
    models: str = ""  # scann: directory of published versions of this run
    name: str = "twotower"  # scann: name of the model there; its newest version answers
    keep_seen: bool = False  # recommend also what a user chose in train or validation
    block_size: int = 256  # users that are ranked at a time
    shard_size: int = 100_000  # users of a file
    overwrite: bool = False  # replace what is in the output directory

    def __post_init__(self) -> None:
        require_all(self, "must be given", "data", "run", "output")
        require_all(self, "must be at least 1", "k", "block_size", "shard_size")
        require(self.index in ("exact", "scann"), "index", "must be exact or scann", self.index)
        needed = self.index == "exact" or bool(self.models)
        require(needed, "models", "must be given with --index scann", self.models)
        for name in ("data", "run", "models"):
            place = os.path.abspath(getattr(self, name) or self.data)
            output = os.path.abspath(self.output)
            apart = os.path.commonpath([place, output]) != output
            require(apart, "output", f"must not be or hold {name}", self.output)
