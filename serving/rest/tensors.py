"""Arrays as nested lists in JSON: the values of TensorFlow Serving's REST API.

Differs: where a string is not valid UTF-8, it becomes {"b64": ...} also in an output whose name
does not end in _bytes; TensorFlow Serving writes its bytes, which then are no JSON.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from typing import Any

import numpy as np
from pydantic_core import to_json

from serving.errors import InvalidRequest

_BASE64 = "b64"
_BYTES_SUFFIX = "_bytes"  # outputs so named hold bytes, all others text
_MOST_DIMENSIONS = 32  # of an array in NumPy 1
_SHOWN = 80  # characters of a value in a message; a client may send megabytes
_FIRST = 40  # parts of a list or an object in it: with their commas they are as long
_POWERS = 10.0 ** np.arange(23)  # all the powers of ten that float64 holds exactly
_SHORTENED = (1e-12, 1e6)  # sizes of numbers whose digits these powers can count


def to_array(name: str, value: Any, dtype: Any) -> np.ndarray:
    """Nested lists to an array; the first element at each level says how long all must be.

    Raises:
      InvalidRequest: the lists are ragged, or a value is not of the dtype; naming the input.
    """
    leaves, shape = [value], []
    while leaves and isinstance(leaves[0], list):
        shape.append(len(leaves[0]))
        if len(shape) > _MOST_DIMENSIONS:
            raise InvalidRequest(f"Input {name!r} has more than {_MOST_DIMENSIONS} dimensions.")
        for part in leaves:
            if not isinstance(part, list) or len(part) != shape[-1]:
                raise InvalidRequest(
                    f"Input {name!r} must be nested evenly: expected lists of {shape[-1]} at "
                    f"level {len(shape)}, got {shown(part)}."
                )
        leaves = list(itertools.chain.from_iterable(leaves))
    return _array(name, leaves, np.dtype(dtype)).reshape(shape)


def to_lists(name: str, array: np.ndarray) -> Any:
    """An array as nested lists of what JSON can carry.

    Raises:
      InvalidRequest: it can carry no such dtype.
    """
    kind = array.dtype.kind
    if kind in "OSU":
        return _nested(_texts(array, as_bytes=name.endswith(_BYTES_SUFFIX)), array.shape)
    if kind in "biu" or array.dtype == np.float64:
        return array.tolist()
    if kind == "f" or array.dtype.name == "bfloat16":
        return _shortened(array).tolist()
    raise InvalidRequest(f"Output {name!r} is {array.dtype.name}, which JSON cannot carry.")


def short_floats(values: list[float]) -> list[float]:
    """The same float32 numbers with the fewest digits; other numbers stay as they are."""
    wide = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return np.where(narrow == wide, _shortened(narrow), wide).tolist()


def shown(value: Any) -> str:
    """A value for a message, as JSON, cut short."""
    if isinstance(value, list | dict) and len(value) > _SHOWN:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = to_json(_cut(value), inf_nan_mode="constants").decode()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _cut(value: Any, levels: int = 3) -> Any:
    """The beginning of a value: all that a message shows of it, and not much more."""
    if isinstance(value, str):
        return value[:_SHOWN]
    if isinstance(value, dict):
        first = list(itertools.islice(value.items(), _FIRST if levels else 0))
        return {name[:_SHOWN]: _cut(part, levels - 1) for name, part in first}
    if isinstance(value, list):
        return [_cut(part, levels - 1) for part in value[: _FIRST if levels else 0]]
    return value


def is_base64(value: Any) -> bool:
    """Whether it is a binary value, {"b64": "..."}."""
    return isinstance(value, dict) and value.keys() == {_BASE64} and isinstance(value[_BASE64], str)


def _array(name: str, leaves: list[Any], dtype: np.dtype) -> np.ndarray:
    """Values to an array of one dimension, without loss."""
    if dtype.kind == "O":
        _check_types(name, leaves, "a string", str, dict)
        array = np.empty(len(leaves), object)
        array[:] = [_bytes(name, leaf) for leaf in leaves]
        return array
    if dtype.kind == "b":
        _check_types(name, leaves, "true or false", bool)
        return np.array(leaves, dtype)
    if dtype.kind in "iu":
        _check_types(name, leaves, f"an {dtype.name}", int)
        try:
            return np.array(leaves, dtype)
        except OverflowError as error:
            raise InvalidRequest(f"Input {name!r} must be {dtype.name}: {error}.") from error
    if dtype.kind == "f":
        _check_types(name, leaves, "a number", int, float)
        return _floats(name, leaves, dtype)
    raise InvalidRequest(f"Input {name!r} is {dtype.name}, which JSON cannot carry: use gRPC.")


def _check_types(name: str, leaves: list[Any], wanted: str, *types: type) -> None:
    if set(map(type, leaves)) <= set(types):
        return
    wrong = next(leaf for leaf in leaves if type(leaf) not in types)
    raise InvalidRequest(f"Input {name!r} must be {wanted} in every place, got {shown(wrong)}.")


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
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"Input {name!r} is not valid base64: {error}.") from error


def _floats(name: str, leaves: list[Any], dtype: np.dtype) -> np.ndarray:
    """Numbers of a floating-point dtype; an integer that it does not hold exactly is refused."""
    most = 2 ** (np.finfo(dtype).nmant + 1) - 1
    try:
        exact = np.array(leaves, np.float64)
    except OverflowError:
        exact = np.array([float("inf")])
    with np.errstate(over="ignore"):
        array = exact.astype(dtype)
    integers = [leaf for leaf in leaves if isinstance(leaf, int)]
    if integers and max(map(abs, integers)) > most:
        lost = next(leaf for leaf in integers if abs(leaf) > most)
    elif (np.isinf(array) & np.isfinite(exact)).any():
        lost = exact[np.argmax(np.isinf(array) & np.isfinite(exact))].item()
    else:
        return array
    raise InvalidRequest(
        f"Input {name!r}: {shown(lost)} cannot be a {dtype.name} without loss of precision."
    )


def _texts(array: np.ndarray, *, as_bytes: bool) -> list[Any]:
    """The strings of an array, in order."""
    flat = array.ravel().tolist()
    if as_bytes:
        return [{_BASE64: base64.b64encode(value).decode()} for value in flat]
    try:  # one decoding for all
        texts = b"\0".join(flat).decode().split("\0")
    except UnicodeDecodeError:
        texts = []
    return texts if len(texts) == len(flat) else [_text(value) for value in flat]


def _text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {_BASE64: base64.b64encode(value).decode()}


def _nested(flat: list[Any], shape: tuple[int, ...]) -> Any:
    """Lists of the given shape; as `ndarray.tolist`, without an array of objects in between."""
    if not flat:
        return np.empty(shape).tolist()
    for size in reversed(shape[1:]):
        flat = [flat[start : start + size] for start in range(0, len(flat), size)]
    return flat if shape else flat[0]


def _shortened(values: np.ndarray) -> np.ndarray:
    """Float64 whose decimal text has the fewest digits that still give back the same `values`.

    A float32 0.1 is 0.10000000149011612 as float64. Nine digits always give a float32 back, eight
    or seven often; the quotient of an integer and a power of ten, both exact, is the float64
    nearest to that decimal, which is printed by its shortest text. Very large and very small
    numbers keep their digits.
    """
    wide = values.astype(np.float64)
    size = np.abs(wide)
    usual = (size >= _SHORTENED[0]) & (size < _SHORTENED[1])
    exponent = np.floor(np.log10(np.where(usual, size, 1.0))).astype(np.int64)
    best = wide
    for digits in (9, 8, 7):
        scale = _POWERS[digits - 1 - exponent]
        decimal = np.rint(np.where(usual, wide, 0.0) * scale) / scale
        best = np.where(usual & (decimal.astype(values.dtype) == values), decimal, best)
    return best
