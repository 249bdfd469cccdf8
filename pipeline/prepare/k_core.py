"""The k-core: queries and candidates with too few rows are dropped, until none is left to drop."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
import numpy as np

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import join, repartition
from pipeline.beam.options import running, spread
from pipeline.beam.staging import Staging, add_up, load_block, write_block, write_json
from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig

log = logging.getLogger(__name__)
ROUNDS = 3  # in one pipeline; then the driver looks whether anything changed


def k_core(
    blocks: list[str], config: PrepareConfig, staging: Staging, counts: dict[str, int]
) -> list[str]:
    """Repeats the k-core pass until it drops nothing; sets `rows` and `k_core` in the counts."""
    number, counts["k_core"] = 0, 0
    while max(config.min_user_interactions, config.min_item_interactions) > 1:
        number += 1
        out, left = staging.stage(f"active{number}"), counts["rows"]
        _one_pass(blocks, config, staging, out)
        blocks = sorted(map(str, out.glob("*.npy")))
        passed = {"rows": 0, "k_core": 0} | add_up(out)
        check_sum(f"k-core pass {number}", left, passed, ("rows", "k_core"))
        counts["rows"] = passed["rows"]
        counts["k_core"] += passed["k_core"]
        log.info("prepare: k-core pass %d keeps %d of %d rows", number, counts["rows"], left)
        if counts["rows"] == 0:
            raise ValueError(
                f"the k-core of {config.source} is empty: no row has a user with at least "
                f"{config.min_user_interactions} and an item with at least "
                f"{config.min_item_interactions} rows; lower --min_user_interactions or "
                "--min_item_interactions."
            )
        if counts["rows"] == left:
            break
    return blocks


def _one_pass(blocks: list[str], config: PrepareConfig, staging: Staging, out: Path) -> None:
    """`ROUNDS` of both filters: blocks by query → the same with fewer rows, staged in `out`.

    Each filter is local: all rows of one id are in one key range, and a shuffle stands between
    the filter of the queries and that of the candidates. Each stages how many rows it drops, so
    that these and the rows at the end add up to the rows at the beginning.
    """
    with running(staging.options) as pipeline:
        loaded = spread(pipeline, "Blocks", blocks) | "Load" >> beam.Map(load_block)
        ranges = loaded | "Alone" >> beam.MapTuple(lambda part, rows: (part, [rows]))
        for number in range(1, ROUNDS + 1):
            for side, other in (schema.SIDES, schema.SIDES[::-1]):
                keep = beam.FlatMap(_keep, number, side, other, config, out)
                kept = ranges | f"Keep {side} {number}" >> keep
                ranges = kept | f"By {other} {number}" >> beam.GroupByKey()
        _ = ranges | "Stage" >> beam.MapTuple(partial(_stage_rows, out=out))


def _keep(
    element: tuple[int, Iterable[np.ndarray]],
    number: int,
    side: str,
    other: str,
    config: PrepareConfig,
    out: Path,
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows whose id on `side` has enough of them, from its key range to those by `other`."""
    part, rows = element[0], join(element[1])
    minima = (config.min_user_interactions, config.min_item_interactions)
    _, codes, counts = np.unique(rows[side], return_inverse=True, return_counts=True)
    kept = rows[counts[codes] >= minima[schema.SIDES.index(side)]]
    if len(kept) < len(rows):
        write_json(out, f"{side}{number}-{part:05d}", {"k_core": len(rows) - len(kept)})
    yield from repartition(kept, other, config.partitions)


def _stage_rows(part: int, blocks: Iterable[np.ndarray], out: Path) -> None:
    rows = join(blocks)
    write_json(out, f"rows-{part:05d}", {"rows": len(rows)})
    write_block(out, f"{part:05d}", rows)
