"""Reading a log with Beam: pieces of a source → blocks of rows and ids, dead letters and tallies.

Every job that reads a log starts here, so that a bad row is treated alike in all of them.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.beam.accounting import AccountingError, check_sum
from pipeline.beam.blocks import ROW, by_range, repartition
from pipeline.beam.options import spread
from pipeline.beam.staging import Staging, read_all, read_json, write_json
from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.read.cells import Checks, ids_of, numbers_of, seconds_of
from pipeline.read.discover import Piece, files_in, resolve_columns, source_files
from pipeline.read.readers import DeadLetter, read_checked
from pipeline.read.settings import SourceConfig

DEAD_LETTERS = "dead_letters.jsonl"
# What a tally counts: rows (read, bad, below_threshold), ids sent by side (each once for every
# block that holds it), rows read by file, good rows by days since 1970, bad rows by reason.
TALLIES = ("counts", "ids", "files", "days", "reasons")


class Block(NamedTuple):
    """What one block of a piece gave."""

    rows: np.ndarray  # ROW [n], ids are fingerprints
    ids: dict[str, tuple[np.ndarray, list[bytes]]]  # side → fingerprints, raw ids; each id once,
    # without a side whose column is not read
    num_below: int  # rows below the rating threshold
    has_times: bool  # whether rows have a timestamp


def read_blocks(
    piece: Piece, config: SourceConfig
) -> Iterator[tuple[Block, list[DeadLetter], int]]:
    """Reads and validates one piece: blocks, the bad rows of each, and how many rows it had.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """

    def validate(batch: pa.RecordBatch, numbers: np.ndarray, checks: Checks) -> Block:
        columns = resolve_columns(batch.schema.names, config, piece.path)
        rows = np.zeros(len(batch), ROW)
        rows["order"] = (piece.number << 40) + numbers
        rows["split"], rows["weight"] = piece.split, 1
        codes, ids = {}, {}
        for side, name in zip(schema.SIDES, (columns.user, columns.item), strict=True):
            if name:
                codes[side], ids[side] = ids_of(batch[name], name, checks)
        if name := columns.timestamp:
            rows["timestamp"] = seconds_of(batch[name], name, config, checks)
            if config.latest_time is not None:
                checks.fail(rows["timestamp"] > config.latest_time, f"{name} is in the future")
        if name := columns.weight:
            rows["weight"] = numbers_of(batch[name], name, checks)
            checks.fail(rows["weight"] < 0, f"{name} is negative")
        keep = np.ones(len(batch), bool)
        if name := columns.rating:
            keep = numbers_of(batch[name], name, checks) >= config.rating_threshold
        keep &= checks.good
        for side, (fingerprints, raw) in ids.items():
            rows[side] = fingerprints[codes[side]] if len(fingerprints) else 0
            used = np.unique(codes[side][keep])
            ids[side] = (fingerprints[used], [raw[i] for i in used])
        num_below = int(checks.good.sum() - keep.sum())
        return Block(rows[keep], ids, num_below, columns.timestamp is not None)

    def choose(names: list[str]) -> list[str]:
        return resolve_columns(names, config, piece.path).read()

    return read_checked(piece, config, choose, validate)


class Read(NamedTuple):
    """What `read_source` adds to a pipeline."""

    rows: beam.PCollection  # (range of fingerprints of the key's side, ROW [n])
    ids: beam.PCollection  # (side · partitions + range, (fingerprints int64 [n], raw ids))


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
      pieces: from `find_pieces`.
      staging: takes the dead letters and the tallies.
      key: the side by whose id rows are keyed.
    """
    dead, tally = staging.stage("dead"), staging.stage("tally")
    write_json(tally, "pieces", [piece.number for piece in pieces])
    reader = ReadPiece(config, key, dead, tally)
    read = spread(pipeline, "Pieces", pieces) | "Read" >> beam.ParDo(reader)
    return Read(*(read | kind >> beam.FlatMap(_only, kind) for kind in ("Rows", "Ids")))


def _only(element: tuple[str, int, Any], kind: str) -> Iterator[tuple[int, Any]]:
    if element[0] == kind:
        yield element[1:]


