"""Streaming frequency estimation: the mean number of steps between two occurrences of a candidate.

Yi et al., RecSys 2019, doi:10.1145/3298689.3346996. Candidates are hashed to buckets; at step t,
once for every bucket with a candidate in the step,
    w = (1 - α) w + α, then b = b + α/w (t - a - b), then a = t
with a the last step of the bucket and b its mean interval; a = 0, b = 1 and w = 0 before the first
step, which is t = 1. The estimated probability that a step holds a candidate is 1 / max_h b_h over
several hash arrays h, because candidates that share a bucket make its intervals shorter.

Differs: the paper's b = (1 - α) b + α (t - a) is this with w = 1 throughout; there the 1 that b
starts from has the weight (1 - α)^n after n occurrences. Here w = 1 - (1 - α)^n, and b is the mean
of the n intervals alone, the newest with the largest weight.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np

from pipeline.beam.accounting import AccountingError
from pipeline.beam.blocks import begins, partition
from pipeline.beam.staging import load_array
from pipeline.contract import hashing, schema
from pipeline.counts.settings import FrequenciesConfig

# a, b and w of a bucket
STATE = np.dtype([("last_step", "<i8"), ("interval", "<f8"), ("weight", "<f8")])
FILES = (schema.STREAMING_LAST_STEP, schema.STREAMING_INTERVAL, schema.STREAMING_WEIGHT)  # of it
FEW = 10  # occurrences; the mean of fewer is off by a third or more
WIDE = 128  # buckets that are worth a vector operation


class Block(NamedTuple):
    """Candidates and the steps that hold them."""

    steps: np.ndarray  # int64 [n], from 1
    fingerprints: np.ndarray  # int64 [n]
    rows: np.ndarray  # int64 [n], how many rows of the log each stands for


class Buckets(NamedTuple):
    """The state of some buckets that lie side by side in one hash array."""

    array: int  # h
    start: int  # the first bucket
    rows: int  # of the log that were applied to them by the last steps
    state: np.ndarray  # STATE [n]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Sizes and weight of the estimates, and what they start from."""

    num_buckets: int  # H, of each hash array
    num_hashes: int  # A, hash arrays
    alpha: float  # α
    ranges: int = 1  # of buckets of an array that travel alone; nothing depends on it
    previous: str = ""  # snapshot to go on from; none: a = 0, b = 1, w = 0

    def initial(self, array: int, start: int, stop: int) -> np.ndarray:
        """The state of some buckets before the run: STATE [stop - start]."""
        state = np.zeros(stop - start, STATE)
        if not self.previous:
            state["interval"] = 1
            return state
        for name, file in zip(STATE.names or (), FILES, strict=True):
            state[name] = load_array(Path(self.previous) / file, mmap_mode="r")[array, start:stop]
        return state

    @property
    def num_ranges(self) -> int:
        """The ranges of an array; none is empty."""
        return min(self.ranges, self.num_buckets)

    def limits(self, number: int) -> tuple[int, int]:
        """The first bucket of a range, and the first one behind it."""
        start, stop = (-(-n * self.num_buckets // self.num_ranges) for n in (number, number + 1))
        return start, stop

    def by_range(self, block: Block) -> Iterator[tuple[int, np.ndarray]]:
        """(array · ranges + range, int64 [n, 3] of bucket, step, rows) of a block."""
        buckets = hashing.hash_buckets(
            block.fingerprints, num_buckets=self.num_buckets, num_hashes=self.num_hashes
        )
        for array in range(self.num_hashes):
            occurrences = np.stack([buckets[:, array], block.steps, block.rows], axis=1)
            parts = buckets[:, array] * self.num_ranges // self.num_buckets
            for part, rows in partition(occurrences, parts, self.num_ranges):
                yield array * self.num_ranges + part, rows


def estimator_of(config: FrequenciesConfig, previous: str = "") -> Estimator:
    """What the settings of a job say of the estimates; `previous` is a snapshot to go on from."""
    return Estimator(
        num_buckets=config.num_buckets,
        num_hashes=config.num_hashes,
        alpha=config.alpha,
        ranges=config.partitions,
        previous=previous,
    )


def advance(state: np.ndarray, buckets: np.ndarray, steps: np.ndarray, alpha: float) -> np.ndarray:
    """The state after some steps, bit for bit what a loop over steps and buckets gives.

    Many buckets with few occurrences are advanced together, one occurrence of each at a time;
    the rest of the occurrences of the few buckets that have many, one after the other.

    Args:
      state: STATE [m], before the steps.
      buckets: int64 [n] in 0..m-1, in any order, repeated at will.
      steps: int64 [n], the step of each occurrence. One that a bucket has counted already, as
        when a run ended inside a step, is left out.
      alpha: α, in (0, 1].

    Returns:
      STATE [m], a new array.

    Raises:
      ValueError: a step lies before the last one of its bucket.
    """
    by_bucket = np.lexsort((steps, buckets))
    buckets, steps = buckets[by_bucket], steps[by_bucket]
    before = state["last_step"][buckets]
    late = np.flatnonzero(steps < before)
    if len(late):
        raise ValueError(
            f"steps must not lie before the last one of their bucket, got {steps[late[0]]} after "
            f"{before[late[0]]}: they were given out of order."
        )
    new = begins(buckets, steps) & (steps > before)
    buckets, steps, before, state = buckets[new], steps[new], before[new], state.copy()
    if not len(steps):
        return state
    first = begins(buckets)
    intervals = (steps - np.where(first, before, np.roll(steps, 1))).astype(np.float64)
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(buckets))
    present = buckets[starts]
    means, weights = _means(state[present], intervals, starts, ends, alpha)
    state["last_step"][present] = steps[ends - 1]
    state["interval"][present], state["weight"][present] = means, weights
    return state


def _means(
    state: np.ndarray, intervals: np.ndarray, starts: np.ndarray, ends: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """b and w after intervals[starts : ends] of each bucket, STATE [m]: float64 [m] both."""
    by_length = np.argsort(starts - ends, kind="stable")
    starts, lengths = starts[by_length], (ends - starts)[by_length]
    rounds = int(lengths[WIDE - 1]) if len(lengths) >= WIDE else 0
    longer = np.searchsorted(-lengths, -np.arange(rounds), side="left")  # buckets in each round
    means, weights = state["interval"][by_length], state["weight"][by_length]
    keep = 1 - alpha
    for number, count in enumerate(longer):
        weights[:count] = keep * weights[:count] + alpha
        change = intervals[starts[:count] + number] - means[:count]
        means[:count] += alpha / weights[:count] * change
    for place in range(np.searchsorted(-lengths, -rounds, side="left")):
        mean, weight = float(means[place]), float(weights[place])
        start, end = starts[place] + rounds, starts[place] + lengths[place]
        for interval in intervals[start:end].tolist():
            weight = keep * weight + alpha
            mean += alpha / weight * (interval - mean)
        means[place], weights[place] = mean, weight
    back = np.argsort(by_length)
    return means[back], weights[back]


def occurrences(weight: np.ndarray, alpha: float) -> dict[str, int]:
    """How many buckets were touched, and how many of them less than FEW times, from w [A, H]."""
    few = weight < (1 - (1 - alpha) ** FEW) * (1 - 1e-9)
    return {"touched": int((weight > 0).sum()), "few": int((few & (weight > 0)).sum())}


def distinct(block: Block) -> Block:
    """Each candidate of a step once, by fingerprint and step, rows added up."""
    order = np.lexsort((block.steps, block.fingerprints))
    steps, prints, rows = (column[order] for column in block)
    first = np.flatnonzero(begins(prints, steps))
    return Block(steps[first], prints[first], np.add.reduceat(rows, first) if len(rows) else rows)


@beam.typehints.with_input_types(Block)
@beam.typehints.with_output_types(Buckets)
@dataclasses.dataclass
class EstimateFrequencies(beam.PTransform):
    """Blocks of a bounded log → the buckets that changed, after all of its steps.

    All steps of a bucket are grouped and put in order, so that the result does not depend on how
    the log is cut. A range of buckets without a candidate in the log does not come out.
    """

    estimator: Estimator

    def expand(self, blocks: beam.PCollection) -> beam.PCollection:
        return (
            blocks
            | "Hash" >> beam.FlatMap(self.estimator.by_range)
            | "ByBuckets" >> beam.GroupByKey()
            | "Advance" >> beam.MapTuple(partial(advance_range, estimator=self.estimator))
        )


def advance_range(
    key: int, blocks: Iterable[np.ndarray], estimator: Estimator, state: np.ndarray | None = None
) -> Buckets:
    """The buckets of one range after the steps of its blocks; `state` None is that of the start."""
    array, number = divmod(key, estimator.num_ranges)
    start, stop = estimator.limits(number)
    if state is None:
        state = estimator.initial(array, start, stop)
    buckets, steps, rows = np.concatenate(list(blocks)).T
    state = advance(state, buckets - start, steps, estimator.alpha)
    return Buckets(array, start, int(rows.sum()), state)


def assemble(
    estimator: Estimator,
    changed: Iterable[Buckets],
    before: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All buckets, STATE [A, H], and the rows of the log that each array counted, [A].

    Buckets that did not change are as in `before`, by default as at the start. `changed` may be in
    any order; of a range that comes several times, the last one counts.

    Raises:
      AccountingError: the arrays have not counted the same rows.
    """
    if before is None:
        arrays = range(estimator.num_hashes)
        whole = np.stack([estimator.initial(array, 0, estimator.num_buckets) for array in arrays])
        rows = np.zeros(estimator.num_hashes, np.int64)
    else:
        whole, rows = (array.copy() for array in before)
    for buckets in changed:
        stop = buckets.start + len(buckets.state)
        whole[buckets.array, buckets.start : stop] = buckets.state
        rows[buckets.array] += buckets.rows
    if rows.min() != rows.max():
        raise AccountingError(
            f"the hash arrays counted {rows.tolist()} rows: rows were lost or made twice"
        )
    return whole, rows
