"""Counting: the log and earlier counts → items by range of fingerprints → shards with `log_q`.

Two pipelines: the first reads the log and adds up what its blocks hold to the counts of an earlier
run, one range of fingerprints at a time; the second writes the shards, when the number of items
and the total are known. No step sees more than one range of items.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.beam.accounting import places_of
from pipeline.beam.blocks import by_range, partition
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, write_json
from pipeline.contract import schema
from pipeline.counts.settings import FrequenciesConfig
from pipeline.prepare.shards import shard_of
from pipeline.prepare.vocabulary import RANK_ORDER, Ids, distinct_ids, write_table
from pipeline.quality.histogram import as_lists, histogram
from pipeline.read.consumed import stage_inputs
from pipeline.read.discover import Piece
from pipeline.read.log import read_source

ITEMS_PER_SHARD = 262_144  # about; it alone decides the number of shards
NUM_MOST_FREQUENT = 20


def merge_log(
    pieces: list[Piece],
    files: list[str],
    previous: schema.Manifest | None,
    config: FrequenciesConfig,
    staging: Staging,
) -> None:
    """Reads the log and stages, for each range of fingerprints, its items and their counts.

    Staged are `merged/` (tables of raw_id, fingerprint, count, and the numbers beside them),
    `inputs/` (a description of each of `files`), and what `read_source` stages.
    """
    merged = staging.stage("merged")
    with running(staging.options) as pipeline:
        rows, ids = read_source(pipeline, pieces, config, staging, key="candidate")
        parts = {
            "ids": ids | "CandidateIds" >> beam.FlatMap(_candidate_ids, config.partitions),
            "counts": rows | "CountBlock" >> beam.MapTuple(_count_block),
        }
        if previous:
            names = previous.files_of(schema.FREQUENCIES)
            paths = [str(Path(config.previous) / name) for name in names]
            load = "LoadPrevious" >> beam.FlatMap(_load_previous, config.partitions)
            parts["previous"] = spread(pipeline, "Previous", paths) | load
        ranges = (
            parts
            | "JoinCounts" >> beam.CoGroupByKey()
            | "MergeRange" >> beam.Map(partial(_merge_range, decay=config.decay, out=merged))
        )
        finish(ranges, stage_inputs(pipeline, {"source": files}, staging))


def _candidate_ids(element: tuple[int, Ids], partitions: int) -> Iterator[tuple[int, Ids]]:
    slot, ids = element
    side, part = divmod(slot, partitions)
    if schema.SIDES[side] == "candidate":
        yield part, ids


def _count_block(part: int, rows: np.ndarray) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    return part, np.unique(rows["candidate"], return_counts=True)


def _load_previous(path: str, partitions: int) -> Iterator[tuple[int, tuple[Ids, np.ndarray]]]:
    table = pq.read_table(path)
    prints, counts = (table[name].to_numpy() for name in (schema.FINGERPRINT, schema.COUNT))
    raw = table[schema.RAW_ID].cast(pa.binary()).to_pylist()
    for part, rows in by_range(prints, partitions):
        yield part, ((prints[rows], [raw[i] for i in rows]), counts[rows])


def _merge_range(element: tuple[int, dict[str, Any]], decay: float, out: Path) -> str:
    """Stages the items of one range of fingerprints with their counts, and how many they are."""
    part, found = element
    where = f"candidate ids, range {part}"
    earlier, ids_read = list(found.get("previous", ())), list(found["ids"])
    prints, raw = distinct_ids([*ids_read, *(ids for ids, _ in earlier)])
    before, known = np.zeros(len(prints)), np.zeros(len(prints), bool)
    for ids, counts in earlier:
        places = places_of(ids[0], prints, where)
        before[places], known[places] = counts, True
    today = np.zeros(len(prints), np.int64)
    for counted, rows in found["counts"]:
        today[places_of(counted, prints, where)] += rows
    counts = decay * before + today
    # A count that decays for years becomes 0 in the end, or so small that its share of all is 0.
    kept = counts >= np.finfo(np.float64).tiny
    names = [schema.RAW_ID, schema.FINGERPRINT, schema.COUNT]
    table = pa.table([pa.array(raw, pa.binary()), prints, counts], names)
    name = f"{part:05d}"
    write_table(table.filter(pa.array(kept)), out / f"{name}.parquet")
    sizes = {
        "candidate": sum(len(raw) for _, raw in ids_read),
        "rows": int(today.sum()),
        "previous_items": int(known.sum()),
        "new_items": int((~known).sum()),
        "forgotten_items": int((~kept).sum()),
        "items": int(kept.sum()),
    }
    write_json(out, name, sizes)
    return name


def write_shards(items: int, total: float, staging: Staging) -> None:
    """Staged counts → shards with `log_q`, and of each its histogram and most frequent items.

    Read is `merged/`, with `items` items, at least 1, and `total`, the sum of their counts.
    """
    num_shards = -(-items // ITEMS_PER_SHARD)
    files = sorted(map(str, staging.stage("merged").glob("*.parquet")))
    write = partial(
        _write_shard,
        num_shards=num_shards,
        total=total,
        empty=pq.read_schema(files[0]).empty_table(),
        out=staging.out,
        written=staging.stage("shards"),
    )
    with running(staging.options) as pipeline:
        _ = (
            spread(pipeline, "Merged", files)
            | "ByShard" >> beam.FlatMap(_by_shard, num_shards)
            | "GroupShards" >> beam.GroupByKey()
            | "Write" >> beam.MapTuple(write)
        )
    for number in range(num_shards):
        if not (staging.out / schema.frequencies_name(number, num_shards)).exists():
            write(number, [])  # a range of fingerprints without items is a shard all the same


def _by_shard(path: str, num_shards: int) -> Iterator[tuple[int, pa.Table]]:
    """Cuts a table into ranges of fingerprints, so that the shards in a row are in their order."""
    table = pq.read_table(path)
    unsigned = table[schema.FINGERPRINT].to_numpy().view(np.uint64) ^ np.uint64(1 << 63)
    numbers = shard_of(unsigned, num_shards)
    for number, rows in partition(np.arange(len(table)), numbers, num_shards):
        yield number, table.take(pa.array(rows))


def _write_shard(
    number: int,
    tables: Iterable[pa.Table],
    num_shards: int,
    total: float,
    empty: pa.Table,
    out: Path,
    written: Path,
) -> str:
    name = schema.frequencies_name(number, num_shards)
    table = pa.concat_tables([empty, *tables]).sort_by(schema.FINGERPRINT).combine_chunks()
    table = table.set_column(0, schema.RAW_ID, table[schema.RAW_ID].cast(pa.string()))
    counts = table[schema.COUNT].to_numpy()
    table = table.append_column(schema.LOG_Q, pa.array(np.log(counts / total)))
    write_table(table, out / name)
    most = table.select([schema.RAW_ID, schema.COUNT])
    if len(table):  # there is no first of none
        most = most.take(pc.select_k_unstable(most, NUM_MOST_FREQUENT, RANK_ORDER))
    summary = {"histogram": as_lists(histogram(counts)), "most_frequent": most.to_pylist()}
    write_json(written, name, summary)
    return name
