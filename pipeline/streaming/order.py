"""Events of a log in the order of their time, without a worker that sees all of them.

The log is read once and staged in pieces of equal size, each in order. A few events of every piece
tell where to cut the time axis; each range between two cuts is put in order alone, and the sizes of
the ranges say which place in the whole log its first event has. Where the cuts lie decides how the
work is shared, not what comes out.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, read_all, read_json, write_block, write_json
from pipeline.read.discover import Piece
from pipeline.read.log import read_source
from pipeline.read.settings import SourceConfig

# s since 1970 (0 without a timestamp column), place in the source, fingerprint
EVENT = np.dtype([("timestamp", "<i8"), ("order", "<u8"), ("candidate", "<i8")])
SAMPLES = 256  # events of a staged file that help to find the cuts
CHUNK_EVENTS = 1 << 20  # events that travel at once


class Chunk(NamedTuple):
    """Events start ... stop - 1 of a staged file."""

    path: str
    start: int
    stop: int
    place: int  # of the first of them among all events of the run, where they are in order

    def load(self) -> np.ndarray:
        """The events, or what the file holds of them: [stop - start]."""
        return np.array(np.load(self.path, mmap_mode="r")[self.start : self.stop])


def chunks(paths: Iterable[str]) -> list[Chunk]:
    """Cuts staged files, one after the other."""
    cut, place = [], 0
    for path in paths:
        size = len(np.load(path, mmap_mode="r"))
        for start in range(0, size, CHUNK_EVENTS):
            cut.append(Chunk(path, start, min(start + CHUNK_EVENTS, size), place + start))
        place += size
    return cut


def stage_events(
    pieces: list[Piece], config: SourceConfig, options: PipelineOptions, staging: Staging
) -> list[str]:
    """Reads a log and stages its good rows; the files of EVENT [n].

    Rows are dealt out by their place in the source: by candidate, the one that has a tenth of
    all rows would be one worker's.
    """
    out = staging.stage("events")
    with running(options) as pipeline:
        read = read_source(pipeline, pieces, config, staging, key="order")
        finish(
            read.rows
            | "Events"
            >> beam.MapTuple(lambda part, rows: (part, rows[list(EVENT.names or ())].astype(EVENT)))
            | "GroupEvents" >> beam.GroupByKey()
            | "StageEvents" >> beam.MapTuple(partial(_stage_events, out=out))
        )
    return sorted(map(str, out.glob("*.npy")))


def event_times(staging: Staging) -> list[int]:
    """Event times that `stage_events` staged, the earliest and the latest among them."""
    staged = read_all(staging.stage("events"))
    return [times[name] for times in staged.values() for name in ("oldest", "newest")]


def order_events(
    paths: list[str], ranges: int, options: PipelineOptions, staging: Staging
) -> list[str]:
    """Staged events → files of fingerprints, int64 [n], that are in order one after the other.

    The order is that of time, then of the source.
    """
    staged, out = staging.stage("events"), staging.stage("ordered")
    samples = [read_json(staged, Path(path).stem)["sample"] for path in paths]
    cuts = find_cuts([tuple(event) for sample in samples for event in sample], ranges)
    with running(options) as pipeline:
        finish(
            spread(pipeline, "Staged", paths)
            | "Cut" >> beam.FlatMap(_cut, cuts)
            | "GroupRanges" >> beam.GroupByKey()
            | "StageOrdered" >> beam.MapTuple(partial(_stage_ordered, out=out))
        )
    return sorted(map(str, out.glob("*.npy")))


def find_cuts(sample: list[tuple[int, int, int]], ranges: int) -> list[tuple[int, int]]:
    """Where to cut events into at most so many ranges of about equal size.

    Args:
      sample: (timestamp, order, events that it stands for), in any order.
      ranges: their number.

    Returns:
      (timestamp, order) of the first event of each range but the first, ascending.
    """
    sample = sorted(sample)
    before = np.cumsum([0, *(weight for *_, weight in sample)])
    places = np.searchsorted(before, before[-1] * np.arange(1, ranges) / ranges)
    firsts = sorted({int(place) for place in places if 0 < place < len(sample)})
    return [sample[place][:2] for place in firsts]


def _in_order(blocks: Iterable[np.ndarray]) -> np.ndarray:
    events = np.concatenate(list(blocks))
    return events[np.lexsort((events["order"], events["timestamp"]))]


def _stage_events(part: int, blocks: Iterable[np.ndarray], out: Path) -> str:
    events, name = _in_order(blocks), f"{part:05d}"
    places = np.arange(0, len(events), -(-len(events) // SAMPLES))
    sizes = np.diff(np.append(places, len(events)))
    times, order = events["timestamp"], events["order"]
    columns = (times[places].tolist(), order[places].tolist(), sizes.tolist())
    sample = list(zip(*columns, strict=True))
    write_json(out, name, {"oldest": int(times[0]), "newest": int(times[-1]), "sample": sample})
    write_block(out, name, events)
    return name


def _cut(path: str, cuts: list[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
    """The part of a staged file that lies in each range: (range, EVENT [n])."""
    events = np.load(path, mmap_mode="r")
    places = [0]
    for timestamp, order in cuts:
        first, last = np.searchsorted(events["timestamp"], [timestamp, timestamp + 1])
        within = np.searchsorted(events["order"][first:last], np.uint64(order))
        places.append(int(first + within))
    places.append(len(events))
    for number, (start, stop) in enumerate(pairwise(places)):
        for first in range(start, stop, CHUNK_EVENTS):
            yield number, np.array(events[first : min(first + CHUNK_EVENTS, stop)])


def _stage_ordered(number: int, blocks: Iterable[np.ndarray], out: Path) -> str:
    return write_block(out, f"{number:05d}", _in_order(blocks)["candidate"])
