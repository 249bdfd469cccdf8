"""What is measured on the rows that are kept: split sizes, degrees, popularity, cold rows.

A preparation reads it from the vocabularies and train counts that it has written; a dry run, which
writes none, counts the same in a pipeline of its own. Both give the same numbers.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.blocks import partition, partition_of
from pipeline.beam.options import finish, running
from pipeline.beam.staging import Staging, load_block, read_json, write_json
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
    """Reads the files of counts in a directory of prepared data, one shard at a time.

    Args:
      out: holds vocabularies and train counts.
      splits: rows of each split.
    """
    degrees, trained, without, cold = {}, 0, 0, 0
    for side in schema.SIDES:
        paths = sorted(out.glob(f"{side}_vocabulary-*.parquet"))
        degrees[side] = merge(histogram(_counts(path)) for path in paths)
    for path in sorted(out.glob("candidate_vocabulary-*.parquet")):
        counts = _counts(path)
        train = _counts(path.with_name(path.name.replace("vocabulary", "train_counts")))
        trained += int(train.sum())
        without += int((train == 0).sum())
        cold += int(counts[train == 0].sum())
    return Measures(splits, degrees, trained, without, cold)


def _counts(path: Path) -> np.ndarray:
    return pq.read_table(path, columns=[schema.COUNT])[schema.COUNT].to_numpy()


def measure_blocks(
    blocks: list[str], config: PrepareConfig, options: PipelineOptions, staging: Staging
) -> Measures:
    """Counts in blocks of rows by query, as `assemble` takes them; nothing is written but sums."""
    out = staging.stage("measures")
    with running(options) as pipeline:
        rows = (
            pipeline
            | "Blocks" >> beam.Create(blocks)
            | "Spread" >> beam.Reshuffle()
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
    by_query = [read_json(out, path.stem) for path in sorted(out.glob("query-*.json"))]
    by_candidate = [read_json(out, path.stem) for path in sorted(out.glob("candidate-*.json"))]
    sizes = np.sum([one["splits"] for one in by_query], axis=0).tolist()
    return Measures(
        dict(zip(schema.SPLITS, sizes, strict=True)),
        {
            "query": merge(from_lists(one["histogram"]) for one in by_query),
            "candidate": merge(from_lists(one["histogram"]) for one in by_candidate),
        },
        sum(one["train_rows"] for one in by_candidate),
        sum(one["without_train_rows"] for one in by_candidate),
        sum(one["cold_rows"] for one in by_candidate),
    )


def _measure_queries(part: int, rows: np.ndarray, out: Path) -> str:
    """All rows of a query are in one block."""
    name = f"query-{part:05d}"
    splits = np.bincount(rows["split"], minlength=len(schema.SPLITS)).tolist()
    degrees = np.unique(rows["query"], return_counts=True)[1]
    write_json(out, name, {"splits": splits, "histogram": as_lists(histogram(degrees))})
    return name


def _count_candidates(
    element: tuple[int, np.ndarray], partitions: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """The partial counts of a block: (range, (fingerprints, counts [n, 2]: all rows, train))."""
    rows = element[1]
    prints, codes = np.unique(rows["candidate"], return_inverse=True)
    train = np.bincount(codes, rows["split"] == 0, len(prints))
    counts = np.stack([np.bincount(codes, minlength=len(prints)), train], 1).astype(np.int64)
    for part, found in partition(
        np.arange(len(prints)), partition_of(prints, partitions), partitions
    ):
        yield part, (prints[found], counts[found])


def _measure_candidates(
    part: int, counted: Iterable[tuple[np.ndarray, np.ndarray]], out: Path
) -> str:
    name = f"candidate-{part:05d}"
    counts = count_ids(counted)[1]
    cold = counts[:, 1] == 0
    measured = {
        "histogram": as_lists(histogram(counts[:, 0])),
        "train_rows": int(counts[:, 1].sum()),
        "without_train_rows": int(cold.sum()),
        "cold_rows": int(counts[cold, 0].sum()),
    }
    write_json(out, name, measured)
    return name
