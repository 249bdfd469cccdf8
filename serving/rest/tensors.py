"""Values of TensorFlow Serving's REST API: nested lists to arrays, arrays to what JSON can carry.

Differs: where a string is not valid UTF-8, it becomes {"b64": ...} also in an output whose name
does not end in _bytes; TensorFlow Serving writes its bytes, which then are no JSON.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from typing import Any

import numpy as np
import orjson

from serving.errors import InvalidRequest

_BASE64 = "b64"
_MAX_DIMENSIONS = 32  # of an array in NumPy 1
_MAX_SHOWN = 80  # characters of a value in a message; a client may send megabytes
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {  # kind of dtype → what its values are in JSON
    "O": ("a string", (str, dict)),
    "b": ("true or false", (bool,)),
    "i": ("an integer", (int,)),
    "u": ("an integer", (int,)),
    "f": ("a number", (int, float)),
}
_NOT_FINITE = {  # `str` of a number → as TensorFlow Serving writes it and Python reads it
    "nan": orjson.Fragment(b"NaN"),
    "inf": orjson.Fragment(b"Infinity"),
    "-inf": orjson.Fragment(b"-Infinity"),
}


def to_array(name: str, value: Any, dtype: Any) -> np.ndarray:
    """Nested lists to an array; the first element at each level says how long all must be.

    >>> to_array("x", [[1, 2], [3, 4]], np.float32).tolist()
    [[1.0, 2.0], [3.0, 4.0]]

    Raises:
      InvalidRequest: the lists are ragged, or a value is not of the dtype; naming the input.
    """
    leaves, shape = [value], []
    while leaves and isinstance(leaves[0], list):
        shape.append(len(leaves[0]))
        if len(shape) > _MAX_DIMENSIONS:
            raise InvalidRequest(f"Input {name!r} has more than {_MAX_DIMENSIONS} dimensions.")
        for part in leaves:
            if not isinstance(part, list) or len(part) != shape[-1]:
                raise InvalidRequest(
                    f"Input {name!r} must be nested evenly: expected lists of {shape[-1]} at "
                    f"level {len(shape)}, got {shown(part)}."
                )
        leaves = list(itertools.chain.from_iterable(leaves))
    return _flat_array(name, leaves, np.dtype(dtype)).reshape(shape)


def to_json_values(name: str, array: np.ndarray) -> Any:
    """An array as what orjson writes: itself, or nested lists of strings.

    orjson writes the floats of an array with the fewest digits that give them back.

    >>> orjson.dumps(to_json_values("x", np.float32([0.1])), option=orjson.OPT_SERIALIZE_NUMPY)
    b'[0.1]'

    Raises:
      InvalidRequest: JSON can carry no such dtype.
    """
    if array.dtype.kind in "OSU":
        as_bytes = name.endswith("_bytes")  # outputs so named hold bytes, all others text
        texts = [_text(value, as_bytes=as_bytes) for value in array.ravel().tolist()]
        return np.array(texts, object).reshape(array.shape).tolist()
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise InvalidRequest(f"Output {name!r} is {array.dtype.name}, which JSON cannot carry.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        numbers = [_NOT_FINITE.get(str(value), value) for value in array.ravel()]
        return np.array(numbers, object).reshape(array.shape).tolist()
    return np.asarray(array, order="C")[()]  # of one without dimensions its number


def shown(value: Any) -> str:
    """A value for a message, as JSON, cut short."""
    parts = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(value)
    text = "".join(part[: _MAX_SHOWN + 1] for part in itertools.islice(parts, _MAX_SHOWN + 1))
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def is_base64(value: Any) -> bool:
    """Whether it is a binary value, {"b64": "..."}."""
    return isinstance(value, dict) and value.keys() == {_BASE64} and isinstance(value[_BASE64], str)


def _flat_array(name: str, leaves: list[Any], dtype: np.dtype) -> np.ndarray:
    """Values to an array of one dimension, without loss."""
    if dtype.kind not in _TYPES:
        raise InvalidRequest(f"Input {name!r} is {dtype.name}, which JSON cannot carry: use gRPC.")
    expected, types = _TYPES[dtype.kind]
    if not set(map(type, leaves)) <= set(types):
        wrong = next(leaf for leaf in leaves if type(leaf) not in types)
        raise InvalidRequest(
            f"Input {name!r} must be {expected} in every place, got {shown(wrong)}."
        )
    if dtype.kind == "O":
        return np.array([_bytes(name, leaf) for leaf in leaves], object)
    if dtype.kind == "f":
        return _floats(name, leaves, dtype)
    try:
        return np.array(leaves, dtype)
    except OverflowError as error:
        raise InvalidRequest(f"Input {name!r} must be {dtype.name}: {error}.") from error


def _bytes(name: str, leaf: Any) -> bytes:
    if isinstance(leaf, str):
        return leaf.encode()
    if not is_base64(leaf):
        raise InvalidRequest(
            f"Input {name!r} must hold strings or objects with the one key {_BASE64!r}, "
            f"got {shown(leaf)}."
        )
    text = leaf[_BASE64].rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise InvalidRequest(f"Input {name!r} is not valid base64: {error}.") from error


def _floats(name: str, leaves: list[Any], dtype: np.dtype) -> np.ndarray:
    """Numbers of a floating-point dtype; an integer that it does not hold exactly is refused."""
    most = 2 ** (np.finfo(dtype).nmant + 1) - 1
    lost = [leaf for leaf in leaves if type(leaf) is int and abs(leaf) > most]
    if not lost:
        with np.errstate(over="ignore"):
            array = np.array(leaves, np.float64).astype(dtype)
        lost = [leaves[place] for place in np.flatnonzero(np.isinf(array))]
        lost = [leaf for leaf in lost if not math.isinf(leaf)]
    if lost:
        raise InvalidRequest(
            f"Input {name!r}: {shown(lost[0])} cannot be a {dtype.name} without loss of precision."
        )
    return array


def _text(value: bytes, *, as_bytes: bool) -> Any:
    if not as_bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return {_BASE64: base64.b64encode(value).decode()}
