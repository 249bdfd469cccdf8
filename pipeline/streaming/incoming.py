"""Files that come, as an unbounded collection whose watermark follows the times of their rows.

A look lists the source; what is new is read file by file, one between two checkpoints. After the
last file of a look the watermark is the newest row time less the lateness, as in the micro-batch
job: rows of one look are never late among themselves. The state of the watch holds the files that
are there, so it ends with them.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from glob import has_magic
from typing import Any, NamedTuple, TextIO

import apache_beam as beam
import numpy as np
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Duration, Timestamp

from pipeline.contract.files import absolute, find_files, is_directory, stamp_of, write_text
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.discover import file_pieces
from pipeline.read.formats import is_readable
from pipeline.read.log import IN_THE_FUTURE, read_blocks
from pipeline.streaming.estimator import Block, distinct
from pipeline.streaming.steps import NEVER

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
    """How far a watch has come. Flink keeps that of every look to the end of the job: few bytes."""

    files: dict[bytes, bytes]  # names and stamps of those that were read and are still there
    waiting: tuple[str, ...] = ()  # found by the last look, not read yet
    looks: int = 0
    origin: int | None = None  # the period of step 1, once there is one
    newest: int | None = None  # latest event time that was read, seconds since 1970
    oldest: int = NEVER  # rows of earlier periods are late


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
        place, block = self._read(place) if place.waiting else (place, None)
        if not watch.try_claim(place):
            return
        if block and len(block.steps) and place.origin is not None:
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
        stamps = {path: _digest(stamp_of(path)) for path in map(absolute, complete_files(config))}
        there = {_digest(path): path for path in stamps}
        new = [path for name, path in there.items() if place.files.get(name) != stamps[path]]
        files = {name: stamp for name, stamp in place.files.items() if name in there}
        place = place._replace(files=files, looks=place.looks + 1)
        seconds, lateness = config.step_seconds, config.allowed_lateness_seconds
        if place.newest is not None:
            place = place._replace(oldest=(place.newest - lateness) // seconds)
        if new and place.origin is None:
            with open(os.devnull, "w+") as none:
                times = np.concatenate([self._rows(path, none)[1] for path in new])
            if len(times):
                first, last = (int(time) for time in (times.min(), times.max()))
                if first // seconds > (last - lateness) // seconds and (
                    place.looks != config.max_polls
                ):
                    return place
                place = place._replace(origin=first // seconds)
        return place._replace(waiting=tuple(new))

    def _read(self, place: Place) -> tuple[Place, Block | None]:
        """The next file, and the place behind it."""
        path = place.waiting[0]
        name, stamp = _digest(path), stamp_of(path)
        changed = "has changed since it was read" if name in place.files else ""
        place = place._replace(waiting=place.waiting[1:])
        if not stamp:  # removed since the look
            return place, None
        place = place._replace(files={**place.files, name: _digest(stamp)})
        with tempfile.TemporaryFile("w+", encoding="utf-8") as letters:  # most rows may be bad
            prints, times, bad, problem = self._rows(path, letters)
            problem = changed or problem
            if stamp_of(path) != stamp:  # an error where the store does not answer
                problem = "has changed while it was read"
            letters.seek(0)
            text = "" if problem else letters.read()
        if problem:
            log.warning("frequencies: %s is set aside: %s", path, problem)
            text = json.dumps({"source": path, "set_aside": problem}) + "\n"
            prints, times, bad = prints[:0], times[:0], Counter()
        if text:
            write_text(f"{self._config.output}/dead_letters/{name.hex()}.jsonl", text)
        periods = times // self._config.step_seconds
        origin = min(periods, default=0) if place.origin is None else place.origin
        steps = periods - int(origin) + 1
        keep = steps >= max(1, place.oldest - int(origin) + 1)
        counts = {**bad, "rows": int(keep.sum()), "late_rows": int((~keep).sum())}
        counts["files_set_aside"] = bool(problem)
        for counter, number in counts.items():
            Metrics.counter(METRICS, counter).inc(number)
        if not len(times):
            return place, None
        block = Block(steps[keep], prints[keep], np.ones(int(keep.sum()), np.int64))
        newest = max(int(times.max()), place.newest if place.newest is not None else NEVER)
        return place._replace(newest=newest, origin=int(origin)), distinct(block)

    def _rows(self, path: str, letters: TextIO) -> tuple[Any, Any, Counter[str], str]:
        """Fingerprints and times of the good rows of a file, int64 [n] each; writes the others.

        And the numbers of these; and the problem, with no rows, of a file that cannot be read or
        has too many bad rows.
        """
        config, latest = self._config, int(time.time()) + self._config.max_ahead_seconds
        rows, bad, num_read = [np.zeros((0, 2), np.int64)], Counter[str](), 0
        try:
            for piece in file_pieces(path, 0, config, 0, {}):
                for block, found, number in read_blocks(piece, config, latest):
                    columns = [block.rows["candidate"], block.rows["timestamp"]]
                    rows.append(np.stack(columns, axis=1))
                    future = sum(letter.reason.endswith(IN_THE_FUTURE) for letter in found)
                    bad.update(future_rows=future, bad_rows=len(found) - future)
                    letters.writelines(letter.as_json() + "\n" for letter in found)
                    num_read += number
            if bad.total() > config.max_bad_share * num_read:
                letters.seek(0)
                first = letters.readline().strip()
                raise ValueError(
                    f"{bad.total()} of {num_read} rows of {path} are bad, more than "
                    f"--max_bad_share {config.max_bad_share:g}; the first is {first}"
                )
        except ValueError as error:
            return *np.zeros((2, 0), np.int64), Counter(), str(error)
        return *np.concatenate(rows).T, bad, ""


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
