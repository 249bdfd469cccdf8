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
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.blocks import by_range
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, load_block, read_all, write_json
from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.split import assign_splits
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

    queries = [as_lists(histogram(shard)) for shard in counts("query_vocabulary")]
    shards = zip(counts("candidate_vocabulary"), counts("candidate_train_counts"), strict=True)
    return _add_up(splits, queries, [_measure(*shard) for shard in shards])


def _measure(counts: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """What is known of some candidates, as JSON can hold it; rows and train rows of each, [n]."""
    cold = train == 0
    return {
        "histogram": as_lists(histogram(counts)),
        "train_rows": int(train.sum()),
        "without_train_rows": int(cold.sum()),
        "cold_rows": int(counts[cold].sum()),
    }


def _add_up(
    splits: dict[str, int], queries: list[list[list[float]]], candidates: list[dict[str, Any]]
) -> Measures:
    """The measures of all ids, from histograms of queries and `_measure` of candidates."""
    histograms = {"query": queries, "candidate": [part["histogram"] for part in candidates]}
    names = ("train_rows", "without_train_rows", "cold_rows")
    return Measures(
        splits,
        {side: merge(map(from_lists, parts)) for side, parts in histograms.items()},
        *(sum(part[name] for part in candidates) for name in names),
    )


def measure_blocks(
    blocks: list[str], config: PrepareConfig, options: PipelineOptions, staging: Staging
) -> Measures:
    """Counts in blocks of rows by query, as `assemble` takes them; nothing is written but sums."""
    out = staging.stage("measures")
    with running(options) as pipeline:
        rows = (
            spread(pipeline, "Blocks", blocks)
            | "Load" >> beam.Map(load_block)
            | "Split" >> beam.MapTuple(lambda part, rows: (part, assign_splits(rows, config)))
        )
        queries = rows | "MeasureQueries" >> beam.MapTuple(partial(_measure_queries, out=out))
        candidates = (
            rows
            | "CountCandidates" >> beam.FlatMap(_count_candidates, config.partitions)
            | "GroupCounts" >> beam.GroupByKey()
            | "MeasureCandidates" >> beam.MapTuple(partial(_measure_candidates, out=out))
        )
        finish(queries, candidates)
    by_query, by_candidate = (list(read_all(out, f"{side}-*").values()) for side in schema.SIDES)
    sizes = np.sum([part["splits"] for part in by_query], axis=0).tolist()
    splits = dict(zip(schema.SPLITS, sizes, strict=True))
    return _add_up(splits, [part["histogram"] for part in by_query], by_candidate)


def _measure_queries(part: int, rows: np.ndarray, out: Path) -> None:
    """All rows of a query are in one block."""
    splits = np.bincount(rows["split"], minlength=len(schema.SPLITS)).tolist()
    degrees = np.unique(rows["query"], return_counts=True)[1]
    measured = {"splits": splits, "histogram": as_lists(histogram(degrees))}
    write_json(out, f"query-{part:05d}", measured)


def _count_candidates(
    element: tuple[int, np.ndarray], partitions: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """The partial counts of a block: (range, (fingerprints, counts [n, 2]: all rows, train))."""
    rows = element[1]
    prints, codes = np.unique(rows["candidate"], return_inverse=True)
    train = np.bincount(codes, rows["split"] == 0, len(prints))
    counts = np.stack([np.bincount(codes, minlength=len(prints)), train], 1).astype(np.int64)
    for part, places in by_range(prints, partitions):
        yield part, (prints[places], counts[places])


def _measure_candidates(
    part: int, counted: Iterable[tuple[np.ndarray, np.ndarray]], out: Path
) -> None:
    write_json(out, f"candidate-{part:05d}", _measure(*count_ids(counted)[1].T))
