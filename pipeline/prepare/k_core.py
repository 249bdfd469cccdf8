"""The k-core: queries and candidates with too few rows are dropped, until none is left to drop."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import by_range
from pipeline.beam.options import running, spread
from pipeline.beam.staging import Staging, add_up, load_array, load_block, write_block, write_json
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
        passed = _check_pass(f"k-core pass {number}", left, len(blocks), out)
        blocks = sorted(map(str, out.glob("*.npy")))
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


def _check_pass(where: str, rows: int, sent: int, out: Path) -> dict[str, int]:
    """What became of the rows; AccountingError: some, or counts or lists of rare ids, were lost.

    The pass begins with `sent` lists, one a block.
    """
    for number in range(ROUNDS + 1):
        left, counted = add_up(out, f"left{number}-*"), add_up(out, f"counted{number}-*")
        check_sum(where, rows, left, ("rows", "k_core"))
        check_sum(where, sent, left, ["lists"], "lists")
        if number < ROUNDS:
            check_sum(where, left["rows"], counted, ["rows"])
            sent = counted["lists"]
    return left


def _one_pass(blocks: list[str], config: PrepareConfig, staging: Staging, out: Path) -> None:
    """`ROUNDS` of both filters: blocks by query → the same with fewer rows, staged in `out`.

    Rows stay with their query: those of one candidate may be more than a worker can hold. A block
    sends counts of its candidates to their key ranges, and each of these tells it which of them are
    rare; in each round it is loaded and filtered anew, by all that it was told so far. That is
    staged, so that a step has one input and one output: a runner may keep buffers for each.
    """
    source, rare_lists = Path(blocks[0]).parent, staging.stage(f"{out.name}-rare")
    with running(staging.options) as pipeline:
        begin = beam.Map(lambda path: (int(Path(path).stem), np.empty(0, np.int64)))
        rare = spread(pipeline, "Blocks", blocks) | "Begin" >> begin
        for number in range(ROUNDS):
            count = partial(_count_left, number, config, source, rare_lists, out)
            ranges = (
                rare
                | f"ByBlock{number}" >> beam.GroupByKey()
                | f"Count{number}" >> beam.FlatMapTuple(count)
                | f"ByCandidate{number}" >> beam.GroupByKey()
            )
            send_back = beam.FlatMapTuple(partial(_rare_ids, number, config, out))
            rare = ranges | f"Rare{number}" >> send_back
        left = "Left" >> beam.MapTuple(partial(_left, ROUNDS, config, source, rare_lists, out))
        stage = "Stage" >> beam.MapTuple(lambda part, rows: write_block(out, f"{part:05d}", rows))
        _ = rare | "ByBlock" >> beam.GroupByKey() | left | stage


def _left(
    number: int,
    config: PrepareConfig,
    source: Path,
    rare_lists: Path,
    out: Path,
    part: int,
    lists: Iterable[np.ndarray],
) -> tuple[int, np.ndarray]:
    """The rows of a block without those of rare candidates, and then of rare queries."""
    name, lists = f"{part:05d}", list(lists)
    _, rows = load_block(str(source / f"{name}.npy"))
    before = [load_array(rare_lists / f"{number - 1}-{name}.npy")] if number else []
    rare = np.concatenate([*before, *lists])
    write_block(rare_lists, f"{number}-{name}", rare)
    left = rows[~np.isin(rows["candidate"], rare)]
    _, codes, sizes = np.unique(left["query"], return_inverse=True, return_counts=True)
    left = left[sizes[codes] >= config.min_user_interactions]
    counts = {"rows": len(left), "k_core": len(rows) - len(left), "lists": len(lists)}
    write_json(out, f"left{number}-{name}", counts)
    return part, left


def _count_left(
    number: int, config: PrepareConfig, *block: Any
) -> Iterator[tuple[int, tuple[int, np.ndarray, np.ndarray]]]:
    """What is left of a block: (block, candidates [n], rows of each [n]), by their range.

    To one range at least, where nothing is left too: the block has its turn in the next round.
    """
    part, left = _left(number, config, *block)
    ids, sizes = np.unique(left["candidate"], return_counts=True)
    none = [(part % config.partitions, np.empty(0, np.int64))]
    for candidates, places in list(by_range(ids, config.partitions)) or none:
        yield candidates, (part, ids[places], sizes[places])


def _rare_ids(
    number: int,
    config: PrepareConfig,
    out: Path,
    part: int,
    counted: Iterable[tuple[int, np.ndarray, np.ndarray]],
) -> list[tuple[int, np.ndarray]]:
    """(block, which of its candidates have too few rows in all blocks together), for each block."""
    blocks, ids, sizes = zip(*counted, strict=True)
    known, codes = np.unique(np.concatenate(ids), return_inverse=True)
    sums = np.bincount(codes, np.concatenate(sizes))
    rare = known[sums < config.min_item_interactions]
    write_json(out, f"counted{number}-{part:05d}", {"rows": int(sums.sum()), "lists": len(blocks)})
    return [(block, of[np.isin(of, rare)]) for block, of in zip(blocks, ids, strict=True)]
