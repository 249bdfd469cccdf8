"""Events of a log in order, and what becomes of them: applied in a step, pending, or too late.

No worker sees all of them. The log is read once and staged in pieces of equal size, each in order.
A few events of every piece tell where to cut the time axis; each range between two cuts is put in
order alone, and the sizes of the ranges say which place in the whole log its first event has. Where
the cuts lie decides how the work is shared, not what comes out.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from pipeline.beam.blocks import partition
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, load_array, read_all, read_json, write_block, write_json
from pipeline.prepare.shards import shard_of
from pipeline.read.discover import Piece
from pipeline.read.log import read_source
from pipeline.read.settings import SourceConfig
from pipeline.streaming.estimator import Block, Buckets, EstimateFrequencies, Estimator, distinct

# s since 1970 (0 without a timestamp column), place in the source, fingerprint
EVENT = np.dtype([("timestamp", "<i8"), ("order", "<u8"), ("candidate", "<i8")])
SAMPLES = 256  # events of a staged file that help to find the cuts
CHUNK_EVENTS = 1 << 20  # events that travel at once
APPLIED, PENDING, LATE = "applied", "pending", "late"
NEVER = -(2**62)  # a period before all others
Sorted = tuple[tuple[str, int], Any]  # (what becomes of rows, range or piece), the rows


class Chunk(NamedTuple):
    """Events start ... stop - 1 of a staged file."""

    path: str
    start: int
    stop: int
    place: int  # of the first of them among all events of the run, where they are in order

    def load(self) -> np.ndarray:
        """The events, or what the file holds of them: [stop - start]."""
        return np.array(load_array(self.path, mmap_mode="r")[self.start : self.stop])


def chunks(paths: Iterable[str]) -> list[Chunk]:
    """Cuts staged files, one after the other."""
    cut, place = [], 0
    for path in paths:
        size = len(load_array(path, mmap_mode="r"))
        for start in range(0, size, CHUNK_EVENTS):
            cut.append(Chunk(path, start, min(start + CHUNK_EVENTS, size), place + start))
        place += size
    return cut


def stage_events(
    pieces: list[Piece], config: SourceConfig, staging: Staging, latest: int | None = None
) -> list[str]:
    """Reads a log and stages its good rows, none after `latest`; the files of EVENT [n].

    Rows are dealt out by their place in the source: by candidate, the one that has a tenth of
    all rows would be one worker's.
    """
    out = staging.stage("events")
    with running(staging.options) as pipeline:
        rows, _ = read_source(pipeline, pieces, config, staging, "order", latest)
        finish(
            rows
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


def order_events(paths: list[str], ranges: int, staging: Staging) -> list[str]:
    """Staged events → files of fingerprints, int64 [n], in order of time, then of the source."""
    staged, out = staging.stage("events"), staging.stage("ordered")
    samples = [read_json(staged, Path(path).stem)["sample"] for path in paths]
    cuts = find_cuts([tuple(event) for sample in samples for event in sample], ranges)
    with running(staging.options) as pipeline:
        finish(
            spread(pipeline, "Staged", paths)
            | "Cut" >> beam.FlatMap(_cut, cuts)
            | "GroupRanges" >> beam.GroupByKey()
            | "StageOrdered" >> beam.MapTuple(partial(_stage_ordered, out=out))
        )
    return sorted(map(str, out.glob("*.npy")))


def find_cuts(sample: list[tuple[int, int, int]], ranges: int) -> list[tuple[int, int]]:
    """Where to cut events into at most so many ranges of about equal size.

    From (timestamp, order, events that it stands for) in any order to (timestamp, order) of the
    first event of each range but the first, ascending.
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
    events = load_array(path, mmap_mode="r")
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


class Periods(NamedTuple):
    """What becomes of the rows of each period of event time."""

    seconds: int  # of a period
    origin: int  # the period that is step 1
    oldest: int  # rows of earlier periods are late
    last: int  # rows of later periods are pending
    ranges: int  # of fingerprints of pending rows that travel alone


