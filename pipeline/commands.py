"""The commands on Beam: `twotower prepare` and `twotower frequencies`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.contract.flags import Command

if TYPE_CHECKING:
    from pipeline.counts.settings import FrequenciesConfig
    from pipeline.prepare.settings import PrepareConfig

COMMANDS = {
    "prepare": Command(
        "pipeline.prepare.settings:PrepareConfig",
        "pipeline.commands:prepare",
        "read raw interactions and write examples, vocabularies and counts (Beam)",
        on_beam=True,
        stores="output",
        flags="source output user_column item_column timestamp_column timestamp_format split "
        "item_features",
        groups={
            "the log": "rating_column rating_threshold weight_column duplicates delimiter "
            "max_bad_share allow_empty_files max_empty_days",
            "which rows are kept and how they are split": "min_user_interactions "
            "min_item_interactions test_from train_ratio validation_ratio seed",
            "attributes": "user_features user_features_id item_features_id user_feature_kinds "
            "item_feature_kinds feature_min_count feature_separator",
        },
    ),
    "frequencies": Command(
        "pipeline.counts.settings:FrequenciesConfig",
        "pipeline.commands:frequencies",
        "count items, or estimate their frequency from a stream, for log_q alone (Beam)",
        on_beam=True,
        stores="output",
        reads="previous",
        flags="source output item_column previous decay streaming timestamp_column "
        "timestamp_format",
        groups={
            "the log": "user_column rating_column rating_threshold weight_column delimiter "
            "max_bad_share allow_empty_files allow_repeated_files",
            "streaming": "batch_size step_seconds allowed_lateness_seconds max_ahead_seconds "
            "max_late_share num_buckets num_hashes alpha watch poll_seconds max_polls "
            "keep_snapshots unbounded snapshot_steps",
        },
    ),
}


def prepare(config: PrepareConfig, beam_arguments: list[str]) -> None:
    """Runs the preparation job and prints what it counted."""
    from pipeline import job

    counts = job.prepare(config, beam_arguments).counts
    width = max(map(len, counts))
    print("\n".join(f"{name:{width}}  {value}" for name, value in counts.items()))
    if not config.dry_run:
        print(f"prepared data: {config.output}")


def frequencies(config: FrequenciesConfig, beam_arguments: list[str]) -> None:
    """Counts the items of a log exactly, or estimates their frequency from it as a stream."""
    if config.streaming:
        from pipeline.streaming.job import estimate

        estimate(config, beam_arguments)
    else:
        from pipeline.counts.job import count

        count(config, beam_arguments)
