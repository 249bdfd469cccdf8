"""The preparation job: raw interactions → examples, vocabularies, train counts, manifest.

Three kinds of pipeline run one after the other: `ingest` reads, validates and drops duplicates;
`activity` drops queries and candidates with too few rows, one pipeline a pass, until nothing
changes; `assemble` splits, makes the vocabularies, replaces ids and writes the shards. Elements
are blocks of rows, keyed by a range of fingerprints. Only transforms that every runner can
translate are used: Create, ParDo, GroupByKey, Flatten, tagged outputs and small side inputs.
"""

import logging

import pyarrow.parquet as pq

from pipeline import schema
from pipeline.activity import k_core
from pipeline.assemble import assemble
from pipeline.beam_options import beam_options
from pipeline.config import PrepareConfig
from pipeline.examples import Shard, columns_of, write_dataset_metadata
from pipeline.ingest import check_ingested, check_nothing_lost, ingest
from pipeline.sources import (
    Piece,
    column_names,
    find_pieces,
    resolve_columns,
    with_demo_columns,
)
from pipeline.staging import Staging

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, beam_arguments: list[str] | None = None) -> schema.Manifest:
    """Runs the whole job and puts its output in place at once.

    Args:
      config: what to do.
      beam_arguments: flags of Beam and its runner, such as `--direct_num_workers=2`.

    Raises:
      ValueError: the source, a column, the share of bad rows or an empty result; nothing is left
        behind but, where there were bad rows, `<output>.dead_letters.jsonl`.
    """
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    pieces = find_pieces(config)
    with Staging(config.output, config.overwrite) as staging:
        log.info("prepare: reading %d piece(s) of %s", len(pieces), config.source)
        ingest(pieces, config, options, staging)
        counts = check_ingested(config, staging)["counts"]
        blocks = sorted(map(str, staging.stage("rows").glob("*.npy")))
        blocks = k_core(blocks, config, options, staging, counts)
        columns = _example_columns(pieces, config)
        num_shards = max(1, round(counts["rows"] / config.rows_per_shard))
        log.info("prepare: writing %d rows in %d shard(s) a split", counts["rows"], num_shards)
        shards = assemble(blocks, columns, num_shards, config, options, staging)
        write_dataset_metadata(staging.out, shards, num_shards, columns)
        staging.sweep()
        manifest = _manifest(config, counts, shards, num_shards, columns, staging)
        manifest.write(staging.out)
        staging.commit()
    log.info("prepare: %s is complete", config.output)
    return manifest


def _example_columns(pieces: list[Piece], config: PrepareConfig) -> tuple[str, ...]:
    """The columns that examples have, by what the first piece has."""
    found = resolve_columns(column_names(pieces[0], config), config, pieces[0].path)
    return columns_of(found.timestamp is not None, found.weight is not None)


def _manifest(
    config: PrepareConfig,
    counts: dict[str, int],
    shards: list[Shard],
    num_shards: int,
    columns: tuple[str, ...],
    staging: Staging,
) -> schema.Manifest:
    out = staging.out
    for code, split in enumerate(schema.SPLITS):
        counts[split] = sum(shard.rows for shard in shards if shard.split == code)
    drops = ("bad", "below_threshold", "duplicates", "k_core")
    check_nothing_lost(counts["read"], counts, drops + schema.SPLITS)
    for side, name in zip(schema.SIDES, ("queries", "candidates"), strict=True):
        tables = out.glob(f"{side}_vocabulary-*.parquet")
        counts[name] = sum(pq.read_metadata(path).num_rows for path in tables)
    counts["candidates_without_train_rows"] = sum(
        int((pq.read_table(path)[schema.COUNT].to_numpy() == 0).sum())
        for path in out.glob("candidate_train_counts-*.parquet")
    )
    rows = {schema.shard_name(schema.SPLITS[s.split], s.number, num_shards): s.rows for s in shards}
    return schema.Manifest(
        kind="prepared",
        source=config.source,
        configuration=config.recorded(),
        counts=counts,
        files=schema.describe_files(out, rows),
        details={"columns": list(columns)},
    )
