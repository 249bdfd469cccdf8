"""A job counts what goes into each step and what comes out; when an element is lost, it refuses."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lost_elements import Fault, watched
from prepared import digest
from streaming_log import BY_ROWS, BY_TIME, config_for

import twotower
from pipeline.beam.accounting import AccountingError, check_sum, look_up, places_of
from pipeline.counts import merge as counting
from pipeline.counts.job import count
from pipeline.counts.settings import FrequenciesConfig
from pipeline.job import prepare
from pipeline.prepare import assemble, k_core, vocabulary
from pipeline.prepare.settings import PrepareConfig
from pipeline.streaming.job import estimate

ONE_LINE = r"^.+; nothing is written\. Please report this with the runner and its version\..*$"


def test_what_goes_in_comes_out():
    check_sum("reading", 5, {"bad": 1, "rows": 4, "other": 7}, ("bad", "rows", "none"))
    with pytest.raises(AccountingError, match=ONE_LINE) as raised:
        check_sum("reading", 5, {"bad": 1, "rows": 3}, ("bad", "rows"))
    assert str(raised.value).startswith("reading: 5 rows went in, 4 came out (1 bad + 3 rows)")


def test_places_of_ids():
    known = np.array([-4, 2, 9])
    ids = np.array([9, -5, -4, 3, 10])
    places, there = look_up(ids, known)
    assert there.tolist() == [True, False, True, False, False]
    assert places[there].tolist() == [2, 0]
    assert places_of(np.array([9, 9, -4]), known, "a join").tolist() == [2, 2, 0]
    with pytest.raises(AccountingError, match=r"a join: 3 ids are missing.*fingerprint -5.*3 of 5"):
        places_of(ids, known, "a join")
    with pytest.raises(AccountingError, match="among 0 known"):
        places_of(ids, known[:0], "a join")


# --- joins by id: what is missing is no neighbour's -------------------------------------------


def test_an_id_without_its_raw_id(tmp_path):
    counts = np.array([[0, 1, 2, 1], [0, 3, 1, 1]])
    known = (np.array([1, 5]), [b"one", b"five"])  # 3 would become "five"
    with pytest.raises(AccountingError, match="candidate ids, range 1: 1 ids are missing"):
        assemble._count_range((5, {"counts": [counts], "ids": [known]}), 4, tmp_path)


def test_a_count_without_its_id(tmp_path):
    found = {
        "counts": [(np.array([1, 3]), np.array([2, 2]))],
        "ids": [(np.array([1, 5]), [b"a", b"b"])],
    }
    with pytest.raises(AccountingError, match="candidate ids, range 2: 1 ids are missing"):
        counting._merge_range((2, found), 1.0, tmp_path)


def test_rows_without_their_dense_id():
    tables = [(np.array([1, 5]), np.array([0, 1]))]
    assert vocabulary.replace_ids(np.array([5, 1]), tables, "rows").tolist() == [1, 0]
    with pytest.raises(AccountingError, match="rows: 1 ids are missing"):
        vocabulary.replace_ids(np.array([5, 3]), tables, "rows")


@pytest.mark.parametrize("places", [[0], [3], [0, 2], [0, 3, 3], [1, 3]])
def test_a_shard_of_a_vocabulary_without_a_part(tmp_path, places):
    """Its rows are dense ids: what came behind a missing part would have the ids of others."""
    ranking = vocabulary.RankIds(2, [0], 5, tmp_path)
    part = pa.table(
        {"raw_id": pa.array([b"a", b"b", b"c"]), "count": [3, 2, 1], "train": [1, 1, 1]}
    )
    with pytest.raises(AccountingError, match="query_vocabulary-00001-of-00002"):
        ranking._write_shard((0, 1, 10), [(place, part) for place in places])
    ranking._write_shard((0, 1, 10), [(3, part.slice(0, 2)), (0, part)])
    assert len(pq.read_table(tmp_path / "query_vocabulary-00001-of-00002.parquet")) == 5


# --- whole jobs -----------------------------------------------------------------------------


def _prepare(work, out, **settings):
    tables = {"item_features": str(work / "items"), "user_features": str(work / "users.parquet")}
    fields = {"validation_ratio": 0.2, "rows_per_shard": 20, "min_user_interactions": 3}
    fields |= {"min_item_interactions": 3, "partitions": 2} | tables | settings
    prepare(PrepareConfig(source=str(work / "log"), output=str(out), **fields))


def _dry_run(work, out):
    config = PrepareConfig(source=str(work / "log"), output=str(out), partitions=2, dry_run=True)
    manifest = prepare(config)
    out.mkdir()
    (out / "manifest").write_text(repr((manifest.counts, manifest.details)))


def _count(work, out, part="b", **settings):
    settings = settings or {"previous": str(work / "earlier")}
    source = str(work / f"log/{part}.parquet")
    count(FrequenciesConfig(source=source, output=str(out), partitions=2, **settings))


def _by_rows(work, out):
    estimate(config_for(work / "log", out, **BY_ROWS))


def _by_time(work, out, part="b", **settings):
    # The parts of the log are of the same hours, so most rows of the second one are late.
    settings = settings or {"previous": str(work / "earlier_stream"), "max_late_share": 1.0}
    estimate(config_for(work / f"log/{part}.parquet", out, **BY_TIME, **settings))


# a job, and its first pipeline that no job before it has
JOBS = {"prepare": (_prepare, 0), "dry run": (_dry_run, 1), "count": (_count, 0)}
JOBS |= {"stream by rows": (_by_rows, 0), "stream by time": (_by_time, 1)}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A log of 400 rows in six pieces with two bad ones, and tables of attributes."""
    root, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(3)
    log = pa.table(
        {
            "user_id": [None, *(f"u{user}" for user in rng.integers(0, 30, 400)), "u1"],
            "item_id": ["i1", *(f"i{item}" for item in rng.zipf(1.3, 400) % 40), None],
            "timestamp": rng.integers(1_000_000, 1_003_000, 402),
        }
    )
    items = pa.table({"item_id": [f"i{i}" for i in range(45)], "price": [i / 3 for i in range(45)]})
    items = items.append_column("kind", pa.array([f"k{i % 4}" for i in range(45)]))
    users = pa.table(
        {"user_id": [f"u{i}" for i in range(25)], "age": [float(i) for i in range(25)]}
    )
    for name, part in (("log/a", log[:210]), ("log/b", log[210:]), ("items/a", items[:20])):
        (root / name).parent.mkdir(exist_ok=True)
        pq.write_table(part, root / f"{name}.parquet", row_group_size=70)
    pq.write_table(items[20:], root / "items/b.parquet")
    pq.write_table(users, root / "users.parquet")
    _count(root, root / "earlier", "a", decay=1.0)
    _by_time(root, root / "earlier_stream", "a", keep_snapshots=1)
    return root


