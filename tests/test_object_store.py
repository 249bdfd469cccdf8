"""The whole path with everything in a bucket, against a real S3 server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from object_store import SECRET, running_store
from prepared import digest

import twotower
from pipeline.contract import stores

pytestmark = pytest.mark.long
ROOT = "s3://shop"


def log(rows):
    """Users of one taste choose the items of that taste."""
    rng = np.random.default_rng(1)
    users = rng.integers(0, 100, rows)
    items = (30 * rng.random(rows) ** 1.5).astype(int) * 4 + users % 4
    lines = [f"u{user},i{item}" for user, item in zip(users, items, strict=True)]
    return "\n".join(["user_id,item_id", *lines]).encode()


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    """A bucket with a log, and a client of it."""
    with running_store() as environment, pytest.MonkeyPatch.context() as patch:
        environment |= {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
        for name, value in environment.items():
            patch.setenv(name, value)
            client = fsspec.filesystem("s3", use_listings_cache=False)
        client.mkdir("shop")
        client.pipe("shop/log/day=1/log.csv", log(3000))
        yield client


def run(line):
    """Runs a command with PLACE for the bucket; its paths are those of the store."""
    assert twotower.main(line.replace("PLACE", ROOT).split()) == 0


@pytest.fixture(scope="module")
def trained(store):
    run("prepare --source PLACE/log --output PLACE/prepared")
    run("train --data PLACE/prepared --run PLACE/run --dim 8 --epochs 2 --normalize")


def test_a_run_in_the_store_is_that_of_the_disk(trained, tmp_path):
    run("evaluate --data PLACE/prepared --run PLACE/run")
    run(f"prepare --source PLACE/log --output {tmp_path}/prepared")
    both = f"--data {tmp_path}/prepared --run {tmp_path}/run"
    run(f"train {both} --dim 8 --epochs 2 --normalize")
    run(f"evaluate {both}")
    remote = stores.local_copy(f"{ROOT}/run")
    for name in ("metrics.json", "breakdown.json"):
        there, here = (json.loads((d / name).read_text()) for d in (remote, tmp_path / "run"))
        for content in (there, here):
            content.pop("seconds", None)
        assert there == here
    run(f"recommend {both} --k 5 --output {tmp_path}/top")
    run("recommend --data PLACE/prepared --run PLACE/run --k 5 --output PLACE/top")
    files = digest(tmp_path / "top")
    del files["_manifest.json"]  # names the source of the data
    assert files.items() <= digest(stores.local_copy(f"{ROOT}/top")).items()


def test_training_that_went_on_elsewhere_is_finished_there(trained, store, tmp_path, monkeypatch):
    """Another machine, with an empty cache, trains the run for one more epoch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    before = stores.local_copy(f"{ROOT}/run") / "training.json"
    assert len(json.loads(before.read_text())["history"]) == 2
    run("train --data PLACE/prepared --run PLACE/run --dim 8 --epochs 3 --normalize")
    after = stores.local_copy(f"{ROOT}/run") / "training.json"
    assert len(json.loads(after.read_text())["history"]) == 3


