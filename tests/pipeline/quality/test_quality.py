"""The quality of prepared data, against plain loops; days, files, schemas not as before."""

import html.parser
import json
import re
from collections import Counter
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from browser import assert_file_fits, assert_shared_look
from prepared import digest, raw_pairs

import twotower
from pipeline.contract import schema
from pipeline.contract.files import checksum
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.quality.page import page
from pipeline.quality.report import gaps_between
from pipeline.read.discover import find_pieces

SETTINGS = {
    "validation_ratio": 0.1,
    "train_ratio": 0.4,
    "min_user_interactions": 3,
    "min_item_interactions": 15,
    "rating_threshold": 2.0,
    "max_bad_share": 0.1,
    "rows_per_shard": 400,
}
DAY = 86_400


def config(source, out, **settings):
    return PrepareConfig(source=str(source), output=str(out), **{"partitions": 3} | settings)


def with_bad_rows(log):
    """Every 50th row without a user, every 70th without an item; 40 days with two holes."""
    rows = log.to_pylist()
    for number, row in enumerate(rows):
        row["user_id"] = None if number % 50 == 0 else row["user_id"]
        row["item_id"] = "" if number % 70 == 1 else row["item_id"]
        day = number % 40
        row["timestamp"] = 1_000_000_800 + (day + 2 * (day > 10) + (day > 30)) * DAY
    return rows


@pytest.fixture(scope="module")
def made(log, tmp_path_factory):
    """(rows as they are in the two files of a log, its directory, output, manifest)."""
    root = tmp_path_factory.mktemp("made")
    (root / "logs").mkdir()
    rows = with_bad_rows(log)
    pq.write_table(pa.Table.from_pylist(rows[:1000]), root / "logs" / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1000:]), root / "logs" / "b.parquet")
    manifest = prepare(config(root / "logs", root / "out", **SETTINGS))
    return rows, root / "logs", root / "out", manifest


def good(row):
    return row["user_id"] and row["item_id"] and row["rating"] >= 2


def test_rows_at_every_step(made):
    rows, _, out, manifest = made
    found = manifest.details["quality"]
    without_user = sum(row["user_id"] is None for row in rows)
    without_item = sum(row["user_id"] is not None and not row["item_id"] for row in rows)
    pairs = {(row["user_id"], row["item_id"]) for row in rows if good(row)}
    kept = {split: raw_pairs(out, split) for split in schema.SPLITS}
    left = sum(map(len, kept.values()))
    assert found["rows"] == {
        "read": 3000,
        "bad": without_user + without_item,
        "below_threshold": sum(
            bool(row["user_id"] and row["item_id"]) and row["rating"] < 2 for row in rows
        ),
        "duplicates": sum(map(bool, map(good, rows))) - len(pairs),
        "k_core": len(pairs) - left,
        "rows": left,
        **{split: len(some) for split, some in kept.items()},
    }
    assert min(found["rows"].values()) > 0  # so that every step is seen to work
    assert found["bad_share"] == (without_user + without_item) / 3000
    assert found["bad_reasons"] == {
        "user_id is missing": without_user,
        "item_id is missing": without_item,
    }
    assert found["files"] == {"a.parquet": 1000, "b.parquet": 2000}
    assert schema.read_manifest(out, "prepared").details["quality"] == found
    # Nothing of attributes where there are no tables.
    assert "feature" not in json.dumps([manifest.configuration, manifest.details])
    assert not [name for name in manifest.files if "feature" in name and name != "features.json"]