def outcomes(job, work, tmp_path, copies=0, at_end=False, every=1):
    """(step, error or None, whether the output is what it should be) with a fault at each step."""
    run, first = JOBS[job]
    with watched() as steps:
        run(work, tmp_path / "expected")
    expected = digest(tmp_path / "expected")
    found = [step for step in steps.deciding() if step.pipeline >= first]
    assert len(found) > 5
    for number, step in enumerate(found[every // 2 :: every]):
        place = steps.elements[step] - 1 if at_end else 0
        out, error = tmp_path / f"out{number}", None
        try:
            with watched(Fault(step, place, copies)):
                run(work, out)
        except AccountingError as raised:
            error = raised
            assert not digest(out), step
        yield step, error, error is None and digest(out) == expected


@pytest.mark.parametrize(
    ("job", "every"),
    [
        pytest.param("count", 12, id="count"),
        pytest.param("prepare", 12, marks=pytest.mark.long),  # ten times as long as another job
        *(pytest.param(job, 4, marks=pytest.mark.long) for job in JOBS if job != "prepare"),
        *(pytest.param(job, 1, marks=pytest.mark.soak) for job in JOBS),
    ],
)
def test_a_lost_element_is_refused(work, tmp_path, monkeypatch, job, every):
    monkeypatch.setattr(k_core, "ROUNDS", 1)
    for step, error, _ in outcomes(job, work, tmp_path, every=every):
        assert error is not None, f"an element behind {step} is lost and nobody says so"
        assert re.search(ONE_LINE, str(error)), error
        assert "\n" not in str(error)


@pytest.mark.soak
@pytest.mark.parametrize(("copies", "at_end"), [(0, True), (2, False), (2, True)])
@pytest.mark.parametrize("job", JOBS)
def test_another_element_lost_or_made_twice(work, tmp_path, monkeypatch, job, copies, at_end):
    """Refused, or nobody can tell: what is written is the same."""
    monkeypatch.setattr(k_core, "ROUNDS", 1)
    for step, error, same in outcomes(job, work, tmp_path, copies, at_end):
        assert error is not None or same, f"a fault behind {step} changes the output in silence"


def test_the_command_says_it_in_one_line(work, tmp_path, monkeypatch, capsys):
    original = counting._count_block

    def without_one_row(part, rows):
        return original(part, rows[1:])

    monkeypatch.setattr(counting, "_count_block", without_one_row)
    command = ["frequencies", "--source", str(work / "log"), "--output", str(tmp_path / "out")]
    assert twotower.main(command) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("twotower frequencies: counting the rows: 402 rows went in, ")
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []
