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
    ),
    "frequencies": Command(
        "pipeline.counts.settings:FrequenciesConfig",
        "pipeline.commands:frequencies",
        "count items, or estimate their frequency from a stream, for log_q alone (Beam)",
        on_beam=True,
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
