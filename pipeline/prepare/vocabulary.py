"""Vocabularies: raw id ↔ dense id, by descending count, then by raw id.

A dense id is the rank of an id in its whole side, yet no worker sees a whole side: ids go to ranges
of ranks by boundaries that a sample gives, each range is sorted alone, and the sizes of the ranges
before it make its offset. The boundaries decide where work is done, never what comes out.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beam.accounting import AccountingError, places_of
from pipeline.beam.blocks import begins, by_range
from pipeline.contract import schema
from pipeline.contract.files import written_aside

Ids = tuple[np.ndarray, list[bytes]]  # fingerprints int64 [n], raw ids in UTF-8
TRAIN = "train"  # column of counted ids beside those of a vocabulary: rows in train
RANK_ORDER = [(schema.COUNT, "descending"), (schema.RAW_ID, "ascending")]
_SAMPLE = 4096  # keys of a side, about, that the boundaries are chosen from


def distinct_ids(tables: Iterable[Ids]) -> Ids:
    """Each id once, by fingerprint; ValueError: two different ids have one fingerprint."""
    tables = [(np.empty(0, np.int64), []), *tables]
    prints = np.concatenate([table[0] for table in tables])
    raw = np.array([value for table in tables for value in table[1]], object)
    by_print = np.argsort(prints, kind="stable")
    prints, raw = prints[by_print], raw[by_print]
    new = begins(prints)
    clash = ~new[1:] & (raw[1:] != raw[:-1])
    if clash.any():
        first = int(np.flatnonzero(clash)[0])
        raise ValueError(
            f"the ids {raw[first]!r} and {raw[first + 1]!r} have the same 64-bit fingerprint; "
            "rename one of them in the source."
        )
    return prints[new], list(raw[new])


def count_ids(counted: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Adds up what `count_block` counts: each id once, int64 [n], ascending, and counts [n, 2]."""
    table = np.concatenate([np.empty((0, 4), np.int64), *counted])
    ids, codes = np.unique(table[:, 1], return_inverse=True)
    sums = np.zeros((len(ids), 2), np.int64)
    np.add.at(sums, codes, table[:, 2:])
    return ids, sums


def replace_ids(
    ids: np.ndarray, tables: Iterable[tuple[np.ndarray, np.ndarray]], where: str
) -> np.ndarray:
    """Fingerprints → dense ids by tables of both, [m] each; AccountingError: an id is in none."""
    tables = [(np.empty(0, np.int64),) * 2, *tables]
    prints = np.concatenate([prints for prints, _ in tables])
    by_print = np.argsort(prints, kind="stable")
    dense = np.concatenate([dense for _, dense in tables])
    return dense[by_print[places_of(ids, prints[by_print], where)]]


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file in one step: the same table gives the same bytes."""
    with written_aside(path) as aside:
        pq.write_table(table, aside)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The ids of one range of ranks, in order."""

    rank_range: int  # side · partitions + range
    offset: int  # dense id of the first
    total: int  # ids of the whole side
    table: pa.Table