def test_settings_name_the_store_on_every_machine(trained, store, tmp_path, monkeypatch):
    """What a run starts from is the same on another machine, which goes on with it."""
    line = "train --data PLACE/prepared --run PLACE/student --dim 8 --method full_softmax "
    line += "--teacher PLACE/run --init_from PLACE/run --normalize --epochs "
    run(line + "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    run(line + "2")
    copy = stores.local_copy(f"{ROOT}/student")
    recorded = json.loads((copy / "config.json").read_text())["configuration"]
    assert (recorded["teacher"], recorded["init_from"]) == (f"{ROOT}/run", f"{ROOT}/run")
    assert len(json.loads((copy / "training.json").read_text())["history"]) == 2
    run("train --data PLACE/prepared --run PLACE/refit --refit PLACE/run")


def test_a_study_goes_on_elsewhere(trained, store, tmp_path, monkeypatch):
    run("prepare --source PLACE/log --validation_ratio 0.2 --output PLACE/validated")
    line = "tune --data PLACE/validated --output PLACE/study --dim 8 --epochs 1 --pruner none "
    run(line + "--trials 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    run(line + "--trials 2")
    trials = json.loads((stores.local_copy(f"{ROOT}/study") / "trials.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 2


def test_frequencies_of_a_store(trained, store, tmp_path, monkeypatch):
    """A directory of snapshots that people copied there; the run keeps to what it began with."""
    source = tmp_path / "log.csv"
    source.write_bytes(log(3000))
    run(f"frequencies --source {source} --streaming --output {tmp_path}/stream")
    store.put(f"{tmp_path}/stream", "shop/stream", recursive=True)
    run(f"frequencies --source {source} --output PLACE/counts")
    line = "train --data PLACE/prepared --dim 8 --normalize "
    run(line + "--run PLACE/counted --epochs 1 --frequency counts:PLACE/counts")
    run(line + "--run PLACE/streamed --epochs 1 --frequency streaming:PLACE/stream")
    store.put(f"{tmp_path}/stream/00000001", "shop/stream/00000002", recursive=True)
    run(line + "--run PLACE/streamed --epochs 2 --frequency streaming:PLACE/stream")
    recorded = json.loads((stores.local_copy(f"{ROOT}/streamed") / "config.json").read_text())
    assert recorded["configuration"]["frequency"] == f"streaming:{ROOT}/stream/00000001"


def test_runs_are_audited_compared_and_exported(trained, store, tmp_path):
    run("train --data PLACE/prepared --run PLACE/second --dim 8 --epochs 1 --normalize")
    for name in ("run", "second"):
        run(f"evaluate --data PLACE/prepared --run PLACE/{name}")
    for page in (f"{tmp_path}/page.html", "PLACE/pages/page.html", "PLACE/pages/page.json"):
        run(f"compare PLACE/run PLACE/second --output {page}")
    assert store.cat("shop/pages/page.html") == (tmp_path / "page.html").read_bytes()
    compared = json.loads(store.cat("shop/pages/page.json"))["runs"]
    assert [row["name"] for row in compared] == ["run", "second"]
    assert [row["path"] for row in compared] == [f"{ROOT}/run", f"{ROOT}/second"]
    run("audit --data PLACE/prepared --run PLACE/run --methods bpr ssl_pop --batches 2")
    few = "--methods bpr ssl_pop --batches 2"
    run(f"audit --data PLACE/prepared --run PLACE/run --output PLACE/audit {few}")
    for page in ("run/audit/audit.html", "audit/audit.html"):
        place, _, name = page.partition("/")
        assert (stores.local_copy(f"{ROOT}/{place}") / name).is_file()
    run(f"export --data PLACE/prepared --run PLACE/run --models {tmp_path}/models --k 5")
    bundle = stores.local_copy(f"{ROOT}/run") / "bundle"
    assert (bundle / "manifest.json").is_file()
    assert (tmp_path / "models/twotower/1/manifest.json").is_file()


def test_training_that_is_killed_goes_on(trained, store, tmp_path):
    line = "train --data PLACE/prepared --run PLACE/killed --dim 8 --epochs 20 --normalize"
    script = "import sys, twotower; sys.exit(twotower.main())"
    arguments = line.replace("PLACE", ROOT).split()
    job = subprocess.Popen([sys.executable, "-c", script, *arguments], start_new_session=True)
    runs = stores.cache_directory("runs")
    try:
        while not list(runs.glob("*/killed/training.json")):
            assert job.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    [kept] = runs.glob("*/killed/training.json")
    assert not json.loads(kept.read_text())["finished"]
    assert not store.exists("shop/killed")
    run(line)
    run(line.replace("killed", "whole"))
    killed, whole = (
        json.loads((stores.local_copy(f"{ROOT}/{name}") / "training.json").read_text())
        for name in ("killed", "whole")
    )
    assert [row["loss"] for row in killed["history"]] == [row["loss"] for row in whole["history"]]


def test_no_file_holds_credentials(trained, store):
    for path in store.find("shop"):
        assert SECRET.encode() not in store.cat(path), Path(path).name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --data PLACE/nothing --run PLACE/new", "PLACE/nothing holds nothing finished"),
        ("evaluate --data PLACE/prepared --run PLACE/new", "PLACE/new holds nothing finished"),
        ("train --data PLACE/log/day=1 --run PLACE/new", "holds nothing finished"),
        ("train --data PLACE/run --run PLACE/new", "holds no finished prepared data"),
    ],
)
def test_what_is_not_there_is_one_line(trained, store, capsys, line, message):
    assert twotower.main(line.replace("PLACE", ROOT).split()) == 2
    error = capsys.readouterr().err
    assert message.replace("PLACE", ROOT) in error
    assert error.count("\n") == 1
    assert not store.exists("shop/new")
