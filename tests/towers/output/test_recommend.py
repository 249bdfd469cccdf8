import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import twotower
from pipeline.contract import schema
from pipeline.contract.files import checksum, made_aside
from towers.data.interactions import open_data
from towers.output.recommend import Ranker, recommend
from towers.output.settings import RecommendConfig
from towers.training.run_directory import open_run


@pytest.fixture
def config(prepared, trained, tmp_path):
    return RecommendConfig(
        data=str(prepared), run=trained[0].run, output=str(tmp_path / "out"), k=7, block_size=16
    )


def rows_of(directory):
    """[(user, candidates, scores)] of all files, in order."""
    tables = [pq.read_table(path).to_pylist() for path in sorted(directory.glob("*.parquet"))]
    rows = [row for table in tables for row in table]
    return [(row["query_id"], row["candidate_ids"], row["scores"]) for row in rows]


def expected_rows(config, keep_seen=False, k=7):
    """By a loop over users in float64."""
    data = open_data(config.data)
    model, _ = open_run(config.run, data)
    queries, candidates = (
        e.numpy().astype(np.float64)
        for e in (model.query_embeddings(), model.candidate_embeddings())
    )
    users, items = (getattr(data, f"{s}_vocabulary").raw_ids.to_pylist() for s in schema.SIDES)
    seen = {(row, c) for split in ("train", "validation") for row, c in pairs_of(data, split)}
    for row, user in enumerate(users):
        scores = candidates @ queries[row]
        free = [c for c in range(len(items)) if keep_seen or (row, c) not in seen]
        best = sorted(free, key=lambda c: -scores[c])[:k]
        yield user, [items[c] for c in best], [scores[c] for c in best]


def pairs_of(data, split):
    arrays = data.arrays(split)
    return zip(arrays["query_id"].tolist(), arrays["candidate_id"].tolist(), strict=True)


