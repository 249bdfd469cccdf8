"""`twotower frequencies --streaming`: streaming frequencies of a log, or of one that goes on."""

from pipeline.beam.options import beam_options
from pipeline.contract import schema
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.consumed import check_not_repeated, input_files
from pipeline.read.discover import find_pieces, with_demo_columns
from pipeline.streaming.micro_batch import write_snapshot
from pipeline.streaming.snapshots import describe, find_previous, only_writer
from pipeline.streaming.watch import watch


def estimate(
    config: FrequenciesConfig, beam_arguments: list[str] | None = None
) -> schema.Manifest | None:
    """Writes a snapshot of the streaming frequencies of a log, or one for each look at a directory.

    Args:
      config: what to do.
      beam_arguments: flags of Beam and its runner, such as `--direct_num_workers=2`.

    Returns:
      The manifest of the last snapshot; None when a watched directory never had a file.

    Raises:
      ValueError: what `find_pieces` and `write_snapshot` raise; the snapshot to go on from has
        other settings; a file was counted before or has changed since; there are snapshots already
        and nothing says what to do with them. The snapshots there are stay as they were.
    """
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    if config.watch:
        with only_writer(config.output):
            return watch(config, options)
    pieces = find_pieces(config)
    with only_writer(config.output):
        previous = find_previous(config)
        inputs = describe(input_files(config))
        if previous and not config.allow_repeated_files:
            check_not_repeated({file.path: file.recorded() for file in inputs}, previous.consumed)
        return write_snapshot(pieces, inputs, previous, config, options).manifest
