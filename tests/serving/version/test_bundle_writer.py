import json
import signal
import subprocess
import sys

import numpy as np
import pytest

import twotower
from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle, write_bundle
from serving.retrieval.retriever import Retriever


def arrays(sample):
    return {"vectors": sample.vectors.astype(np.float64), "candidate_ids": sample.candidate_ids}


def test_arrays_become_a_version_by_one_command(small, tmp_path, capsys):
    sample = small.sample
    write_bundle(
        tmp_path / "bundle",
        **arrays(sample),
        source="another trainer",
        query_model=small.bundle / schema.BUNDLE_QUERY_MODEL,
        sample_queries=sample.queries,
        query_ids=sample.query_ids,
        seen=sample.seen,
        counts=np.arange(300),
    )
    models = tmp_path / "models"
    flags = ["--bundle", str(tmp_path / "bundle"), "--models", str(models), "--k", "40"]
    assert twotower.main(["export", *flags, "--target_recall", "0.9", "--at", "10"]) == 0
    assert f"version: {models / 'twotower' / '1'}" in capsys.readouterr().out
    report = json.loads((models / "twotower/1/ann_report.json").read_text())
    assert (report["at"], report["target_recall"], report["queries"]["count"]) == (10, 0.9, 20)
    retriever = Retriever.load(models)
    for query, result in enumerate(retriever.top_k(sample.query_ids, 40, exclude_seen=True)):
        assert result.candidate_ids == sample.best_ids(query, sample.seen[query])[:40]
    [popular] = retriever.top_k(["nobody"], 2, unknown_queries="popular")
    assert popular.scores == [299, 298]


def test_vectors_and_ids_are_enough(small, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", **arrays(small.sample))
    content = read_bundle(bundle)
    np.testing.assert_array_equal(content.vectors, small.sample.vectors)
    assert content.candidate_ids == small.sample.candidate_ids
    assert (content.query_model, content.num_queries) == (None, None)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "candidate_ids.parquet",
        "candidate_vectors.npy",
        "manifest.json",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_ids": ["a", "b"]}, "got 2 ids: write both in the same order"),
        ({"query_ids": ["a"]}, "query_ids and seen must be given together"),
        ({"counts": np.zeros(3)}, r"must be int64 \[300\]"),
        ({"vectors": np.zeros((300, 2))}, "got only zeros in row 0, candidate 'cañdidate 0'"),
    ],
)
def test_a_refused_bundle_leaves_what_stood_there(small, tmp_path, change, message):
    before = write_bundle(tmp_path / "bundle", **arrays(small.sample), source="before")
    with pytest.raises(ValueError, match=message):
        write_bundle(tmp_path / "bundle", **{**arrays(small.sample), **change})
    assert schema.read_manifest(before, "bundle").source == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_command_without_bundle_or_run_says_what_it_needs(tmp_path, capsys):
    assert twotower.main(["export", "--models", str(tmp_path)]) == 2
    assert "data must be a directory, got ''" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import numpy as np
from pipeline.contract import bundle
from pipeline.contract.bundle import write_bundle

room, name = {"files": (bundle, "describe_files"), "renames": (os, "rename")}[sys.argv[2]]
call = getattr(room, name)
def killed(*arguments):
    if name == "rename":
        call(*arguments)  # the bundle that stood there
    os.kill(os.getpid(), signal.SIGKILL)
setattr(room, name, killed)
write_bundle(sys.argv[1], np.full([2, 2], 3), ["a", "b"])
"""


@pytest.mark.parametrize("moment", ["files", "renames"])
def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path, moment):
    bundle, new = tmp_path / "bundle", np.ones([2, 2])
    write_bundle(bundle, -new, ["a", "b"])
    before = {path.name for path in tmp_path.iterdir()}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(bundle), moment])
    assert killed.returncode == -signal.SIGKILL
    assert bundle.exists() == (moment == "files")
    write_bundle(bundle, new, ["a", "b"])
    np.testing.assert_array_equal(read_bundle(bundle).vectors, new)
    assert {path.name for path in tmp_path.iterdir()} == before
