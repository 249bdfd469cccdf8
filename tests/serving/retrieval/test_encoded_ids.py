"""Ids as answers carry them, held against what json and protobuf write."""

import json

import numpy as np
import pytest
from tensorflow.core.framework import tensor_pb2

from serving.retrieval.encoded_ids import EncodedIds

IDS = ["a", "", 'b"\\', "ñ\n\0\x7f\u2028", "x" * 300, "last"]


@pytest.mark.parametrize("added", [0, 1, 6])
def test_rows_give_their_ids(added):
    base = EncodedIds(IDS[: len(IDS) - added])
    ids = EncodedIds(IDS[len(IDS) - added :], base) if added else base
    rows = np.random.default_rng(added).integers(-1, len(IDS), size=(4, 50), dtype=np.int32)
    wanted = [[([*IDS, ""])[row] for row in part] for part in rows]
    assert [json.loads(part) for part in ids.json_lists(rows)] == wanted
    tensor = tensor_pb2.TensorProto.FromString(ids.string_val(rows))
    assert list(tensor.string_val) == [name.encode() for part in wanted for name in part]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_give_no_ids(shape):
    ids = EncodedIds(IDS)
    assert ids.json_lists(np.zeros(shape, np.int32)) == [b"[]"] * shape[0]
    assert ids.string_val(np.zeros(shape, np.int32)) == b""
