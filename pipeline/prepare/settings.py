"""Settings of the preparation job; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.contract import schema
from pipeline.contract.settings import require, require_all, utc_seconds
from pipeline.read.settings import SourceConfig

DUPLICATES = ("first", "sum", "max")
SPLIT_KINDS = ("random", "time", "global_time", "leave_last_out", "given")


@dataclasses.dataclass(frozen=True)
class PrepareConfig(SourceConfig):
    """Settings of one preparation: what is read, which rows are kept, how they are split."""

    # random, time (within each user), global_time (with --test_from), leave_last_out, or given
    split: str = "random"
    # date, or date with a time, in UTC: rows from then on are test, all earlier ones are train
    test_from: str = ""
    # weight of a repeated pair, whose earliest row stays: first (of that row), sum or max
    duplicates: str = "first"
    train_ratio: float = 0.8  # random, time: share of each user's rows for training, at least one
    validation_ratio: float = 0.0  # share of the training rows that becomes validation
    min_user_interactions: int = 1  # k-core: users with fewer rows are dropped, to a fixed point
    min_item_interactions: int = 1  # k-core: items with fewer rows are dropped, to a fixed point
    seed: int = 10  # of the random split and of the order of rows
    rows_per_shard: int = 262_144  # rows of an output shard, about
    user_features: str = ""  # attributes of users: Parquet or text file, directory or glob
    item_features: str = ""  # attributes of items, also of those without interactions
    user_features_id: str = ""  # column of the raw id in --user_features; as in the log when empty
    item_features_id: str = ""  # column of the raw id in --item_features; as in the log when empty
    user_feature_kinds: tuple[str, ...] = ()  # COLUMN=KIND, as --item_feature_kinds
    # COLUMN=KIND where the type of the column does not say it: categorical, multi, numeric, text,
    # or skip to leave the column out
    item_feature_kinds: tuple[str, ...] = ()
    feature_min_count: int = 1  # rarer values, among ids with train rows, count as unknown
    feature_separator: str = "|"  # between the values of a multi column that is text
    # more days without rows, between the first and the last, are an error; none: they are reported
    # only
    max_empty_days: int | None = None
    dry_run: bool = False  # read, count and report, but write nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.split in SPLIT_KINDS, "split", f"must be one of {SPLIT_KINDS}", self.split)
        if (self.split == "global_time") != bool(self.test_from):
            raise ValueError("split global_time and test_from need each other; give both.")
        if self.test_from:
            utc_seconds("test_from", self.test_from)
        rule = f"must be one of {DUPLICATES}"
        require(self.duplicates in DUPLICATES, "duplicates", rule, self.duplicates)
        if self.duplicates != "first" and not self.weight_column:
            raise ValueError("duplicates combines weights; it needs weight_column.")
        require_all(self, "must be in (0, 1]", "train_ratio")
        require_all(self, "must be in [0, 1)", "validation_ratio")
        least_1 = ("min_user_interactions", "min_item_interactions", "rows_per_shard")
        require_all(self, "must be at least 1", *least_1, "feature_min_count")
        require_all(self, "must be given", "feature_separator")
        if self.max_empty_days is not None:
            require_all(self, "must be at least 0", "max_empty_days")
        for side, word in (("query", "user"), ("candidate", "item")):
            self.kinds_of(side)
            for name in (f"{word}_features_id", f"{word}_feature_kinds"):
                if getattr(self, name) and not getattr(self, f"{word}_features"):
                    raise ValueError(f"{name} needs {word}_features, the table it speaks of.")

    @property
    def needs_timestamps(self) -> bool:
        return (
            self.split in ("time", "global_time", "leave_last_out")
            or self.max_empty_days is not None
        )

    @property
    def keeps_split(self) -> bool:
        return self.split == "given"

    def kinds_of(self, side: str) -> dict[str, str]:
        """Column → kind or `skip`, as the flag of a side says it."""
        flag = "user_feature_kinds" if side == "query" else "item_feature_kinds"
        kinds = {}
        for pair in getattr(self, flag):
            name, _, kind = pair.rpartition("=")
            rule = f"must be COLUMN=KIND with a kind of {(*schema.FEATURE_KINDS, 'skip')}"
            require(bool(name) and kind in (*schema.FEATURE_KINDS, "skip"), flag, rule, pair)
            kinds[name] = kind
        return kinds

    def recorded(self) -> dict[str, Any]:
        """What the manifest records: all that decides the content, nothing that does not."""
        fields = dataclasses.asdict(self)
        for name in (
            *("source", "output", "overwrite", "partitions", "dry_run"),
            *("allow_empty_files", "max_empty_days"),
        ):
            del fields[name]
        if not self.test_from:
            del fields["test_from"]
        if not self.user_features and not self.item_features:
            fields = {name: value for name, value in fields.items() if "feature" not in name}
        else:  # where they lie does not decide the content, as for the source
            del fields["user_features"], fields["item_features"]
        return fields | {"format_version": schema.FORMAT_VERSION}
