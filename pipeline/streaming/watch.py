"""Watching a source: each look runs a bounded job over the new files and commits a snapshot."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from glob import escape, glob
from itertools import count

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.contract import schema
from pipeline.contract.files import checksum
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.discover import Piece, file_pieces, is_readable
from pipeline.streaming.micro_batch import write_snapshot
from pipeline.streaming.snapshots import Input, Snapshot, describe, find_previous, stamp_of

log = logging.getLogger(__name__)
_NAP = 0.2  # seconds between two looks for a signal


class Watcher:
    """Looks for files that are not in the snapshot to go on from."""

    def __init__(self, config: FrequenciesConfig, snapshot: Snapshot | None) -> None:
        self.snapshot = snapshot
        self._config = config
        self._compared: dict[str, tuple[int, ...]] = {}  # files that need no look until they change
        self._types: dict[str, tuple[str, str]] = {}  # column → its kind, and the file that says so

    def new_files(self) -> list[Input]:
        """The complete files that are not in the snapshot, in the order of their names.

        A file with the content of one that was read before is left out, and said so once.

        Raises:
          ValueError: a file that was read before has another content now.
        """
        consumed = self.snapshot.consumed if self.snapshot else []
        read = {file["file"]: file for file in consumed}
        unknown = []
        for path in map(os.path.abspath, complete_files(self._config)):
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
            if known.setdefault(file.checksum, file.path) == file.path:
                new.append(file)
                continue
            self._compared[file.path] = file.stamp
            log.warning(
                "frequencies: %s is left out: its content is that of %s; "
                "--allow_repeated_files counts it all the same.",
                file.path,
                known[file.checksum],
            )
        return new

    def pieces(self, files: list[Input]) -> list[Piece]:
        """What there is to read in new files.

        Raises:
          ValueError: a file cannot be read, lacks a column, or has one of another kind than the
            files before it.
        """
        pieces: list[Piece] = []
        for file in files:
            pieces += file_pieces(file.path, 0, self._config, len(pieces), self._types)
        if not pieces and not self._config.allow_empty_files:
            raise ValueError(f"{files[0].path} holds no rows; --allow_empty_files goes on without.")
        return pieces


def watch(config: FrequenciesConfig, options: PipelineOptions) -> schema.Manifest | None:
    """Looks for new files again and again, until there were `max_polls` looks or a signal.

    SIGINT and SIGTERM end it between two jobs; a second one at once. Whenever it ends, the next
    one goes on from the last snapshot.

    Returns:
      The manifest of the last snapshot; None without one.

    Raises:
      ValueError: a file is wrong. The last snapshot stays as it was, so that a new watch reads
        the files of this look again.
    """
    watcher = Watcher(config, find_previous(config))
    if config.source.startswith("tfds:"):
        raise ValueError("--watch needs files, got a TFDS name; give --source a directory.")
    with _signals() as signals:
        for poll in count(1):
            files = watcher.new_files()
            log.info("frequencies: look %d: %d new file(s) in %s", poll, len(files), config.source)
            if files:
                pieces = watcher.pieces(files)
                watcher.snapshot = write_snapshot(pieces, files, watcher.snapshot, config, options)
            if not signals and poll != config.max_polls:
                _sleep(config.poll_seconds, signals)
            if signals or poll == config.max_polls:
                break
    return watcher.snapshot.manifest if watcher.snapshot else None


def complete_files(config: FrequenciesConfig) -> list[str]:
    """The readable files of a source, in order; none that is hidden or has an unknown ending.

    Raises:
      ValueError: the source is no pattern, and nothing is there.
    """
    source = config.source
    if not os.path.exists(source) and source == escape(source):
        raise ValueError(f"{source} does not exist; check --source.")
    pattern = os.path.join(escape(source), "*") if os.path.isdir(source) else source
    return [path for path in sorted(glob(pattern)) if is_readable(path)]


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
