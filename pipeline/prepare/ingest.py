"""Reading a log for preparation: pieces → distinct rows by query, and ids by fingerprint."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import drop_duplicates, join
from pipeline.beam.options import finish, running
from pipeline.beam.staging import Staging, add_up, write_block, write_json
from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.vocabulary import Ids, distinct_ids, write_table
from pipeline.read.consumed import stage_inputs
from pipeline.read.discover import Piece
from pipeline.read.log import check_read, read_source


def ingest(
    pieces: list[Piece], files: dict[str, list[str]], config: PrepareConfig, staging: Staging
) -> None:
    """Pieces → blocks of distinct rows by query, ids by fingerprint, dead letters, tallies.

    `files` of the log and of other sources, by name, are described for the manifest.
    """
    out = {name: staging.stage(name) for name in ("rows", "ids", "tally")}
    stage_rows = partial(_stage_distinct, out=out, weights=config.duplicates)
    stage_ids = partial(_stage_ids, out=out, partitions=config.partitions)
    with running(staging.options) as pipeline:
        rows, ids = read_source(pipeline, pieces, config, staging)
        finish(
            rows | "GroupRows" >> beam.GroupByKey() | "StageRows" >> beam.MapTuple(stage_rows),
            ids | "GroupIds" >> beam.GroupByKey() | "StageIds" >> beam.MapTuple(stage_ids),
            stage_inputs(pipeline, files, staging),
        )


def _stage_distinct(
    part: int, blocks: Iterable[np.ndarray], out: dict[str, Path], weights: str
) -> str:
    rows = join(blocks)
    kept = drop_duplicates(rows, weights)
    infinite = int(np.isinf(kept["weight"]).sum())
    tally = {"duplicates": len(rows) - len(kept), "rows": len(kept), "infinite": infinite}
    write_json(out["tally"], f"distinct-{part:05d}", tally)
    return write_block(out["rows"], f"{part:05d}", kept)


def _stage_ids(slot: int, tables: Iterable[Ids], out: dict[str, Path], partitions: int) -> None:
    tables = list(tables)
    prints, raw = distinct_ids(tables)
    table = pa.table({schema.FINGERPRINT: prints, schema.RAW_ID: pa.array(raw, pa.binary())})
    tally = {schema.SIDES[slot // partitions]: sum(len(raw) for _, raw in tables)}
    write_json(out["tally"], f"ids-{slot:05d}", tally)
    write_table(table, out["ids"] / f"{slot:05d}.parquet")


def check_ingested(config: PrepareConfig, staging: Staging) -> dict[str, Any]:
    """As `check_read`, after `ingest` has run, with the counts `duplicates` and `rows`.

    But `ids` are the numbers of different ids in the good rows, by side. ValueError, too: no row is
    left, or a sum of weights is too large; AccountingError: rows or ids were lost or made twice.
    """
    read, tally = check_read(config, staging), staging.stage("tally")
    counts = read["counts"] | {"duplicates": 0, "rows": 0} | add_up(tally, "distinct-*")
    if infinite := counts.pop("infinite", 0):
        raise ValueError(
            f"{infinite} pair(s) of {config.source} have weights whose sum is more than float32 "
            f"holds, {np.finfo(np.float32).max:.3g}; divide {config.weight_column!r} by a constant "
            "first, or choose --duplicates max."
        )
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
