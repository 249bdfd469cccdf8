"""Two worker processes write the bytes of one process, run after run; without the guard they fail.

Each run is a process of its own, as `twotower prepare` is: what hangs is ended after MAX_SECONDS.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import digest

from pipeline.contract import schema

pytestmark = pytest.mark.soak
NUM_RUNS = 20
NUM_ROWS, NUM_USERS, NUM_ITEMS = 2_000_000, 20_000, 5_000
MAX_ATTEMPTS = 10  # of the control: whether two threads meet is a matter of time
FLUSH_MS = 5  # of the control: Beam's own is 1000
MAX_SECONDS = 600  # of one run
TWO = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
UNGUARDED = (
    "import sys, twotower\n"
    "from pipeline.beam import options as beam_options\n"
    f"beam_options.DATA_BUFFER_TIME_LIMIT_MS = {FLUSH_MS}\n"
    "sys.exit(twotower.main(sys.argv[1:]))\n"
)
REFUSED = "nothing is written. Please report this with the runner and its version."


def run(source, out, *flags, code="import sys, twotower; sys.exit(twotower.main(sys.argv[1:]))"):
    """One preparation; its exit status and what it says at the end."""
    command = [sys.executable, "-c", code, "prepare", "--source", str(source)]
    command += ["--output", str(out), "--min_user_interactions=5", "--min_item_interactions=5"]
    done = subprocess.run(
        [*command, *flags],
        cwd=Path(schema.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
        check=False,
    )
    return done.returncode, done.stderr.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("source") / "log.parquet", np.random.default_rng(0)
    weights = np.arange(1, NUM_ITEMS + 1) ** -0.8
    items = rng.choice(NUM_ITEMS, NUM_ROWS, p=weights / weights.sum())
    log = pa.table({"user_id": rng.integers(0, NUM_USERS, NUM_ROWS), "item_id": items})
    pq.write_table(log, path, row_group_size=250_000)
    return path


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    status, error = run(source, out)
    assert status == 0, error
    return digest(out)


def test_runs_in_two_processes_write_the_bytes_of_one(source, expected, tmp_path):
    for number in range(NUM_RUNS):
        status, error = run(source, tmp_path / "out", "--overwrite", *TWO)
        assert status == 0, f"run {number}: {error[-2000:]}"
        assert digest(tmp_path / "out") == expected, f"run {number}"


def test_without_the_guard_a_run_is_refused_and_none_is_silently_wrong(source, expected, tmp_path):
    for number in range(MAX_ATTEMPTS):
        out = tmp_path / f"out{number}"
        status, error = run(source, out, *TWO, code=UNGUARDED)
        if status:
            lines = [line for line in error.splitlines() if line.startswith("twotower prepare: ")]
            assert len(lines) == 1, error[-2000:]
            assert REFUSED in lines[0]
            assert not out.exists()
            return
        assert digest(out) == expected, f"attempt {number}"
    pytest.fail(f"{MAX_ATTEMPTS} runs that flush every {FLUSH_MS} ms lost nothing")
