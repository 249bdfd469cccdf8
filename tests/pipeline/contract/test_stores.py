"""Outputs in a store are whole or absent, and read by a checked copy; against a real S3 server."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from object_store import SECRET, empty, gated_store
from prepared import digest

import twotower
from pipeline.contract import schema, stores
from pipeline.contract.bundle import write_bundle

pytestmark = pytest.mark.long
PLACE = "s3://data/bundle"


@pytest.fixture(scope="module")
def server():
    """A gate before a store with a bucket `data`, and a client of it."""
    with gated_store("data") as gate_and_client:
        yield gate_and_client


@pytest.fixture
def gate(server):
    return empty(*server, "data")


@pytest.fixture
def store(gate, server, tmp_path, monkeypatch):
    """A client of the empty bucket; the cache is empty, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server[1]


def bundle(place, value):
    """A finished directory; its vectors hold the value."""
    return write_bundle(place, np.full((2, 2), value), ["a", "b"])


def value_at(place):
    return float(np.load(stores.local_copy(place) / schema.BUNDLE_VECTORS)[0, 0])


def folders(store, root="data/bundle"):
    return [path for path in store.ls(root) if "/run-" in path]


def test_a_copy_has_the_bytes_of_what_was_uploaded(store, tmp_path):
    made = bundle(tmp_path / "made", 1)
    (made / "inner").mkdir()
    (made / "inner" / "empty").touch()
    stores.upload(made, PLACE)
    copy = stores.local_copy(PLACE)
    assert digest(copy) == digest(made)
    assert copy.is_relative_to(tmp_path / "cache")


def test_a_second_upload_replaces_the_first_and_removes_it(store, tmp_path):
    for value in (1, 2):
        stores.upload(bundle(tmp_path / "made", value), PLACE)
        assert value_at(PLACE) == value
        assert len(folders(store)) == 1
        assert len(store.ls("data/bundle")) == 2


def test_a_copy_is_made_once(store, gate, tmp_path):
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    copy = stores.local_copy(PLACE)
    gate.requests.clear()
    assert stores.local_copy(PLACE) == copy
    assert {method for method, _ in gate.requests} <= {"GET", "HEAD"}
    assert {Path(path).name for _, path in gate.requests} == {schema.MANIFEST}


@pytest.mark.parametrize("fails_at", [1, 3, 4])  # a file, the last one, the manifest
def test_a_put_that_fails_leaves_what_was_there(store, gate, tmp_path, fails_at):
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    puts = []

    def judge(method, path):
        puts.extend([path] if method == "PUT" else [])
        return 403 if method == "PUT" and len(puts) >= fails_at else 0

    gate.judge = judge
    made = bundle(tmp_path / "made", 2)
    (made / "one_more").write_text("more")
    with pytest.raises(ValueError, match=f"{PLACE} cannot be reached") as error:
        stores.upload(made, PLACE)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    assert len(puts) >= fails_at
    assert value_at(PLACE) == 1
    gate.judge = lambda method, path: 0
    stores.upload(made, PLACE)
    assert value_at(PLACE) == 2
    assert len(folders(store)) == 1


def test_a_store_that_is_slow_for_once_is_asked_again(store, gate, tmp_path):
    answers = [503]
    gate.judge = lambda method, path: answers.pop() if answers and method == "PUT" else 0
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    assert not answers
    assert value_at(PLACE) == 1


def test_a_reader_has_the_old_or_the_new(store, gate, tmp_path):
    """The directory is replaced while a copy of it is under way."""
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    new = bundle(tmp_path / "made", 2)
    replaced = []

    def judge(method, path):
        if method == "GET" and path.endswith(schema.BUNDLE_VECTORS) and not replaced:
            replaced.append(path)
            stores.upload(new, PLACE)
        return 0

    gate.judge = judge
    assert value_at(PLACE) == 2
    assert replaced


