"""What a training step needs beside what is there already: split into blocks, or refused."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import tensorflow as tf

from samplers.methods.full_softmax import FullSoftmax
from samplers.methods.in_batch import Cbns, Mns
from samplers.methods.method import Method
from samplers.methods.per_query import PerQueryMethod
from samplers.methods.resampling import Bir
from samplers.selection.draws import DRAWS_IN_BLOCKS

if TYPE_CHECKING:
    from towers.model.two_tower import TwoTower

_SHARE = 0.8  # of the memory of the machine that training may take
_BLOCKS = [1 << power for power in range(14, 7, -1)]  # that are tried
# Copies of the matrix of scores that a step holds at once, measured on a CPU: bir draws by them.
_COPIES, _COPIES_OF_DRAWS, _COPIES_BY_QUERY = 1.2, 5.0, 3.0
_COPIES_OF_WEIGHTS = 5  # with an optimizer of Keras, such as its Adam
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_log = logging.getLogger(__name__)


def fit_to_memory(model: TwoTower, rows: int) -> None:
    """Makes a step fit: a method that can scores candidates block by block, with the same result.

    For one replica on a CPU, whose memory is known; a GPU says itself what it has not.

    Args:
      model: with its optimizer.
      rows: B.

    Raises:
      ValueError: the step would need more memory than this machine has.
    """
    several = model.distribute_strategy.num_replicas_in_sync > 1
    if several or tf.config.list_physical_devices("GPU"):
        return
    method, settings = model.method, json.loads(model.settings)
    dim = settings["dim"]
    limit = _SHARE * machine_bytes()
    weights = sum(int(variable.shape.num_elements()) for variable in model.trainable_variables)
    left = limit - 4 * weights * getattr(model.optimizer, "copies", _COPIES_OF_WEIGHTS)
    if left <= 0:
        raise ValueError(
            f"the tables of {weights:,} weights and their optimizer need more memory than the "
            f"{limit / 2**30:.1f} GiB that training may take here: lower dim, or take "
            "the optimizer rowwise_adagrad."
        )
    if (needed := step_bytes(method, rows, dim)) <= left:
        return
    for block in _BLOCKS if _takes_blocks(method) else ():
        if step_bytes(method, rows, dim, block) <= left:
            method.block_size = block
            model.make_step()
            text = "train: a step would need %.1f GiB; candidates are scored %d at a time"
            _log.info(text, needed / 2**30, block)
            return
    smaller = max(2, int(rows * min(1.0, left / needed) / 2))
    raise ValueError(
        f"a step of {settings['method']} with batch_size {rows} needs about "
        f"{needed / 2**30:.1f} GiB beside the tables, {left / 2**30:.1f} GiB are "
        f"left here: lower batch_size, such as to {smaller}"
        + (", or num_negatives." if isinstance(method, PerQueryMethod) else ".")
    )


def step_bytes(method: Method, rows: int, dim: int, block_size: int | None = None) -> float:
    """About what the scores of a step take, with their gradient.

    Args:
      rows: B.
      dim: D.
      block_size: candidates that are scored at a time; None for what the method has.
    """
    if isinstance(method, PerQueryMethod):
        floats = dim / getattr(method, "group_size", 1) + 1  # embeddings that rows share, a score
        return 4 * _COPIES_BY_QUERY * rows * method.num_negatives * floats
    columns, copies = rows, _COPIES
    if isinstance(method, FullSoftmax):
        columns = method.num_candidates or rows
    elif isinstance(method, Mns):
        columns = rows + (method.num_uniform or rows)
    elif isinstance(method, Cbns):
        columns = rows + method.num_cached
    elif isinstance(method, Bir):
        copies = _COPIES_OF_DRAWS
    columns += 2 * (getattr(method, "num_mixed", 0) or 0)
    block_size = block_size or getattr(method, "block_size", None)
    return 4 * copies * rows * min(columns, block_size or columns)


def machine_bytes() -> int:
    """The memory of this machine, or of the container that this process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            sizes.append(int(Path(path).read_text(encoding="ascii")))
    return min(sizes)


def _takes_blocks(method: Method) -> bool:
    """Whether a block size, which nobody gave, goes with the other options of a method."""
    published = getattr(method, "weights", "published") == "published"
    free = getattr(method, "block_size", 0) is None
    return free and published and getattr(method, "draws", "rounded") in DRAWS_IN_BLOCKS
