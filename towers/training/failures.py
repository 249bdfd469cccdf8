"""What ends a run, told in one line: the data changed, the disk is full, a loss is not finite.

And what says nothing to a user, kept quiet.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import quiet_standard_error, written_aside
from towers.data.epochs import step_rows
from towers.data.interactions import RetrievalData
from towers.metrics.ranking import Diverged
from towers.model.step import MUST_BE_FINITE
from towers.training.run_directory import DIVERGED
from towers.training.settings import TrainConfig

# TensorFlow has several kinds of errors for them, and the words of the system in their text.
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


class MemoryIsFull(ValueError):  # noqa: N818 - it names what happened
    """A step of training does not fit in memory."""


def check_data(directory: str, fingerprint: str, what: str, flag: str) -> None:
    """Raises ValueError where data are no longer what a run or a study, `what`, began with.

    The run itself has its arrays, and could go on; but nothing could be made of its weights, since
    evaluation and export would meet the new data.
    """
    if schema.read_manifest(directory, "prepared").fingerprint != fingerprint:
        raise ValueError(
            f"{directory} was changed while a {what} on it: put the former data back and give the "
            f"same command again, which goes on, or begin anew with another {flag}."
        )


def compile_quietly() -> None:
    """Has XLA say unheard that it compiles, which it says once in the life of a process."""
    with quiet_standard_error():
        tf.function(lambda number: number + 1, jit_compile=True)(tf.constant(0))


def full_disk(error: Exception) -> str | None:
    """The words of the system for a full disk, where an error has them."""
    return next((words for words in _FULL if words in str(error)), None)


@contextlib.contextmanager
def told_when_full(directory: str | os.PathLike[str], then: str = "") -> Iterator[None]:
    """A context in which a directory is written, by whatever library.

    A ValueError where the disk is full, or a quota or the largest size of a file is reached; `then`
    ends it, with what giving the same command again will do.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        if (reason := full_disk(error)) is None:
            raise
        raise ValueError(
            f"{Path(directory)} cannot be written: {reason.lower()}; make room and give the same "
            f"command again{then}."
        ) from error


def explain_divergence(
    error: tf.errors.InvalidArgumentError, config: TrainConfig, data: RetrievalData, step: int
) -> Diverged | None:
    """Saves the batch of an error of `finite_loss` after `step` steps, and says what to raise.

    None for other errors. Of each row is saved its place in the train split, its ids and weight.
    """
    what = next(
        (name for name in ("loss", "gradient") if f"{name} {MUST_BE_FINITE}" in error.message), None
    )
    if what is None:
        return None
    rows = step_rows(data.num_rows("train"), config.batch_size, seed=config.seed, step=step)
    columns: dict[str, Any] = {"row": rows}
    columns |= {name: values[rows] for name, values in data.arrays("train").items()}
    for side in schema.SIDES:
        raw_ids = getattr(data, f"{side}_vocabulary").raw_ids
        columns[f"{side}_{schema.RAW_ID}"] = raw_ids.take(pa.array(columns[f"{side}_id"]))
    path = Path(config.run) / DIVERGED
    with written_aside(path) as aside:
        pq.write_table(pa.table(columns), aside)
    value = "infinity" if "Inf" in error.message.rpartition(MUST_BE_FINITE)[2] else "NaN"
    return Diverged(
        f"the {what} must be finite, got {value} in epoch "
        f"{step // data.steps_per_epoch(config.batch_size) + 1}, after {step} steps: the batch is "
        f"in {path}, and nothing of it in the weights. Look at it, or begin again with --overwrite "
        "and a smaller --learning_rate or a larger --temperature."
    )
