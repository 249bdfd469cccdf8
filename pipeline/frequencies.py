"""`twotower frequencies`: how often items occur, for those who only want `log_q`."""

from __future__ import annotations

from pipeline.counts.settings import FrequenciesConfig


def frequencies(config: FrequenciesConfig, beam_arguments: list[str] | None = None) -> None:
    """Counts the items of a log exactly, or estimates their frequency from it as a stream.

    Args:
      config: what to do.
      beam_arguments: flags of Beam and its runner, such as `--direct_num_workers=2`.

    Raises:
      ValueError: what the jobs raise.
    """
    if config.streaming:
        from pipeline.streaming.job import estimate

        estimate(config, beam_arguments)
    else:
        from pipeline.counts.job import count

        count(config, beam_arguments)
