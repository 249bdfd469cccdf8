"""What an evaluation keeps of each query: where in the ranking its held-out positives stand.

From the ranks follow all metrics at all cut-offs down to the depth, so that runs can be compared
query by query long after their evaluation, and without their models.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract.files import written_aside
from towers.metrics.definitions import METRICS
from towers.training.run_directory import HITS

_COLUMNS = ("fingerprint", "train_rows", "num_positives", "hit_ranks")
_ABOUT = ("split", "ks", "data_fingerprint", "training")  # what describes the file
_METADATA = b"twotower"  # the key of that in the file


@dataclasses.dataclass(frozen=True, eq=False)
class HitsByQuery:
    """The hits of one evaluation, a row a query of the split."""

    fingerprints: np.ndarray  # int64 [U], of the raw ids of the queries
    train_rows: np.ndarray  # int64 [U]
    num_positives: np.ndarray  # int64 [U], held out, at least 1
    hits: np.ndarray  # bool [U, K], whether the candidate at each rank, best first, is one of them
    split: str  # that was evaluated
    ks: tuple[int, ...]  # the cut-offs of that evaluation; the largest is K
    data_fingerprint: str  # of the prepared data
    training: str  # a checksum of the training.json of the weights that were evaluated

    def values(self, metric: str, k: int) -> np.ndarray:
        """A metric of each query: float64 [U]; k at most the largest of ks."""
        return METRICS[metric](self.hits, self.num_positives, k)

    def write(self, run: Path) -> None:
        """Writes the file into a run directory, in one step."""
        ranks = [np.flatnonzero(hits) + 1 for hits in self.hits]
        columns = [self.fingerprints, self.train_rows, self.num_positives]
        table = pa.table([*columns, pa.array(ranks, pa.list_(pa.int32()))], names=_COLUMNS)
        about = {name: getattr(self, name) for name in _ABOUT}
        with written_aside(run / HITS) as aside:
            pq.write_table(table.replace_schema_metadata({_METADATA: json.dumps(about)}), aside)


def read_hits(run: Path) -> HitsByQuery:
    """Reads what `twotower evaluate` kept of a run; a ValueError where it cannot be read."""
    path = run / HITS
    if not path.is_file():
        raise ValueError(f"{run} has no {HITS}: make it with `twotower evaluate`.")
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_METADATA])
        about["ks"] = tuple(about["ks"])
        fingerprints, train_rows, num_positives = (table[name].to_numpy() for name in _COLUMNS[:3])
        ranks = table["hit_ranks"].combine_chunks()
        hits = np.zeros((table.num_rows, max(about["ks"])), bool)
        rows = np.repeat(np.arange(len(hits)), ranks.value_lengths().to_numpy())
        hits[rows, ranks.flatten().to_numpy() - 1] = True
        return HitsByQuery(fingerprints, train_rows, num_positives, hits, **about)
    except (pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): make it again with `twotower evaluate`."
        ) from error
