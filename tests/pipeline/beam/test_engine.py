"""The same input gives the same bytes however the work is cut; a killed job leaves nothing."""

import os

import pyarrow.parquet as pq
import pytest
from prepared import digest, kill_once_there

from pipeline.beam.staging import Staging
from pipeline.contract import schema
from pipeline.contract.files import checksum
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.read import readers

SETTINGS = {
    "validation_ratio": 0.1,
    "min_user_interactions": 3,
    "min_item_interactions": 3,
    "rows_per_shard": 400,
}


@pytest.fixture(scope="module")
def source(log, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "log.parquet"
    pq.write_table(log, path, row_group_size=250)
    return str(path)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(PrepareConfig(source=source, output=str(out), **SETTINGS))
    return digest(out)


@pytest.mark.parametrize(
    ("partitions", "block_rows", "group", "mode"),
    [
        (3, 37, 3000, "in_memory"),
        pytest.param(1, 1000, 250, "multi_threading", marks=pytest.mark.long),
        pytest.param(11, 1000, 250, "multi_processing", marks=pytest.mark.long),
    ],
)
def test_how_the_work_is_cut_does_not_matter(
    log, source, expected, tmp_path, monkeypatch, partitions, block_rows, group, mode
):
    """Key ranges, blocks of rows, row groups of the source (3000: one piece), and workers."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", block_rows)
    out = tmp_path / "out"
    pq.write_table(log, source, row_group_size=group)  # the manifest has its path
    arguments = [f"--direct_running_mode={mode}", "--direct_num_workers=2"]
    config = PrepareConfig(source=source, output=str(out), partitions=partitions, **SETTINGS)
    manifest = prepare(config, arguments)
    pq.write_table(log, source, row_group_size=250)
    (described,) = manifest.details["inputs"]["source"]
    assert described["checksum"] != checksum(source) or group == 250
    described.update(bytes=os.path.getsize(source), checksum=checksum(source))
    manifest.write(out)
    assert digest(out) == expected


@pytest.mark.long
@pytest.mark.parametrize("stage", ["active1", "out/interactions-train*"])
def test_a_killed_job_leaves_nothing_that_looks_finished(source, expected, tmp_path, stage):
    """SIGKILL as soon as a stage has begun to write; the next run then succeeds."""
    out = tmp_path / "out"
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()] + ["--partitions=3"]
    # The writer of blocks waits after its first file, so that there is a moment to kill in.
    slow = (
        "import sys, time, twotower\n"
        "from pipeline.prepare import assemble, k_core\n"
        "for room, name in ((k_core, 'write_block'), (assemble, 'write_shard')):\n"
        "    def wait(*a, f=getattr(room, name)): r = f(*a); time.sleep(0.3); return r\n"
        "    setattr(room, name, wait)\n"
        "sys.exit(twotower.main(sys.argv[1:]))\n"
    )
    arguments = ["prepare", "--source", source, "--output", out, *flags]
    pattern = stage if "*" in stage else f"{stage}/*.npy"
    kill_once_there(slow, arguments, tmp_path / "out.partial", pattern)
    assert not out.exists()
    with pytest.raises(ValueError, match="no finished prepared data"):
        schema.read_manifest(out, "prepared")
    prepare(PrepareConfig(source=source, output=str(out), **SETTINGS))
    assert digest(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_two_preparations_of_one_output(source, tmp_path):
    config = PrepareConfig(source=source, output=str(tmp_path / "out"))
    with (
        Staging(config.output, overwrite=False),
        pytest.raises(ValueError, match=r"another preparation of .* is running"),
    ):
        prepare(config)


def test_what_is_left_beside_a_finished_output_goes_with_the_next_command(tmp_path):
    """Of a job that was killed between the renaming of its output and its end."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial" / "rows").mkdir(parents=True)
    (tmp_path / "out.partial.lock").touch()
    with pytest.raises(ValueError, match="already exists"), Staging(str(tmp_path / "out"), False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
