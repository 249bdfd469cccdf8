"""The k-core: queries and candidates with too few rows are dropped, until none is left to drop."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import join, partition, partition_of
from pipeline.beam.options import running
from pipeline.beam.staging import (
    Staging,
    add_up,
    write_block,
    write_json,
)
from pipeline.prepare.settings import PrepareConfig

log = logging.getLogger(__name__)
ROUNDS = 3  # in one pipeline; then the driver looks whether anything changed


def keep_active(rows: np.ndarray, side: str, minimum: int) -> np.ndarray:
    """The rows whose id on `side` occurs at least `minimum` times in them."""
    _, codes, counts = np.unique(rows[side], return_inverse=True, return_counts=True)
    return rows[counts[codes] >= minimum]


def repartition(rows: np.ndarray, side: str, partitions: int) -> Iterator[tuple[int, np.ndarray]]:
    """Sends a block's rows to the key ranges of their id on `side`."""
    return partition(rows, partition_of(rows[side], partitions), partitions)


Range = tuple[int, Iterable[tuple[np.ndarray, int]]]  # key range, (rows, drops on their way) many


@dataclasses.dataclass
class KeepActive(beam.PTransform):
    """Key ranges by query → the same with `ROUNDS` of both filters behind them.

    Each filter is local: all rows of one id are in one key range, and a shuffle stands between
    the filter of the queries and that of the candidates. What a filter drops is counted there and
    travels with the rows, so that rows and drops add up to the same sum behind every shuffle.
    """

    config: PrepareConfig

    def expand(self, ranges: beam.PCollection) -> beam.PCollection:
        for number in range(1, ROUNDS + 1):
            ranges = (
                ranges
                | f"KeepQueries{number}" >> beam.FlatMap(self._filter, "query", "candidate")
                | f"ByCandidate{number}" >> beam.GroupByKey()
                | f"KeepCandidates{number}" >> beam.FlatMap(self._filter, "candidate", "query")
                | f"ByQuery{number}" >> beam.GroupByKey()
            )
        return ranges

    def _filter(
        self, element: Range, side: str, other: str
    ) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
        minimum = (
            self.config.min_user_interactions
            if side == "query"
            else self.config.min_item_interactions
        )
        part, (rows, dropped) = element[0], _join_range(element[1])
        kept = keep_active(rows, side, minimum)
        dropped += len(rows) - len(kept)
        if dropped:
            yield part, (kept[:0], dropped)
        for number, block in repartition(kept, other, self.config.partitions):
            yield number, (block, 0)


def _join_range(blocks: Iterable[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    rows, dropped = zip(*blocks, strict=True)
    return join(rows), sum(dropped)


def k_core(
    blocks: list[str],
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
    counts: dict[str, int],
) -> list[str]:
    """Repeats the k-core pass until it drops nothing; sets `rows` and `k_core` in the counts."""
    number, counts["k_core"] = 0, 0
    while max(config.min_user_interactions, config.min_item_interactions) > 1:
        number += 1
        out, left = staging.stage(f"active{number}"), counts["rows"]
        blocks = _one_pass(blocks, config, options, out)
        passed = add_up(out, "*")
        check_sum(f"k-core pass {number}", left, passed, ("rows", "k_core"))
        counts["rows"] = passed["rows"]
        counts["k_core"] += passed["k_core"]
        log.info("prepare: k-core pass %d keeps %d of %d rows", number, counts["rows"], left)
        if counts["rows"] == 0:
            raise ValueError(
                f"the k-core of {config.source} is empty: no row has a user with at least "
                f"{config.min_user_interactions} and an item with at least "
                f"{config.min_item_interactions} rows; lower --min_user_interactions or "
                "--min_item_interactions."
            )
        if counts["rows"] == left:
            break
    return blocks


def _one_pass(
    blocks: list[str], config: PrepareConfig, options: PipelineOptions, out: Path
) -> list[str]:
    """One pass of the k-core: files of blocks by query → the same with fewer rows."""
    with running(options) as pipeline:
        (
            pipeline
            | "Blocks" >> beam.Create(blocks)
            | "Spread" >> beam.Reshuffle()
            | "Load" >> beam.Map(_load_range)
            | "KeepActive" >> KeepActive(config)
            | "Stage" >> beam.MapTuple(partial(_stage_rows, out=out))
        )
    return sorted(map(str, out.glob("*.npy")))


def load_block(path: str) -> tuple[int, np.ndarray]:
    """A staged block with the key range that is its name."""
    return int(Path(path).stem), np.load(path, allow_pickle=False)


def _load_range(path: str) -> Range:
    part, rows = load_block(path)
    return part, [(rows, 0)]


def _stage_rows(part: int, blocks: Iterable[tuple[np.ndarray, int]], out: Path) -> str:
    rows, dropped = _join_range(blocks)
    name = f"{part:05d}"
    write_json(out, name, {"rows": len(rows), "k_core": dropped})
    if len(rows):
        write_block(out, name, rows)
    return name
