"""Features: tables of attributes → codes and numbers by dense id, and what they mean.

Two pipelines after the examples are written. The first reads the tables, joins them by raw id with
the vocabularies and counts values over the ids that have train rows; the second replaces values
by codes and writes one row an id. Ids of a table without interactions become rows of their own.
"""

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.accounting import check_sum
from pipeline.beam.options import finish, running
from pipeline.beam.staging import Staging, load_block, read_json, write_json
from pipeline.contract import schema
from pipeline.features.columns import Statistics, merge, rank_values
from pipeline.features.files import WriteFeatures
from pipeline.features.join import join_slot, load_vocabulary, train_ids
from pipeline.features.read import ReadTable
from pipeline.features.tables import WORDS, Table, in_words_of
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.vocabulary import write_table
from pipeline.read.discover import Piece, files_in, source_files

log = logging.getLogger(__name__)
Specs = dict[str, list[schema.FeatureSpec]]  # side → the columns of its feature files


def write_features(
    found: dict[str, tuple[Table, list[Piece]]],
    blocks: list[str],
    train_rows: int,
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
) -> dict[str, Any]:
    """Writes the feature files of every side that has a table.

    Args:
      found: from `find_tables`.
      blocks: files of rows by query, as `assemble` takes them; the vocabularies are written.
      train_rows: of all examples.
      config: the preparation's settings.
      options: of Beam.
      staging: takes what is between the pipelines, and the files.

    Returns:
      What the details of the manifest gain; nothing where there is no table.

    Raises:
      ValueError: a table cannot be read, has too many bad rows, or two rows of an id differ.
      AccountingError: rows or ids were lost or made twice.
    """
    if not found:
        return {}
    tables = {side: table for side, (table, _) in found.items()}
    shards = {side: _vocabulary_shards(staging.out, side) for side in tables}
    _join(found, blocks, shards, config, options, staging)
    rows = {}
    for side, (table, pieces) in found.items():
        ids = sum(_rows_of(Path(path)) for _, path, _ in shards[side])
        rows[side] = _check_joined(table, len(pieces), ids, train_rows, staging)
    specs = {side: _specs(tables[side], rows[side]["ids"], staging) for side in tables}
    _encode(specs, shards, rows, config, options, staging)
    for side in tables:
        _check_written(side, rows[side], staging.out)
    return {
        schema.FEATURES: {
            side: _details(tables[side], specs[side], rows[side], staging) for side in tables
        }
    }


def _vocabulary_shards(out: Path, side: str) -> list[tuple[str, str, int]]:
    """(side, path, dense id of the first row) of every shard of a vocabulary."""
    shards, first = [], 0
    for path in sorted(out.glob(f"{side}_vocabulary-*.parquet")):
        shards.append((side, str(path), first))
        first += _rows_of(path)
    return shards


def _rows_of(path: Path) -> int:
    return pq.read_metadata(path).num_rows


def _check_written(side: str, rows: dict[str, int], out: Path) -> None:
    """Every id of the vocabulary, and every cold one, has a row in a file."""
    for key, expected in (("features", "ids"), ("features_cold", "cold")):
        written = {"rows": sum(map(_rows_of, out.glob(f"{side}_{key}-*.parquet")))}
        check_sum(f"writing the {side} {key}", rows[expected], written, written, "ids")


