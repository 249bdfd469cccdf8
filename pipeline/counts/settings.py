"""Settings of `twotower frequencies`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses

from pipeline.contract.files import is_remote
from pipeline.contract.settings import require_all
from pipeline.read.settings import SourceConfig


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
    poll_seconds: float = 30.0  # watch and unbounded: time between two looks
    max_polls: int = 0  # watch and unbounded: stop after so many looks; 0: never
    unbounded: bool = False  # streaming: follow the source on a runner for streams, such as Flink
    snapshot_steps: int = 60  # unbounded: steps from one snapshot to the next
    keep_snapshots: int = 10  # streaming: older ones are removed, but for their dead letters

    def __post_init__(self) -> None:
        super().__post_init__()
        least_1 = ("batch_size", "num_buckets", "num_hashes", "keep_snapshots", "snapshot_steps")
        require_all(self, "must be at least 1", *least_1)
        least_0 = ("step_seconds", "allowed_lateness_seconds", "max_ahead_seconds", "max_polls")
        require_all(self, "must be at least 0", *least_0)
        require_all(self, "must be in (0, 1]", "decay", "head_share", "alpha")
        require_all(self, "must be in [0, 1]", "max_late_share")
        require_all(self, "must be above 0", "poll_seconds")
        if self.streaming and not self.unbounded and is_remote(self.output):
            raise ValueError("output of --streaming must be a local path: copy what is finished.")
        if self.watch and not self.streaming:
            raise ValueError("--watch needs --streaming; exact counts go on with --previous.")
        if self.watch and not self.step_seconds:
            raise ValueError("--watch needs --step_seconds: files that come decide no order.")
        if self.unbounded and not (self.streaming and self.step_seconds):
            raise ValueError("--unbounded needs --streaming and --step_seconds, steps of time.")
        if self.unbounded and (self.watch or self.previous or self.overwrite):
            raise ValueError(
                "--unbounded does not go with --watch, --previous or --overwrite: it follows files "
                "from their beginning, into a directory of its own."
            )
        no_files = self.source == "demo" or self.source.startswith("tfds:")
        if (self.unbounded or self.watch) and no_files:
            raise ValueError("--watch and --unbounded need files; give --source a directory.")
        if self.allowed_lateness_seconds and not self.step_seconds:
            raise ValueError("--allowed_lateness_seconds needs --step_seconds, steps of time.")
        if self.decay < 1 and self.streaming:
            raise ValueError("--decay is for exact counts; --alpha forgets in a stream.")
        if self.decay < 1 and not self.previous:
            raise ValueError("--decay needs --previous, the counts that decay.")

    @property
    def needs_timestamps(self) -> bool:
        return self.step_seconds > 0
