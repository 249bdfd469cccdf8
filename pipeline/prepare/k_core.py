"""The k-core: queries and candidates with too few rows are dropped, until none is left to drop."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.beam.accounting import check_sum
from pipeline.beam.blocks import by_range, partition
from pipeline.beam.options import running, spread
from pipeline.beam.staging import Staging, add_up, load_block, write_block, write_json
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
        sent += counted.get("lists", 0)
    return left


def _one_pass(blocks: list[str], config: PrepareConfig, staging: Staging, out: Path) -> None:
    """`ROUNDS` of both filters: blocks by query → the same with fewer rows, staged in `out`.

    Rows stay with their query: those of one candidate may be more than a worker can hold. A block
    sends counts of its candidates to their key ranges, and is told which of them are rare; in each
    round it is loaded and filtered anew, by all that it was told so far.
    """
    source = Path(blocks[0]).parent
    with running(staging.options) as pipeline:
        begin = beam.Map(lambda path: (int(Path(path).stem), np.empty(0, np.int64)))
        rare = spread(pipeline, "Blocks", blocks) | "Begin" >> begin
        for number in range(ROUNDS):
            count = beam.FlatMapTuple(partial(_count_left, number, config, source, out))
            send_back = beam.FlatMapTuple(partial(_rare_ids, number, config, out))
            counted = rare | f"ByBlock{number}" >> beam.GroupByKey() | f"Count{number}" >> count
            ranges = counted | f"ByCandidate{number}" >> beam.GroupByKey()
            rare = (rare, ranges | f"Rare{number}" >> send_back) | f"All{number}" >> beam.Flatten()
        left = "Left" >> beam.MapTuple(partial(_left, ROUNDS, config, source, out))
        stage = "Stage" >> beam.MapTuple(lambda part, rows: write_block(out, f"{part:05d}", rows))
        _ = rare | "ByBlock" >> beam.GroupByKey() | left | stage


def _left(
    number: int, config: PrepareConfig, source: Path, out: Path, part: int, rare: Iterable[Any]
) -> tuple[int, np.ndarray]:
    """The rows of a block without those of rare candidates, and then of rare queries."""
    _, rows = load_block(str(source / f"{part:05d}.npy"))
    lists = list(rare)
    left = rows[~np.isin(rows["candidate"], np.concatenate(lists))]
    _, codes, sizes = np.unique(left["query"], return_inverse=True, return_counts=True)
    left = left[sizes[codes] >= config.min_user_interactions]
    counts = {"rows": len(left), "k_core": len(rows) - len(left), "lists": len(lists)}
    write_json(out, f"left{number}-{part:05d}", counts)
    return part, left


def _count_left(
    number: int, config: PrepareConfig, *block: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """What is left of a block: (block, candidate, rows of it) [n, 3], by range of candidates."""
    part, left = _left(number, config, *block)
    ids, sizes = np.unique(left["candidate"], return_counts=True)
    counted = np.stack([np.full(len(ids), part), ids, sizes], axis=1)
    for candidates, places in by_range(ids, config.partitions):
        yield candidates, counted[places]


def _rare_ids(
    number: int, config: PrepareConfig, out: Path, part: int, counted: Iterable[np.ndarray]
) -> list[tuple[int, np.ndarray]]:
    """(block, which of its candidates have too few rows in all blocks together)."""
    blocks, ids, sizes = np.concatenate(list(counted)).T
    _, codes = np.unique(ids, return_inverse=True)
    sums = np.bincount(codes, sizes)
    rare = sums[codes] < config.min_item_interactions
    lists = list(partition(ids[rare], blocks[rare], config.partitions))
    write_json(out, f"counted{number}-{part:05d}", {"rows": int(sums.sum()), "lists": len(lists)})
    return lists
