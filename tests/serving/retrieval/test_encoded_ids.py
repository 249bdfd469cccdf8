"""Ids as answers carry them, held against what json and protobuf write."""

import json

import numpy as np
import pytest
from tensorflow.core.framework import tensor_pb2

from serving.retrieval import encoded_ids
from serving.retrieval.encoded_ids import EncodedIds

IDS = ["a", "", 'b"\\', "ñ\n\0\x7f\u2028", "x" * 300, "last"]


@pytest.mark.parametrize("added", [0, 1, 6])
def test_rows_give_their_ids(added):
    base = EncodedIds(IDS[: len(IDS) - added])
    ids = EncodedIds(IDS[len(IDS) - added :], base) if added else base
    rows = np.random.default_rng(added).integers(-1, len(IDS), size=(4, 50), dtype=np.int32)
    wanted = [[([*IDS, ""])[row] for row in part] for part in rows]
    assert [json.loads(part) for part in ids.json_lists(rows)] == wanted
    tensor = tensor_pb2.TensorProto.FromString(bytes(ids.string_val(rows)))
    assert list(tensor.string_val) == [name.encode() for part in wanted for name in part]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_give_no_ids(shape):
    ids = EncodedIds(IDS)
    assert ids.json_lists(np.zeros(shape, np.int32)) == [b"[]"] * shape[0]
    assert ids.string_val(np.zeros(shape, np.int32)) == b""


def test_ids_give_their_rows():
    ids = [raw_id for raw_id in IDS if raw_id]
    base = EncodedIds(ids)
    wanted = ["last", "none", "a", "", "a", "\ud800", ids[2]]
    assert base.rows(wanted).tolist() == [len(ids) - 1, -1, 0, -1, 0, -1, 2]
    assert base.rows([]).tolist() == []
    assert base.names(base.rows(ids)) == ids
    both = EncodedIds(["more"], base)
    assert both.rows(["more", *ids]).tolist() == [-1, *range(len(ids))]
    assert both.names(np.array([len(ids), 0, -1])) == ["more", "a", ""]


def test_the_first_writes_a_file_that_others_map(tmp_path):
    def fail():
        raise AssertionError("it is read again")

    file, ids = tmp_path / "ids.arrow", [raw_id for raw_id in IDS if raw_id]
    first, second = EncodedIds.mapped(file, lambda: ids), EncodedIds.mapped(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.arrow"]
    file.unlink()
    rows, own = np.array([[0, 3, -1]]), EncodedIds(ids)
    for mapped in (first, second):
        assert mapped.rows(ids).tolist() == list(range(len(ids)))
        assert mapped.names(rows[0]) == own.names(rows[0])
        assert mapped.json_lists(rows) == own.json_lists(rows)
        assert mapped.string_val(rows) == own.string_val(rows)


def test_two_ids_with_one_fingerprint_are_an_error(monkeypatch):
    monkeypatch.setattr(encoded_ids, "fingerprints", lambda raws: np.zeros(len(list(raws)), int))
    with pytest.raises(ValueError, match="'' and 'a' share a fingerprint: rename one"):
        EncodedIds(["a"]).rows(["a"])
