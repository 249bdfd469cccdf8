"""Commands are killed (SIGKILL) at random moments, and repeated until they end.

Nothing half-written is taken for finished, nothing is left over, and the end has the bytes of an
undisturbed run. `TWOTOWER_KILLS` sets how often each is killed, 20 times by default. A command is
killed up to four times in a row, each time beginning with what the one before has left, and then
left alone until it ends.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import check_files
from serving.version.versions import numbered_directories
from towers.training.run_directory import TRAINING, read_json

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("TWOTOWER_KILLS", "20"))
IN_A_ROW = 4  # kills before the command is left alone
USERS, ITEMS, ROWS = 1_000, 800, 20_000
TWO_PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
# What is measured or drawn anew by every export; the manifests have checksums of it.
NOT_THE_SAME = ("fingerprint.pb", "manifest.json", "ann_report.json", "model_card.md")
SCANN_VARIABLES = "assets.extra/scann/variables/"


def command(name, **flags):
    """A command of the console script in a process of its own."""
    start = "import sys, twotower; sys.exit(twotower.main(sys.argv[1:]))"
    return [sys.executable, "-c", start, name, *(f"--{k}={v}" for k, v in flags.items())]


def state_of(folder):
    """What a command has begun to write: paths, sizes and times of change."""
    found = set()
    for root, _, names in os.walk(folder):  # passes over directories that go meanwhile
        for path in (root, *(os.path.join(root, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                found.add((path, status.st_size, status.st_mtime_ns))
    return found


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def clear(folder):
    subprocess.run(["rm", "-rf", *map(str, folder.iterdir())], check=True)


class Process:
    """A command at work in a folder, where its output shows when it has begun."""

    def __init__(self, arguments, folder):
        before = state_of(folder)
        self._log = folder.parent / f"{folder.name}.log"
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, start_new_session=True
            )
        while self.runs() and state_of(folder) == before:
            time.sleep(0.02)
        self.began = time.monotonic()

    def runs(self):
        return self._process.poll() is None

    def wait(self, status=0):
        """Waits for its end; the seconds since it began to write."""
        assert self._process.wait(timeout=600) == status, self._log.read_text()[-3000:]
        return time.monotonic() - self.began

    def kill_after(self, seconds):
        """Kills it, with its workers, so long after it began to write; whether it still ran."""
        while self.runs() and time.monotonic() - self.began < seconds:
            time.sleep(0.01)
        if not self.runs():
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True


def repeat_under_kills(arguments, folder, check, done, *, seed):
    """Kills a command at `KILLS` moments of its run, and leaves it alone after every few of them.

    Args:
      arguments: the command.
      folder: where it works.
      check: looks at what a killed one has left, and raises where it is wrong; the exit status
        of the same command on that.
      done: looks at what is there in the end; clears it for the next round.
      seed: of the moments.
    """
    seconds = Process(arguments, folder).wait()
    done()
    draw, started = random.Random(seed), time.monotonic()
    killed = in_a_row = status = 0
    while killed < KILLS or in_a_row:
        process = Process(arguments, folder)
        leave = status or in_a_row == IN_A_ROW or killed == KILLS
        if not leave and process.kill_after(draw.uniform(0, seconds)):
            killed, in_a_row = killed + 1, in_a_row + 1
            status = check()
        else:
            process.wait(status)
            done()
            in_a_row = status = 0
    print(
        f"\n{arguments[3]}: killed {killed} times in the {seconds:.1f} s from its first file on, "
        f"{time.monotonic() - started:.0f} s in all"
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Interactions in which every user has some."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("log") / "log.csv"
    users, items = draw.integers(0, USERS, ROWS), (ITEMS * draw.random(ROWS) ** 2).astype(int)
    lines = [f"user {user},item {item}" for user, item in zip(users, items, strict=True)]
    path.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
    return path


def prepare_command(log, folder):
    return command("prepare", source=log, output=folder / "prepared", rows_per_shard=3_000)


@pytest.fixture(scope="module")
def prepared(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "undisturbed"
    folder.mkdir()
    Process(prepare_command(log, folder), folder).wait()
    return folder / "prepared"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preparation(processes, log, prepared, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    arguments = prepare_command(log, folder)
    arguments += TWO_PROCESSES if processes == 2 else ()
    expected = {name: rows for name, rows in bytes_of(prepared).items() if name[0] != "."}

    def check():
        if not (folder / "prepared").exists():
            return 0
        assert bytes_of(folder / "prepared") == expected
        return 2  # the next one is refused, and clears up

    def done():
        assert names_in(folder) == {"prepared"}
        assert bytes_of(folder / "prepared") == expected
        clear(folder)

    repeat_under_kills(arguments, folder, check, done, seed=processes)


def train_command(prepared, run):
    settings = {"dim": 16, "batch_size": 256, "epochs": 4, "method": "xir"}
    return command("train", data=prepared, run=run, checkpoint_minutes=0.01, **settings)


def weights_of(run):
    """All that the last checkpoint holds of the model, its method and its optimizer."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints")))
    names = sorted(reader.get_variable_to_shape_map())
    skipped = ("save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH", "progress")  # the last: seconds
    return {
        name: np.asarray(reader.get_tensor(name)).tobytes()
        for name in names
        if not any(part in name for part in skipped)
    }


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "undisturbed"
    folder.mkdir()
    Process(train_command(prepared, folder / "run"), folder).wait()
    return folder / "run"