def assert_rows(found, expected):
    assert len(found) == len(expected)
    for (user, ids, scores), (other, other_ids, other_scores) in zip(found, expected, strict=True):
        assert (user, ids) == (other, other_ids)
        np.testing.assert_allclose(scores, other_scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_seen", [False, True])
def test_is_the_top_of_the_corpus_for_every_user(config, tmp_path, keep_seen):
    manifest = recommend(dataclasses.replace(config, keep_seen=keep_seen, shard_size=25))
    found = rows_of(tmp_path / "out")
    assert_rows(found, list(expected_rows(config, keep_seen)))
    names = [f"recommendations-{n:05d}-of-00003.parquet" for n in range(3)]
    assert sorted(manifest.files) == names
    assert [manifest.files[name]["rows"] for name in names] == [25, 25, len(found) - 50]
    assert manifest.configuration == {"k": 7, "index": "exact", "keep_seen": keep_seen, "where": ()}
    table = pd.read_parquet(tmp_path / "out")
    assert list(table.columns) == ["query_id", "candidate_ids", "scores"]
    written = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert written["counts"] == {"queries": len(found)}
    for name in names:
        assert checksum(tmp_path / "out" / name) == written["files"][name]["checksum"]


def test_users_who_saw_nearly_all_get_fewer(config, tmp_path):
    data = open_data(config.data)
    recommend(dataclasses.replace(config, k=data.num_candidates))
    found = rows_of(tmp_path / "out")
    left = data.num_candidates - data.positives("train", "validation").sizes
    assert [len(ids) for _, ids, _ in found] == left.tolist()
    assert_rows(found, list(expected_rows(config, k=data.num_candidates)))


@pytest.mark.parametrize(("block_size", "shard_size"), [(1, 1), (7, 20), (1000, 10), (60, 60)])
def test_blocks_and_files_may_have_any_size(config, tmp_path, block_size, shard_size):
    sizes = {"block_size": block_size, "shard_size": shard_size}
    recommend(dataclasses.replace(config, **sizes))
    assert_rows(rows_of(tmp_path / "out"), list(expected_rows(config)))


def ranker(config, top_k, change=0.0):
    """One with the vectors of the run, or with others."""
    data = open_data(config.data)
    vectors = open_run(config.run, data)[0].candidate_embeddings().numpy() + change
    return Ranker("version 7", data.candidate_vocabulary.raw_ids.to_pylist(), vectors, top_k)


def test_somebody_else_may_rank(config, tmp_path):
    asked = []

    def top_k(users):
        asked.append(len(users))
        return [
            ([f"{user}-a", f"{user}-b"][: 1 + len(user) % 2], [2.0, 1.0][: 1 + len(user) % 2])
            for user in users
        ]

    recommend(dataclasses.replace(config, index="scann", models="m"), ranker(config, top_k))
    users = open_data(config.data).query_vocabulary.raw_ids.to_pylist()
    for (user, ids, scores), expected in zip(rows_of(tmp_path / "out"), users, strict=True):
        assert (user, ids) == (expected, [f"{expected}-a", f"{expected}-b"][: len(ids)])
        assert scores == [2.0, 1.0][: len(ids)]
    assert max(asked) == 16


def test_queries_in_place_of_users(config, tmp_path):
    queries = [{"query_id": f"new {row}", "history": ["a"] * row} for row in range(20)]

    def top_k(block):
        return [(query["history"], [1.0] * len(query["history"])) for query in block]

    config = dataclasses.replace(config, data="", run="", queries="q", models="m")
    manifest = recommend(config, ranker_of(top_k, queries))
    rows = [(q["query_id"], q["history"], [1.0] * len(q["history"])) for q in queries]
    assert rows_of(tmp_path / "out") == rows
    assert (manifest.source, manifest.counts) == ("version 7", {"queries": 20})


def ranker_of(top_k, queries):
    return Ranker("version 7", [], np.zeros((0, 1)), top_k, queries)


def test_progress_in_a_log(config, caplog):
    caplog.set_level("INFO", "towers")
    recommend(config)
    lines = [line for line in caplog.messages if "of 60 users" in line]
    assert lines[0] == "recommend: 16 of 60 users"
    assert lines[-1] == "recommend: 60 of 60 users"


def test_an_output_that_is_there_is_kept(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="already exists; choose another --output"):
        recommend(config)
    assert (tmp_path / "out" / "mine").read_text() == "x"
    recommend(dataclasses.replace(config, overwrite=True))
    assert not (tmp_path / "out" / "mine").exists()


def test_a_ranker_of_another_run_is_refused(config, tmp_path):
    other = ranker(config, lambda users: [], change=0.01)
    with pytest.raises(ValueError, match=r"version 7 was not made from .*run as it is now: export"):
        recommend(config, other)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_stays(config, tmp_path):
    asked = []

    def top_k(users):
        asked.append(users)
        if len(asked) == 2:
            assert not (tmp_path / "out").exists()
            assert list((tmp_path / ".out.partial").iterdir())  # a file of the first block
            raise KeyboardInterrupt
        return [([], [])] * len(users)

    with pytest.raises(KeyboardInterrupt):
        recommend(dataclasses.replace(config, shard_size=16), ranker(config, top_k))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes(config, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "recommendations-00000-of-00099.parquet").write_bytes(b"half")
    recommend(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(rows_of(tmp_path / "out")) == 60


def test_a_second_writer_is_refused(config, tmp_path):
    with (
        made_aside(tmp_path / "out"),
        pytest.raises(ValueError, match=r"another process is writing .*out; wait for it"),
    ):
        recommend(config)


KILLED = """
import os, signal, sys
from test_recommend import ranker
from towers.output.settings import RecommendConfig
from towers.output.recommend import recommend

config = RecommendConfig(
    data=sys.argv[1], run=sys.argv[2], output=sys.argv[3], block_size=16, shard_size=16
)
asked = []

def top_k(users):
    asked.append(users)
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [([], [])] * len(users)

recommend(config, ranker(config, top_k))
"""


@pytest.mark.long
def test_killed_in_the_middle_then_again(config, tmp_path):
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, config.data, config.run, config.output],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", ".out.partial.lock"}
    recommend(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_rows(rows_of(tmp_path / "out"), list(expected_rows(config)))


@pytest.mark.long
def test_from_the_command_line_exact_and_scann(config, tmp_path, capsys, caplog):
    places = ["--data", config.data, "--run", config.run]
    models = ["--models", str(tmp_path / "models"), "--name", "shop"]
    assert twotower.main(["export", *places, *models, "--k", "10"]) == 0
    for index in ("exact", "scann"):
        output = ["--output", str(tmp_path / index), "--k", "7", "--index", index]
        assert twotower.main(["recommend", *places, *models, *output]) == 0
        assert "60 users in 1 file(s)" in caplog.text
        caplog.clear()
    exact, scann = (rows_of(tmp_path / index) for index in ("exact", "scann"))
    assert_rows(exact, list(expected_rows(config)))
    found = 0
    seen = seen_ids(config)
    for (user, ids, _), (other, other_ids, _) in zip(exact, scann, strict=True):
        assert user == other
        assert len(other_ids) == len(ids)
        assert not seen[user] & set(other_ids)
        found += len(set(ids) & set(other_ids)) / len(ids)
    assert found / len(exact) >= 0.9
    manifest = json.loads((tmp_path / "scann" / "_manifest.json").read_text())
    assert manifest["configuration"]["index"] == "scann"

    refused = [*places, *models, "--output", str(tmp_path / "no"), "--index", "scann"]
    assert twotower.main(["recommend", *refused, "--k", "11"]) == 2
    assert "k must be at most 10, the k of" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def seen_ids(config):
    """Raw id of each user → raw ids of what was chosen in train and validation."""
    data = open_data(config.data)
    users, items = (getattr(data, f"{s}_vocabulary").raw_ids.to_pylist() for s in schema.SIDES)
    seen = {user: set() for user in users}
    for split in ("train", "validation"):
        for row, candidate in pairs_of(data, split):
            seen[users[row]].add(items[candidate])
    return seen


def test_a_full_disk_is_told_in_one_line(config, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with pytest.raises(ValueError, match=r"cannot be written: no space .*; make room"):
            recommend(dataclasses.replace(config, output=str(place / "out"), shard_size=5))
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("output", "", "output must be given"),
        ("k", 0, "k must be at least 1"),
        ("block_size", 0, "block_size must be at least 1"),
        ("shard_size", 0, "shard_size must be at least 1"),
        ("index", "hnsw", "index must be exact or scann"),
        ("index", "scann", "models must be given with --index scann"),
        ("where", ("a=b",), "models must be given with --index scann, --queries and --where"),
        ("queries", "q.parquet", "models must be given with"),
        ("output", "r", "output must not be or hold run"),
        ("output", ".", "output must not be or hold data"),
    ],
)
def test_wrong_settings_are_errors(field, value, text):
    with pytest.raises(ValueError, match=text):
        RecommendConfig(**({"data": "d", "run": "r", "output": "o"} | {field: value}))
