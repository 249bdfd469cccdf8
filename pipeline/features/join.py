"""Joining: values of one range of fingerprints, by id, with the ids of the vocabulary in it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.beam.accounting import look_up
from pipeline.beam.blocks import partition, partition_of
from pipeline.beam.staging import write_json
from pipeline.contract import schema
from pipeline.features.columns import Statistics, describe
from pipeline.features.read import values_schema
from pipeline.features.tables import Table
from pipeline.features.values import TEXT
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.split import assign_splits
from pipeline.prepare.vocabulary import write_table

DENSE = "dense"  # column of joined values: dense id, -1 for an id without interactions
Known = tuple[np.ndarray, np.ndarray, pa.Array]  # fingerprints, dense ids, raw ids, [n] each


class VocabularyShard(NamedTuple):
    """A file of a vocabulary."""

    side: str
    path: str
    first: int  # dense id of the first row
    rows: int


def vocabulary_shards(out: Path, side: str) -> list[VocabularyShard]:
    """The files of the vocabulary of a side, in order."""
    shards, first = [], 0
    for path in sorted(out.glob(f"{side}_vocabulary-*.parquet")):
        shards.append(VocabularyShard(side, str(path), first, pq.read_metadata(path).num_rows))
        first += shards[-1].rows
    return shards


def load_vocabulary(shard: VocabularyShard, partitions: int) -> Iterator[tuple[int, Known]]:
    """The ids of a shard by slot."""
    table = pq.read_table(shard.path, columns=[schema.FINGERPRINT, schema.RAW_ID]).combine_chunks()
    prints, raw = table[schema.FINGERPRINT].to_numpy(), table[schema.RAW_ID].cast(TEXT)
    slot = schema.SIDES.index(shard.side) * partitions
    parts = partition_of(prints, partitions)
    for part, rows in partition(np.arange(len(prints)), parts, partitions):
        yield slot + part, (prints[rows], shard.first + rows, raw.take(rows).combine_chunks())


def train_ids(
    element: tuple[int, np.ndarray], config: PrepareConfig, sides: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """(range, all rows of its queries) → the fingerprint of each train row's id, by slot."""
    rows = assign_splits(element[1], config)
    rows = rows[rows["split"] == schema.SPLITS.index("train")]
    for side in sides:
        slot = schema.SIDES.index(side) * config.partitions
        parts = partition_of(rows[side], config.partitions)
        for part, ids in partition(rows[side], parts, config.partitions):
            yield slot + part, ids


def join_slot(
    element: tuple[int, dict[str, Iterable[Any]]],
    tables: dict[str, Table],
    partitions: int,
    out: Path,
) -> Iterator[tuple[tuple[int, int], Statistics]]:
    """Stages the joined values of one slot: ((side, column), their statistics).

    Every id of the vocabulary has a row, of nulls where the table has none. A tally tells what
    became of the rows of the table.
    """
    slot, grouped = element
    side = slot // partitions
    table = tables[schema.SIDES[side]]
    blocks = [values_schema(table).empty_table(), *grouped["values"]]
    values, duplicates, conflicts = distinct_rows(pa.concat_tables(blocks).combine_chunks())
    no_ids: Known = np.empty(0, np.int64), np.empty(0, np.int64), pa.array([], TEXT)
    all_prints, all_dense, all_raw = zip(no_ids, *grouped["dense"], strict=True)
    prints, dense = np.concatenate(all_prints), np.concatenate(all_dense)
    raw = pa.concat_arrays(all_raw)
    train_rows = np.concatenate([np.empty(0, np.int64), *grouped["train"]])
    train = np.isin(prints, train_rows)
    have = values[schema.FINGERPRINT].to_numpy()
    places, hit = look_up(prints, have)
    joined = values.take(pa.array(places, mask=~hit))
    other = pc.not_equal(joined[schema.RAW_ID], raw).fill_null(False)  # of one fingerprint
    conflicts += raw.filter(other.combine_chunks()).to_pylist()
    cold = np.ones(len(have), bool)
    cold[places[hit]] = False
    rest = values.filter(pa.array(cold))
    all_dense = pa.array(np.r_[dense, np.full(len(rest), -1)])
    staged = pa.concat_tables([joined, rest]).append_column(DENSE, all_dense)
    write_table(staged.combine_chunks(), out / f"{slot:05d}.parquet")
    tally = {
        "ids": len(prints),
        "duplicates": duplicates,
        "joined": int(hit.sum()),
        "cold": len(rest),
        "train": len(train_rows),
        "conflicts": sorted(conflicts)[:1],
    }
    write_json(out, f"tally-{slot:05d}", tally)
    for number, kind in enumerate(table.kinds.values()):
        yield (side, number), describe(joined[str(number)], kind, train)


def distinct_rows(values: pa.Table) -> tuple[pa.Table, int, list[str]]:
    """Each id once by fingerprint, rows that repeat one, ids whose rows are not equal."""
    prints = values[schema.FINGERPRINT].to_numpy()
    order = np.argsort(prints, kind="stable")
    values, prints = values.take(pa.array(order)).combine_chunks(), prints[order]
    repeated = np.r_[False, prints[1:] == prints[:-1]][: len(prints)]
    later = np.flatnonzero(repeated)
    first, second = (values.take(pa.array(rows)) for rows in (later - 1, later))
    same = np.ones(len(later), bool)
    for name in values.column_names:
        same &= _equal(first[name], second[name])
    conflicts = second[schema.RAW_ID].filter(pa.array(~same)).to_pylist()
    return values.filter(pa.array(~repeated)), len(later), conflicts


def _equal(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Where two columns agree, a null with a null too: bool [n]."""
    if pa.types.is_large_list(first.type):
        pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
        return np.array([a == b for a, b in pairs], bool)
    both = pc.and_(pc.is_null(first), pc.is_null(second))
    return pc.coalesce(pc.equal(first, second), both).to_numpy()