def test_a_training(prepared, trained, tmp_path):
    folder, expected = tmp_path / "work", weights_of(trained)
    folder.mkdir()
    run = folder / "run"

    def check():
        finished = (run / TRAINING).exists() and read_json(run / TRAINING)["finished"]
        if (run / "checkpoints" / "checkpoint").exists():
            found = weights_of(run)
            assert found == expected if finished else found.keys() == expected.keys()
        else:
            assert not finished
        return 0

    def done():
        found = weights_of(run)
        assert [name for name in expected if found[name] != expected[name]] == []
        assert found.keys() == expected.keys()
        assert read_json(run / TRAINING)["finished"]
        assert names_in(run) == names_in(trained)
        state = tf.train.get_checkpoint_state(str(run / "checkpoints"))
        kept = {Path(path).name for path in state.all_model_checkpoint_paths}
        assert {name.split(".")[0] for name in names_in(run / "checkpoints")} == {
            "checkpoint",
            *kept,
        }
        assert "checkpoint" in names_in(run / "checkpoints")
        assert len(names_in(run / "checkpoints")) == 1 + 2 * len(kept)
        clear(folder)

    repeat_under_kills(train_command(prepared, run), folder, check, done, seed=3)


def test_an_export(prepared, trained, tmp_path):
    folder = tmp_path / "work"
    run, home = folder / "run", folder / "models" / "twotower"
    subprocess.run(["cp", "-r", str(trained.parent), str(folder)], check=True)
    arguments = command("export", data=prepared, run=run, models=home.parent, k=20)
    Process(arguments, folder).wait()
    expected = {"bundle": lasting(run / "bundle"), "version": lasting(home / "1")}
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    clear(home)

    def check():
        there = [(home / str(number), "version") for number in numbered_directories(home)]
        for path, kind in [*there, (run / "bundle", "bundle")]:
            if path.exists():  # a bundle that stood there is away between two renames
                check_files(path, schema.read_manifest(path, kind).files, content=True)
                assert lasting(path) == expected[kind]
        return 0

    def done():
        check()
        assert {str(path.relative_to(run)) for path in run.rglob("*")} == files
        numbers = {str(number) for number in numbered_directories(home)}
        assert numbers
        assert names_in(home) == numbers
        clear(home)

    repeat_under_kills(arguments, folder, check, done, seed=4)


def lasting(path):
    """The files of a bundle or a version that are the same in every export."""
    return {
        name: content
        for name, content in bytes_of(path).items()
        if Path(name).name not in NOT_THE_SAME and not name.startswith(SCANN_VARIABLES)
    }
