"""How large the ranges of ids become when a log of 10^9 rows is prepared.

    python -m benchmarks.shuffle --json benchmarks/results/shuffle.json

Nothing is shuffled: every id gets the rows that it has on average, and the fingerprints and key
ranges of the jobs say which worker would hold them. Users have as many rows each, items in
proportion to 1/rank, as in the synthetic log of `benchmarks.beam_prepare`.
"""

import argparse
import dataclasses
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

from benchmarks.record import command, processor, write
from pipeline.beam.blocks import ROW, partition_of
from pipeline.contract.hashing import fingerprints
from pipeline.prepare.k_core import _keep
from pipeline.prepare.settings import PrepareConfig
from pipeline.read import consumed


@dataclasses.dataclass
class Log:
    """A log that is not there."""

    rows: int = 10**9
    users: int = 10**8
    items: int = 10**7
    bytes_a_row: int = 40  # of text


def ranges_of(log: Log, most_ids: int) -> dict[str, dict[str, float]]:
    """Rows of the ranges of users and of items; of so many ids, which stand for all."""
    partitions = -(-log.rows * log.bytes_a_row // consumed._RANGE_BYTES)
    found = {}
    for side, number in (("users", log.users), ("items", log.items)):
        number = min(number, most_ids)
        prints = fingerprints(f"{side[0]}{i}".encode() for i in range(number))
        share = np.ones(number) if side == "users" else 1 / np.arange(1.0, number + 1)
        share *= log.rows / share.sum()
        held = np.bincount(partition_of(prints, partitions), share, partitions)
        found[side] = {
            "ranges": partitions,
            "mean_rows": held.mean(),
            "largest_rows": held.max(),
            "rows_of_the_most_frequent": share.max(),
        }
    return found


def bytes_a_row(rows: int = 4_000_000) -> float:
    """Memory that the k-core takes for each row of a range at its peak, the range included."""
    block = np.zeros(rows, ROW)
    block["query"] = np.random.default_rng(0).integers(0, 1 << 60, rows)
    with tempfile.TemporaryDirectory() as out:
        config = PrepareConfig(source="log", output=out, partitions=600, min_item_interactions=2)
        tracemalloc.start()
        for _ in _keep((0, [block]), 1, "candidate", "query", config, Path(out)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return (peak + block.nbytes) / rows


def main() -> None:
    """Writes the sums and prints the largest ranges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True)
    parser.add_argument("--most_ids", type=int, default=10**7)
    arguments = parser.parse_args()
    log, peak = Log(), bytes_a_row()
    found = {
        "command": command("shuffle"),
        "log": dataclasses.asdict(log),
        "bytes_of_a_row": ROW.itemsize,
        "peak_bytes_a_row": peak,
        "ranges": ranges_of(log, arguments.most_ids),
        "processor": processor(),
    }
    for side, held in found["ranges"].items():
        gigabytes = held["largest_rows"] * peak / 1e9
        print(f"{side}: largest range {held['largest_rows']:,.0f} rows, {gigabytes:.1f} GB at most")
    write(arguments.json, found)


if __name__ == "__main__":
    main()