def _join(
    found: dict[str, tuple[Table, list[Piece]]],
    blocks: list[str],
    shards: dict[str, list[tuple[str, str, int]]],
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
) -> None:
    """Pieces of tables and vocabularies → joined values by slot, and summaries of columns."""
    tables = {side: table for side, (table, _) in found.items()}
    pieces = [(side, piece) for side, (_, pieces) in found.items() for piece in pieces]
    read, joined = staging.stage("tables"), staging.stage("joined")
    with running(options) as pipeline:
        values = (
            pipeline
            | "Pieces" >> beam.Create(pieces)
            | "SpreadPieces" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(ReadTable(tables, config.partitions, read))
        )
        dense = (
            pipeline
            | "Vocabularies" >> beam.Create([one for some in shards.values() for one in some])
            | "SpreadVocabularies" >> beam.Reshuffle()
            | "LoadVocabulary" >> beam.FlatMap(load_vocabulary, config.partitions)
        )
        train = (
            pipeline
            | "Blocks" >> beam.Create(blocks)
            | "SpreadBlocks" >> beam.Reshuffle()
            | "LoadBlock" >> beam.Map(load_block)
            | "TrainIds" >> beam.FlatMap(train_ids, config, list(tables))
        )
        summaries = (
            {"values": values, "dense": dense, "train": train}
            | "JoinById" >> beam.CoGroupByKey()
            | "JoinSlot" >> beam.FlatMap(join_slot, tables, config.partitions, joined)
            | "ByColumn" >> beam.GroupByKey()
            | "Summarise" >> beam.MapTuple(partial(_summarise, tables, config, staging.out, read))
        )
        finish(summaries)


def _summarise(
    tables: dict[str, Table],
    config: PrepareConfig,
    out: Path,
    staged: Path,
    key: tuple[int, int],
    parts: Iterable[Statistics],
) -> None:
    """Writes the vocabulary of a column, and stages its spec."""
    side, number = schema.SIDES[key[0]], key[1]
    name, kind = list(tables[side].kinds.items())[number]
    found = merge(parts)
    spec = schema.FeatureSpec(
        name,
        kind,
        mean=found.moments.mean,
        std=found.moments.std,
        max_length=found.max_length,
        has_presence=kind == "numeric" and found.train_missing > 0,
        missing=found.missing,
    )
    if kind in ("categorical", "multi"):
        vocabulary = rank_values(found.counts, config.feature_min_count)
        file = schema.feature_vocabulary_name(side, name)
        write_table(vocabulary, out / file)
        spec = dataclasses.replace(spec, vocabulary=file, size=len(vocabulary))
    staged_spec = {"spec": dataclasses.asdict(spec), "ids": found.ids}
    write_json(staged, f"spec-{side}-{number:05d}", staged_spec)


def _specs(table: Table, ids: int, staging: Staging) -> list[schema.FeatureSpec]:
    staged, specs = staging.stage("tables"), []
    for number, name in enumerate(table.kinds):
        found = read_json(staged, f"spec-{table.side}-{number:05d}")
        check_sum(f"the values of the {table.side} column {name!r}", ids, found, ["ids"], "ids")
        specs.append(schema.FeatureSpec(**found["spec"]))
    return specs


def _check_joined(
    table: Table, pieces: int, ids: int, train_rows: int, staging: Staging
) -> dict[str, int]:
    """What became of the rows of a table of so many pieces, and whether all ids met it.

    Returns:
      Rows read, bad, duplicates, joined and cold; ids: of the vocabulary.
    """
    where = f"the {table.side} features"
    counts = _check_read(table, pieces, staging)
    partitions, first = table.config.partitions, schema.SIDES.index(table.side)
    conflicts: list[str] = []
    for path in staging.stage("joined").glob("[0-9]*.json"):
        if int(path.stem) // partitions == first:
            tally = read_json(path.parent, path.stem)
            conflicts += tally.pop("conflicts")
            counts.update(tally)
    if conflicts:
        raise ValueError(
            f"{table.config.source} has rows for the id {min(conflicts)!r} that differ; keep one "
            f"row an id in --{WORDS[table.side]}_features."
        )
    check_sum(where, counts["read"], counts, ("bad", "duplicates", "joined", "cold"))
    check_sum(where, ids, counts, ["ids"], "ids")
    check_sum(where, train_rows, counts, ["train"], "train rows")
    log.info(
        "prepare: %s features: %d rows read, %d of ids with interactions, %d cold, %d bad",
        table.side,
        *(counts[name] for name in ("read", "joined", "cold", "bad")),
    )
    return dict(counts)