@beam.typehints.with_input_types(tuple[int, pa.Table])
@dataclasses.dataclass
class RankIds(beam.PTransform):
    """(slot, counted ids) → `shards` written, `dense`: (slot, (fingerprints, dense ids)).

    A slot is side · partitions + range of fingerprints. Counted ids are a table with the columns
    raw_id (binary), fingerprint, count and `TRAIN`, one a slot, every id in one of them.
    """

    partitions: int  # ranges of fingerprints, and of ranks
    slots: list[int]  # those that have a table, empty or not
    ids_per_shard: int  # it alone decides how vocabularies are cut
    out: Path

    def expand(self, counted: beam.PCollection) -> Any:  # a dict; Beam has no type for it
        ranked = (
            counted
            | "SendSamples" >> beam.FlatMap(self._send_samples)
            | "GroupSlots" >> beam.GroupByKey()
            | "ByRankRange" >> beam.FlatMap(self._by_rank_range)
            | "GroupRankRanges" >> beam.GroupByKey()
            | "SortRankRange" >> beam.MapTuple(_sort_range)
            | "SendSizes" >> beam.FlatMap(self._send_sizes)
            | "GroupSizes" >> beam.GroupByKey()
            | "Rank" >> beam.FlatMap(_with_offset)
        )
        shards = (
            ranked
            | "ByShard" >> beam.FlatMap(self._by_shard)
            | "GroupShards" >> beam.GroupByKey()
            | "WriteShard" >> beam.MapTuple(self._write_shard)
        )
        return {"shards": shards, "dense": ranked | "Dense" >> beam.FlatMap(self._dense)}

    def _ranges(self, slot: int) -> range:
        """All ranges of the same side, of fingerprints or ranks."""
        first = slot // self.partitions * self.partitions
        return range(first, first + self.partitions)

    def _others(self, slot: int) -> list[int]:
        """All slots of the same side that have a table."""
        return [other for other in self.slots if other in self._ranges(slot)]

    def _send_samples(self, element: tuple[int, pa.Table]) -> Iterator[tuple[int, Any]]:
        """The ids to their slot, in order, and a sample of their keys to all slots of the side."""
        slot, table = element[0], element[1].sort_by(RANK_ORDER)
        wanted = max(4, _SAMPLE // self.partitions)
        keys = _rows(table, np.arange(0, len(table), max(1, len(table) // wanted)))
        counts, raw = keys[schema.COUNT].to_numpy(), keys[schema.RAW_ID].to_pylist()
        sample = list(zip((-counts).tolist(), raw, strict=True))
        yield slot, table
        for other in self._others(slot):
            yield other, sample

    def _by_rank_range(self, element: tuple[int, Iterable[Any]]) -> Iterator[tuple[int, pa.Table]]:
        """Cuts the ids of a slot where the keys of all samples say that a range of ranks begins."""
        slot, sent = element
        tables, samples = _by_type(sent)
        expected = len(self._others(slot))
        if (len(tables), len(samples)) != (1, expected):
            side, part = divmod(slot, self.partitions)
            raise AccountingError(
                f"{schema.SIDES[side]} ids, range {part}: of 1 table and {expected} samples came "
                f"{len(tables)} and {len(samples)}"
            )
        [table] = tables
        keys = sorted(key for sample in samples for key in sample)
        places = np.arange(1, self.partitions) * len(keys) // self.partitions if keys else ()
        boundaries = sorted({keys[place] for place in places})
        descending = -table[schema.COUNT].to_numpy()
        raw = table[schema.RAW_ID].combine_chunks()
        cuts = [0, *(_place(descending, raw, key) for key in boundaries), len(table)]
        for number, (start, end) in enumerate(itertools.pairwise(cuts), self._ranges(slot).start):
            if end > start:
                yield number, _rows(table, np.arange(start, end))

    def _send_sizes(self, element: tuple[int, pa.Table]) -> Iterator[tuple[int, Any]]:
        """The ids to their range of ranks, and their number to all ranges of the side."""
        rank_range, table = element
        yield rank_range, table
        for other in self._ranges(rank_range):
            yield other, (rank_range, len(table))

    def _by_shard(self, ranked: Ranked) -> Iterator[tuple[Any, tuple[int, pa.Table]]]:
        """((side, shard, ids of the side), (place in the shard, ids))."""
        side, rows = ranked.rank_range // self.partitions, np.arange(len(ranked.table))
        shards, places = np.divmod(rows + ranked.offset, self.ids_per_shard)
        firsts = np.flatnonzero(np.diff(shards, prepend=-1))
        for first, part in zip(firsts, np.split(rows, firsts[1:]), strict=True):
            key = side, int(shards[first]), ranked.total
            yield key, (int(places[first]), _rows(ranked.table, part))

    def _write_shard(self, key: tuple[int, int, int], parts: Iterable[tuple[int, pa.Table]]) -> str:
        side, shard, total = schema.SIDES[key[0]], key[1], key[2]
        shards = -(-total // self.ids_per_shard)
        name = schema.vocabulary_name(side, shard, shards)
        ordered = sorted(parts, key=lambda part: part[0])
        ends = np.cumsum([len(part) for _, part in ordered]).tolist()
        size = min(self.ids_per_shard, total - shard * self.ids_per_shard)
        if [place for place, _ in ordered] != [0, *ends[:-1]] or ends[-1] != size:
            raise AccountingError(
                f"{name}: its {size} ids must lie side by side, {ends[-1]} came in parts"
            )
        table = pa.concat_tables([part for _, part in ordered]).combine_chunks()
        raw = table[schema.RAW_ID].cast(pa.string())
        vocabulary = table.drop_columns([TRAIN]).set_column(0, schema.RAW_ID, raw)
        write_table(vocabulary, self.out / name)
        if side == "candidate":
            counts = pa.table({schema.COUNT: table[TRAIN]})
            write_table(counts, self.out / schema.train_counts_name(shard, shards))
        return name

    def _dense(self, ranked: Ranked) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        prints = ranked.table[schema.FINGERPRINT].to_numpy()
        dense = np.arange(ranked.offset, ranked.offset + len(prints))
        first = self._ranges(ranked.rank_range).start
        for part, places in by_range(prints, self.partitions):
            yield first + part, (prints[places], dense[places])


def _rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of a table, taken, not sliced: a slice would travel with the whole table behind it."""
    return table.take(pa.array(rows))


def _place(descending: np.ndarray, raw: pa.Array, key: tuple[int, bytes]) -> int:
    """Where a key stands among rows sorted by (-count, raw id): the first row not before it."""
    low = int(np.searchsorted(descending, key[0], "left"))
    high = int(np.searchsorted(descending, key[0], "right"))
    return bisect.bisect_left(range(high), key[1], low, high, key=lambda row: raw[row].as_py())


def _sort_range(rank_range: int, tables: Iterable[pa.Table]) -> tuple[int, pa.Table]:
    return rank_range, pa.concat_tables(list(tables)).sort_by(RANK_ORDER).combine_chunks()


def _with_offset(element: tuple[int, Iterable[Any]]) -> Iterator[Ranked]:
    rank_range, sent = element
    tables, sizes = _by_type(sent)
    own = [size for number, size in sizes if number == rank_range]
    if own != [len(table) for table in tables]:
        raise AccountingError(
            f"ids, range of ranks {rank_range}: of tables of {own} ids came {len(tables)}"
        )
    offset = sum(size for number, size in sizes if number < rank_range)
    total = sum(size for _, size in sizes)
    for table in tables:
        yield Ranked(rank_range, offset, total, table)


def _by_type(sent: Iterable[Any]) -> tuple[list[pa.Table], list[Any]]:
    """The tables among what was sent to a key, and the rest."""
    sent = list(sent)
    tables = [one for one in sent if isinstance(one, pa.Table)]
    return tables, [one for one in sent if not isinstance(one, pa.Table)]
