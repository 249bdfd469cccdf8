"""Reads a piece of a source in blocks, and tells good rows from bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.beam.blocks import ROW
from pipeline.contract import schema
from pipeline.read.cells import Checks, ids_of, numbers_of, seconds_of
from pipeline.read.discover import Columns, Piece, resolve_columns
from pipeline.read.readers import DeadLetter, read_checked
from pipeline.read.settings import SourceConfig


class Block(NamedTuple):
    """What one block of a piece gave."""

    rows: np.ndarray  # ROW [n], ids are fingerprints
    ids: dict[str, tuple[np.ndarray, list[bytes]]]  # side → fingerprints, raw ids; each id once,
    # without a side whose column is not read
    bad: list[DeadLetter]
    num_read: int
    num_below: int  # rows below the rating threshold
    has_times: bool  # whether rows have a timestamp


def read_blocks(piece: Piece, config: SourceConfig) -> Iterator[Block]:
    """Reads and validates one piece.

    Raises:
      ValueError: the file as a whole cannot be read (truncated, not of its format).
    """

    def columns_of(names: list[str]) -> Columns:
        return resolve_columns(names, config, piece.path)

    def validate(batch: pa.RecordBatch, numbers: np.ndarray, checks: Checks) -> Block:
        return _validate(batch, numbers, checks, columns_of(batch.schema.names), piece, config)

    blocks = read_checked(piece, config, lambda names: columns_of(names).read(), validate)
    for block, bad, num_read in blocks:
        yield block._replace(bad=bad, num_read=num_read)


def _validate(
    batch: pa.RecordBatch,
    numbers: np.ndarray,
    checks: Checks,
    columns: Columns,
    piece: Piece,
    config: SourceConfig,
) -> Block:
    rows = np.zeros(len(batch), ROW)
    rows["order"] = (piece.number << 40) + numbers
    rows["split"], rows["weight"] = piece.split, 1
    codes, ids = {}, {}
    for side, name in zip(schema.SIDES, (columns.user, columns.item), strict=True):
        if name:
            codes[side], ids[side] = ids_of(batch[name], name, checks)
    if columns.timestamp:
        rows["timestamp"] = seconds_of(batch[columns.timestamp], columns.timestamp, config, checks)
        if config.latest_time is not None:
            ahead = rows["timestamp"] > config.latest_time
            checks.fail(ahead, f"{columns.timestamp} is in the future")
    if columns.weight:
        rows["weight"] = numbers_of(batch[columns.weight], columns.weight, checks)
        checks.fail(rows["weight"] < 0, f"{columns.weight} is negative")
    keep = checks.good
    if columns.rating:
        keep &= numbers_of(batch[columns.rating], columns.rating, checks) >= config.rating_threshold
    keep &= checks.good
    used = {}
    for side, (fingerprints, raw) in ids.items():
        rows[side] = fingerprints[codes[side]] if len(fingerprints) else 0
        present = np.unique(codes[side][keep])
        used[side] = (fingerprints[present], [raw[i] for i in present])
    below = int(checks.good.sum() - keep.sum())
    return Block(rows[keep], used, [], 0, below, columns.timestamp is not None)
