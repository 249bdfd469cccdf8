"""The log popularity of candidates, from counts or as it comes with a batch."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from samplers.candidates import Batch
from samplers.proposals.frequency import log_pop


class PopularityTable:
    """log pop_j of candidates, see `frequency.log_pop`.

    Args:
      method: the name of the method that asks, for its error.
      frequency: [N], train rows of each candidate; None where log pop comes with every batch.
    """

    def __init__(self, method: str, frequency: np.ndarray | None) -> None:
        self._method = method
        self._table = None if frequency is None else tf.constant(log_pop(frequency))

    def of_batch(self, batch: Batch) -> tf.Tensor:
        """float32 [B], of the positives: `batch.log_pop`, or else from the counts.

        Raises:
          ValueError: there are neither.
        """
        if batch.log_pop is not None:
            return tf.stop_gradient(tf.cast(batch.log_pop, tf.float32))
        return self.of_ids(batch.candidate_ids)

    def of_ids(self, ids: tf.Tensor) -> tf.Tensor:
        """float32, of candidates by dense id, of any shape.

        Raises:
          ValueError: there are no counts.
        """
        if self._table is None:
            raise ValueError(
                f"{self._method} needs frequency=, got None: pass the number of train rows of "
                "each candidate, [N], or the sampling probability with every batch."
            )
        return tf.gather(self._table, ids)