def test_damage_is_found(store, tmp_path):
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    [path] = store.glob(f"data/bundle/run-*/{schema.BUNDLE_VECTORS}")
    store.pipe(path, store.cat(path)[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{PLACE} is not what its manifest says"):
        stores.local_copy(PLACE)
    assert list((tmp_path / "cache").rglob("*.npy")) == []


def test_files_that_people_copied_are_read_as_they_are(store, tmp_path):
    made = bundle(tmp_path / "made", 3)
    store.put(str(made), PLACE, recursive=True)
    assert digest(stores.local_copy(PLACE)) == digest(made)


def test_of_two_new_ones_one_is_first(store, tmp_path):
    stores.upload(bundle(tmp_path / "made", 1), PLACE, new=True)
    with pytest.raises(FileExistsError):
        stores.upload(bundle(tmp_path / "made", 2), PLACE, new=True)
    assert value_at(PLACE) == 1
    assert len(folders(store)) == 1


def test_nothing_of_others_is_removed(store, tmp_path):
    store.pipe("data/bundle/notes.txt", b"mine")
    store.pipe("data/bundle/run-away/notes.txt", b"mine")
    for value in (1, 2):
        stores.upload(bundle(tmp_path / "made", value), PLACE)
    assert store.cat("data/bundle/notes.txt") == b"mine"
    assert store.exists("data/bundle/run-away/notes.txt")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://data", "a place in a bucket that exists"),
        ("s3://nowhere/bundle", "a place in a bucket that exists"),
        (f"s3://key:{SECRET}@data/bundle", "holds credentials"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(store, tmp_path, place, message):
    with pytest.raises(ValueError, match=message) as error:
        stores.upload(bundle(tmp_path / "made", 1), place)
    assert SECRET not in str(error.value)


def test_what_is_no_manifest_of_ours_is_refused(store):
    for content in (b"{", b"[]", b'{"name": "web app"}'):
        store.pipe("data/site/manifest.json", content)
        with pytest.raises(ValueError, match="not a manifest of twotower"):
            stores.local_copy("s3://data/site")
    with pytest.raises(ValueError, match="holds nothing finished"):
        stores.local_copy("s3://data/empty")


def log_in(directory, rows=400):
    """A log of two files."""
    directory.mkdir()
    for part in range(2):
        lines = [f"u{n % 37},i{n % 23}" for n in range(part, rows, 2)]
        (directory / f"{part}.csv").write_text("\n".join(["user_id,item_id", *lines]))
    return str(directory)


@pytest.mark.parametrize("command", ["prepare", "frequencies"])
def test_an_output_in_a_store_is_that_of_the_disk(store, tmp_path, capsys, command):
    source, output = log_in(tmp_path / "log"), "s3://data/out"
    assert twotower.main([command, "--source", source, "--output", str(tmp_path / "out")]) == 0
    arguments = [command, "--source", source, "--output", output]
    assert twotower.main(arguments) == 0
    assert digest(stores.local_copy(output)) == digest(tmp_path / "out")
    assert SECRET not in "".join(store.cat(path).decode() for path in store.glob("data/out/*.json"))
    assert twotower.main(arguments) == 2
    assert f"{output} already exists" in capsys.readouterr().err
    assert twotower.main([*arguments, "--overwrite"]) == 0
    assert digest(stores.local_copy(output)) == digest(tmp_path / "out")
    assert len(folders(store, "data/out")) == 1
    assert list((tmp_path / "cache/twotower/outputs").iterdir()) == []


def test_bad_rows_of_an_output_in_a_store_are_kept_here(store, tmp_path, capsys):
    (tmp_path / "log.csv").write_text("user_id,item_id\n,i\nu,i\n")
    arguments = ["--source", str(tmp_path / "log.csv"), "--output", "s3://data/out"]
    assert twotower.main(["prepare", *arguments]) == 2
    kept = capsys.readouterr().err.partition("all of them are in ")[2].partition(",")[0]
    assert Path(kept).read_text().count("\n") == 1
    assert store.find("data/out") == []


def test_a_preparation_that_is_killed_while_it_uploads_leaves_the_old_one(store, gate, tmp_path):
    source, output = log_in(tmp_path / "log"), "s3://data/out"
    arguments = ["prepare", "--source", source, "--output", output]
    assert twotower.main(arguments) == 0
    before = digest(stores.local_copy(output))
    puts, held, is_killed = [], threading.Event(), threading.Event()

    def judge(method, path):
        puts.extend([path] if method == "PUT" else [])
        if len(puts) > 5:
            held.set()
            is_killed.wait(60)
            return 403
        return 0

    gate.judge = judge
    script = "import sys, twotower; sys.exit(twotower.main())"
    again = [*arguments, "--overwrite", "--seed", "11"]
    job = subprocess.Popen([sys.executable, "-c", script, *again], start_new_session=True)
    try:
        assert held.wait(120)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        is_killed.set()
    gate.judge = lambda method, path: 0
    assert len(folders(store, "data/out")) == 2  # the finished one, and what was left
    assert digest(stores.local_copy(output)) == before
    assert twotower.main(again) == 0
    assert digest(stores.local_copy(output)) != before
    assert len(folders(store, "data/out")) == 1
    assert list((tmp_path / "cache/twotower/outputs").iterdir()) == []


def test_an_output_that_cannot_be_uploaded_is_kept(store, gate, tmp_path, capsys):
    gate.judge = lambda method, path: 403 if method == "PUT" else 0
    source, output = log_in(tmp_path / "log"), "s3://data/out"
    arguments = ["prepare", "--source", source, "--output", output]
    assert twotower.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{output} cannot be reached" in error
    assert error.count("\n") == 1
    kept = Path(error.partition("is kept in ")[2].strip().rstrip("."))
    assert schema.read_manifest(kept, "prepared").files
    gate.judge = lambda method, path: 0
    store.put(str(kept), output, recursive=True)  # as people do by hand
    assert digest(stores.local_copy(output)) == digest(kept)
    assert twotower.main([*arguments, "--overwrite"]) == 0
    assert not kept.exists()


def work_in(place, value, *, may_be_new=True):
    """Writes a value in a working copy; without one, fails."""
    with stores.working_copy(place, may_be_new=may_be_new) as work:
        (work / "step").write_text(value or "lost")
        if not value:
            raise RuntimeError


RUN = "s3://data/run"


def step_of(place=RUN):
    return (stores.local_copy(place) / "step").read_text()


def test_a_working_copy_is_uploaded_where_it_was_changed(store, gate):
    with pytest.raises(ValueError, match="holds nothing finished"):
        work_in(RUN, "1", may_be_new=False)
    with pytest.raises(RuntimeError):
        work_in(RUN, "")
    assert store.find("data/run") == []
    with stores.working_copy(RUN, may_be_new=True) as work:
        assert (work / "step").read_text() == "lost"  # what failed goes on
        assert work.name == "run"
        (work / ".lock").touch()
        (work / "step").write_text("2")
    assert {Path(path).name for path in store.find("data/run")} == {"manifest.json", "step"}
    gate.requests.clear()
    with stores.working_copy(RUN, may_be_new=False) as work:
        assert (work / "step").read_text() == "2"
    assert {Path(path).name for _, path in gate.requests} == {"manifest.json"}
    assert "PUT" not in {method for method, _ in gate.requests}


def test_a_working_copy_follows_the_store(store, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError):
        work_in(RUN, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    work_in(RUN, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stores.working_copy(RUN, may_be_new=True) as work:
        assert (work / "step").read_text() == "1"
        (work / "step").write_text("2")
    assert step_of() == "2"
    assert len(folders(store, "data/run")) == 1
    store.rm("data/run", recursive=True)
    with stores.working_copy(RUN, may_be_new=True) as work:
        assert list(work.iterdir()) == []


def test_work_that_cannot_be_uploaded_is_kept(store, gate, tmp_path, monkeypatch):
    work_in(RUN, "1")

    def kept(error):
        return Path(str(error.value).partition("is kept in ")[2].rstrip("."), "step").read_text()

    gate.judge = lambda method, path: 403 if method == "PUT" else 0
    with pytest.raises(ValueError, match="cannot be reached") as error:
        work_in(RUN, "2")
    assert (kept(error), step_of()) == ("2", "1")

    def work_while_another_does():
        with stores.working_copy(RUN, may_be_new=False) as work:
            (work / "step").write_text("3")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
            work_in(RUN, "4")

    gate.judge = lambda method, path: 0
    with pytest.raises(ValueError, match="was written by another command meanwhile") as error:
        work_while_another_does()
    assert (kept(error), step_of()) == ("3", "4")


def test_nothing_of_a_store_is_written_beside_a_copy(store, tmp_path):
    stores.upload(bundle(tmp_path / "made", 1), PLACE)
    [folder] = folders(store)
    for key in (f"{folder}/{tmp_path}/absolute", f"{folder}/../above"):
        store.pipe(key, b"x")
    stores.local_copy(PLACE)
    assert list(tmp_path.rglob("absolute")) + list(tmp_path.rglob("above")) == []


def test_copies_that_nobody_uses_go_after_a_week(store, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_in_use", {})

    def copy(value):
        stores.upload(bundle(tmp_path / "made", value), PLACE)
        return stores.local_copy(PLACE)

    def end(*places):
        """As if the process had ended that used them, long ago."""
        for path in places:
            os.close(stores._in_use.pop(path))
            os.utime(path / ".done" if (path / ".done").exists() else path, (0, 0))

    work_in(RUN, "1")
    with pytest.raises(RuntimeError):
        work_in("s3://data/failed", "")
    done, failed = (place for place in stores._in_use if place.parent.name == "runs")
    used, recent, idle = copy(1), copy(2), copy(3)
    os.close(stores._in_use.pop(recent))
    os.utime(used, (0, 0))
    end(done, failed, idle)
    newest = copy(4)
    assert {path.name for path in newest.parent.iterdir()} == {
        path.name for path in (used, recent, newest)
    }
    assert [path.name for path in done.parent.iterdir()] == [failed.name]
    work_in(RUN, "2")
    assert step_of() == "2"


def test_versions_are_followed(store, tmp_path):
    """The newest two of each model; what is not a version, or not below the place, is left."""
    models = "s3://data/models"
    for name in ("a/1", "a/2", "a/10", "b/1", "a/x", "a/3/4", "../5", "c/manifest.json/6"):
        store.pipe(f"data/models/{name}/{schema.MANIFEST}", b"{}")
    for number, name in enumerate(("a/1", "a/2", "a/10", "b/1")):
        store.rm(f"data/models/{name}", recursive=True)
        stores.upload(bundle(tmp_path / "made", number + 1), f"{models}/{name}")

    def followed(keep):
        home = stores.follow_versions(models, keep)
        return {
            path.parent.relative_to(home).as_posix(): float(np.load(path)[0, 0])
            for path in home.rglob(schema.BUNDLE_VECTORS)
        }

    assert followed(0) == {}
    assert followed(2) == {"a/10": 3, "a/2": 2, "b/1": 4}
    store.rm("data/models/a/10", recursive=True)
    assert followed(2) == {"a/2": 2, "a/1": 1, "b/1": 4}
    stores.upload(bundle(tmp_path / "made", 7), f"{models}/b/1")  # in place of the former one
    assert followed(2) == {"a/2": 2, "a/1": 1, "b/1": 7}
    assert followed(1) == followed(2)  # older ones stay
    [path] = store.glob(f"data/models/a/2/run-*/{schema.BUNDLE_VECTORS}")
    manifest = json.loads(store.cat("data/models/a/2/manifest.json"))
    manifest["details"]["note"] = "another"  # with the same content it is what is held
    store.pipe("data/models/a/2/manifest.json", json.dumps(manifest).encode())
    store.pipe(path, b"damaged")
    with pytest.raises(ValueError, match="a/2 is not what its manifest says"):
        followed(2)
    assert followed(0) == {"a/1": 1, "b/1": 7}
