"""Files that come, as an unbounded collection whose watermark follows the times of their rows.

A look lists the source; what is new is read file by file, one between two checkpoints. After the
last file of a look the watermark is the newest row time less the lateness, as in the micro-batch
job: rows of one look are never late among themselves. The state of the watch holds the files that
are there, so it ends with them.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Duration, Timestamp

from pipeline.contract.files import absolute, find_files, is_directory, stamp_of, write_atomically
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.discover import file_pieces
from pipeline.read.formats import is_readable
from pipeline.read.log import IN_THE_FUTURE, read_blocks
from pipeline.read.readers import DeadLetter
from pipeline.streaming.estimator import Block, distinct

log = logging.getLogger(__name__)
METRICS = "stream"  # rows, late_rows, future_rows, bad_rows and files_set_aside are counted there


def complete_files(config: FrequenciesConfig) -> list[str]:
    """The readable files of a source, in order, but hidden ones; ValueError: nothing is there."""
    source = config.source
    files = find_files(source)
    if not files and not has_magic(source) and not is_directory(source):
        raise ValueError(f"{source} does not exist; check --source.")
    return [
        path for path in files if is_readable(path) and not path.rpartition("/")[2].startswith(".")
    ]


class Place(NamedTuple):
    """How far a watch has come; Beam keeps it in its checkpoints."""

    files: dict[str, tuple[Any, ...]]  # stamps of those that were read and are still there
    waiting: tuple[str, ...] = ()  # found by the last look, not read yet
    looks: int = 0
    origin: int | None = None  # the period of step 1, once there is one
    newest: int | None = None  # latest event time that was read, seconds since 1970
    oldest: int = -(2**62)  # rows of earlier periods are late


class _Tracker(RestrictionTracker):
    """A claim is the place behind what is claimed; what remains always begins at the last one."""

    def __init__(self, place: Place) -> None:
        self._place, self._stopped = place, False

    def current_restriction(self) -> Place:
        return self._place

    def current_progress(self) -> RestrictionProgress:
        return RestrictionProgress(fraction=0.0)

    def try_claim(self, place: Place) -> bool:
        if not self._stopped:
            self._place = place
        return not self._stopped

    def try_split(self, fraction: float) -> tuple[Place, Place] | None:
        if fraction or self._stopped:
            return None
        self._stopped = True
        return self._place, self._place

    def check_done(self) -> None:
        """A watch may end after any file."""

    def is_bounded(self) -> bool:
        return False


class _Watch(beam.RestrictionProvider):
    def initial_restriction(self, element: Any) -> Place:
        return Place({})

    def create_tracker(self, restriction: Place) -> _Tracker:
        return _Tracker(restriction)

    def restriction_size(self, element: Any, restriction: Place) -> int:
        return 1


_WATCH = beam.DoFn.RestrictionParam(_Watch())
_WATERMARK = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())


class ReadIncoming(beam.DoFn):
    """An impulse → (origin, Block) of each file that comes, until there were `max_polls` looks.

    The first step is that of the earliest row there when the watermark first reaches it: until then
    nothing is read. A file that cannot be read, has too many bad rows, or has changed is set aside:
    `dead_letters/` in the output says so, and holds the bad rows of the others.
    """

    def __init__(self, config: FrequenciesConfig) -> None:
        self._config = config

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        _: Any,
        watch: Any = _WATCH,
        watermark: Any = _WATERMARK,
    ) -> Iterator[Any]:
        config, place = self._config, watch.current_restriction()
        if watermark.current_watermark() is None:
            watermark.set_watermark(MIN_TIMESTAMP)  # Flink takes none at all for the end of time
        place = place if place.waiting else self._look(place)
        block = None
        if place.waiting:
            place, block = self._read(place)
        if not watch.try_claim(place):
            return
        if block and len(block.steps):
            begins = (int(block.steps.min()) + place.origin - 1) * config.step_seconds
            yield TimestampedValue((place.origin, block), begins)
        if not place.waiting:
            if place.newest is not None:
                complete = Timestamp(place.newest - config.allowed_lateness_seconds)
                watermark.set_watermark(complete)
            if place.looks == config.max_polls:
                return
        watch.defer_remainder(Duration(0 if place.waiting else config.poll_seconds))

    def _look(self, place: Place) -> Place:
        config = self._config
        stamps = {path: stamp_of(path) for path in map(absolute, complete_files(config))}
        new = [path for path, stamp in stamps.items() if stamp and place.files.get(path) != stamp]
        files = {path: stamp for path, stamp in place.files.items() if path in stamps}
        place = place._replace(files=files, looks=place.looks + 1)
        seconds, lateness = config.step_seconds, config.allowed_lateness_seconds
        if place.newest is not None:
            place = place._replace(oldest=(place.newest - lateness) // seconds)
        if new and place.origin is None:
            times = [time for path in new for time in self._span(path)]
            reached = times and min(times) // seconds <= (max(times) - lateness) // seconds
            if reached or (times and place.looks == config.max_polls):
                place = place._replace(origin=min(times) // seconds)
            elif times:
                return place
        return place._replace(waiting=tuple(new))

    def _span(self, path: str) -> list[int]:
        """The earliest and the latest time of a file, none where it is to be set aside."""
        try:
            times = self._rows(path)[1]
        except ValueError:
            return []
        return [int(times.min()), int(times.max())] if len(times) else []

    def _read(self, place: Place) -> tuple[Place, Block | None]:
        """The next file, and the place behind it."""
        path, stamp = place.waiting[0], stamp_of(place.waiting[0])
        problem = "has changed since it was read" if path in place.files else ""
        place = place._replace(
            waiting=place.waiting[1:], files={**place.files, path: stamp} if stamp else place.files
        )
        if not stamp:  # removed since the look
            return place, None
        prints = times = np.zeros(0, np.int64)
        letters: list[DeadLetter] = []
        try:
            if not problem:
                prints, times, letters = self._rows(path)
        except ValueError as error:
            problem = str(error)
        if stamp_of(path) != stamp:  # an error where the store does not answer
            problem = "has changed while it was read"
        lines = [letter.as_json() for letter in letters]
        if problem:
            log.warning("frequencies: %s is set aside: %s", path, problem)
            _count("files_set_aside", 1)
            lines = [json.dumps({"source": path, "set_aside": problem})]
            prints = times = np.zeros(0, np.int64)
        if lines:
            name = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
            written = Path(self._config.output, "dead_letters", f"{name}.jsonl")
            written.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(written, "".join(line + "\n" for line in lines))
        if place.origin is None or not len(times):
            return place, None
        newest = int(times.max()) if place.newest is None else max(place.newest, int(times.max()))
        steps = times // self._config.step_seconds - place.origin + 1
        keep = steps >= max(1, place.oldest - place.origin + 1)
        _count("rows", int(keep.sum()))
        _count("late_rows", int((~keep).sum()))
        future = sum(letter.reason.endswith(IN_THE_FUTURE) for letter in letters)
        _count("future_rows", future)
        _count("bad_rows", len(letters) - future)
        block = Block(steps[keep], prints[keep], np.ones(int(keep.sum()), np.int64))
        return place._replace(newest=newest), distinct(block)

    def _rows(self, path: str) -> tuple[np.ndarray, np.ndarray, list[DeadLetter]]:
        """Fingerprints and times of the good rows of a file, int64 [n] each, and dead letters.

        Raises:
          ValueError: the file cannot be read, or has too many bad rows.
        """
        config, latest = self._config, int(time.time()) + self._config.max_ahead_seconds
        rows, letters, num_read = [np.zeros((0, 2), np.int64)], [], 0
        for piece in file_pieces(path, 0, config, 0, {}):
            for block, bad, number in read_blocks(piece, config, latest):
                rows.append(np.stack([block.rows["candidate"], block.rows["timestamp"]], axis=1))
                letters += bad
                num_read += number
        if len(letters) > config.max_bad_share * num_read:
            raise ValueError(
                f"{len(letters)} of {num_read} rows of {path} are bad, more than --max_bad_share "
                f"{config.max_bad_share:g}; the first is {letters[0].as_json()}"
            )
        prints, times = np.concatenate(rows).T
        return prints, times, letters


def _count(name: str, number: int) -> None:
    Metrics.counter(METRICS, name).inc(number)
