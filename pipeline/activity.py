"""The k-core: queries and candidates with too few rows are dropped, until none is left to drop."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam_options import running
from pipeline.config import PrepareConfig
from pipeline.rows import join, partition, partition_of
from pipeline.staging import Staging, write_block

log = logging.getLogger(__name__)
ROUNDS = 3  # in one pipeline; then the driver looks whether anything changed


def keep_active(rows: np.ndarray, side: str, minimum: int) -> np.ndarray:
    """The rows whose id on `side` occurs at least `minimum` times in them."""
    _, codes, counts = np.unique(rows[side], return_inverse=True, return_counts=True)
    return rows[counts[codes] >= minimum]


def repartition(rows: np.ndarray, side: str, partitions: int) -> Iterator[tuple[int, np.ndarray]]:
    """Sends a block's rows to the key ranges of their id on `side`."""
    return partition(rows, partition_of(rows[side], partitions), partitions)


@beam.typehints.with_input_types(tuple[int, np.ndarray])
@beam.typehints.with_output_types(tuple[int, np.ndarray])
@dataclasses.dataclass
class KeepActive(beam.PTransform):
    """(query range, rows) → the same with `ROUNDS` of both filters behind it.

    Each filter is local: all rows of one id are in one key range, and a shuffle stands between
    the filter of the queries and that of the candidates.
    """

    config: PrepareConfig

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        for number in range(1, ROUNDS + 1):
            rows = (
                rows
                | f"KeepQueries{number}" >> beam.FlatMap(self._filter, "query", "candidate")
                | f"ByCandidate{number}" >> beam.GroupByKey()
                | f"JoinCandidates{number}" >> beam.MapTuple(_join_range)
                | f"KeepCandidates{number}" >> beam.FlatMap(self._filter, "candidate", "query")
                | f"ByQuery{number}" >> beam.GroupByKey()
                | f"JoinQueries{number}" >> beam.MapTuple(_join_range)
            )
        return rows

    def _filter(
        self, element: tuple[int, np.ndarray], side: str, other: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        minimum = (
            self.config.min_user_interactions
            if side == "query"
            else self.config.min_item_interactions
        )
        kept = keep_active(element[1], side, minimum)
        return repartition(kept, other, self.config.partitions)


def _join_range(part: int, blocks: Iterable[np.ndarray]) -> tuple[int, np.ndarray]:
    return part, join(blocks)


def k_core(
    blocks: list[str],
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
    counts: dict[str, int],
) -> list[str]:
    """Repeats the k-core pass until it drops nothing; sets `rows` and `k_core` in the counts."""
    before = counts["rows"]
    number = 0
    while max(config.min_user_interactions, config.min_item_interactions) > 1:
        number += 1
        left = counts["rows"]
        blocks = _one_pass(blocks, config, options, staging.stage(f"active{number}"))
        counts["rows"] = sum(len(np.load(path, mmap_mode="r")) for path in blocks)
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
    counts["k_core"] = before - counts["rows"]
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
            | "Load" >> beam.Map(load_block)
            | "KeepActive" >> KeepActive(config)
            | "Stage" >> beam.MapTuple(partial(_stage_rows, out=out))
        )
    return sorted(map(str, out.glob("*.npy")))


def load_block(path: str) -> tuple[int, np.ndarray]:
    """A staged block with the key range that is its name."""
    return int(Path(path).stem), np.load(path, allow_pickle=False)


def _stage_rows(part: int, rows: np.ndarray, out: Path) -> str:
    return write_block(out, f"{part:05d}", rows)
