"""Reading: pieces of a source → blocks of rows, ids, dead letters and tallies.

Every job that reads a log starts here, so that a bad row is treated alike in all of them.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.accounting import AccountingError, check_sum
from pipeline.beam.blocks import (
    drop_duplicates,
    join,
    partition,
    partition_of,
)
from pipeline.beam.options import finish, running
from pipeline.beam.staging import (
    Staging,
    add_up,
    read_json,
    write_block,
    write_json,
)
from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.prepare.k_core import repartition
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.vocabulary import Ids, distinct_ids, write_table
from pipeline.read.discover import Piece, files_in, source_files
from pipeline.read.settings import SourceConfig
from pipeline.read.validate import DeadLetter, read_blocks

DEAD_LETTERS = "dead_letters.jsonl"
_ROWS, _IDS, _DEAD, _TALLY = "rows", "ids", "dead", "tally"  # kinds of what a piece gives


class Read(NamedTuple):
    """What `read_source` adds to a pipeline."""

    rows: beam.PCollection  # (range of fingerprints of the key's side, ROW [n])
    ids: beam.PCollection  # (side · partitions + range, (fingerprints int64 [n], raw ids))
    staged: tuple[beam.PCollection, beam.PCollection]  # dead letters, tallies; for `finish`


def ingest(
    pieces: list[Piece], config: PrepareConfig, options: PipelineOptions, staging: Staging
) -> None:
    """Pieces → blocks of distinct rows by query, ids by fingerprint, dead letters, tallies."""
    out = {name: staging.stage(name) for name in ("rows", "ids", "tally")}
    with running(options) as pipeline:
        read = read_source(pipeline, pieces, config, staging)
        rows = (
            read.rows
            | "GroupRows" >> beam.GroupByKey()
            | "StageRows"
            >> beam.MapTuple(partial(_stage_distinct, out=out, weights=config.duplicates))
        )
        ids = (
            read.ids
            | "GroupIds" >> beam.GroupByKey()
            | "StageIds"
            >> beam.MapTuple(partial(_stage_ids, out=out, partitions=config.partitions))
        )
        finish(rows, ids, *read.staged)


def read_source(
    pipeline: beam.Pipeline,
    pieces: list[Piece],
    config: SourceConfig,
    staging: Staging,
    key: str = "query",
) -> Read:
    """Reads and validates all pieces; `check_read` tells afterwards what became of the rows.

    Each key comes many times, and an id at least once for each block that holds it.

    Args:
      pipeline: what the steps are added to.
      pieces: from `find_pieces`.
      config: columns and rules.
      staging: takes the dead letters and the tallies.
      key: the side by whose id rows are keyed.
    """
    read = (
        pipeline
        | "Pieces" >> beam.Create(pieces)
        | "Spread" >> beam.Reshuffle()
        | "Read" >> beam.ParDo(ReadPiece(config, key))
    )
    dead, tally = staging.stage("dead"), staging.stage("tally")
    write_json(tally, "pieces", [piece.number for piece in pieces])
    letters = (
        read
        | "DeadLetters" >> beam.FlatMap(_only, kind=_DEAD)
        | "GroupDeadLetters" >> beam.GroupByKey()
        | "StageDeadLetters" >> beam.MapTuple(partial(_stage_letters, out=dead))
    )
    tallies = (
        read
        | "Tallies" >> beam.FlatMap(_only, kind=_TALLY)
        | "GroupTallies" >> beam.GroupByKey()
        | "StageTallies" >> beam.MapTuple(partial(_stage_tallies, out=tally))
    )
    return Read(
        read | "Rows" >> beam.FlatMap(_only, kind=_ROWS),
        read | "Ids" >> beam.FlatMap(_only, kind=_IDS),
        (letters, tallies),
    )


def _only(element: tuple[str, int, Any], kind: str) -> Iterator[tuple[int, Any]]:
    if element[0] == kind:
        yield element[1:]


class Tally(NamedTuple):
    """What became of the rows of one piece."""

    piece: int
    path: str
    counts: dict[str, int]  # read, bad, below_threshold
    ids: dict[str, int]  # side → ids sent, each once for every block that holds it
    days: dict[int, int]  # good rows by days since 1970, where rows have a time
    reasons: dict[str, int]  # bad rows by what is wrong with them
    problem: str  # why the piece could not be read to its end; empty when it could


class ReadPiece(beam.DoFn):
    """One piece → (kind, key, value): its rows and ids by range, dead letters, tally.

    A piece that cannot be read to its end is told in the tally: an exception would reach the
    user as a worker's stack trace, and differently from each runner.
    """

    def __init__(self, config: SourceConfig, key: str = "query") -> None:
        self._config, self._key = config, key
        self._bad = beam.metrics.Metrics.counter("read", "bad_rows")

    def process(self, piece: Piece) -> Iterator[Any]:
        partitions = self._config.partitions
        counts: Counter[str] = Counter()
        ids: Counter[str] = Counter()
        days: Counter[int] = Counter()
        reasons: Counter[str] = Counter()
        problem = ""
        try:
            for block in read_blocks(piece, self._config):
                counts.update(
                    read=block.num_read, bad=len(block.bad), below_threshold=block.num_below
                )
                if block.has_times:
                    found, sizes = np.unique(block.rows["timestamp"] // 86_400, return_counts=True)
                    days.update(dict(zip(found.tolist(), sizes.tolist(), strict=True)))
                reasons.update(letter.reason for letter in block.bad)
                self._bad.inc(len(block.bad))
                for part, rows in repartition(block.rows, self._key, partitions):
                    yield _ROWS, part, rows
                for side, (prints, raw) in block.ids.items():
                    ids[side] += len(raw)
                    first = schema.SIDES.index(side) * partitions
                    parts = partition_of(prints, partitions)
                    for part, places in partition(np.arange(len(raw)), parts, partitions):
                        yield _IDS, first + part, (prints[places], [raw[i] for i in places])
                if block.bad:
                    yield _DEAD, piece.number, block.bad
        except ValueError as error:
            problem = str(error)
        tally = (dict(counts), dict(ids), dict(days), dict(reasons), problem)
        yield _TALLY, 0, Tally(piece.number, piece.path, *tally)


def _stage_distinct(
    part: int, blocks: Iterable[np.ndarray], out: dict[str, Path], weights: str
) -> str:
    rows = join(blocks)
    kept = drop_duplicates(rows, weights)
    tally = {"duplicates": len(rows) - len(kept), "rows": len(kept)}
    write_json(out["tally"], f"distinct-{part:05d}", tally)
    return write_block(out["rows"], f"{part:05d}", kept)


def _stage_ids(slot: int, tables: Iterable[Ids], out: dict[str, Path], partitions: int) -> None:
    tables = list(tables)
    prints, raw = distinct_ids(tables)
    table = pa.table({schema.FINGERPRINT: prints, schema.RAW_ID: pa.array(raw, pa.binary())})
    tally = {schema.SIDES[slot // partitions]: sum(len(table[1]) for table in tables)}
    write_json(out["tally"], f"ids-{slot:05d}", tally)
    write_table(table, out["ids"] / f"{slot:05d}.parquet")


def _stage_letters(piece: int, letters: Iterable[list[DeadLetter]], out: Path) -> None:
    lines = [letter.as_json() + "\n" for letter in sorted(one for some in letters for one in some)]
    write_atomically(out / f"{piece:06d}.jsonl", "".join(lines))


def _stage_tallies(_: int, tallies: Iterable[Tally], out: Path) -> None:
    counts: Counter[str] = Counter()
    ids: Counter[str] = Counter()
    files: Counter[str] = Counter()
    days: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    problems, pieces = [], []
    for tally in tallies:
        pieces.append(tally.piece)
        counts.update(tally.counts)
        ids.update(tally.ids)
        files[tally.path] += tally.counts.get("read", 0)
        days.update(tally.days)
        reasons.update(tally.reasons)
        problems += [tally.problem] if tally.problem else []
    total = {"counts": counts, "ids": ids, "files": files, "days": days, "reasons": reasons}
    write_json(out, "read", total | {"problems": sorted(problems), "pieces": sorted(pieces)})


def check_read(config: SourceConfig, staging: Staging) -> dict[str, Any]:
    """What became of the rows of the whole source, after `read_source` has run.

    Returns:
      `counts` of rows: read, bad and below_threshold; `files`: rows read of each file; `days`:
      good rows of each day, as text YYYY-MM-DD in order, where rows have a time; `reasons`: bad
      rows by what is wrong with them, the most frequent first; `ids`: side → ids sent on.

    Raises:
      ValueError: a piece could not be read, a file or the source holds no rows, or too many
        rows are bad.
      AccountingError: a piece was not read, or read twice, or a dead letter is missing.
    """
    read = read_tally(staging)
    if read["problems"]:
        raise ValueError(read["problems"][0])
    counts = {name: read["counts"].get(name, 0) for name in ("read", "bad", "below_threshold")}
    if counts["read"] == 0:
        raise ValueError(f"{config.source} holds no rows; check --source.")
    names = [name for path in source_files(config) for name in files_in(path)]
    empty = [name for name in names if not read["files"].get(name)]
    if empty and not config.allow_empty_files:
        raise ValueError(
            f"{empty[0]} holds no rows, as do {len(empty) - 1} other file(s) of the source; is a "
            "day of the log missing? --allow_empty_files goes on without."
        )
    letters = _collect_letters(staging, counts["bad"])
    if counts["bad"] > config.max_bad_share * counts["read"]:
        kept = staging.destination.with_name(staging.destination.name + "." + DEAD_LETTERS)
        shutil.copyfile(letters, kept)
        with open(letters, encoding="utf-8") as file:
            first = file.readline().strip()
        raise ValueError(
            f"{counts['bad']} of {counts['read']} rows of {config.source} are bad, more than "
            f"--max_bad_share {config.max_bad_share:g}; all of them are in {kept}, the first is "
            f"{first}"
        )
    days = sorted((int(day), rows) for day, rows in read["days"].items())
    reasons = sorted(read["reasons"].items(), key=lambda pair: (-pair[1], pair[0]))
    return {
        "counts": counts,
        "files": dict(sorted(read["files"].items())),
        "days": {str(np.datetime64(day, "D")): rows for day, rows in days},
        "reasons": dict(reasons),
        "ids": read["ids"],
    }


def read_tally(staging: Staging) -> dict[str, Any]:
    """The tallies of all pieces, added up.

    Raises:
      AccountingError: a piece was not read, or read twice.
    """
    tally = staging.stage("tally")
    pieces, read = read_json(tally, "pieces"), read_json(tally, "read")
    if read["pieces"] != pieces:
        raise AccountingError(
            f"reading the log: {len(pieces)} pieces went in, {len(read['pieces'])} were read, "
            f"{len(set(read['pieces']))} of them different"
        )
    return read


def check_ingested(config: PrepareConfig, staging: Staging) -> dict[str, Any]:
    """As `check_read`, after `ingest` has run, with the counts `duplicates` and `rows`.

    Returns:
      What `check_read` returns, but `ids`: side → number of different ids in the good rows.

    Raises:
      ValueError: as `check_read`, or no row is left.
      AccountingError: as `check_read`, or rows or ids were lost or made twice.
    """
    read, tally = check_read(config, staging), staging.stage("tally")
    counts = read["counts"] | {"duplicates": 0, "rows": 0} | add_up(tally, "distinct-*")
    drops = ("bad", "below_threshold", "duplicates")
    check_sum("reading the log", counts["read"], counts, (*drops, "rows"))
    came = add_up(tally, "ids-*")
    for side, sent in read["ids"].items():
        check_sum("reading the log", sent, came, [side], f"{side} ids")
    if counts["rows"] == 0:
        raise ValueError(f"no row of {config.source} is left: {counts}; check --rating_threshold.")
    ids = dict.fromkeys(schema.SIDES, 0)
    for path in staging.stage("ids").glob("*.parquet"):
        ids[schema.SIDES[int(path.stem) // config.partitions]] += pq.read_metadata(path).num_rows
    return read | {"counts": counts, "ids": ids}


def _collect_letters(staging: Staging, bad: int) -> Path:
    """One dead-letter file in the order of the source; it is empty when no row was bad."""
    path, letters = staging.out / DEAD_LETTERS, 0
    with open(path, "wb") as collected:
        for part in sorted(staging.stage("dead").glob("*.jsonl")):
            with open(part, "rb") as file:
                for line in file:
                    collected.write(line)
                    letters += 1
    check_sum("bad rows of the log", bad, {"dead letters": letters}, ["dead letters"])
    return path
