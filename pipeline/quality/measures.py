"""What is measured on the rows that are kept: split sizes, degrees, popularity, cold rows.

A preparation reads it from the vocabularies and train counts that it has written; a dry run, which
writes none, counts the same in a pipeline of its own. Both give the same numbers.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq

from pipeline.beam.options import finish, running
from pipeline.beam.staging import Staging, add_up, read_all, write_json
from pipeline.contract import schema
from pipeline.prepare.assemble import count_block, split_blocks
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.vocabulary import count_ids
from pipeline.quality.histogram import Histogram, as_lists, from_lists, histogram, merge


class Measures(NamedTuple):
    """Numbers of rows and ids after the k-core."""

    splits: dict[str, int]  # rows of each split
    degrees: dict[str, Histogram]  # side → rows of each of its ids, over all splits
    train_rows: int  # by the counts of the candidates
    candidates_without_train_rows: int
    cold_rows: int  # rows of validation and test whose candidate has no row in train


def measure_output(out: Path, splits: dict[str, int]) -> Measures:
    """Reads vocabularies and train counts in a directory of prepared data, a shard at a time."""

    def counts(kind: str) -> Iterator[np.ndarray]:
        for path in sorted(out.glob(f"{kind}-*.parquet")):
            yield pq.read_table(path, columns=[schema.COUNT])[schema.COUNT].to_numpy()

    queries = [_measure(shard, shard) for shard in counts("query_vocabulary")]
    shards = zip(counts("candidate_vocabulary"), counts("candidate_train_counts"), strict=True)
    return _add_up(splits, queries, [_measure(*shard) for shard in shards])


def _measure(counts: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """What is known of some ids, as JSON can hold it; from the rows and train rows of each, [n]."""
    cold = train == 0
    return {
        "histogram": as_lists(histogram(counts)),
        "train_rows": int(train.sum()),
        "without_train_rows": int(cold.sum()),
        "cold_rows": int(counts[cold].sum()),
    }


def _add_up(
    splits: dict[str, int], queries: list[dict[str, Any]], candidates: list[dict[str, Any]]
) -> Measures:
    """The measures of all ids, from `_measure` of some."""
    degrees = {
        side: merge(from_lists(part["histogram"]) for part in parts)
        for side, parts in zip(schema.SIDES, (queries, candidates), strict=True)
    }
    names = ("train_rows", "without_train_rows", "cold_rows")
    return Measures(splits, degrees, *(sum(part[name] for part in candidates) for name in names))


def measure_blocks(blocks: list[str], config: PrepareConfig, staging: Staging) -> Measures:
    """Counts in blocks of rows by query, as `assemble` takes them; nothing is written but sums."""
    out = staging.stage("measures")
    with running(staging.options) as pipeline:
        rows = split_blocks(pipeline, blocks, config)
        counts = (
            rows
            | "CountBlock" >> beam.FlatMap(count_block, config.partitions)
            | "GroupCounts" >> beam.GroupByKey()
            | "MeasureIds" >> beam.MapTuple(partial(_measure_ids, config.partitions, out))
        )
        finish(rows | "MeasureSplits" >> beam.MapTuple(partial(_measure_splits, out)), counts)
    queries, candidates = (list(read_all(out, f"{side}-*").values()) for side in schema.SIDES)
    return _add_up(add_up(out, "splits-*"), queries, candidates)


def _measure_splits(out: Path, part: int, rows: np.ndarray) -> None:
    sizes = np.bincount(rows["split"], minlength=len(schema.SPLITS)).tolist()
    write_json(out, f"splits-{part:05d}", dict(zip(schema.SPLITS, sizes, strict=True)))


def _measure_ids(partitions: int, out: Path, slot: int, counted: Iterable[np.ndarray]) -> None:
    measured = _measure(*count_ids(counted)[1].T)
    write_json(out, f"{schema.SIDES[slot // partitions]}-{slot:05d}", measured)
