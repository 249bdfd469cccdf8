"""Models in an object store: published, changed, asked and served; against a real S3 server."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from object_store import SECRET, empty, gated_store
from running_server import running

import twotower
from pipeline.contract import schema, stores
from serving.publish.items import change_items
from serving.publish.publish import publish
from serving.publish.settings import ItemsConfig
from serving.retrieval.retriever import Retriever

pytestmark = pytest.mark.long
MODELS = "s3://shop/models"
RETRIEVE = "/v1/models/twotower:retrieve"


@pytest.fixture(scope="module")
def server():
    """A gate before a store with a bucket `shop`, and a client of it."""
    with gated_store("shop") as gate_and_client:
        yield gate_and_client


@pytest.fixture
def gate(server):
    return empty(*server, "shop")


@pytest.fixture
def store(gate, server, tmp_path, monkeypatch):
    """A client of the empty bucket; the cache is empty, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server[1]


def export(bundle, **options):
    return publish(bundle, MODELS, **{"k": 5, "scann": False, **options})


def versions(store):
    """The numbers whose manifest is there."""
    return sorted(int(path.split("/")[-2]) for path in store.glob("shop/models/*/*/manifest.json"))


def top(place, number=0):
    """The first answer for a query, of a version or of a server."""
    if isinstance(place, str):
        [result] = Retriever.load(place, "twotower", number).top_k(["query 3"], k=5)
        return result.candidate_ids
    answer = place.post(RETRIEVE, {"queries": [{"query_id": "query 3"}], "k": 5})
    assert answer.status == 200, answer.body
    return [candidate["id"] for candidate in answer.json["results"][0]["candidates"]]


def served(place):
    answer = place.post(RETRIEVE, {"queries": [{"query_id": "query 3"}], "k": 1})
    return answer.json["version"] if answer.status == 200 else answer.status


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def cached():
    """Numbers of the versions that the server's cache holds."""
    return sorted(
        int(path.parent.name)
        for path in stores.cache_directory("models").glob("*/twotower/[0-9]*/manifest.json")
    )


def test_a_version_of_a_store_is_that_of_the_disk(store, without_scann, capsys):
    assert export(without_scann.bundle) == f"{MODELS}/twotower/1"
    assert export(without_scann.bundle) == f"{MODELS}/twotower/2"
    assert versions(store) == [1, 2]
    assert top(MODELS) == top(str(without_scann.models))
    assert twotower.main(["query", "query 3", "--models", MODELS, "--k", "5"]) == 0
    assert top(MODELS)[0] in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no version 7; there are: 1, 2\."):
        Retriever.load(MODELS, "twotower", 7)
    with pytest.raises(ValueError, match=r"version 2 of .* exists"):
        export(without_scann.bundle, version=2)
    for path in store.find("shop"):
        assert SECRET.encode() not in store.cat(path)


def taken_by_another(gate, number, version):
    """The paths at which another machine publishes its version, once: while files are uploaded."""
    taken = []

    def judge(method, path):
        if method == "PUT" and f"/{number}/run-" in path and not taken:
            taken.append(path)
            stores.upload(version, f"{MODELS}/twotower/{number}", new=True)
        return 0

    gate.judge = judge
    return taken


def test_a_number_that_another_machine_takes_gives_way(store, gate, without_scann, tmp_path):
    """The other one's manifest comes while the files of this one are on their way."""
    other = publish(without_scann.bundle, tmp_path / "models", k=5, scann=False)
    taken = taken_by_another(gate, 1, other)
    assert export(without_scann.bundle) == f"{MODELS}/twotower/2"
    assert taken
    assert versions(store) == [1, 2]
    copies = [stores.local_copy(f"{MODELS}/twotower/{number}") for number in (1, 2)]
    assert all(schema.read_manifest(copy, "version") for copy in copies)


def test_a_put_that_fails_leaves_no_version(store, gate, without_scann):
    gate.judge = lambda method, path: 403 if "manifest.json" in path and method == "PUT" else 0
    with pytest.raises(ValueError, match=r"cannot be reached.*is kept in") as error:
        export(without_scann.bundle)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    kept = str(error.value).partition("is kept in ")[2].rstrip(".")
    assert schema.read_manifest(kept, "version").files
    assert store.find("shop/models") == []
    gate.judge = lambda method, path: 0
    assert export(without_scann.bundle) == f"{MODELS}/twotower/1"


def test_an_export_that_is_killed_is_repeated(store, gate, without_scann):
    puts, held, is_killed = [], threading.Event(), threading.Event()

    def judge(method, path):
        puts.extend([path] if method == "PUT" else [])
        if len(puts) > 3:
            held.set()
            is_killed.wait(60)
            return 403
        return 0

    gate.judge = judge
    script = "import sys, twotower; sys.exit(twotower.main())"
    arguments = ["--bundle", str(without_scann.bundle), "--models", MODELS, "--k", "5"]
    job = subprocess.Popen([sys.executable, "-c", script, "export", *arguments, "--scann", "false"])
    try:
        assert held.wait(120)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
        is_killed.set()
    gate.judge = lambda method, path: 0
    assert store.find("shop/models")
    assert versions(store) == []
    with pytest.raises(ValueError, match="has no version"):
        Retriever.load(MODELS, "twotower")
    assert export(without_scann.bundle) == f"{MODELS}/twotower/1"
    assert len(store.ls("shop/models/twotower/1")) == 2  # nothing is left of the first


