"""Hashes of rows and ids, and the rule of the split, which are the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from pipeline.contract.settings import require


def fingerprint(raw_id: str) -> int:
    """Eight bytes of blake2b of the UTF-8 of `raw_id`, as a signed little-endian int64.

    The same on every machine and in every run. Equal ids have equal fingerprints; that no two
    different ids of one data set share one is checked when its vocabulary is made.
    """
    digest = hashlib.blake2b(raw_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprints(raw_ids: Iterable[bytes]) -> np.ndarray:
    """The fingerprints of ids that are already UTF-8 bytes: int64 [n]."""
    digests = b"".join(hashlib.blake2b(raw, digest_size=8).digest() for raw in raw_ids)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    """The splitmix64 step (Steele, Lea, Flood, OOPSLA 2014, doi:10.1145/2660193.2660195)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_hash(seed: int, salt: str, *columns: np.ndarray) -> np.ndarray:
    """A pseudo-random number for every row, the same on every machine and in every order of rows.

    Rows are put in order by it, instead of being drawn: mix(... mix(mix(mix(seed) ^
    fingerprint(salt)) ^ column_1) ...), where mix is splitmix64. It is not for secrets.

    Args:
      seed: any int64 of the user's configuration.
      salt: what the numbers are for, so that two uses with one seed are independent.
      *columns: int64 [n] each, at least one; their order matters.

    Returns:
      uint64 [n].
    """
    state = _mix(np.array([seed], np.int64).view(np.uint64))
    state = _mix(state ^ np.array([fingerprint(salt)], np.int64).view(np.uint64))
    for column in columns:
        state = _mix(state ^ np.ascontiguousarray(column, np.int64).view(np.uint64))
    return state


def hash_buckets(fingerprints: np.ndarray, *, num_buckets: int, num_hashes: int) -> np.ndarray:
    """The bucket of each fingerprint, int64 [n], in A hash arrays of H buckets: int64 [n, A].

    bucket_h(f) = mix(f xor mix(h)) mod num_buckets for h = 0, 1, ..., unsigned, with the mix of
    `row_hash`. `samplers.proposals.streaming_frequency` has the same function: a trainer goes on
    with the estimates that a job has made.
    """
    keys = np.ascontiguousarray(fingerprints, np.int64).view(np.uint64)[:, None]
    arrays = _mix(np.arange(num_hashes, dtype=np.uint64))[None, :]
    return (_mix(keys ^ arrays) % np.uint64(num_buckets)).astype(np.int64)


def split_sizes(
    num_rows: np.ndarray, train_ratio: float, validation_ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many of a query's rows are train, validation and test: three int64 arrays.

    rint(train_ratio · n) rows (half to even), but at least one, are not test; the last
    rint(validation_ratio · those) of them are validation, where at least one stays train.

    `num_rows` is int [Q], rows of each query; for the ratios see `split_codes`.
    """
    require(0 < train_ratio <= 1, "train_ratio", "must be in (0, 1]", train_ratio)
    require(0 <= validation_ratio < 1, "validation_ratio", "must be in [0, 1)", validation_ratio)
    num_rows = np.asarray(num_rows, np.int64)
    known = np.maximum(np.rint(train_ratio * num_rows).astype(np.int64), np.minimum(num_rows, 1))
    validation = np.rint(validation_ratio * known).astype(np.int64)
    validation = np.clip(validation, 0, np.maximum(known - 1, 0))
    return known - validation, validation, num_rows - known


def split_codes(
    query_ids: np.ndarray, *order: np.ndarray, train_ratio: float, validation_ratio: float = 0.0
) -> np.ndarray:
    """The split of every row: int8 [n], an index into `SPLITS`.

    The rows of a query are put in order and cut by `split_sizes`: first train, then validation,
    then test.

    Args:
      query_ids: int64 [n], dense ids or fingerprints.
      *order: [n] each, the keys to put a query's rows in order by, the first decides first:
        `row_hash` for a random split; time, then `row_hash` for a split by time.
      train_ratio: in (0, 1], the share of rows that are not test.
      validation_ratio: in [0, 1), the share of those that are validation.
    """
    rows = np.lexsort((*reversed(order), query_ids))  # lexsort's last key decides first
    ordered = np.asarray(query_ids)[rows]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    sizes = np.diff(np.append(first, len(ordered)))
    parts = np.stack(split_sizes(sizes, train_ratio, validation_ratio), axis=1)  # [Q, 3]
    codes = np.empty(len(ordered), np.int8)
    codes[rows] = np.repeat(np.tile(np.arange(3, dtype=np.int8), len(sizes)), parts.ravel())
    return codes


def global_time_codes(
    query_ids: np.ndarray,
    timestamps: np.ndarray,
    *order: np.ndarray,
    test_from: int,
    validation_ratio: float = 0.0,
) -> np.ndarray:
    """The split of every row where one moment divides all of them: int8 [n], as `split_codes`.

    Rows at `test_from` or later are test, whoever has them, so that queries and candidates of test
    may have no train row. Of the earlier rows of a query, the last share by time is validation.

    Example:
      >>> global_time_codes(np.array([7, 7, 8]), np.array([10, 20, 30]), test_from=20).tolist()
      [0, 2, 2]

    Args:
      query_ids: int64 [n], dense ids or fingerprints.
      timestamps: int64 [n], seconds since 1970.
      *order: [n] each, decide between rows of a query at the same time.
      test_from: seconds since 1970, of `contract.settings.utc_seconds`.
      validation_ratio: in [0, 1), the share of a query's earlier rows that is validation.
    """
    earlier = np.asarray(timestamps) < test_from
    codes = np.full(len(earlier), 2, np.int8)
    keys = [np.asarray(key)[earlier] for key in (query_ids, timestamps, *order)]
    codes[earlier] = split_codes(*keys, train_ratio=1.0, validation_ratio=validation_ratio)
    return codes
