"""A log in a bucket gives what the same log gives on a local disk; against a real S3 server."""

import bz2
import gzip
import io
import zipfile

import fsspec
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from object_store import SECRET, running_store
from prepared import digest
from s3fs.core import S3File
from streaming_log import BY_TIME, config_for, state_of

import twotower
from pipeline.contract import schema
from pipeline.counts.job import count
from pipeline.counts.settings import FrequenciesConfig
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.streaming.job import estimate

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def store():
    """An empty bucket `logs`."""
    with running_store() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("logs")
        yield files


@pytest.fixture(scope="module")
def local(log, store, tmp_path_factory):
    """The log in folders by day, in several formats; the same files lie in s3://logs/local."""
    root = tmp_path_factory.mktemp("source") / "local"
    root.mkdir()
    for day in range(5):
        (root / f"day={day}").mkdir()
    pq.write_table(log.slice(0, 1000), root / "day=0/a.parquet", row_group_size=300)

    def csv(first, rows):
        sink = io.BytesIO()
        pa_csv.write_csv(log.slice(first, rows), sink)
        return sink.getvalue()

    (root / "day=1/a.csv").write_bytes(csv(1000, 500))
    (root / "day=2/a.csv.gz").write_bytes(gzip.compress(csv(1500, 500)))
    (root / "day=3/a.csv.bz2").write_bytes(bz2.compress(csv(2000, 500)))
    with zipfile.ZipFile(root / "day=4/a.csv.zip", "w") as archive:
        archive.writestr("1.csv", csv(2500, 250))
        archive.writestr("2.csv", csv(2750, 250))
    (root / "scratch").mkdir()  # not a folder NAME=VALUE
    (root / "scratch" / "b.csv").write_bytes(csv(0, 100))
    store.put(str(root), "logs/local", recursive=True)
    return root


def prepared(source, out, **settings):
    prepare(PrepareConfig(source=str(source), output=str(out), partitions=3, **settings))
    files = digest(out)
    files.pop(schema.MANIFEST)  # names its source
    return files, schema.read_manifest(out, "prepared")


def test_prepared_data_are_those_of_the_local_files(local, tmp_path):
    files, manifest = prepared(local, tmp_path / "local")
    assert manifest.counts["read"] == 3000
    remote_files, remote = prepared("s3://logs/local", tmp_path / "remote")
    assert remote_files == files
    assert remote.fingerprint == manifest.fingerprint
    assert remote.source == "s3://logs/local"
    text = (tmp_path / "remote" / schema.MANIFEST).read_text()
    assert SECRET not in text
    assert "testing" not in text


@pytest.mark.parametrize("pattern", ["day=*/", "**/a.*", "**/", "", "day=[0-4]/a.*"])
def test_globs_and_directories_name_the_same_rows(local, tmp_path, pattern):
    found = {}
    for root in (str(local), "s3://logs/local"):
        out = tmp_path / str(len(found))
        count(FrequenciesConfig(source=f"{root}/{pattern}", output=str(out), partitions=3))
        found[root] = digest(out), schema.read_manifest(out, "frequencies").details["inputs"]
    (files, inputs), (remote_files, remote_inputs) = found.values()
    assert files.pop(schema.manifest_name("frequencies"))
    assert remote_files.pop(schema.manifest_name("frequencies"))
    assert remote_files == files
    assert remote_inputs == inputs
    names = [file["file"] for file in inputs]
    assert len(set(names)) == len(names)
    assert [name[:6] for name in names if "=" in name] == [f"day={day}/" for day in range(5)]


def test_a_stream_from_a_store_has_the_state_of_the_local_one(parts, expected, store, tmp_path):
    store.put(str(parts), "logs/parts", recursive=True)
    for _ in range(2):  # the second one finds nothing new
        settings = BY_TIME | {"watch": True, "max_polls": 1}
        estimate(config_for("s3://logs/parts", tmp_path / "out", **settings))
        assert state_of(tmp_path / "out") == expected
        assert len(schema.snapshot_directories(tmp_path / "out")) == 1


@pytest.mark.parametrize("command", ["prepare", "frequencies"])
def test_a_file_that_fails_while_it_is_read_is_one_line(
    store, tmp_path, capsys, monkeypatch, command
):
    store.pipe("logs/fails.csv", b"user_id,item_id\n" + b"u,i\n" * 500_000)
    fetch = S3File._fetch_range

    def fail(file, start, end):
        if start:
            raise ConnectionError("connection reset")
        return fetch(file, start, min(end, 1 << 20))

    monkeypatch.setattr(S3File, "_fetch_range", fail)
    arguments = ["--source", "s3://logs/fails.csv", "--output", str(tmp_path / "out")]
    assert twotower.main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert "s3://logs/fails.csv cannot be read to its end: the store fails" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://logs/nothing", "does not exist"),
        ("s3://no-such-bucket/log", "does not exist"),
        ("s3://logs/nothing/*.csv", "does not exist"),
        (f"s3://key:{SECRET}@logs/local", "holds credentials"),
        ("odd://logs/local", "no known kind"),
        ("s3://logs/text", "no known format"),
        ("s3://logs/broken.parquet", "is not a Parquet file"),
        ("s3://logs/broken.csv.gz", "cannot be read"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(store, tmp_path, capsys, source, message):
    for name in ("text", "broken.parquet", "broken.csv.gz"):
        store.pipe(f"logs/{name}", b"neither")
    assert twotower.main(["prepare", "--source", source, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert SECRET not in error
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    arguments = ["--source", "s3://logs/local", "--output", str(tmp_path / "out")]
    assert twotower.main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert error.count("\n") == 1
    assert SECRET not in error
    fsspec.filesystem("s3").clear_instance_cache()
