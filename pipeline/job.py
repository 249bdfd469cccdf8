"""The preparation job: raw interactions → examples, vocabularies, train counts, manifest.

Three kinds of pipeline run one after the other: `ingest` reads, validates and drops duplicates;
`k_core` drops queries and candidates with too few rows, one pipeline a pass, until nothing
changes; `assemble` splits, makes the vocabularies, replaces ids and writes the shards. Elements
are blocks of rows, keyed by a range of fingerprints. Only transforms that every runner can
translate are used: Create, Reshuffle, ParDo, GroupByKey and Flatten.
"""

import dataclasses
import logging
from typing import Any

from pipeline.beam.accounting import check_sum
from pipeline.beam.options import beam_options
from pipeline.beam.staging import Staging, add_up
from pipeline.contract import schema
from pipeline.contract.files import describe_files, write_atomically
from pipeline.features.job import write_features
from pipeline.features.tables import find_tables
from pipeline.prepare.assemble import assemble
from pipeline.prepare.ingest import check_ingested, ingest
from pipeline.prepare.k_core import k_core
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.shards import columns_of, write_dataset_metadata
from pipeline.quality.measures import Measures, measure_blocks, measure_output
from pipeline.quality.page import page
from pipeline.quality.report import DROPS, as_lines, check_days, quality
from pipeline.read.consumed import (
    check_unchanged,
    input_files,
    staged_inputs,
    stamps_of,
    with_partitions,
)
from pipeline.read.discover import (
    column_names,
    find_pieces,
    resolve_columns,
    source_files,
    with_demo_columns,
)

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, beam_arguments: list[str] | None = None) -> schema.Manifest:
    """Runs the whole job and puts its output in place at once; its manifest.

    `beam_arguments` are flags of Beam and its runner, such as `--direct_num_workers=2`. The
    manifest of a dry run names no files, and nothing is written.

    Raises:
      ValueError: the source, a column, the share of bad rows, days without rows or an empty
        result; nothing is left behind but, where there were bad rows,
        `<output>.dead_letters.jsonl`.
    """
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    pieces = find_pieces(config)
    read_files = {"source": input_files(config)}
    stamps = stamps_of(read_files["source"])
    config = with_partitions(config, stamps)
    tables = find_tables(config)
    for table in tables.values():
        of_table = read_files[table.flag.strip("-")] = source_files(table.config)
        stamps |= stamps_of(of_table)
    with Staging(config.output, config.overwrite or config.dry_run, options) as staging:
        log.info("prepare: reading %d piece(s) of %s", len(pieces), config.source)
        ingest(pieces, read_files, config, staging)
        read = check_ingested(config, staging)
        check_days(read["days"], config)
        counts = read["counts"]
        manifest = schema.Manifest("prepared", config.source, config.recorded(), counts, {})
        blocks = sorted(map(str, staging.stage("rows").glob("*.npy")))
        blocks = k_core(blocks, config, staging, counts)
        if config.dry_run:
            found = _judge(read, measure_blocks(blocks, config, staging), config)
            for line in as_lines(found):
                log.info("%s", line)
            log.info("prepare: this was a dry run; nothing is written")
            return dataclasses.replace(manifest, details={"quality": found})
        names = resolve_columns(column_names(pieces[0], config), config, pieces[0].path)
        columns = columns_of(names.timestamp is not None, names.weight is not None)
        num_shards = max(1, round(counts["rows"] / config.rows_per_shard))
        log.info("prepare: writing %d rows in %d shard(s) a split", counts["rows"], num_shards)
        shards = assemble(blocks, columns, num_shards, config, staging)
        rows = dict.fromkeys(schema.SPLITS, 0)
        for shard in shards:
            rows[schema.SPLITS[shard.split]] += shard.rows
        measured = measure_output(staging.out, rows)
        inputs = staged_inputs(read_files, staging)
        details: dict[str, Any] = {
            "columns": list(columns),
            "inputs": {name: list(found.values()) for name, found in inputs.items()},
            "quality": _judge(read, measured, config),
        }
        _check_ids(read["ids"], measured, staging)
        write_dataset_metadata(staging.out, shards, num_shards, columns)
        features = {
            side: write_features(table, blocks, measured.train_rows, config, staging)
            for side, table in tables.items()
        }
        details |= {schema.FEATURES: features} if features else {}
        check_unchanged(stamps)
        write_atomically(staging.out / schema.QUALITY_PAGE, page(details["quality"], features))
        staging.sweep()
        rows_of_files = {shard.name(num_shards): shard.rows for shard in shards}
        files = describe_files(staging.out, rows_of_files)
        manifest = dataclasses.replace(manifest, files=files, details=details)
        manifest.write(staging.out)
        staging.commit()
    log.info("prepare: %s is complete", config.output)
    return manifest


def _judge(read: dict[str, Any], measured: Measures, config: PrepareConfig) -> dict[str, Any]:
    """The quality of the data; completes and checks `read`, or ValueError: a split is empty."""
    counts = read["counts"]
    counts |= measured.splits
    for split, side in (("train", "before"), ("test", "at or after")):
        if config.test_from and not counts[split]:
            first, last = min(read["days"]), max(read["days"])
            raise ValueError(
                f"no row of {config.source} is {side} --test_from {config.test_from}: its days are "
                f"{first} to {last}; choose a date between them."
            )
    check_sum("writing the examples", counts["rows"], counts, schema.SPLITS)
    check_sum("preparing the rows", counts["read"], counts, (*DROPS, *schema.SPLITS))
    for side, name in zip(schema.SIDES, ("queries", "candidates"), strict=True):
        degrees = measured.degrees[side]
        rows = {"rows of its ids": int(degrees.total)}
        check_sum(f"counting the {side} ids", counts["rows"], rows)
        counts[name] = degrees.size
    trained = {"train rows of candidates": measured.train_rows}
    check_sum("counting the train rows", counts["train"], trained)
    counts["candidates_without_train_rows"] = measured.candidates_without_train_rows
    return quality(read, counts, measured)


def _check_ids(ids: dict[str, int], measured: Measures, staging: Staging) -> None:
    """The ids that were read are in a vocabulary, or the k-core left them no row."""
    for side, number in ids.items():
        counts = add_up(staging.stage("counted"), f"{side}-*")
        check_sum(f"counting the {side} ids", number, counts, ("kept", "lost"), "ids")
        written = {"in the vocabulary": measured.degrees[side].size}
        check_sum(f"the {side} vocabulary", counts["kept"], written, unit="ids")
