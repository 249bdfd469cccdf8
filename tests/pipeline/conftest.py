"""A small log of interactions with everything that preparation must cope with."""

import numpy as np
import pyarrow as pa
import pytest
from streaming_log import BY_TIME, config_for, make_rows, state_of, write_parts

from pipeline import job
from pipeline.streaming.job import estimate


def make_log(num_rows=3000, num_users=120, num_items=80, seed=7):
    """Zipf-like interactions with duplicates: columns of raw strings and int timestamps."""
    rng = np.random.default_rng(seed)
    users = rng.zipf(1.3, num_rows) % num_users
    items = rng.zipf(1.2, num_rows) % num_items
    return pa.table(
        {
            "user_id": pa.array([f"u{u}" for u in users]),
            "item_id": pa.array([f"ü{i}" if i % 7 == 0 else f"i{i}" for i in items]),
            "timestamp": rng.integers(1_000_000, 1_100_000, num_rows),
            "rating": rng.integers(1, 6, num_rows).astype(np.float64),
        }
    )


@pytest.fixture(scope="module", autouse=True)
def page_without_plots(request):
    """Plots take a fifth of a small preparation; the page has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "quality":
            patch.setattr(job, "page", lambda *parts: repr(parts))
        yield


@pytest.fixture(scope="session")
def log():
    return make_log()


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A log of streaming in three files; rows of one may be older than the last of another."""
    return write_parts(tmp_path_factory.mktemp("source") / "log", make_rows(), 3)


@pytest.fixture(scope="session")
def expected(parts, tmp_path_factory):
    """The state after one run over all three files, by event time."""
    out = tmp_path_factory.mktemp("expected") / "out"
    estimate(config_for(parts, out, **BY_TIME))
    return state_of(out)
