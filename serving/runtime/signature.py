"""What a function of a version takes and gives, and whether a request fits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import InvalidRequest


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one function of a version; None in a shape is any size."""

    name: str  # what clients call it
    inputs: dict[str, tf.TensorSpec]
    outputs: dict[str, tf.TensorSpec]
    proto: meta_graph_pb2.SignatureDef  # the same for `GetModelMetadata`
    # Whether row i of every output comes from row i of every input alone, as far as the shapes
    # tell: all inputs have a first dimension of any size, and so have the outputs.
    by_rows: bool = False

    @classmethod
    def of(cls, name: str, proto: meta_graph_pb2.SignatureDef) -> Signature:
        """Reads a signature as a SavedModel describes it."""
        inputs = {key: _spec(key, proto.inputs[key]) for key in sorted(proto.inputs)}
        outputs = {key: _spec(key, proto.outputs[key]) for key in sorted(proto.outputs)}
        by_rows = bool(inputs) and all(map(_any_rows, inputs.values()))
        by_rows &= all(_any_rows(spec) or spec.shape.rank is None for spec in outputs.values())
        return cls(name, inputs, outputs, proto, by_rows)

    def fit(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs as arrays, str as UTF-8 bytes, no other cast; InvalidRequest: no fit."""
        if inputs.keys() != self.inputs.keys():
            takes = ", ".join(f"{name!r}: {_shown(spec)}" for name, spec in self.inputs.items())
            got = ", ".join(repr(name[:80]) for name in list(inputs)[:20]) or "none"
            raise InvalidRequest(f"Signature {self.name!r} takes {takes}, got inputs {got}.")
        arrays = {name: self._fit_one(spec, inputs[name]) for name, spec in self.inputs.items()}
        if self.by_rows and len({len(array) for array in arrays.values()}) > 1:
            rows = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
            raise InvalidRequest(f"All inputs must have the same number of rows, got {rows}.")
        return arrays

    def rows(self, inputs: Mapping[str, np.ndarray]) -> int:
        """How many rows inputs that fit have; 1 where the function does not go by rows."""
        return len(next(iter(inputs.values()))) if self.by_rows else 1

    def row_shapes(self, inputs: Mapping[str, np.ndarray]) -> Hashable:
        """Equal for inputs whose rows can be joined."""
        return tuple(inputs[name].shape[1:] for name in self.inputs)

    def made_up(self, rows: int) -> dict[str, np.ndarray] | None:
        """Zeros and empty strings that fit; None where other sizes than the rows are open too."""
        inputs = {}
        for name, spec in self.inputs.items():
            shape: list[Any] = [None] if spec.shape.rank is None else spec.shape.as_list()
            if self.by_rows:
                shape[0] = rows
            if None in shape:
                return None
            dtype = spec.dtype.as_numpy_dtype
            inputs[name] = np.full(shape, b"" if dtype is object else 0, dtype)
        return inputs

    def _fit_one(self, spec: tf.TensorSpec, array: np.ndarray) -> np.ndarray:
        fits = array.dtype == spec.dtype.as_numpy_dtype
        if not fits or not spec.shape.is_compatible_with(array.shape):
            raise InvalidRequest(
                f"Input {spec.name!r} of signature {self.name!r} must be {_shown(spec)}, "
                f"got {tf.dtypes.as_dtype(array.dtype).name} {list(array.shape)}."
            )
        return array


def _spec(name: str, info: meta_graph_pb2.TensorInfo) -> tf.TensorSpec:
    sizes = [dim.size if dim.size >= 0 else None for dim in info.tensor_shape.dim]
    shape = None if info.tensor_shape.unknown_rank else sizes
    return tf.TensorSpec(shape, tf.dtypes.as_dtype(info.dtype), name)


def _any_rows(spec: tf.TensorSpec) -> bool:
    return bool(spec.shape.rank) and spec.shape[0] is None


def _shown(spec: tf.TensorSpec) -> str:
    shape = "" if spec.shape.rank is None else f" {spec.shape.as_list()}".replace("None", "any")
    return f"{spec.dtype.name}{shape}"
