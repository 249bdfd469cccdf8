"""`twotower frequencies --streaming`: streaming frequencies of a log, or of one that goes on."""

import logging
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.options import beam_options
from pipeline.contract import schema
from pipeline.counts.settings import FrequenciesConfig
from pipeline.prepare.ingest import DEAD_LETTERS
from pipeline.read.consumed import check_not_repeated, input_files
from pipeline.read.discover import Piece, find_pieces, with_demo_columns
from pipeline.streaming.estimator import FEW
from pipeline.streaming.micro_batch import Input, describe, run_batch
from pipeline.streaming.snapshots import (
    Snapshot,
    keep_newest,
    only_writer,
    open_snapshot,
)

log = logging.getLogger(__name__)


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
      ValueError: what `find_pieces` and `run_batch` raise; the snapshot to go on from has other
        settings; a file was counted before or has changed since; there are snapshots already and
        nothing says what to do with them. The snapshots there are stay as they were.
    """
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    if config.watch:
        from pipeline.streaming.watch import watch

        with only_writer(config.output):
            return watch(config, options)
    pieces = find_pieces(config)
    with only_writer(config.output):
        previous = find_previous(config)
        inputs = describe(input_files(config))
        if previous and not config.allow_repeated_files:
            check_not_repeated({one.file: one.recorded() for one in inputs}, previous.consumed)
        return write_snapshot(pieces, inputs, previous, config, options).manifest


def find_previous(config: FrequenciesConfig) -> Snapshot | None:
    """The snapshot to go on from; None for a new stream.

    A watched stream goes on from the newest one in its own output, wherever it began.

    Raises:
      ValueError: there are snapshots and neither --previous nor --overwrite says what to do; or
        the snapshot is of a stream with other settings.
    """
    own = schema.snapshot_directories(config.output)
    if own and config.watch and not config.overwrite:
        return open_snapshot(config.output, config)
    snapshot = open_snapshot(config.previous, config) if config.previous else None
    is_own = snapshot is not None and snapshot.path.parent == Path(config.output).resolve()
    if own and not config.overwrite and not is_own:
        raise ValueError(
            f"{config.output} already holds snapshots: --previous {config.output} goes on from "
            "them, --overwrite begins a new stream."
        )
    return snapshot


def write_snapshot(
    pieces: list[Piece],
    inputs: list[Input],
    previous: Snapshot | None,
    config: FrequenciesConfig,
    options: PipelineOptions,
) -> Snapshot:
    """Runs one batch, says what came of it, and removes old snapshots."""
    snapshot = run_batch(pieces, inputs, previous, config, options)
    # Of a run that failed under this number; its rows were read again.
    snapshot.path.with_name(f"{snapshot.path.name}.{DEAD_LETTERS}").unlink(missing_ok=True)
    begun = previous is None or previous.path.parent != snapshot.path.parent
    keep_newest(config.output, 1 if begun and config.overwrite else config.keep_snapshots)
    counts, position = snapshot.manifest.counts, snapshot.position
    log.info(
        "frequencies: %d file(s), %s rows: %s; step %d, snapshot %s",
        len(inputs),
        f"{counts['read']:,}",
        ", ".join(f"{rows:,} {name}" for name, rows in counts.items() if name != "read"),
        position.step,
        snapshot.path,
    )
    few, touched = (snapshot.manifest.details["buckets"][name] for name in ("few", "touched"))
    log.log(
        logging.WARNING if 2 * few > touched else logging.INFO,
        "frequencies: %s of %s buckets were touched less than %d times: what they estimate may be "
        "off by a third or more",
        f"{few:,}",
        f"{touched:,}",
        FEW,
    )
    return snapshot
