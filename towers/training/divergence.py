"""What is left of a run whose loss or gradient is no longer a number: the batch, and a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import written_aside
from towers.data.epochs import step_rows
from towers.data.interactions import RetrievalData
from towers.errors import Diverged
from towers.model.gradients import MUST_BE_FINITE
from towers.training.run_directory import DIVERGED
from towers.training.settings import TrainConfig


def explain(
    error: tf.errors.InvalidArgumentError, config: TrainConfig, data: RetrievalData, step: int
) -> Diverged | None:
    """Saves the batch of an error of `finite_loss`, and says what to raise; None for other errors.

    Args:
      error: what `fit` raised.
      config: the settings of the run.
      data: what it is trained on.
      step: the number of steps before the one that failed.
    """
    what = next(
        (name for name in ("loss", "gradient") if f"{name} {MUST_BE_FINITE}" in error.message), None
    )
    if what is None:
        return None
    path = Path(config.run) / DIVERGED
    save_batch(path, config, data, step)
    value = "infinity" if "Inf" in error.message.rpartition(MUST_BE_FINITE)[2] else "NaN"
    return Diverged(
        f"the {what} must be finite, got {value} in epoch "
        f"{step // data.steps_per_epoch(config.batch_size) + 1}, after {step} steps: the batch is "
        f"in {path}, and nothing of it in the weights. Look at it, or begin again with --overwrite "
        "and a smaller --learning_rate or a larger --temperature."
    )


def save_batch(path: Path, config: TrainConfig, data: RetrievalData, step: int) -> None:
    """Writes the rows of a step: their places in the train split, dense and raw ids, weights."""
    rows = step_rows(data.num_rows("train"), config.batch_size, seed=config.seed, step=step)
    columns: dict[str, Any] = {"row": rows}
    columns |= {name: values[rows] for name, values in data.arrays("train").items()}
    for side in schema.SIDES:
        raw_ids = getattr(data, f"{side}_vocabulary").raw_ids
        columns[f"{side}_{schema.RAW_ID}"] = raw_ids.take(pa.array(columns[f"{side}_id"]))
    with written_aside(path) as aside:
        pq.write_table(pa.table(columns), aside)