def split_by_rows(chunk: Chunk, rows_before: int, size: int) -> Iterator[Sorted]:
    """The step of the i-th row of the stream, from 0, is i // size + 1."""
    prints = chunk.load()
    places = rows_before + chunk.place + np.arange(len(prints))
    yield (APPLIED, 0), distinct(Block(places // size + 1, prints, np.ones_like(prints)))


def split_by_time(chunk: Chunk, periods: Periods) -> Iterator[Sorted]:
    """The period of a row decides: of one that is new, or of one that was pending."""
    rows = chunk.load()
    if rows.dtype == EVENT:
        period = rows["timestamp"] // periods.seconds
        late = period < periods.oldest
        pieces, sizes = np.unique(rows["order"][late] >> np.uint64(40), return_counts=True)
        for piece, size in zip(pieces.tolist(), sizes.tolist(), strict=True):
            yield (LATE, piece), size
        period, prints = period[~late], rows["candidate"][~late]
        counts = np.ones_like(prints)
    else:
        prints, period, counts = rows.T
    block = distinct(Block(period, prints, counts))
    now = block.steps <= periods.last
    if now.any():
        steps, prints, counts = (column[now] for column in block)
        yield (APPLIED, 0), Block(steps - periods.origin + 1, prints, counts)
    later = np.stack([block.fingerprints, block.steps, block.rows], axis=1)[~now]
    # Ranges of fingerprints that, one after the other, are in their order.
    unsigned = later[:, 0].astype(np.uint64) ^ np.uint64(1 << 63)
    for part, rows in partition(later, shard_of(unsigned, periods.ranges), periods.ranges):
        yield (PENDING, part), rows


def advance_rows(
    staged: list[Chunk],
    split: Callable[[Chunk], Iterator[Sorted]],
    estimator: Estimator,
    staging: Staging,
) -> None:
    """Stages the buckets that change, the rows that stay pending, and how many are late."""
    out = {name: staging.stage(name) for name in (APPLIED, PENDING, LATE)}
    if not staged:
        return
    with running(staging.options) as pipeline:
        rows = spread(pipeline, "Chunks", staged) | "Split" >> beam.FlatMap(split)
        applied = (
            rows
            | "Applied" >> beam.Filter(lambda element: element[0][0] == APPLIED)
            | "Block" >> beam.Values()
            | "Estimate" >> EstimateFrequencies(estimator)
            | "StageBuckets" >> beam.Map(_stage_buckets, out=out[APPLIED])
        )
        others = (
            rows
            | "Others" >> beam.Filter(lambda element: element[0][0] != APPLIED)
            | "GroupOthers" >> beam.GroupByKey()
            | "StageOthers" >> beam.MapTuple(partial(_stage_others, out=out))
        )
        finish(applied, others)


def _stage_others(key: tuple[str, int], rows: Iterable[Any], out: dict[str, Path]) -> None:
    kind, number = key
    if kind == LATE:
        write_json(out[LATE], f"{number:06d}", sum(rows))
        return
    prints, periods, counts = np.concatenate(list(rows)).T
    periods, prints, counts = distinct(Block(periods, prints, counts))
    write_block(out[PENDING], f"{number:05d}", np.stack([prints, periods, counts], axis=1))


def _stage_buckets(buckets: Buckets, out: Path) -> str:
    name = f"{buckets.array:03d}-{buckets.start:010d}"
    write_json(out, name, {"array": buckets.array, "start": buckets.start, "rows": buckets.rows})
    return write_block(out, name, buckets.state)


def staged_buckets(staging: Staging) -> Iterator[Buckets]:
    """The buckets that changed."""
    staged = staging.stage(APPLIED)
    for name, described in read_all(staged).items():
        yield Buckets(**described, state=load_array(staged / f"{name}.npy"))


def staged_late(staging: Staging) -> dict[int, int]:
    """The late rows of each piece that has some."""
    return {int(piece): rows for piece, rows in read_all(staging.stage(LATE)).items()}
