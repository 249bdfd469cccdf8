"""Features: tables of attributes → codes and numbers by dense id, and what they mean.

Two pipelines a table after the examples are written. The first reads it, joins it by raw id with
the vocabulary and counts values over the ids that have train rows; the second replaces values
by codes and writes one row an id. Ids of a table without interactions become rows of their own.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq

from pipeline.beam.accounting import check_sum
from pipeline.beam.options import finish, running, spread
from pipeline.beam.staging import Staging, read_all, read_json, write_json
from pipeline.contract import schema
from pipeline.features import join
from pipeline.features.encoding import Statistics, make_spec, merge
from pipeline.features.tables import WORDS, Table, in_words_of
from pipeline.prepare.assemble import split_blocks
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.vocabulary import write_table
from pipeline.read.discover import source_files
from pipeline.read.log import DEAD_LETTERS, add_tallies, check_bad, empty_files

log = logging.getLogger(__name__)


def write_features(
    table: Table, blocks: list[str], train_rows: int, config: PrepareConfig, staging: Staging
) -> dict[str, Any]:
    """Writes the feature files of the side that has this table; what the manifest says of it.

    `blocks` are files of rows by query, as `assemble` takes them, `train_rows` of all examples;
    `staging` holds the vocabularies.

    Raises:
      ValueError: a table cannot be read, has too many bad rows, or two rows of an id differ.
      AccountingError: rows or ids were lost or made twice.
    """
    shards = join.vocabulary_shards(staging.out, table.side)
    _join(table, blocks, shards, config, staging)
    ids = sum(shard.rows for shard in shards)
    rows = _check_joined(table, ids, train_rows, staging)
    specs = _specs(table, ids, staging)
    firsts = [shard.first for shard in shards]
    num_cold = -(-rows["cold"] // config.rows_per_shard)
    files = join.FeatureFiles(table.side, specs, firsts, num_cold, staging.out)
    joined = sorted(map(str, staging.stage("joined").glob(f"{table.side}-*.parquet")))
    with running(staging.options) as pipeline:
        _ = (
            spread(pipeline, "Joined", joined)
            | "Encode" >> beam.FlatMap(files.encode)
            | "GroupShards" >> beam.GroupByKey()
            | "WriteShard" >> beam.MapTuple(files.write)
        )
    files.write_empty()
    for spec in specs:
        values = f", {spec.size:,} values" if spec.vocabulary else ""
        log.info(
            "prepare: %s: %s%s; %s of %s without a value",
            f"{WORDS[table.side]} {spec.name}",
            spec.kind,
            values,
            *(f"{number:,}" for number in (spec.missing, ids)),
        )
    return _details(table, specs, rows, staging)


def _join(
    table: Table,
    blocks: list[str],
    shards: list[join.VocabularyShard],
    config: PrepareConfig,
    staging: Staging,
) -> None:
    """Pieces of a table and vocabularies → joined values by range, and specs of columns."""
    read, joined = staging.stage("tables"), staging.stage("joined")
    with running(staging.options) as pipeline:
        ids = {
            "values": spread(pipeline, "Pieces", table.pieces)
            | "Read" >> beam.FlatMap(join.read_table, table, read),
            "known": spread(pipeline, "Vocabulary", shards)
            | "LoadVocabulary" >> beam.FlatMap(join.load_vocabulary, config.partitions),
            "train": split_blocks(pipeline, blocks, config)
            | "TrainIds" >> beam.FlatMap(join.train_ids, config, table.side),
        }
        finish(
            ids
            | "JoinById" >> beam.CoGroupByKey()
            | "JoinRange" >> beam.FlatMap(join.join_range, table, joined)
            | "ByColumn" >> beam.GroupByKey()
            | "Summarise" >> beam.MapTuple(partial(_summarise, table, config, staging.out, read))
        )


def _summarise(
    table: Table,
    config: PrepareConfig,
    out: Path,
    staged: Path,
    number: int,
    parts: Iterable[Statistics],
) -> None:
    """Writes the vocabulary of a column, and stages its spec."""
    name, kind = list(table.kinds.items())[number]
    statistics = merge(parts)
    spec, vocabulary = make_spec(name, kind, table.side, statistics, config.feature_min_count)
    if vocabulary is not None:
        write_table(vocabulary, out / spec.vocabulary)
    staged_spec = {"spec": dataclasses.asdict(spec), "ids": statistics.ids}
    write_json(staged, f"spec-{table.side}-{number:05d}", staged_spec)


def _specs(table: Table, ids: int, staging: Staging) -> list[schema.FeatureSpec]:
    """The staged specs of the columns of a table; each knows of all ids of the vocabulary."""
    directory, specs = staging.stage("tables"), []
    for number, name in enumerate(table.kinds):
        staged = read_json(directory, f"spec-{table.side}-{number:05d}")
        check_sum(f"the values of the {table.side} column {name!r}", ids, staged, ["ids"], "ids")
        specs.append(schema.FeatureSpec(**staged["spec"]))
    return specs


def _check_joined(table: Table, ids: int, train_rows: int, staging: Staging) -> dict[str, int]:
    """Rows of a table that were read, bad, duplicates, joined and cold, and all ids that met it."""
    where = f"the {table.side} features"
    counts = _check_read(table, staging)
    conflicts: list[str] = []
    for tally in read_all(staging.stage("joined"), f"tally-{table.side}-*").values():
        conflicts += tally.pop("conflicts")
        counts.update(tally)
    if conflicts:
        raise ValueError(
            f"{table.config.source} has rows for the id {min(conflicts)!r} that differ; keep one "
            f"row an id in {table.flag}."
        )
    if counts["joined"] == 0:
        raise ValueError(
            f"no id of {table.config.source} is in the log: is {table.flag}_id the column of its "
            "ids, and are they written as in the log?"
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


def _check_read(table: Table, staging: Staging) -> Counter[str]:
    """The counts `read` and `bad` of a table, and its dead letters in one file."""
    source, staged = table.config.source, staging.stage("tables")
    read = add_tallies(staged, f"{table.side}-*", len(table.pieces), source)
    counts = Counter(read=0, bad=0)
    counts.update(read["counts"])
    with in_words_of(table.side):
        empty = empty_files(source_files(table.config), read["files"])
    if counts["read"] == 0 or (empty and not table.config.allow_empty_files):
        where = empty[0] if empty else source
        raise ValueError(f"{where} holds no rows; check {table.flag}, or --allow_empty_files.")
    letters = sorted(staged.glob(f"{table.side}-*.jsonl"))
    hint = f"is the kind of a column another ({table.flag[:-1]}_kinds)? "
    name = f"{table.side}_features_{DEAD_LETTERS}"
    check_bad(letters, name, counts, table.config, staging, hint)
    return counts


def _details(
    table: Table, specs: list[schema.FeatureSpec], rows: dict[str, int], staging: Staging
) -> dict[str, Any]:
    """What the manifest says of a side, once every id has a row in a file."""
    files = {}
    for key, expected in (("features", "ids"), ("features_cold", "cold")):
        paths = sorted(staging.out.glob(f"{table.side}_{key}-*.parquet"))
        written = {"rows": sum(pq.read_metadata(path).num_rows for path in paths)}
        check_sum(f"writing the {table.side} {key}", rows[expected], written, unit="ids")
        files[key] = [path.name for path in paths]
    staged = read_all(staging.stage("joined"), f"unknown-{table.side}-*")
    unknown = np.sum(list(staged.values()), axis=0)
    return {
        "source": table.config.source,
        "rows": {name: rows[name] for name in ("read", "bad", "duplicates", "joined", "cold")},
        "ids_without_row": rows["ids"] - rows["joined"],
        "files": files["features"],
        "cold_files": files["features_cold"],
        "columns": [
            dataclasses.asdict(dataclasses.replace(spec, unknown=number))
            for spec, number in zip(specs, unknown.tolist(), strict=True)
        ],
    }
