"""Assembling: distinct rows by query → splits, vocabularies, counts and shards of examples."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import schema
from pipeline.activity import load_block, repartition
from pipeline.config import PrepareConfig
from pipeline.examples import Shard, shard_of, write_shard
from pipeline.rows import join, partition, partition_of
from pipeline.split import assign_splits
from pipeline.staging import Staging, read_json, write_json
from pipeline.vocabulary import Ids, count_ids, distinct_ids, rank_ids, replace_ids, write_table


def assemble(
    blocks: list[str],
    columns: tuple[str, ...],
    num_shards: int,
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
) -> list[Shard]:
    """Blocks of rows by query → split, dense ids, vocabularies, train counts, shards."""
    id_files = sorted(map(str, staging.stage("ids").glob("*.parquet")))
    out, written = staging.out, staging.stage("shards")
    with beam.Pipeline(options=options) as pipeline:
        rows = (
            pipeline
            | "Blocks" >> beam.Create(blocks)
            | "SpreadBlocks" >> beam.Reshuffle()
            | "Load" >> beam.Map(load_block)
            | "Split" >> beam.Map(lambda element: assign_splits(element[1], config))
        )
        ids = (
            pipeline
            | "IdFiles" >> beam.Create(id_files)
            | "SpreadIds" >> beam.Reshuffle()
            | "LoadIds" >> beam.Map(_load_ids)
        )
        counts = rows | "CountBlock" >> beam.FlatMap(_count_block, config.partitions)
        dense = (
            {"ids": ids, "counts": counts}
            | "JoinCounts" >> beam.CoGroupByKey()
            | "CountRange" >> beam.FlatMap(_count_range)
            | "BySide" >> beam.GroupByKey()
            | "Rank" >> beam.FlatMap(_rank_side, out, config.partitions)
        )
        for side in reversed(schema.SIDES):
            ranges = dense | f"Dense{side}" >> beam.FlatMap(_of_side, side)
            by_side = rows | f"By{side}" >> beam.FlatMap(repartition, side, config.partitions)
            rows = (
                {"rows": by_side, "dense": ranges}
                | f"Join{side}" >> beam.CoGroupByKey()
                | f"Replace{side}" >> beam.FlatMap(_replace_range, side)
            )
        (
            rows
            | "ByShard" >> beam.FlatMap(_to_shards, num_shards)
            | "GroupShards" >> beam.GroupByKey()
            | "Write"
            >> beam.MapTuple(
                partial(
                    _write_shard, num_shards=num_shards, columns=columns, out=out, written=written
                )
            )
        )
    return sorted(Shard(**read_json(written, path.stem)) for path in written.glob("*.json"))


def _load_ids(path: str) -> tuple[str, Ids]:
    table = pq.read_table(path)
    return Path(path).stem, (table["fingerprint"].to_numpy(), table["raw_id"].to_pylist())


def _count_block(
    rows: np.ndarray, partitions: int
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The partial counts of a block: (side-range, (fingerprints, counts [n, 2]))."""
    for side in schema.SIDES:
        ids, codes = np.unique(rows[side], return_inverse=True)
        train = np.bincount(codes, rows["split"] == 0, len(ids))
        counts = np.stack([np.bincount(codes, minlength=len(ids)), train], 1).astype(np.int64)
        parts = partition_of(ids, partitions)
        for part, found in partition(np.arange(len(ids)), parts, partitions):
            yield f"{side}-{part:05d}", (ids[found], counts[found])


def _count_range(
    element: tuple[str, dict[str, Iterable[Any]]],
) -> Iterator[tuple[str, tuple[Ids, np.ndarray]]]:
    """The ids of one range that still have rows, with their counts, by side."""
    name, found = element
    partial = list(found["counts"])
    if not partial:
        return
    ids, counts = count_ids(partial)
    prints, raw = distinct_ids(found["ids"])
    kept = [raw[i] for i in np.searchsorted(prints, ids)]
    yield name.split("-")[0], ((ids, kept), counts)


def _rank_side(
    element: tuple[str, Iterable[tuple[Ids, np.ndarray]]], out: Path, partitions: int
) -> Iterator[tuple[str, tuple[int, np.ndarray, np.ndarray]]]:
    """Writes the vocabulary of one side: (side, (range, fingerprints ascending, dense ids))."""
    side, tables = element
    vocabulary, train_counts = rank_ids(tables)
    write_table(vocabulary, out / schema.vocabulary_name(side))
    if side == "candidate":
        write_table(pa.table({schema.COUNT: train_counts}), out / schema.train_counts_name())
    prints = vocabulary[schema.FINGERPRINT].to_numpy()
    dense = np.argsort(prints, kind="stable")
    parts = partition_of(prints[dense], partitions)
    for part, chosen in partition(dense, parts, partitions):
        yield side, (part, prints[chosen], chosen)


def _of_side(
    element: tuple[str, tuple[int, np.ndarray, np.ndarray]], side: str
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    if element[0] == side:
        part, prints, dense = element[1]
        yield part, (prints, dense)


def _replace_range(
    element: tuple[int, dict[str, Iterable[Any]]], side: str
) -> Iterator[np.ndarray]:
    found = element[1]
    rows = join(found["rows"])
    if len(rows):
        ((prints, dense),) = found["dense"]
        rows[side] = replace_ids(rows[side], prints, dense)
        yield rows


def _to_shards(rows: np.ndarray, num_shards: int) -> Iterator[tuple[int, np.ndarray]]:
    numbers = rows["split"].astype(np.int64) * num_shards + shard_of(rows["order"], num_shards)
    return partition(rows, numbers, len(schema.SPLITS) * num_shards)


def _write_shard(
    number: int,
    blocks: Iterable[np.ndarray],
    num_shards: int,
    columns: tuple[str, ...],
    out: Path,
    written: Path,
) -> None:
    rows = join(blocks)
    rows = rows[np.lexsort((rows["candidate"], rows["query"], rows["order"]))]
    split, number = divmod(number, num_shards)
    name = schema.shard_name(schema.SPLITS[split], number, num_shards)
    size = write_shard(out / name, rows, columns)
    shard = Shard(split, number, len(rows), size)
    write_json(written, name, shard._asdict())
