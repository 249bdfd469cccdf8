"""Assembling: distinct rows by query → splits, vocabularies, counts and shards of examples."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beam.accounting import places_of
from pipeline.beam.blocks import by_range, join, partition
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, load_block, read_all, write_json
from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.shards import Shard, shard_of, write_shard
from pipeline.prepare.split import assign_splits
from pipeline.prepare.vocabulary import TRAIN, Ids, RankIds, count_ids, distinct_ids, replace_ids


def assemble(
    blocks: list[str],
    columns: tuple[str, ...],
    num_shards: int,
    config: PrepareConfig,
    staging: Staging,
) -> list[Shard]:
    """Blocks of rows by query → split, dense ids, vocabularies, train counts, shards."""
    id_files = sorted(map(str, staging.stage("ids").glob("*.parquet")))
    slots = [int(Path(path).stem) for path in id_files]
    out, written, counted = staging.out, staging.stage("shards"), staging.stage("counted")
    write = partial(_write_shard, num_shards=num_shards, columns=columns, out=out, written=written)
    with running(staging.options) as pipeline:
        rows = split_blocks(pipeline, blocks, config)
        ids = spread(pipeline, "IdFiles", id_files) | "LoadIds" >> beam.Map(_load_ids)
        counts = rows | "CountBlock" >> beam.FlatMap(count_block, config.partitions)
        ranked = (
            {"ids": ids, "counts": counts}
            | "JoinCounts" >> beam.CoGroupByKey()
            | "CountRange" >> beam.Map(_count_range, config.partitions, counted)
            | "RankIds" >> RankIds(config.partitions, slots, config.rows_per_shard, out)
        )
        used = counts | "UsedIds" >> beam.MapTuple(lambda slot, counted: (slot, counted[:, :2]))
        dense = (
            {"used": used, "dense": ranked["dense"]}
            | "JoinDense" >> beam.CoGroupByKey()
            | "Answer" >> beam.FlatMap(_answer, config.partitions)
        )
        shards = (
            {"rows": rows, "dense": dense}
            | "JoinRows" >> beam.CoGroupByKey()
            | "Replace" >> beam.FlatMap(_replace_block)
            | "ByShard" >> beam.FlatMap(_to_shards, num_shards)
            | "GroupShards" >> beam.GroupByKey()
            | "Write" >> beam.MapTuple(write)
        )
        finish(ranked["shards"], shards)
    return sorted(Shard(**shard) for shard in read_all(written).values())


def split_blocks(
    pipeline: beam.Pipeline, blocks: list[str], config: PrepareConfig
) -> beam.PCollection:
    """(key range, all rows of its queries with their split) of each staged block."""
    loaded = spread(pipeline, "Blocks", blocks) | "Load" >> beam.Map(load_block)
    return loaded | "Split" >> beam.MapTuple(lambda part, rows: (part, assign_splits(rows, config)))


def _load_ids(path: str) -> tuple[int, Ids]:
    table = pq.read_table(path)
    ids = table[schema.FINGERPRINT].to_numpy(), table[schema.RAW_ID].to_pylist()
    return int(Path(path).stem), ids


def count_block(
    element: tuple[int, np.ndarray], partitions: int
) -> Iterator[tuple[int, np.ndarray]]:
    """By slot, the ids of a block: (block, id, its rows, those in train), int64 [n, 4]."""
    part, rows = element
    for number, side in enumerate(schema.SIDES):
        ids, codes, sizes = np.unique(rows[side], return_inverse=True, return_counts=True)
        train = np.bincount(codes[rows["split"] == 0], minlength=len(ids))
        counted = np.stack([np.full(len(ids), part), ids, sizes, train], axis=1)
        for of_ids, places in by_range(ids, partitions):
            yield number * partitions + of_ids, counted[places]


def _count_range(
    element: tuple[int, dict[str, Iterable[Any]]], partitions: int, out: Path
) -> tuple[int, pa.Table]:
    """The ids of one slot that still have rows, with their counts; stages how many have none."""
    slot, found = element
    side = schema.SIDES[slot // partitions]
    prints, counts = count_ids(found["counts"])
    known, raw = distinct_ids(found["ids"])
    places = places_of(prints, known, f"{side} ids, range {slot % partitions}")
    write_json(out, f"{side}-{slot:05d}", {"kept": len(prints), "lost": len(known) - len(prints)})
    ids = pa.array([raw[i] for i in places], pa.binary())
    names = [schema.RAW_ID, schema.FINGERPRINT, schema.COUNT, TRAIN]
    return slot, pa.table([ids, prints, *counts.T], names)


def _answer(
    element: tuple[int, dict[str, Iterable[Any]]], partitions: int
) -> Iterator[tuple[int, tuple[str, np.ndarray]]]:
    """The dense ids of one slot to the blocks that have them: (side, ids and dense ids [n, 2])."""
    slot, found = element
    side = schema.SIDES[slot // partitions]
    blocks, ids = np.concatenate([np.empty((0, 2), np.int64), *found["used"]]).T
    dense = replace_ids(ids, found["dense"], f"{side} ids, slot {slot}")
    for part, known in partition(np.stack([ids, dense], axis=1), blocks, partitions):
        yield part, (side, known)


def _replace_block(element: tuple[int, dict[str, Iterable[Any]]]) -> Iterator[np.ndarray]:
    """The rows of a block with dense ids."""
    tables = list(element[1]["dense"])
    for block in element[1]["rows"]:
        rows = block.copy()
        for side in schema.SIDES:
            known = (table.T for of_side, table in tables if of_side == side)
            rows[side] = replace_ids(rows[side], known, f"{side} ids of the rows")
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
    shard = Shard(*divmod(number, num_shards), len(rows), 0)
    name = shard.name(num_shards)
    size = write_shard(out / name, rows, columns)
    write_json(written, name, shard._replace(bytes=size)._asdict())
