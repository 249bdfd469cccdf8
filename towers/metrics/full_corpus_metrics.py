"""A Keras callback that ranks the whole corpus after every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from towers.data.interactions import RetrievalData
from towers.legacy_keras import tf_keras
from towers.metrics.definitions import METRICS
from towers.metrics.held_out import HeldOut


class FullCorpusMetrics(tf_keras.callbacks.Callback):
    """Adds the metrics of a split to the logs of each epoch, such as val_recall@50.

    Callbacks that read them, as `EarlyStopping` does, come after it in the list.

    Args:
      data: the data that is trained on.
      split: "validation" or "test"; None: validation where there is one, else test.
      metrics: names in `towers.metrics.definitions.METRICS`.
      ks: the cut-offs.
      block_size: queries that are ranked at a time.
    """

    def __init__(
        self,
        data: RetrievalData,
        split: str | None = None,
        *,
        metrics: Sequence[str] = ("recall", "ndcg"),
        ks: Sequence[int] = (10, 20, 50),
        block_size: int = 256,
    ) -> None:
        super().__init__()
        unknown = set(metrics) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {sorted(unknown)}.")
        if split is None:
            split = "validation" if data.num_rows("validation") else "test"
        self._held_out = HeldOut(data, split)
        self._prefix = "val" if split == "validation" else split
        self._names = [f"{metric}@{k}" for metric in metrics for k in ks]
        self._ks, self._block_size = tuple(ks), block_size

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ranks, and writes into the logs."""
        means, _ = self._held_out.measure(
            self.model.query_embeddings(),
            self.model.candidate_embeddings(),
            self._ks,
            block_size=self._block_size,
        )
        if logs is not None:
            logs.update({f"{self._prefix}_{name}": means[name] for name in self._names})
