"""Reads JSON in pieces, so that other threads get their turn in between.

pydantic-core keeps all threads from Python while it reads: 32 MB take it seconds. NumPy, which does
not, finds the commas between elements; a run of elements is then read as a list of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic_core import from_json

MAX_VALUES = 1 << 19  # of a body, lists and objects included; each takes up to 200 bytes

_PIECE = 1 << 15  # bytes that are read at once
_BLOCK = 1 << 20  # bytes that are searched for commas at once
_MOST_LEVELS = 50
_SPACE = b" \t\r\n"


def parse(body: bytes | bytearray) -> Any:
    """What `from_json` gives.

    >>> parse(b'{"instances": ["a", "b"]}')
    {'instances': ['a', 'b']}

    Raises:
      ValueError: it is not JSON, or has more than MAX_VALUES values.
    """
    return from_json(body) if len(body) <= _PIECE else _Large(body).value(0, len(body))


class _Large:
    """A large text; `places` of its brackets and commas outside of strings, and their depth."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = self._text = body
        if b"\\" in body:  # without what is escaped, a string ends at its next quote
            self._text = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        marks = list(self._marks())
        self._places = np.concatenate([places for places, _ in marks])
        self._steps = np.concatenate([steps for _, steps in marks])  # 1 opens, -1 closes, 0 comma
        self._depth = np.cumsum(self._steps, dtype=np.int32)

    def value(self, start: int, end: int) -> Any:
        """The value that these bytes are."""
        first, last = np.searchsorted(self._places, (start, end)).tolist()
        if end - start <= _PIECE or first == last:  # small, or a long string
            return self._read(start, end)
        opening, closing = self._places[first].item(), self._places[last - 1].item()
        level = self._depth[first]
        inner = slice(first + 1, last - 1)
        is_whole = (
            self._depth[last - 1] == level - 1 and (self._depth[first : last - 1] >= level).all()
        )
        kind = self._body[opening : opening + 1] + self._body[closing : closing + 1]
        around = self._body[start:opening] + self._body[closing + 1 : end]
        if not is_whole or kind not in (b"[]", b"{}") or around.strip(_SPACE):
            raise ValueError(f"brackets do not match in bytes {start} to {end}")
        if level > _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_LEVELS} levels of lists and objects")
        is_comma = (self._steps[inner] == 0) & (self._depth[inner] == level)
        edges = np.concatenate([[opening], self._places[inner][is_comma], [closing]])
        return self._list(edges) if kind == b"[]" else self._object(edges)

    def _list(self, edges: np.ndarray) -> list[Any]:
        values: list[Any] = []
        for start, end in _runs(edges):
            if end - start > _PIECE:
                values.append(self.value(start, end))
            else:
                values.extend(self._read(start, end, b"[", b"]"))
        return values

    def _object(self, edges: np.ndarray) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for start, end in _runs(edges):
            if end - start <= _PIECE:
                members.update(self._read(start, end, b"{", b"}"))
                continue
            quote = self._text.find(b'"', start, end)
            colon = self._text.find(b":", self._text.find(b'"', quote + 1, end), end)
            # The name, with a value that stands for the large one.
            [name] = self._read(start, colon, b"{", b":0}")
            members[name] = self.value(colon + 1, end)
        return members

    def _read(self, start: int, end: int, before: bytes = b"", after: bytes = b"") -> Any:
        piece = self._body[start:end]
        if not piece or piece.isspace():
            raise ValueError(f"nothing between commas or brackets at byte {start}")
        try:
            return from_json(before + piece + after if before else piece)
        except ValueError as error:
            raise ValueError(f"{error} of bytes {start} to {end}") from error

    def _marks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places and steps, block by block."""
        in_string, left = False, MAX_VALUES
        for start in range(0, len(self._text), _BLOCK):
            size = min(_BLOCK, len(self._text) - start)
            part = np.frombuffer(self._text, np.uint8, size, start)
            quoted = np.bitwise_xor.accumulate(part == ord('"')) ^ in_string
            in_string = bool(quoted[-1])
            opens, closes = part | 32 == ord("{"), part | 32 == ord("}")  # | 32: [ and ] as well
            places = np.flatnonzero((opens | closes | (part == ord(","))) & ~quoted)
            steps = opens[places].astype(np.int8) - closes[places]
            left -= int(np.count_nonzero(steps >= 0))
            if left < 0:
                raise ValueError(f"more than {MAX_VALUES} values: split the request, or use gRPC")
            yield places + start, steps


def _runs(edges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of elements, each no longer than a piece or one element; edges stand between them."""
    place, last = 0, len(edges) - 1
    while place < last:
        within = np.searchsorted(edges, edges[place] + _PIECE, "right").item() - 1
        end = max(place + 1, within)
        yield edges[place].item() + 1, edges[end].item()
        place = end
