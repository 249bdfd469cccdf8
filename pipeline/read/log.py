"""Reading a log with Beam: pieces of a source → blocks of rows and ids, dead letters and tallies.

Every job that reads a log starts here, so that a bad row is treated alike in all of them.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import ROW, by_range
from pipeline.beam.options import spread
from pipeline.beam.staging import Staging, read_all, read_json, write_json
from pipeline.contract import schema
from pipeline.contract.files import absolute, written_aside
from pipeline.read.cells import Checks, ids_of, numbers_of, seconds_of
from pipeline.read.discover import Piece, resolve_columns, source_files
from pipeline.read.formats import files_in
from pipeline.read.readers import DeadLetter, read_checked
from pipeline.read.settings import SourceConfig

DEAD_LETTERS = "dead_letters.jsonl"
IN_THE_FUTURE = "is in the future"  # the reason of a dead letter
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
    piece: Piece, config: SourceConfig, latest: int | None = None
) -> Iterator[tuple[Block, list[DeadLetter], int]]:
    """Reads and validates one piece: blocks, bad rows, the number of both; see `read_checked`."""

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
            if latest is not None:
                checks.fail(rows["timestamp"] > latest, f"{name} {IN_THE_FUTURE}")
        if name := columns.weight:
            weights = numbers_of(batch[name], name, checks)
            checks.fail(weights < 0, f"{name} is negative")
            checks.fail(weights > np.finfo(np.float32).max, f"{name} is out of range")
            rows["weight"] = np.where(checks.good, weights, 0)
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


def read_source(
    pipeline: beam.Pipeline,
    pieces: list[Piece],
    config: SourceConfig,
    staging: Staging,
    key: str = "query",  # the field by which rows are keyed
    latest: int | None = None,  # time, in seconds since 1970, that a good row may have
) -> tuple[beam.PCollection, beam.PCollection]:
    """Reads and validates all pieces; `check_read` tells afterwards what became of the rows.

    Rows are (range of the key, ROW [n]), ids (side · partitions + range of fingerprints,
    (fingerprints int64 [n], raw ids)). Each key comes many times, and an id at least once for each
    block that holds it.
    """
    dead, tally = staging.stage("dead"), staging.stage("tally")
    write_json(tally, "pieces", len(pieces))
    read_piece = beam.FlatMap(_read_piece, config, key, latest, dead, tally)
    read = spread(pipeline, "Pieces", pieces) | "Read" >> read_piece
    rows, ids = (read | kind >> beam.FlatMap(_only, kind) for kind in ("Rows", "Ids"))
    return rows, ids


def _only(element: tuple[str, int, Any], kind: str) -> Iterator[tuple[int, Any]]:
    if element[0] == kind:
        yield element[1:]


def _read_piece(
    piece: Piece, config: SourceConfig, key: str, latest: int | None, dead: Path, staged: Path
) -> Iterator[tuple[str, int, Any]]:
    """One piece → (kind, key, value), kind Rows or Ids, key a range; stages a tally and letters."""
    name = f"{piece.number:06d}"
    with tallied(piece, dead / name, staged / f"piece-{name}") as (tally, keep):
        for block, bad, num_read in read_blocks(piece, config, latest):
            tally["counts"].update(read=num_read, below_threshold=block.num_below)
            keep(bad)
            if block.has_times:
                days, sizes = np.unique(block.rows["timestamp"] // 86_400, return_counts=True)
                tally["days"].update(dict(zip(days.tolist(), sizes.tolist(), strict=True)))
            beam.metrics.Metrics.counter("read", "bad_rows").inc(len(bad))
            for part, places in by_range(block.rows[key], config.partitions):
                yield "Rows", part, block.rows[places]
            for side, (prints, raw) in block.ids.items():
                tally["ids"][side] += len(raw)
                first = schema.SIDES.index(side) * config.partitions
                for part, places in by_range(prints, config.partitions):
                    yield "Ids", first + part, (prints[places], [raw[i] for i in places])


@contextlib.contextmanager
def tallied(
    piece: Piece, dead: Path, tally_file: Path
) -> Iterator[tuple[dict[str, Counter[Any]], Callable[[list[DeadLetter]], None]]]:
    """Gives a tally of a piece, written when it is read, and what counts and writes dead letters.

    A piece that is read again overwrites them. A piece that cannot be read to its end says so in
    its tally: an exception would reach the user as a worker's stack trace, and differently from
    each runner.
    """
    tally: dict[str, Counter[Any]] = {kind: Counter() for kind in TALLIES}
    problem = ""
    aside = written_aside(dead.with_name(f"{dead.name}.jsonl"))
    with aside as path, open(path, "w", encoding="utf-8") as file:

        def keep(letters: list[DeadLetter]) -> None:
            tally["counts"]["bad"] += len(letters)
            tally["reasons"].update(letter.reason for letter in letters)
            file.writelines(letter.as_json() + "\n" for letter in sorted(letters))

        try:
            yield tally, keep
        except ValueError as error:
            problem = str(error)
    tally["files"][piece.path] = tally["counts"]["read"]
    write_json(tally_file.parent, tally_file.name, {"problem": problem} | tally)


def add_tallies(staged: Path, pattern: str, pieces: int, where: str) -> dict[str, Any]:
    """The tallies of all pieces of a source, added up: a `Counter` for each of `TALLIES`.

    Raises ValueError where a piece could not be read, AccountingError where none read it.
    """
    tallies = read_all(staged, pattern).values()
    check_sum(f"reading {where}", pieces, {"read": len(tallies)}, unit="pieces")
    if problems := sorted(tally["problem"] for tally in tallies if tally["problem"]):
        raise ValueError(problems[0])
    read: dict[str, Any] = {kind: Counter() for kind in TALLIES}
    for tally in tallies:
        for kind, total in read.items():
            total.update(tally[kind])
    return read


def read_tally(staging: Staging) -> dict[str, Any]:
    """As `add_tallies`, after `read_source` has run."""
    staged = staging.stage("tally")
    return add_tallies(staged, "piece-*", read_json(staged, "pieces"), "the log")


def empty_files(files: list[str], rows: Mapping[str, int]) -> list[str]:
    """The files of which no row was read, by the rows of each path."""
    read = {absolute(path) for path, number in rows.items() if number}
    names = (name for path in files for name in files_in(path))
    return [name for name in names if absolute(name) not in read]


def check_read(
    config: SourceConfig, staging: Staging, files: list[str] | None = None
) -> dict[str, Any]:
    """What became of the rows of the whole source, or of some files, after `read_source` has run.

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
    counts = {name: read["counts"].get(name, 0) for name in ("read", "bad", "below_threshold")}
    if counts["read"] == 0:
        raise ValueError(f"{config.source} holds no rows; check --source.")
    empty = empty_files(source_files(config) if files is None else files, read["files"])
    if empty and not config.allow_empty_files:
        raise ValueError(
            f"{empty[0]} holds no rows, as do {len(empty) - 1} other file(s); is a part of the log "
            "missing? --allow_empty_files goes on without."
        )
    letters = sorted(staging.stage("dead").glob("*.jsonl"))
    hint = ""
    if any(reason.startswith(f"{config.timestamp_column} is ") for reason in read["reasons"]):
        hint = (
            f"is --timestamp_format {config.timestamp_format} that of {config.timestamp_column!r}, "
            "or rather another, such as %Y-%m-%d, iso or ms? "
        )
    check_bad(letters, DEAD_LETTERS, counts, config, staging, hint)
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
    """Puts the dead letters of a source, by piece, into the file `name` of the output.

    Raises ValueError, with a `hint`, where too many rows are bad; their letters are kept.
    """
    path, number = staging.out / name, 0
    with open(path, "wb") as collected:
        for part in letters:
            with open(part, "rb") as file:
                while lines := file.read(1 << 20):
                    collected.write(lines)
                    number += lines.count(b"\n")
    check_sum(f"bad rows of {config.source}", counts["bad"], {"dead letters": number})
    kept = staging.destination.with_name(f"{staging.destination.name}.{name}")
    kept.unlink(missing_ok=True)  # of an earlier run that failed
    if counts["bad"] > config.max_bad_share * counts["read"]:
        shutil.copyfile(path, kept)
        with open(path, encoding="utf-8") as file:
            first = file.readline().strip()
        raise ValueError(
            f"{counts['bad']} of {counts['read']} rows of {config.source} are bad, more than "
            f"--max_bad_share {config.max_bad_share:g}; {hint}all of them are in {kept}, the "
            f"first is {first}"
        )
