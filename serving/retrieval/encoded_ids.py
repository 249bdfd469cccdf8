"""Ids of candidates and their rows, and ids as answers carry them, written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from pipeline.contract.files import held, written_aside
from pipeline.contract.hashing import fingerprints

_STRING_VAL = 8  # number of the field of a TensorProto that holds strings


class EncodedIds:
    """Ids by the rows of their candidates, row -1 for the empty id, and rows by ids.

    What is kept are Arrow arrays, which take a tenth of the memory of Python's strings in a dict.

    Example:
      >>> ids = EncodedIds(["a", 'b"'])
      >>> bytes(ids.string_val(np.array([[0, -1]])))
      b'B\\x01aB\\x00'
      >>> ids.json_lists(np.array([[1, -1], [0, 0]]))
      [b'["b\\\\"",""]', b'["a","a"]']
      >>> ids.names(np.array([1])), ids.rows(["a", "c"])
      (['b"'], array([ 0, -1]))

    Args:
      ids: of all candidates, in the order of their rows.
      base: of the candidates whose rows come before them, if there are any.
    """

    def __init__(self, ids: Iterable[str], base: EncodedIds | None = None) -> None:
        texts = list(ids) if base else ["", *ids]  # the first place is for row -1
        self._base, self._texts = base, pa.array(texts, pa.large_string())
        if base:
            self._texts = pa.concat_arrays([base._texts, self._texts])

    @classmethod
    def mapped(cls, file: Path, read: Callable[[], Iterable[str]]) -> EncodedIds:
        """Those in a file, whose memory all processes share; the first one writes it.

        `read` gives the ids for it. Raises OSError where the file cannot be written.
        """
        with held(file.with_name(f"{file.name}.lock"), waits=True):
            if not file.exists():
                ids = cls(read())
                columns = [ids._texts, ids._fields, ids._lists, *map(pa.array, ids._lookup)]
                batch = pa.record_batch(columns, list("tflkr"))
                with written_aside(file) as aside, pa.ipc.new_file(aside, batch.schema) as writer:
                    writer.write_batch(batch)
            columns = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0).columns
        ids = cls(())
        ids._texts, ids._fields, ids._lists, *lookup = columns
        ids._lookup = tuple(column.to_numpy() for column in lookup)
        return ids

    def names(self, rows: np.ndarray) -> list[str]:
        """The ids of rows, int [n]."""
        texts = self._texts.take(pa.array(rows + 1)).to_numpy(zero_copy_only=False)
        return texts.tolist()

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of ids, int64 [n]: -1 where there is no such id, or only beyond `base`."""
        keys, rows = self._lookup
        wanted = fingerprints(text.encode("utf-8", "surrogatepass") for text in ids)
        found = rows[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)]
        is_same = np.array(self.names(found), object) == np.array(ids, object)
        return np.where(is_same, found, -1)

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Fingerprints in ascending order, int64, and the rows of their ids."""
        if self._base:
            return self._base._lookup
        keys = fingerprints(map(str.encode, self._texts.to_pylist()))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if (same := np.flatnonzero(keys[1:] == keys[:-1])).size:
            pair = self.names(order[same[0] : same[0] + 2] - 1)
            raise ValueError(f"ids {pair[0]!r} and {pair[1]!r} share a fingerprint: rename one.")
        return keys, order - 1

    @cached_property
    def _fields(self) -> pa.Array:
        return self._encoded("_fields", _field)

    @cached_property
    def _lists(self) -> pa.Array:
        return self._encoded("_lists", lambda text: b"," + orjson.dumps(text))

    def _encoded(self, name: str, encode: Callable[[str], bytes]) -> pa.Array:
        own = self._texts[len(self._base._texts) if self._base else 0 :]
        encoded = pa.array(map(encode, own.to_pylist()), pa.large_binary())
        return pa.concat_arrays([getattr(self._base, name), encoded]) if self._base else encoded

    def load(self) -> None:
        """Writes now what is otherwise written on first use."""
        _ = self._lookup, self._fields, self._lists
        pa.default_memory_pool().release_unused()  # of what writing takes, as much again

    def string_val(self, rows: np.ndarray) -> memoryview:
        """The field `string_val` of a TensorProto with the ids of rows, int [...]."""
        return _taken(self._fields, rows)[0]

    def json_lists(self, rows: np.ndarray) -> list[bytes]:
        """A JSON list of ids for each of B lists of rows, int [B, K]."""
        if not rows.size:
            return [b"[]"] * len(rows)
        text, ends = _taken(self._lists, rows)
        ends = ends[:: rows.shape[1]].tolist()
        return [b"[%s]" % text[start + 1 : end] for start, end in pairwise(ends)]


def _field(text: str) -> bytes:
    raw = text.encode()
    return field_head(_STRING_VAL, len(raw)) + raw


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