@pytest.mark.parametrize(("side", "place"), [("query", 0), ("candidate", 1)])
def test_degrees(made, side, place):
    rows, _, out, manifest = made
    found = manifest.details["quality"][side]
    column = ("user_id", "item_id")[place]
    before = {row[column] for row in rows if good(row)}
    pairs = [pair for split in schema.SPLITS for pair in raw_pairs(out, split)]
    degrees = sorted(Counter(pair[place] for pair in pairs).values())
    size, total = len(degrees), len(pairs)
    assert found["ids_before_k_core"] == len(before)
    assert found["lost_to_k_core"] == len(before) - size > 0
    assert (found["ids"], found["rows"]) == (size, total)
    differences = sum(abs(a - b) for a in degrees for b in degrees)
    assert found["gini"] == pytest.approx(differences / (2 * size * total))
    assert found["quantiles"]["0.5"] == degrees[(size + 1) // 2 - 1]
    assert found["head"] == {
        "ids": 1,
        "share_of_ids": 1 / size,
        "share_of_rows": degrees[-1] / total,
        "smallest_count": degrees[-1],
    }
    for one in found["bins"]:
        assert one["ids"] == sum(one["from"] <= n < 2 * one["from"] for n in degrees)
    assert sum(one["ids"] for one in found["bins"]) == size
    for one in found["concentration"]:
        number = round(one["share_of_ids"] * size)
        assert one["share_of_rows"] == pytest.approx(sum(degrees[-number:]) / total)


def test_cold_rows_and_density(made):
    _, _, out, manifest = made
    found = manifest.details["quality"]
    known = {item for _, item in raw_pairs(out, "train")}
    held_out = raw_pairs(out, "validation") + raw_pairs(out, "test")
    cold = [item for _, item in held_out if item not in known]
    assert found["cold"] == {
        "candidates_without_train_rows": len(set(cold)),
        "held_out_rows": len(cold),
        "share_of_held_out_rows": len(cold) / len(held_out),
    }
    assert found["density"] == found["rows"]["rows"] / (
        found["query"]["ids"] * found["candidate"]["ids"]
    )


def test_cold_rows_there_are(tmp_path):
    """Each item has one row, so that what is not in train is cold."""
    log = pa.table({"user_id": ["u"] * 4 + ["v"] * 2, "item_id": [f"i{n}" for n in range(6)]})
    pq.write_table(log, tmp_path / "log.parquet")
    settings = {"train_ratio": 0.5}
    for name, dry_run in (("out", False), ("dry", True)):
        manifest = prepare(
            config(tmp_path / "log.parquet", tmp_path / name, dry_run=dry_run, **settings)
        )
        assert manifest.details["quality"]["cold"] == {
            "candidates_without_train_rows": 3,
            "held_out_rows": 3,
            "share_of_held_out_rows": 1.0,
        }
        assert manifest.details["quality"]["days"] is None
    assert "The rows have no time." in (tmp_path / "out" / "quality.html").read_text()


# --- a dry run -------------------------------------------------------------------------------


def test_a_dry_run_finds_the_same_and_writes_nothing(made):
    _, source, out, manifest = made
    before = digest(out)  # an output that is there is no hindrance
    dry = prepare(config(source, out, dry_run=True, **SETTINGS, partitions=7, max_empty_days=3))
    assert dry.details["quality"] == manifest.details["quality"]
    assert dry.counts == manifest.counts
    assert dry.configuration == manifest.configuration
    assert dry.files == {}
    assert digest(out) == before
    assert {path.name for path in out.parent.iterdir()} == {"logs", "out"}


def test_a_dry_run_from_the_command_line(made, tmp_path, caplog):
    _, source, _, manifest = made
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    arguments = ["--source", str(source), "--output", str(tmp_path / "out"), "--dry_run"]
    assert twotower.main(["prepare", *arguments, *flags]) == 0
    assert list(tmp_path.iterdir()) == []
    found = manifest.details["quality"]
    rows = found["rows"]
    lines = [" ".join(message.split()) for message in caplog.messages]
    for line in (
        "rows read 3,000 100.00%",
        f"bad {rows['bad']} {rows['bad'] / 3000:.2%}",
        f"lost to the k-core {rows['k_core']} {rows['k_core'] / 3000:.2%}",
        f"test {rows['test']} {rows['test'] / rows['rows']:.2%} of kept",
        f"bad: {found['bad_reasons']['user_id is missing']} x user_id is missing",
        f"users: {found['query']['ids']} of {found['query']['ids_before_k_core']}, "
        f"{found['query']['lost_to_k_core']} lost to the k-core",
        "days: 40 with rows from 2001-09-09 to 2001-10-21, 3 without",
        "days without rows: 2001-09-20 to 2001-09-21, 2001-10-12",
        "files: 2; rows read from 1,000 (a.parquet) to 2,000 (b.parquet)",
        "prepare: this was a dry run; nothing is written",
    ):
        assert line in lines


# --- days, files, schemas --------------------------------------------------------------------


def test_rows_by_day(made):
    rows, _, _, manifest = made
    days = Counter(
        str(date(1970, 1, 1) + timedelta(row["timestamp"] // DAY)) for row in rows if good(row)
    )
    assert manifest.details["quality"]["days"] == {
        "first": "2001-09-09",
        "last": "2001-10-21",
        "with_rows": 40,
        "without_rows": 3,
        "longest_gaps": [
            {"from": "2001-09-20", "to": "2001-09-21", "days": 2},
            {"from": "2001-10-12", "to": "2001-10-12", "days": 1},
        ],
        "rows": days,
    }


def test_gaps_by_hand():
    assert gaps_between({}) == []
    assert gaps_between({"2024-02-28": 1}) == []
    assert gaps_between({"2024-02-28": 1, "2024-02-29": 1, "2024-03-01": 1}) == []
    assert gaps_between({"2023-02-28": 1, "2023-03-02": 1, "2024-03-01": 9}) == [
        {"from": "2023-03-01", "to": "2023-03-01", "days": 1},
        {"from": "2023-03-03", "to": "2024-02-29", "days": 364},
    ]


def test_too_many_empty_days_are_an_error(made, tmp_path):
    _, source, _, _ = made
    message = r"no rows on 3 day.*2001-09-20 to 2001-09-21, 2001-10-12"
    with pytest.raises(ValueError, match=message):  # what would stop a real run stops a dry one
        prepare(config(source, tmp_path / "out", max_empty_days=2, dry_run=True, **SETTINGS))
    assert list(tmp_path.iterdir()) == []


def test_days_cannot_be_counted_without_times(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("user_id,item_id\na,b\n")
    arguments = ["--source", str(tmp_path / "log.csv"), "--output", str(tmp_path / "out")]
    assert twotower.main(["prepare", *arguments, "--max_empty_days", "0"]) == 2
    assert "has no column 'timestamp'" in capsys.readouterr().err
    assert twotower.main(["prepare", *arguments, "--max_empty_days", "-1"]) == 2
    assert "max_empty_days must be at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"item_id": [7, 8], "timestamp": [1, 2]}, "column 'item_id' is numbers in"),
        ({"item_id": ["7", "8"], "timestamp": ["1", "2"]}, "column 'timestamp' is text in"),
        ({"item": ["7", "8"], "timestamp": [1, 2]}, "has no column 'item_id'"),
        ({"item_id": pa.array([], pa.string()), "timestamp": pa.array([], pa.int64())}, "no rows"),
    ],
)
def test_a_day_that_is_not_as_the_day_before(tmp_path, second, expected):
    logs = tmp_path / "logs"
    logs.mkdir()
    first = {"item_id": ["x", "y"], "timestamp": [1, 2]}
    for name, columns in (("day1", first), ("day2", second)):
        users = pa.array(["a"] * len(columns["timestamp"]), pa.string())
        pq.write_table(pa.table({"user_id": users, **columns}), logs / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"day2\.parquet") as error:
        prepare(config(logs, tmp_path / "out"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("with_time", ["day1", "day2"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_files_with_and_without_times(tmp_path, with_time, kind):
    """A missing time would be 1970, and the earliest of a repeated pair."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("day1", "day2"):
        table = pa.table({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1, 2]})
        table = table if name == with_time else table.drop_columns("timestamp")
        write_table = pq.write_table if kind == "parquet" else pa_csv.write_csv
        write_table(table, logs / f"{name}.{kind}")
    other = {"day1": "day2", "day2": "day1"}[with_time]
    message = rf"{other}\.{kind} has no column 'timestamp', as .*{with_time}\.{kind} has; add it"
    with pytest.raises(ValueError, match=message):
        find_pieces(config(logs, tmp_path / "out"))
    find_pieces(config(logs, tmp_path / "out", timestamp_column=""))


# --- the page --------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """Reads a page, and fails where its tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone(made):
    _, _, out, manifest = made
    text = (out / "quality.html").read_text(encoding="utf-8")
    assert text == page(manifest.details["quality"])
    assert_shared_look(text)
    assert "Attributes" not in text
    found = Elements(text)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for _, name, value in found.attributes if name in ("href", "src", "xlink:href")]
    links += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)  # none leads out of the page
    assert [tag for tag in ("<script", "<link", "@import", "<img") if tag in text] == []
    titles = {
        value for tag, name, value in found.attributes if (tag, name) == ("svg", "aria-label")
    }
    assert titles == {
        "Good rows by day; red: days without rows",
        "Concentration",
        "How many rows users have",
        "How many rows items have",
    }
    cells = " ".join(" ".join(found.text).split())
    rows = manifest.details["quality"]["rows"]
    for expected in (
        f"{rows['rows']:,} of 3,000 rows are kept",
        f"duplicates of an earlier row {rows['duplicates']:,}",
        "2001-09-20 to 2001-09-21 2",
        "user_id is missing",
    ):
        assert expected in cells
    assert str(out.parent) not in text
    assert manifest.files["quality.html"]["checksum"] == checksum(out / "quality.html")


@pytest.mark.long
def test_the_page_fits_into_a_narrow_window(made):
    _, _, out, _ = made
    assert_file_fits(out / "quality.html")


def test_a_reason_is_text_on_the_page(made):
    _, _, _, manifest = made
    found = manifest.details["quality"] | {"bad_reasons": {"<b>&</b> is no column": 3}}
    assert "<b>&</b> is no column" in Elements(page(found)).text


def test_days_of_many_years_share_bars(made):
    _, _, _, manifest = made
    first = date(2001, 1, 1)
    days = {str(first + timedelta(n)): n for n in range(1, 2000)}
    found = dict(manifest.details["quality"])
    found["days"] = found["days"] | {"rows": days}
    text = page(found)
    assert "Good rows, 16 days a bar" in text
    assert text.count("<path") < 900
