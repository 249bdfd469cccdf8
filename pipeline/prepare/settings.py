"""Settings of the preparation job; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.contract import schema

DUPLICATES = ("first", "sum", "max")
SPLIT_KINDS = ("random", "time", "leave_last_out", "given")
EPOCH_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # ticks in a second


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where raw interactions come from and which of their columns are read, for every job."""

    source: str = ""  # file, directory, glob, `tfds:NAME` or `demo`; see the README for formats
    output: str = ""  # directory to make; it appears when all of it is finished
    user_column: str = "user_id"  # column of the raw user id (the query)
    item_column: str = "item_id"  # column of the raw item id (the candidate)
    timestamp_column: str = "timestamp"  # column of the time; may be absent where none is needed
    timestamp_format: str = "s"  # s, ms, us or ns since 1970, or a strptime pattern
    rating_column: str = "rating"  # column of the rating, read where there is a threshold
    rating_threshold: float | None = None  # rows below it are no positives; none: all rows are
    weight_column: str = ""  # column of a weight per row for the loss; none when empty
    delimiter: str = ""  # of text files; by default , for .csv and a tab for .tsv and .inter
    max_bad_share: float = 0.01  # more bad rows than this share is an error
    allow_empty_files: bool = False  # a file of the source without rows is no error
    partitions: int = 16  # key ranges that travel alone; the result does not depend on it
    overwrite: bool = False  # replace what is in the output directory

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: a field breaks its rule; the message names rule, value and remedy.
        """
        for name in ("source", "output", *self.required_columns):
            _require(bool(getattr(self, name)), name, "must be given", getattr(self, name))
        _require(
            0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]", self.max_bad_share
        )
        _require(self.partitions >= 1, "partitions", "must be at least 1", self.partitions)
        _require(len(self.delimiter) <= 1, "delimiter", "must be one character", self.delimiter)
        _require(
            self.timestamp_format in EPOCH_UNITS or "%" in self.timestamp_format,
            "timestamp_format",
            f"must be one of {tuple(EPOCH_UNITS)} or a pattern such as %Y-%m-%d",
            self.timestamp_format,
        )

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The settings of columns that may not be empty."""
        return ("user_column", "item_column")

    @property
    def needs_timestamps(self) -> bool:
        """Whether the job cannot do without the time of a row."""
        return False

    @property
    def latest_time(self) -> int | None:
        """The latest time, in seconds since 1970, that a good row may have; none: any."""
        return None

    @property
    def keeps_split(self) -> bool:
        """Whether files named train, validation and test are kept apart."""
        return False


