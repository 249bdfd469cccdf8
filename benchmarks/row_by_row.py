"""The preparation graph with one element a row, as the opponent of the one with blocks.

The same steps in the same order (read and check, duplicates, split by user, counts, dense ids,
both joins, shards), each as a Beam pipeline is commonly written first: `Map` on rows, `GroupByKey`
on raw ids, a vocabulary sorted on one worker. It knows the random split and two columns of ids. Its
shards have the bytes of `twotower prepare`, which the benchmark checks.

    python -m benchmarks.row_by_row SOURCE OUTPUT SHARDS
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.blocks import ROW
from pipeline.contract import hashing, schema
from pipeline.prepare.shards import shard_of, write_shard

SEED, TRAIN_RATIO = 10, 0.8  # the defaults of `twotower prepare`
_WORD = (1 << 64) - 1


class Interaction(NamedTuple):
    """One row of the log."""

    user: str
    item: str
    order: int


class Example(NamedTuple):
    """One row of the output; ids are raw until they are replaced."""

    query: str | int
    candidate: str | int
    order: int
    split: int


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)


def _start(salt: str) -> int:
    return _mix(_mix(SEED) ^ (hashing.fingerprint(salt) & _WORD))


def _hash(start: int, user: str, item: str) -> int:
    state = _mix(start ^ (hashing.fingerprint(user) & _WORD))
    return _mix(state ^ (hashing.fingerprint(item) & _WORD))


SPLIT, ORDER = _start("split"), _start("order")


def read_rows(piece: tuple[str, int]) -> Iterator[dict[str, object]]:
    """The rows of one row group."""
    path, group = piece
    yield from pq.ParquetFile(path).read_row_group(group, ["user_id", "item_id"]).to_pylist()


def check_row(row: dict[str, object]) -> Iterator[tuple[tuple[str, str], Interaction]]:
    """A row with both ids, by its pair."""
    if row["user_id"] is not None and row["item_id"] is not None:
        user, item = str(row["user_id"]), str(row["item_id"])
        if user and item:
            yield (user, item), Interaction(user, item, 0)


def split_user(element: tuple[str, Iterable[str]]) -> Iterator[Example]:
    """All rows of one user, in the order of their hashes: the first ones are train."""
    user, items = element
    ordered = sorted(items, key=lambda item: _hash(SPLIT, user, item))
    train = max(round(TRAIN_RATIO * len(ordered)), 1)
    for place, item in enumerate(ordered):
        yield Example(user, item, _hash(ORDER, user, item), 0 if place < train else 2)


def rank(
    element: tuple[None, Iterable[tuple[str, int]]], side: str, output: str
) -> Iterator[tuple[str, int]]:
    """The vocabulary of one side, on one worker."""
    counts = sorted(element[1], key=lambda pair: (-pair[1], pair[0].encode()))
    raw = [raw for raw, _ in counts]
    table = pa.table(
        {
            schema.RAW_ID: pa.array(raw, pa.string()),
            schema.FINGERPRINT: np.array([hashing.fingerprint(one) for one in raw], np.int64),
            schema.COUNT: np.array([count for _, count in counts], np.int64),
        }
    )
    pq.write_table(table, Path(output) / schema.vocabulary_name(side))
    for dense, one in enumerate(raw):
        yield one, dense


def replace(element: tuple[str, dict[str, list]], side: str) -> Iterator[Example]:
    """The rows of one raw id with its dense id."""
    (dense,) = element[1]["dense"]
    for row in element[1]["rows"]:
        yield row._replace(**{side: dense})


def write_rows(number: int, rows: Iterable[Example], shards: int, output: str) -> None:
    """One shard, in the order of the hashes."""
    ordered = sorted(rows, key=lambda row: (row.order, row.query, row.candidate))
    block = np.zeros(len(ordered), ROW)
    block["query"] = [row.query for row in ordered]
    block["candidate"] = [row.candidate for row in ordered]
    split, shard = divmod(number, shards)
    name = schema.shard_name(schema.SPLITS[split], shard, shards)
    write_shard(Path(output) / name, block, (schema.QUERY_ID, schema.CANDIDATE_ID))


def shard_number(row: Example, shards: int) -> int:
    """The shard of a row over all splits."""
    return row.split * shards + int(shard_of(np.array([row.order], np.uint64), shards)[0])


def prepare_rows(source: str, output: str, shards: int) -> None:
    """Runs the graph on the FnApiRunner; `output` must exist.

    Args:
      source: Parquet file with the columns user_id and item_id.
      output: directory for shards and vocabularies.
      shards: files of a split.
    """
    metadata = pq.ParquetFile(source).metadata
    pieces = [(source, group) for group in range(metadata.num_row_groups)]
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        rows = (
            pipeline
            | "Pieces" >> beam.Create(pieces)
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(read_rows)
            | "Check" >> beam.FlatMap(check_row)
            | "GroupPairs" >> beam.GroupByKey()
            | "Earliest" >> beam.MapTuple(lambda _, same: min(same, key=lambda row: row.order))
            | "ByUser" >> beam.Map(lambda row: (row.user, row.item))
            | "GroupUsers" >> beam.GroupByKey()
            | "Split" >> beam.FlatMap(split_user)
        )
        for side in ("candidate", "query"):
            dense = (
                rows
                | f"Ids{side}" >> beam.Map(lambda row, side=side: getattr(row, side))
                | f"Count{side}" >> beam.combiners.Count.PerElement()
                | f"OneKey{side}" >> beam.Map(lambda pair: (None, pair))
                | f"Gather{side}" >> beam.GroupByKey()
                | f"Rank{side}" >> beam.FlatMap(rank, side, output)
            )
            by_id = rows | f"By{side}" >> beam.Map(lambda row, s=side: (getattr(row, s), row))
            rows = (
                {"rows": by_id, "dense": dense}
                | f"Join{side}" >> beam.CoGroupByKey()
                | f"Replace{side}" >> beam.FlatMap(replace, side)
            )
        _ = (
            rows
            | "ByShard" >> beam.Map(lambda row: (shard_number(row, shards), row))
            | "GroupShards" >> beam.GroupByKey()
            | "Write" >> beam.MapTuple(lambda n, found: write_rows(n, found, shards, output))
        )


if __name__ == "__main__":
    prepare_rows(sys.argv[1], sys.argv[2], int(sys.argv[3]))