def test_items_of_a_model_in_a_store(store, without_scann, tmp_path, write_ids):
    export(without_scann.bundle)
    best = top(MODELS)
    write_ids(tmp_path / "gone.parquet", best[:1])
    arguments = ["--remove", str(tmp_path / "gone.parquet"), "--id_column", "raw_id"]
    assert twotower.main(["items", "--models", MODELS, *arguments]) == 0
    assert versions(store) == [1, 2]
    assert top(MODELS)[:4] == best[1:]
    assert top(MODELS, 1) == best


def test_items_that_another_machine_changes_meanwhile_are_all_changed(
    store, gate, without_scann, tmp_path, write_ids
):
    """The other one's version comes while the files of this one are on their way."""
    export(without_scann.bundle)
    best = top(MODELS)
    for number, name in enumerate(best[:2]):
        write_ids(tmp_path / f"{number}.parquet", [name])

    def remove(models, number):
        gone = {"remove": str(tmp_path / f"{number}.parquet"), "id_column": "raw_id"}
        return change_items(ItemsConfig(str(models), **gone))

    publish(without_scann.bundle, tmp_path / "models", k=5, scann=False)
    taken = taken_by_another(gate, 2, remove(tmp_path / "models", 0))
    assert remove(MODELS, 1) == f"{MODELS}/twotower/3"
    assert taken
    assert versions(store) == [1, 2, 3]
    assert top(MODELS)[:3] == best[2:]


def test_a_server_follows_the_store(store, gate, without_scann, tmp_path):
    export(without_scann.bundle)
    other = publish(without_scann.bundle, tmp_path / "models", k=4, scann=False)
    with running(MODELS, poll_seconds=0.05) as place:
        assert served(place) == 1
        assert top(place) == top(str(without_scann.models))
        # The files of a version without its manifest.
        (other / "manifest.json").unlink()
        store.put(str(other), "shop/models/twotower/2", recursive=True)
        gate.requests.clear()
        until(lambda: sum(path == "/shop" for _, path in gate.requests) > 4)  # looks at the store
        assert served(place) == 1
        assert cached() == [1]
        export(without_scann.bundle, version=3)
        until(lambda: served(place) == 3)
        export(without_scann.bundle)
        until(lambda: served(place) == 4)
        until(lambda: cached() == [3, 4])  # the one that is served and the one before it
        store.rm("shop/models/twotower/4", recursive=True)
        until(lambda: served(place) == 3)
        until(lambda: cached() == [1, 3])


def test_a_store_that_is_slow_or_fails_holds_up_no_answer(store, gate, without_scann, caplog):
    export(without_scann.bundle)
    with running(MODELS, poll_seconds=0.05) as place:
        export(without_scann.bundle)
        until(lambda: served(place) == 2)
        held, goes_on = threading.Event(), threading.Event()

        def judge(method, path):
            if method == "GET" and "/3/run-" in path:
                held.set()
                goes_on.wait(60)
            return 0

        gate.judge = judge
        export(without_scann.bundle)
        assert held.wait(60)
        assert served(place) == 2
        assert place.get("/readyz").status == 200
        goes_on.set()
        until(lambda: served(place) == 3)
        gate.judge = lambda method, path: 403
        until(lambda: "What is served stays as it is" in caplog.text)
        assert served(place) == 3
        assert SECRET not in caplog.text
        gate.judge = lambda method, path: 0
        export(without_scann.bundle)
        until(lambda: served(place) == 4)


def test_a_damaged_version_is_not_served(store, without_scann, caplog):
    export(without_scann.bundle)
    export(without_scann.bundle)
    [path] = store.glob("shop/models/twotower/2/run-*/saved_model.pb")
    store.pipe(path, store.cat(path)[:-1] + b"x")
    with running(MODELS, poll_seconds=0.05) as place:
        assert served(place) == 1
        until(lambda: "twotower/2 is not what its manifest says" in caplog.text)
        assert cached() == [1]


def test_a_store_that_cannot_be_reached_is_one_line(store, gate, capsys):
    gate.judge = lambda method, path: 403
    assert twotower.main(["serve", "--models", MODELS]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{MODELS} cannot be reached" in error
    assert SECRET not in error


def test_a_version_that_is_named_is_copied_however_old(store, without_scann, tmp_path):
    """As after a rollback, on a machine that has no cache yet."""
    for _ in range(4):
        export(without_scann.bundle)
    file = tmp_path / "models.config"

    def name(version, labelled):
        policy = f"model_version_policy {{ specific {{ versions: {version} }} }}"
        labels = f'version_labels {{ key: "stable" value: {labelled} }}'
        text = f'model_config_list {{ config {{ name: "twotower" {policy} {labels} }} }}'
        file.write_text(text)

    name(2, labelled=2)
    with running(MODELS, poll_seconds=0.05, config_file=str(file)) as place:
        assert served(place) == 2
        until(lambda: cached() == [2, 3, 4])
        name(2, labelled=1)
        until(lambda: place.get("/v1/models/twotower/labels/stable").status == 200)
        until(lambda: cached() == [1, 2, 3, 4])
        name(4, labelled=4)
        until(lambda: served(place) == 4)
        until(lambda: cached() == [3, 4])


def test_a_manifest_that_is_written_again_leaves_what_is_served(store, gate, without_scann):
    export(without_scann.bundle)
    manifest, read = "shop/models/twotower/1/manifest.json", []
    with running(MODELS, poll_seconds=0.05) as place:
        assert served(place) == 1
        record = next(stores.cache_directory("models").glob("*/.held.json"))
        before = record.read_text()

        def judge(method, path):
            read.extend([path] if method == "GET" and "/run-" in path else [])
            return 403 if read else 0

        gate.judge = judge
        time.sleep(1)  # times in a store are whole seconds
        store.pipe(manifest, store.cat(manifest))
        until(lambda: record.read_text() != before or read)
        assert served(place) == 1
        assert not read