@dataclasses.dataclass(frozen=True)
class PrepareConfig(SourceConfig):
    """Settings of one preparation: what is read, which rows are kept, how they are split."""

    split: str = "random"  # random, time (within each user), leave_last_out or given
    # weight of a repeated pair, whose earliest row stays: first (of that row), sum or max
    duplicates: str = "first"
    train_ratio: float = 0.8  # share of each user's rows for training, at least one row
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
        _require(self.split in SPLIT_KINDS, "split", f"must be one of {SPLIT_KINDS}", self.split)
        rule = f"must be one of {DUPLICATES}"
        _require(self.duplicates in DUPLICATES, "duplicates", rule, self.duplicates)
        if self.duplicates != "first" and not self.weight_column:
            raise ValueError("--duplicates combines weights; it needs --weight_column.")
        _require(0 < self.train_ratio <= 1, "train_ratio", "must be in (0, 1]", self.train_ratio)
        _require(
            0 <= self.validation_ratio < 1,
            "validation_ratio",
            "must be in [0, 1)",
            self.validation_ratio,
        )
        least = ("min_user_interactions", "min_item_interactions", "rows_per_shard")
        for name in (*least, "feature_min_count"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        _require(bool(self.feature_separator), "feature_separator", "must be given", "")
        most = self.max_empty_days
        _require(most is None or most >= 0, "max_empty_days", "must be at least 0", most)
        for side, word in (("query", "user"), ("candidate", "item")):
            self.kinds_of(side)
            for name in (f"{word}_features_id", f"{word}_feature_kinds"):
                if getattr(self, name) and not getattr(self, f"{word}_features"):
                    raise ValueError(f"--{name} needs --{word}_features, the table it speaks of.")

    @property
    def needs_timestamps(self) -> bool:
        """Whether the split orders rows by time, or days are counted."""
        return self.split in ("time", "leave_last_out") or self.max_empty_days is not None

    @property
    def keeps_split(self) -> bool:
        """Whether the split is that of the source's files."""
        return self.split == "given"

    def kinds_of(self, side: str) -> dict[str, str]:
        """Column → kind or `skip`, as the flag of a side says it."""
        flag = "user_feature_kinds" if side == "query" else "item_feature_kinds"
        kinds = {}
        for pair in getattr(self, flag):
            name, _, kind = pair.rpartition("=")
            rule = f"must be COLUMN=KIND with a kind of {(*schema.FEATURE_KINDS, 'skip')}"
            _require(bool(name) and kind in (*schema.FEATURE_KINDS, "skip"), flag, rule, pair)
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
        if not self.user_features and not self.item_features:
            fields = {name: value for name, value in fields.items() if "feature" not in name}
        else:  # where they lie does not decide the content, as for the source
            del fields["user_features"], fields["item_features"]
        return fields | {"format_version": schema.FORMAT_VERSION}


@dataclasses.dataclass(frozen=True)
class FrequenciesConfig(SourceConfig):
    """Settings of one run of `twotower frequencies`: exact counts, or streaming estimates."""

    user_column: str = ""  # column of the raw user id; not needed to count items
    previous: str = ""  # output of an earlier run, or a snapshot, to go on from; none: nothing
    decay: float = 1.0  # counts of the earlier run are multiplied by it
    allow_repeated_files: bool = False  # a file with the content of an earlier one counts too
    head_share: float = 0.01  # share of the items that the summary calls the head
    streaming: bool = False  # estimate the steps between two occurrences (correct-sfx), no counts
    batch_size: int = 2048  # streaming: rows of a step, in the order of time, then of the source
    step_seconds: int = 0  # streaming: a step is so many seconds of event time, not rows
    allowed_lateness_seconds: int = 0  # streaming: how long rows may arrive after newer ones
    # streaming with steps of time: a row so much later than the clock of this run is a bad row
    max_ahead_seconds: int = 86_400
    max_late_share: float = 0.5  # streaming: more late rows than this share is an error
    num_buckets: int = 262_144  # streaming: of each hash array; twice the number of items or more
    num_hashes: int = 5  # streaming: hash arrays; the largest of their intervals counts
    # streaming: weight of the newest interval in the mean, in (0, 1]; it forgets within 1 / alpha
    # occurrences
    alpha: float = 0.01
    watch: bool = False  # streaming: look for new files of the source again and again
    poll_seconds: float = 30.0  # watch: time between two looks
    max_polls: int = 0  # watch: stop after so many looks; 0: never
    keep_snapshots: int = 10  # streaming: older ones are removed, but for their dead letters

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "num_buckets", "num_hashes", "keep_snapshots"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        least_0 = ("step_seconds", "allowed_lateness_seconds", "max_ahead_seconds", "max_polls")
        for name in least_0:
            _require(getattr(self, name) >= 0, name, "must be at least 0", getattr(self, name))
        for name in ("decay", "head_share", "alpha"):
            _require(0 < getattr(self, name) <= 1, name, "must be in (0, 1]", getattr(self, name))
        share = self.max_late_share
        _require(0 <= share <= 1, "max_late_share", "must be in [0, 1]", share)
        _require(self.poll_seconds > 0, "poll_seconds", "must be above 0", self.poll_seconds)
        if self.watch and not self.streaming:
            raise ValueError("--watch needs --streaming; exact counts go on with --previous.")
        if self.watch and not self.step_seconds:
            raise ValueError("--watch needs --step_seconds: files that come decide no order.")
        if self.allowed_lateness_seconds and not self.step_seconds:
            raise ValueError("--allowed_lateness_seconds needs --step_seconds, steps of time.")
        if self.decay < 1 and self.streaming:
            raise ValueError("--decay is for exact counts; --alpha forgets in a stream.")
        if self.decay < 1 and not self.previous:
            raise ValueError("--decay needs --previous, the counts that decay.")

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The settings of columns that may not be empty."""
        return ("item_column",)

    @property
    def needs_timestamps(self) -> bool:
        """Whether event time decides the step."""
        return self.step_seconds > 0


@dataclasses.dataclass(frozen=True)
class StartedConfig(FrequenciesConfig):
    """Settings of a run that has begun."""

    started: int = 0  # s since 1970, by the clock of the machine that starts the workers

    @property
    def latest_time(self) -> int | None:
        """So that one wrong time does not make all that comes after it late."""
        return self.started + self.max_ahead_seconds if self.step_seconds else None


def _require(holds: bool, name: str, rule: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {got!r}; change --{name}.")