def _check_read(table: Table, pieces: int, staging: Staging) -> Counter[str]:
    """The counts `read` and `bad` of a table, and its dead letters in one file."""
    flag = f"--{WORDS[table.side]}_features"
    staged, counts, files = staging.stage("tables"), Counter(read=0, bad=0), Counter[str]()
    tallies = sorted(staged.glob(f"{table.side}-*.json"))
    check_sum(f"reading {table.config.source}", pieces, {"read": len(tallies)}, ["read"], "pieces")
    letters = staging.out / f"{table.side}_features_dead_letters.jsonl"
    with open(letters, "wb") as collected:
        for path in tallies:
            tally = read_json(staged, path.stem)
            if tally["problem"]:
                raise ValueError(tally["problem"])
            counts.update(read=tally["read"], bad=tally["bad"])
            files[tally["path"]] += tally["read"]
            collected.write(path.with_suffix(".jsonl").read_bytes())
    with in_words_of(table.side):
        names = [name for path in source_files(table.config) for name in files_in(path)]
    empty = [name for name in names if not files[name]]
    if counts["read"] == 0 or (empty and not table.config.allow_empty_files):
        where = empty[0] if empty else table.config.source
        raise ValueError(f"{where} holds no rows; check {flag}, or --allow_empty_files.")
    if counts["bad"] > table.config.max_bad_share * counts["read"]:
        kept = staging.destination.with_name(f"{staging.destination.name}.{letters.name}")
        shutil.copyfile(letters, kept)
        with open(letters, encoding="utf-8") as file:
            first = file.readline().strip()
        raise ValueError(
            f"{counts['bad']} of {counts['read']} rows of {table.config.source} are bad, more "
            f"than --max_bad_share {table.config.max_bad_share:g}; is the kind of a column "
            f"another ({flag[:-1]}_kinds)? All of them are in {kept}, the first is {first}"
        )
    return counts


def _encode(
    specs: Specs,
    shards: dict[str, list[tuple[str, str, int]]],
    rows: dict[str, dict[str, int]],
    config: PrepareConfig,
    options: PipelineOptions,
    staging: Staging,
) -> None:
    """Joined values by slot → feature files."""
    files = sorted(map(str, staging.stage("joined").glob("*.parquet")))
    firsts = {side: [first for _, _, first in some] for side, some in shards.items()}
    cold = {side: -(-rows[side]["cold"] // config.rows_per_shard) for side in specs}
    with running(options) as pipeline:
        written = (
            pipeline
            | "Joined" >> beam.Create(files)
            | "SpreadJoined" >> beam.Reshuffle()
            | "WriteFeatures" >> WriteFeatures(specs, firsts, cold, config.partitions, staging.out)
        )
        finish(written)


def _details(
    table: Table, specs: list[schema.FeatureSpec], rows: dict[str, int], staging: Staging
) -> dict[str, Any]:
    """What the manifest says of a side."""
    partitions, first = table.config.partitions, schema.SIDES.index(table.side)
    unknown = np.zeros(len(specs), np.int64)
    for path in staging.stage("joined").glob("unknown-*.json"):
        if int(path.stem.split("-")[1]) // partitions == first:
            unknown += read_json(path.parent, path.stem)
    columns = [
        dataclasses.asdict(dataclasses.replace(spec, unknown=number))
        for spec, number in zip(specs, unknown.tolist(), strict=True)
    ]
    files = {
        key: sorted(path.name for path in staging.out.glob(f"{table.side}_{key}-*.parquet"))
        for key in ("features", "features_cold")
    }
    counts = {name: rows[name] for name in ("read", "bad", "duplicates", "joined", "cold")}
    return {
        "source": table.config.source,
        "rows": counts,
        "ids_without_row": rows["ids"] - rows["joined"],
        "files": files["features"],
        "cold_files": files["features_cold"],
        "columns": columns,
    }
