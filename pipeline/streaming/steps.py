"""What becomes of the good rows of a run: applied in their step, kept for later, or too late."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.blocks import partition
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, read_all, write_block, write_json
from pipeline.prepare.shards import shard_of
from pipeline.streaming.estimator import Block, Buckets, EstimateFrequencies, Estimator, distinct
from pipeline.streaming.order import EVENT, Chunk

APPLIED, PENDING, LATE = "applied", "pending", "late"
NEVER = -(2**62)  # a period before all others
Sorted = tuple[tuple[str, int], Any]  # (what becomes of rows, range or piece), the rows
Split = Callable[[Chunk], Iterator[Sorted]]


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
    chunks: list[Chunk],
    split: Split,
    estimator: Estimator,
    options: PipelineOptions,
    staging: Staging,
) -> None:
    """Stages the buckets that change, the rows that stay pending, and how many are late."""
    out = {name: staging.stage(name) for name in (APPLIED, PENDING, LATE)}
    if not chunks:
        return
    with running(options) as pipeline:
        rows = spread(pipeline, "Chunks", chunks) | "Split" >> beam.FlatMap(split)
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
        yield Buckets(**described, state=np.load(staged / f"{name}.npy"))


def staged_late(staging: Staging) -> dict[int, int]:
    """The late rows of each piece that has some."""
    return {int(piece): rows for piece, rows in read_all(staging.stage(LATE)).items()}
