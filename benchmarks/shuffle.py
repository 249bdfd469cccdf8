"""What a worker holds when a log of 10^9 rows is prepared.

    python -m benchmarks.shuffle --json benchmarks/results/shuffle.json

Nothing is shuffled: every id gets the rows that it has on average, and the fingerprints and key
ranges of the jobs say which worker would hold them. Users have as many rows each, items in
proportion to 1/rank, as in the synthetic log of `benchmarks.beam_prepare`. A worker holds a block,
which has all rows of the users of a range, or a pair for each item of a range and each block that
has it. The memory that a row and a pair take is measured in the steps themselves.
"""

import argparse
import dataclasses
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import command, processor, write
from pipeline.beam.blocks import ROW, partition_of
from pipeline.beam.staging import write_block
from pipeline.contract.hashing import fingerprints
from pipeline.prepare import assemble, k_core
from pipeline.prepare.settings import PrepareConfig
from pipeline.prepare.split import assign_splits
from pipeline.read import consumed

SETTINGS: Any = {"source": "log", "output": "out", "partitions": 600}


@dataclasses.dataclass
class Log:
    """A log that is not there."""

    rows: int = 10**9
    users: int = 10**8
    items: int = 10**7
    bytes_a_row: int = 40  # of text


def ranges_of(log: Log, most_ids: int) -> dict[str, dict[str, float]]:
    """What the ranges hold: rows of users, pairs of items; of so many ids, which stand for all."""
    partitions = -(-log.rows * log.bytes_a_row // consumed._RANGE_BYTES)
    found = {}
    for side, number in (("users", log.users), ("items", log.items)):
        number = min(number, most_ids)
        prints = fingerprints(f"{side[0]}{i}".encode() for i in range(number))
        share = np.ones(number) if side == "users" else 1 / np.arange(1.0, number + 1)
        held = share = share * log.rows / share.sum()
        if side == "items":  # the blocks that have at least one row of an item
            held = partitions * -np.expm1(share * np.log1p(-1 / partitions))
        held_by = np.bincount(partition_of(prints, partitions), held, partitions)
        found[side] = {
            "ranges": partitions,
            "mean_held": held_by.mean(),
            "largest_held": held_by.max(),
            "rows_of_the_most_frequent": share.max(),
        }
    return found


def peak_bytes(step: Callable[[], Iterable[Any]], given: int) -> int:
    """Memory of a step at its peak, with the `given` bytes of its input and all that it sends."""
    tracemalloc.start()
    sent = list(step())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del sent
    return peak + given


def bytes_a_row(rows: int = 2_000_000) -> dict[str, float]:
    """Memory of the steps that hold a block, for each of its rows; a tenth as many users."""
    rng, config = np.random.default_rng(0), PrepareConfig(**SETTINGS)
    block = np.zeros(rows, ROW)
    for side, ids in (("query", rows // 10), ("candidate", rows // 4)):
        block[side] = fingerprints(f"{i}".encode() for i in range(ids))[rng.integers(0, ids, rows)]
    dense = []
    for side in ("query", "candidate"):
        ids = np.unique(block[side])
        dense.append((side, np.stack([ids, np.arange(len(ids))], axis=1)))
    tables = sum(table.nbytes for _, table in dense)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        write_block(out, "00000", block)
        args: Any = (0, config, out, out, out, 0, [np.empty(0, np.int64)])
        steps = {
            "k_core": (lambda: k_core._count_left(*args), 0),
            "split": (lambda: [assign_splits(block, config)], block.nbytes),
            "count": (lambda: assemble.count_block((0, block), 600), block.nbytes),
            "replace": (
                lambda: assemble._replace_block((0, {"rows": [block], "dense": dense})),
                block.nbytes + tables,
            ),
        }
        return {name: peak_bytes(*step) / rows for name, step in steps.items()}


def bytes_a_pair(blocks: int = 600, ids_of_block: int = 5_000) -> dict[str, float]:
    """Memory of the steps that hold the items of a range, for each pair of an item and a block."""
    rng, config = np.random.default_rng(0), PrepareConfig(**SETTINGS)
    known = fingerprints(f"{i}".encode() for i in range(4 * ids_of_block))
    counted = []
    for block in range(blocks):
        ids = rng.choice(known, ids_of_block, replace=False)
        counted.append(np.stack([np.full_like(ids, block), ids, np.ones_like(ids)], axis=1))
    asked = [block[:, :2].copy() for block in counted]
    of_blocks = [(int(block[0, 0]), block[:, 1].copy(), block[:, 2].copy()) for block in counted]
    found = {"asked": asked, "dense": [(known, np.arange(len(known)))]}
    pairs = blocks * ids_of_block
    with tempfile.TemporaryDirectory() as out:
        steps = {
            "k_core": (lambda: k_core._rare_ids(1, config, Path(out), 0, of_blocks), 16 * pairs),
            "answer": (lambda: assemble._answer((0, found), 600), 16 * pairs),
        }
        return {name: peak_bytes(*step) / pairs for name, step in steps.items()}


def main() -> None:
    """Writes the sums and prints what the largest ranges take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True)
    parser.add_argument("--most_ids", type=int, default=10**7)
    arguments = parser.parse_args()
    log = Log()
    peaks = {"users": bytes_a_row(), "items": bytes_a_pair()}
    found = {
        "command": command("shuffle"),
        "log": dataclasses.asdict(log),
        "bytes_of_a_row": ROW.itemsize,
        "peak_bytes": peaks,
        "ranges": ranges_of(log, arguments.most_ids),
        "processor": processor(),
    }
    for side, held in found["ranges"].items():
        held["largest_gb"] = held["largest_held"] * max(peaks[side].values()) / 1e9
        print(f"{side}: {held}, bytes each {peaks[side]}")
    write(arguments.json, found)


if __name__ == "__main__":
    main()
