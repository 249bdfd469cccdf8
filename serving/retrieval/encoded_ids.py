"""Ids of candidates as answers carry them, written once when a version is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import numpy as np
import orjson
import pyarrow as pa

_STRING_VAL = 8  # number of the field of a TensorProto that holds strings


class EncodedIds:
    """Ids by the rows of their candidates, row -1 for the empty id; no Python string is made.

    Example:
      >>> ids = EncodedIds(["a", 'b"'])
      >>> ids.string_val(np.array([[0, -1]]))
      b'B\\x01aB\\x00'
      >>> ids.json_lists(np.array([[1, -1], [0, 0]]))
      [b'["b\\\\"",""]', b'["a","a"]']

    Args:
      ids: of all candidates, in the order of their rows.
      base: of the candidates whose rows come before them, if there are any.
    """

    def __init__(self, ids: Iterable[str], base: EncodedIds | None = None) -> None:
        texts = list(ids) if base else ["", *ids]  # the first place is for row -1
        fields = [field_head(_STRING_VAL, len(raw)) + raw for raw in map(str.encode, texts)]
        lists = [b"," + orjson.dumps(text) for text in texts]
        self._fields, self._lists = (pa.array(part, pa.large_binary()) for part in (fields, lists))
        if base:
            self._fields = pa.concat_arrays([base._fields, self._fields])
            self._lists = pa.concat_arrays([base._lists, self._lists])

    def string_val(self, rows: np.ndarray) -> bytes:
        """The field `string_val` of a TensorProto with the ids of rows, int [...]."""
        return bytes(_taken(self._fields, rows)[0])

    def json_lists(self, rows: np.ndarray) -> list[bytes]:
        """A JSON list of ids for each of B lists of rows, int [B, K]."""
        if not rows.size:
            return [b"[]"] * len(rows)
        text, ends = _taken(self._lists, rows)
        ends = ends[:: rows.shape[1]].tolist()
        return [b"[%s]" % text[start + 1 : end] for start, end in pairwise(ends)]


@lru_cache
def field_head(number: int, size: int) -> bytes:
    """What stands before the bytes of a field of a protocol buffer: its number and their count."""
    head, left = [number << 3 | 2], size
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    return bytes([*head, left])


def _taken(encoded: pa.Array, rows: np.ndarray) -> tuple[memoryview, np.ndarray]:
    """The texts of rows, one after the other, and where each begins and the last one ends."""
    _, ends, text = encoded.take(pa.array(rows.ravel() + 1)).buffers()
    ends = np.frombuffer(ends, np.int64, rows.size + 1)
    return memoryview(text)[: ends[-1]], ends
