"""Settings of `twotower export`."""

from __future__ import annotations

import dataclasses

from pipeline.contract.settings import require, require_all
from serving.version.names import MAX_VERSION, check_name


@dataclasses.dataclass(frozen=True)
class VersionOptions:
    """What may be chosen about a model version when it is made."""

    name: str = "twotower"  # name of the model, one directory below MODELS
    k: int = 100  # K, results of a version, fixed at export
    version: int = 0  # number of the version; 0: the next free integer
    target_recall: float = 0.95  # promise: share of the exact top AT that ScaNN finds
    scann: bool = True  # also build a ScaNN index, where the package is installed
    scann_leaves: int = 0  # leaves of the ScaNN tree; 0: chosen from the size of the corpus
    seed: int = 10  # chooses the sample of queries that the indexes are measured with
    at: int = 0  # rank up to which the promise counts; 0: k
    title_column: str = ""  # attribute of items that query and the explorer show beside ids

    def __post_init__(self) -> None:
        check_name(self.name)
        require_all(self, "must be at least 1", "k")
        require_all(self, "must be at least 0", "version", "scann_leaves", "seed", "at")
        is_share = 0.0 < self.target_recall <= 1.0
        require(is_share, "target_recall", "must be above 0 and at most 1", self.target_recall)
        # Recall is promised of results that a version gives.
        require(self.at <= self.k, "at", f"must be at most k, {self.k}", self.at)
        rule = f"must be at most {MAX_VERSION}"
        require(self.version <= MAX_VERSION, "version", rule, self.version)


@dataclasses.dataclass(frozen=True)
class ExportConfig(VersionOptions):
    """Settings of one export: a trained run, or any bundle, becomes a model version."""

    data: str = ""  # directory of prepared data: those that the run was trained on, or later ones
    run: str = ""  # run directory, written by `twotower train`
    models: str = ""  # directory of all models; the version becomes MODELS/NAME/INTEGER
    bundle: str = ""  # instead of data and run: a finished bundle, of this trainer or another
    filter_columns: tuple[str, ...] = ()  # attributes of items that requests may filter by: a,b

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.models), "models", "must be a directory", self.models)
        if self.bundle and (self.data or self.run):
            raise ValueError("an export takes --bundle, or --data and --run, not both.")
        if self.bundle and self.filter_columns:
            raise ValueError("filter_columns needs --data and --run: a bundle has its attributes.")
        if not self.bundle:
            require(bool(self.data), "data", "must be a directory", self.data)
            require(bool(self.run), "run", "must be a directory", self.run)

    def version_options(self) -> VersionOptions:
        names = [field.name for field in dataclasses.fields(VersionOptions)]
        return VersionOptions(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class ItemsConfig:
    """Settings of one change of the candidates of a model."""

    models: str = ""  # directory of all models, as given to `twotower export`
    name: str = "twotower"  # name of the model, one directory below MODELS
    add: str = ""  # Parquet file of candidates to add or replace: their ids, and attributes by name
    remove: str = ""  # Parquet file with ids of candidates to remove
    id_column: str = "candidate_id"  # of raw ids in both files
    max_share: float = 0.05  # of the corpus that may lie beside it; above, it is built anew

    def __post_init__(self) -> None:
        require(bool(self.models), "models", "must be a directory", self.models)
        check_name(self.name)
        is_change = bool(self.add or self.remove)
        require(is_change, "add", "must be a file where --remove is not given", self.add)
        require_all(self, "must be at least 0", "max_share")
