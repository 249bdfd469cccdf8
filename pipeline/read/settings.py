"""Settings of the source, which every job has; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pipeline.contract.settings import require, require_all

ISO_8601 = "iso"
EPOCH_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # ticks in a second


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where raw interactions come from and which of their columns are read, for every job."""

    source: str = ""  # file, directory, glob (also s3://…), `tfds:NAME` or `demo`: docs/prepare.md
    output: str = ""  # directory to make; it appears when all of it is finished
    user_column: str = "user_id"  # column of the raw user id (the query)
    item_column: str = "item_id"  # column of the raw item id (the candidate)
    timestamp_column: str = "timestamp"  # column of the time; may be absent where none is needed
    # s, ms, us or ns since 1970; iso, such as 2026-11-28T10:00:00.5+01:00; or a strptime pattern
    timestamp_format: str = "s"
    rating_column: str = "rating"  # column of the rating, read where there is a threshold
    rating_threshold: float | None = None  # rows below it are no positives; none: all rows are
    weight_column: str = ""  # column of a weight per row for the loss; none when empty
    delimiter: str = ""  # of text files; by default , for .csv and a tab for .tsv and .inter
    max_bad_share: float = 0.01  # more bad rows than this share is an error
    allow_empty_files: bool = False  # a file of the source without rows is no error
    # ranges of ids, each held by one worker at a time; 0: 16, or one for 64 MiB of the source; the
    # result does not depend on it
    partitions: int = 0
    overwrite: bool = False  # replace what is in the output directory
    # no flag: endings of files in a directory that are no part of this source
    foreign_endings: ClassVar[tuple[str, ...]] = (".user", ".item")

    def __post_init__(self) -> None:
        columns = (name for name in ("user_column", "item_column") if getattr(type(self), name))
        require_all(self, "must be given", "source", "output", *columns)  # no default, not required
        require_all(self, "must be in [0, 1]", "max_bad_share")
        require_all(self, "must be at least 0", "partitions")
        require(len(self.delimiter) <= 1, "delimiter", "must be one character", self.delimiter)
        require(
            self.timestamp_format in (*EPOCH_UNITS, ISO_8601) or "%" in self.timestamp_format,
            "timestamp_format",
            f"must be one of {(*EPOCH_UNITS, ISO_8601)} or a pattern such as %Y-%m-%d",
            self.timestamp_format,
        )

    @property
    def needs_timestamps(self) -> bool:
        """Whether the job cannot do without the time of a row."""
        return False

    @property
    def keeps_split(self) -> bool:
        """Whether files named train, validation and test are kept apart."""
        return False