class ReadPiece(beam.DoFn):
    """One piece → (kind, key, value): its rows and ids by range; stages dead letters and a tally.

    A piece that is read again overwrites both. The tally says which piece could not be read to its
    end: an exception would reach the user as a worker's stack trace, and differently from each
    runner.
    """

    def __init__(self, config: SourceConfig, key: str, dead: Path, tally: Path) -> None:
        self._config, self._key, self._dead, self._tally = config, key, dead, tally
        self._bad = beam.metrics.Metrics.counter("read", "bad_rows")

    def process(self, piece: Piece) -> Iterator[Any]:
        partitions = self._config.partitions
        tally: dict[str, Counter[Any]] = {kind: Counter() for kind in TALLIES}
        letters: list[DeadLetter] = []
        problem, name = "", f"{piece.number:06d}"
        try:
            for block, bad, num_read in read_blocks(piece, self._config):
                tally["counts"].update(read=num_read, bad=len(bad), below_threshold=block.num_below)
                if block.has_times:
                    days, sizes = np.unique(block.rows["timestamp"] // 86_400, return_counts=True)
                    tally["days"].update(dict(zip(days.tolist(), sizes.tolist(), strict=True)))
                letters += bad
                self._bad.inc(len(bad))
                for part, rows in repartition(block.rows, self._key, partitions):
                    yield "Rows", part, rows
                for side, (prints, raw) in block.ids.items():
                    tally["ids"][side] += len(raw)
                    first = schema.SIDES.index(side) * partitions
                    for part, places in by_range(prints, partitions):
                        yield "Ids", first + part, (prints[places], [raw[i] for i in places])
        except ValueError as error:
            problem = str(error)
        tally["files"][piece.path] = tally["counts"]["read"]
        tally["reasons"].update(letter.reason for letter in letters)
        lines = "".join(letter.as_json() + "\n" for letter in sorted(letters))
        write_atomically(self._dead / f"{name}.jsonl", lines)
        told = {"piece": piece.number, "problem": problem}
        write_json(self._tally, f"piece-{name}", told | tally)


def read_tally(staging: Staging) -> dict[str, Any]:
    """The tallies of all pieces, added up, and the `problems` of those that could not be read.

    Raises:
      AccountingError: a piece was not read.
    """
    staged = staging.stage("tally")
    pieces = read_json(staged, "pieces")
    tallies = list(read_all(staged, "piece-*").values())
    if sorted(tally["piece"] for tally in tallies) != pieces:
        raise AccountingError(
            f"reading the log: {len(pieces)} pieces went in, {len(tallies)} were read"
        )
    read: dict[str, Any] = {kind: Counter() for kind in TALLIES}
    for tally in tallies:
        for kind, total in read.items():
            total.update(tally[kind])
    return read | {"problems": sorted(t["problem"] for t in tallies if t["problem"])}


def check_read(config: SourceConfig, staging: Staging) -> dict[str, Any]:
    """What became of the rows of the whole source, after `read_source` has run.

    Returns:
      `counts` of rows: read, bad and below_threshold; `files`: rows read of each file; `days`:
      good rows of each day, as text YYYY-MM-DD in order, where rows have a time; `reasons`: bad
      rows by what is wrong with them, the most frequent first; `ids`: side → ids sent on.

    Raises:
      ValueError: a piece could not be read, a file or the source holds no rows, or too many
        rows are bad.
      AccountingError: a piece was not read, or a dead letter is missing.
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
    letters = sorted(staging.stage("dead").glob("*.jsonl"))
    check_bad(letters, DEAD_LETTERS, counts, config, staging)
    days = sorted((int(day), rows) for day, rows in read["days"].items())
    reasons = sorted(read["reasons"].items(), key=lambda pair: (-pair[1], pair[0]))
    return {
        "counts": counts,
        "files": dict(sorted(read["files"].items())),
        "days": {str(np.datetime64(day, "D")): rows for day, rows in days},
        "reasons": dict(reasons),
        "ids": read["ids"],
    }


def check_bad(
    letters: list[Path],
    name: str,
    counts: dict[str, int],
    config: SourceConfig,
    staging: Staging,
    hint: str = "",
) -> None:
    """Puts the dead letters of a source into one file of the output; there may not be too many.

    Args:
      letters: the files of the pieces, in the order of the source.
      name: of the file; it is empty when no row was bad.
      counts: rows `read` and `bad`.
      hint: what the user may have got wrong.

    Raises:
      ValueError: too many rows are bad; their letters are in `<output>.<name>`.
      AccountingError: a dead letter is missing.
    """
    path, number = staging.out / name, 0
    with open(path, "wb") as collected:
        for part in letters:
            lines = part.read_bytes()
            collected.write(lines)
            number += lines.count(b"\n")
    check_sum(f"bad rows of {config.source}", counts["bad"], {"dead letters": number})
    if counts["bad"] > config.max_bad_share * counts["read"]:
        kept = staging.destination.with_name(f"{staging.destination.name}.{name}")
        shutil.copyfile(path, kept)
        with open(path, encoding="utf-8") as file:
            first = file.readline().strip()
        raise ValueError(
            f"{counts['bad']} of {counts['read']} rows of {config.source} are bad, more than "
            f"--max_bad_share {config.max_bad_share:g}; {hint}all of them are in {kept}, the "
            f"first is {first}"
        )
