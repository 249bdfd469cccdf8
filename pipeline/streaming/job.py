"""`twotower frequencies --streaming`: streaming frequencies of a log, or of one that goes on.

Each look at a watched source runs a bounded job over its new files and commits a snapshot.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count

import apache_beam as beam
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipeline.beam.options import beam_options, finish, running
from pipeline.contract import schema
from pipeline.contract.files import absolute, checksum, stamp_of
from pipeline.contract.stores import local_copy
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.consumed import check_not_repeated, input_files, with_partitions
from pipeline.read.discover import Piece, file_pieces, find_pieces, with_demo_columns
from pipeline.streaming.estimator import estimator_of
from pipeline.streaming.incoming import METRICS, ReadIncoming, complete_files
from pipeline.streaming.micro_batch import write_snapshot
from pipeline.streaming.snapshots import (
    Input,
    Snapshot,
    describe,
    find_previous,
    newest_snapshot,
    only_writer,
)
from pipeline.streaming.unbounded import EstimateStream, write_snapshots

log = logging.getLogger(__name__)
_NAP = 0.2  # seconds between two looks for a signal
# By default Beam's runner on Flink keeps back what a bundle gives at a checkpoint, but not the
# watermark behind it: the rows come late, and a window is dropped or applied without them.
_FINISHES = "--finish_bundle_before_checkpointing"


def estimate(
    config: FrequenciesConfig, beam_arguments: list[str] | None = None
) -> schema.Manifest | None:
    """Writes a snapshot of the streaming frequencies of a log, or one for each look at a directory.

    Returns the manifest of the last one; None when a watched directory never had a file.
    `beam_arguments` are flags of Beam and its runner, such as `--direct_num_workers=2`.

    Raises:
      ValueError: what `find_pieces` and `write_snapshot` raise; the snapshot to go on from has
        other settings; a file was counted before or has changed since; there are snapshots already
        and nothing says what to do with them. The snapshots there are stay as they were.
    """
    config = with_partitions(config, {})  # what a range holds is bounded by the buckets
    if config.unbounded:
        return follow(config, beam_arguments or [])
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    pieces = [] if config.watch else find_pieces(config)
    with only_writer(config.output):
        previous = find_previous(config)
        if config.watch:
            last = watch(config, previous, options)
            return last.manifest if last else None
        inputs = describe(input_files(config))
        if previous and not config.allow_repeated_files:
            check_not_repeated({file.path: file.recorded() for file in inputs}, previous.consumed)
        return write_snapshot(pieces, inputs, previous, config, options).manifest


def follow(config: FrequenciesConfig, arguments: list[str]) -> schema.Manifest | None:
    """Writes a snapshot at the end of every window, until there were `max_polls` looks.

    With Flink's `--savepoint_path` among the arguments, it goes on from a savepoint or checkpoint.
    Returns the manifest of the last snapshot; None when no row came.

    Raises:
      ValueError: the source does not exist, there are snapshots already, or the runner is for
        bounded collections and the stream never ends.
    """
    complete_files(config)
    options = beam_options(arguments, vars(config))
    if options.view_as(StandardOptions).runner != "FnApiRunner":
        behind = () if "--" in arguments else ("--",)
        options = beam_options([*arguments, *behind, _FINISHES], vars(config))
    elif not config.max_polls:
        raise ValueError(
            "--unbounded needs a runner for streams, such as Flink's (docs/beam.md): Beam's "
            "FnApiRunner gives snapshots only when a stream ends, as with --max_polls."
        )
    options.view_as(StandardOptions).streaming = True
    goes_on = any(flag.startswith("--savepoint_path") for flag in arguments)
    estimator = estimator_of(config)
    with only_writer(config.output):
        if newest_snapshot(config.output) and not goes_on:
            raise ValueError(
                f"{config.output} already holds snapshots: go on from a savepoint of Flink by "
                "`-- --savepoint_path=…`, or begin in a directory of its own."
            )
        try:
            with running(options) as pipeline:
                blocks = pipeline | beam.Impulse() | "Incoming" >> beam.ParDo(ReadIncoming(config))
                stream = EstimateStream(estimator, config.step_seconds, config.snapshot_steps)
                finish(write_snapshots(blocks | stream, estimator, config))
            counters = pipeline.result.metrics().query(MetricsFilter().with_namespace(METRICS))
            counts = {counter.key.metric.name: counter.result for counter in counters["counters"]}
            log.info("frequencies: the stream has ended: %s", dict(sorted(counts.items())))
        except RuntimeError as error:  # Beam's only word for it
            if "JobCancellationException" not in str(error):
                raise
            log.info("frequencies: the stream was cancelled")
        last = newest_snapshot(config.output)
        return schema.read_snapshot(local_copy(last)) if last else None


def watch(
    config: FrequenciesConfig, snapshot: Snapshot | None, options: PipelineOptions
) -> Snapshot | None:
    """Looks for new files again and again, until there were `max_polls` looks or a signal.

    SIGINT and SIGTERM end it between two jobs; a second one at once. Whenever it ends, the next
    one goes on from the last snapshot, which is what it returns.

    Raises:
      ValueError: a file is wrong. The last snapshot stays as it was, so that a new watch reads
        the files of this look again.
    """
    watcher = Watcher(config)
    with _signals() as signals:
        for look in count(1):
            files = watcher.new_files(snapshot)
            log.info("frequencies: look %d: %d new file(s) in %s", look, len(files), config.source)
            if files:
                snapshot = write_snapshot(watcher.pieces(files), files, snapshot, config, options)
            if not signals and look != config.max_polls:
                _sleep(config.poll_seconds, signals)
            if signals or look == config.max_polls:
                break
    return snapshot


class Watcher:
    """Looks for files that are not in the snapshot to go on from."""

    def __init__(self, config: FrequenciesConfig) -> None:
        self._config = config
        self._compared: dict[str, tuple[int, ...]] = {}  # files that need no look until they change
        self._types: dict[str, tuple[str, str]] = {}  # column → its kind, and the file that says so

    def new_files(self, snapshot: Snapshot | None) -> list[Input]:
        """The complete files that are not in the snapshot, in the order of their names.

        A file with the content of one that was read before is left out, and said so once.

        Raises:
          ValueError: a file that was read before has another content now.
        """
        consumed = snapshot.consumed if snapshot else []
        read = {file["file"]: file for file in consumed}
        unknown = []
        for path in map(absolute, complete_files(self._config)):
            stamp = stamp_of(path)
            if not stamp or self._compared.get(path) == stamp:
                continue
            if path not in read:
                unknown.append(path)
                continue
            if stamp[0] != read[path]["bytes"] or checksum(path) != read[path]["checksum"]:
                raise ValueError(
                    f"{path} has changed since it was read: its old rows are in the snapshot; "
                    "write new rows to a new file, or begin a new stream with --overwrite."
                )
            self._compared[path] = stamp
        files = describe(unknown)
        if self._config.allow_repeated_files:
            return files
        known = {file["checksum"]: file["file"] for file in consumed}
        new = []
        for file in files:
            where = known.setdefault(file.checksum, file.path)
            if where == file.path:
                new.append(file)
                continue
            self._compared[file.path] = file.stamp
            log.warning(
                "frequencies: %s is left out: its content is that of %s; "
                "--allow_repeated_files counts it all the same.",
                file.path,
                where,
            )
        return new

    def pieces(self, files: list[Input]) -> list[Piece]:
        """What there is to read in new files; ValueError as of `file_pieces`, or all are empty."""
        pieces: list[Piece] = []
        for file in files:
            pieces += file_pieces(file.path, 0, self._config, len(pieces), self._types)
        if not pieces and not self._config.allow_empty_files:
            raise ValueError(f"{files[0].path} holds no rows; --allow_empty_files goes on without.")
        return pieces


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask for the end are collected in a list; the second one interrupts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread hears signals
        return

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.info("frequencies: ends when no job is under way; once more ends at once")

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sleep(seconds: float, signals: list[int]) -> None:
    end = time.monotonic() + seconds
    while not signals and time.monotonic() < end:
        time.sleep(min(_NAP, max(0.0, end - time.monotonic())))
