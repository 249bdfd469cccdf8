"""Bad rows are counted and kept aside; bad sources are one clear line, and nothing is left."""

import csv
import json
import pkgutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import raw_pairs

import twotower
from pipeline.counts.job import count
from pipeline.counts.settings import FrequenciesConfig
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.read import log, readers
from pipeline.read.cells import Checks, ids_of, seconds_of
from pipeline.read.discover import find_pieces

HEADER = b"user_id,item_id,timestamp,rating\n"
GOOD = b"".join(b"u%d,i%d,%d,5\n" % (n % 5, n, n) for n in range(20))
BAD_LINES = {
    "user_id is missing": b",i1,3,5",
    "item_id is missing": b"u1,,3,5",
    "timestamp is not a number": b"u1,i1,noon,5",
    "rating is not a number": b"u1,i1,3,five",
    "expected 4 columns, found 3": b"u1,i1,3",
    "expected 4 columns, found 5": b"u1,i1,3,5,6",
    "the line is not UTF-8": b"u1,i\xff1,3,5",
}


def letters(directory):
    return [json.loads(line) for line in (directory / "dead_letters.jsonl").open(encoding="utf-8")]


def test_bad_lines_go_to_the_dead_letters_with_their_row_numbers(tmp_path):
    lines = [line + b"\n" for line in BAD_LINES.values()]
    good, source = GOOD.splitlines(keepends=True), tmp_path / "log.csv"
    parts = [HEADER, *lines, *good[:7], b"\n", lines[0], *good[7:], *lines]
    source.write_bytes(b"".join(parts))
    config = PrepareConfig(
        source=str(source), output=str(tmp_path / "out"), rating_threshold=1, max_bad_share=1
    )
    manifest = prepare(config)
    found = letters(tmp_path / "out")
    reasons = list(BAD_LINES)
    assert [(letter["row"], letter["reason"]) for letter in found] == [
        *enumerate(reasons, 1),
        (len(reasons) + 8, reasons[0]),  # the header and the blank line are no rows
        *enumerate(reasons, len(reasons) + 22),
    ]
    assert {letter["source"] for letter in found} == {str(source)}
    assert all(letter["content"] for letter in found)
    bad = 2 * len(reasons) + 1
    assert (manifest.counts["read"], manifest.counts["bad"]) == (20 + bad, bad)
    assert manifest.counts["rows"] == 20


def test_a_line_that_is_not_utf8_is_no_item_in_a_file_of_one_column(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"item_id\ntea\nbr\xe9ad\nmilk\nc\xe9leri\n")
    manifest = count(
        FrequenciesConfig(
            source=str(tmp_path / "log.csv"), output=str(tmp_path / "out"), max_bad_share=1
        )
    )
    assert sorted(pq.read_table(tmp_path / "out")["raw_id"].to_pylist()) == ["milk", "tea"]
    assert manifest.counts["bad"] == 2
    lines = (tmp_path / "out" / "_dead_letters.jsonl").read_text().splitlines()
    found = [(letter["row"], letter["content"]) for letter in map(json.loads, lines)]
    assert found == [(2, "br\\xe9ad"), (4, "c\\xe9leri")]


def test_bad_values_in_parquet(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array([None, "a", "a", "b", "c", ""]),
            "item_id": pa.array([b"x", b"y\xff", b"x", b"x", b"z", b"x"]),
            "timestamp": pa.array([1, 2, None, 4, 5, 6]),
            "weight": pa.array([1.0, 1.0, 1.0, float("nan"), -1.0, 1.0]),
        }
    )
    pq.write_table(table.append_column("n", pa.array(range(6))), tmp_path / "log.parquet")
    settings = {"max_bad_share": 1, "weight_column": "weight", "train_ratio": 1.0}
    with pytest.raises(ValueError, match="no row of"):
        prepare(
            PrepareConfig(
                source=str(tmp_path / "log.parquet"), output=str(tmp_path / "out"), **settings
            )
        )
    good = pa.table({"user_id": ["a"], "item_id": [b"x"], "timestamp": [9], "weight": [1.0]})
    pq.write_table(good, tmp_path / "more.parquet")
    prepare(
        PrepareConfig(source=str(tmp_path / "*.parquet"), output=str(tmp_path / "out"), **settings)
    )
    assert [(one["row"], one["reason"]) for one in letters(tmp_path / "out")] == [
        (1, "user_id is missing"),
        (2, "item_id is not UTF-8"),
        (3, "timestamp is not a time"),
        (4, "weight is not a number"),
        (5, "weight is negative"),
        (6, "user_id is missing"),
    ]
    assert raw_pairs(tmp_path / "out", "train") == [("a", "x")]


def test_a_weight_that_float32_cannot_hold_is_bad(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,w\na,x,3e38\na,y,4e38\nb,x,0\n")
    pairs, bad = read_text(tmp_path / "log.csv", weight_column="w")
    assert pairs == [("a", "x"), ("b", "x")]
    assert [(letter.row, letter.reason) for letter in bad] == [(2, "w is out of range")]


def test_a_day_that_no_calendar_has_is_bad():
    """Arrow takes 30 February for 1 March."""
    days = ["2024-02-29", "2024-02-30", "2023-02-29", "2024-03-01", "2024-04-31", "x", None]
    config = PrepareConfig(source="log.csv", output="out", timestamp_format="%Y-%m-%d")
    checks = Checks(len(days))
    seconds = seconds_of(pa.array(days), "when", config, checks)
    reasons = dict(checks.failures())
    assert sorted(reasons) == [1, 2, 4, 5, 6]
    assert reasons[1] == reasons[2] == reasons[4] == "when is a day that no calendar has"
    assert [seconds[0], seconds[3]] == [1_709_164_800, 1_709_251_200]


@pytest.mark.parametrize("kind", ["uint64", "float64"])
def test_a_time_that_int64_cannot_hold_is_bad(kind):
    checks = Checks(3)
    column = pa.array(np.array([7, 2**63, 8], kind))
    config = PrepareConfig(source="log.parquet", output="out")
    assert seconds_of(column, "when", config, checks).tolist() == [7, 0, 8]
    assert checks.failures() == [(1, "when is out of range")]


def test_times_of_iso_8601():
    """Fractions are cut off, zones count, and a day that no calendar has is bad in every zone."""
    good = {
        "2024-02-29": "2024-02-29T00:00:00",
        "2024-02-29 10:05": "2024-02-29T10:05:00",
        "2024-02-29T10:05:06.999999999": "2024-02-29T10:05:06",
        " 2024-02-29T10:05:06,5Z ": "2024-02-29T10:05:06",
        "2024-02-29t10:05:06z": "2024-02-29T10:05:06",
        "2024-03-01T01:05:06.5+02:00": "2024-02-29T23:05:06",
        "2024-02-29T23:05:06-0530": "2024-03-01T04:35:06",
        "2024-02-29T23:05:06 +14": "2024-02-29T09:05:06",
    }
    no_days = ["2024-02-30", "2023-02-29T01:00:00+02:00", "2024-04-31T23:00:00-05"]
    bad = [
        "2024-13-01",
        "2024-02-29T25:00",
        "29.02.2024",
        "1709164800",
        "2024-02-29T1:05",
        "",
        None,
    ]
    config = PrepareConfig(source="log.csv", output="out", timestamp_format="iso")
    checks = Checks(len(good) + len(no_days) + len(bad))
    seconds = seconds_of(pa.array([*good, *no_days, *bad]), "when", config, checks)
    assert seconds[: len(good)].astype("datetime64[s]").astype(str).tolist() == list(good.values())
    reasons = dict(checks.failures())
    assert [reasons.get(row, "") for row in range(len(good))] == [""] * len(good)
    found = [reasons[row] for row in range(len(good), len(good) + len(no_days))]
    assert found == ["when is a day that no calendar has"] * len(no_days)
    assert len(reasons) == len(no_days) + len(bad)


@pytest.mark.parametrize(("kind", "bits"), [("float64", 53), ("float32", 24), ("float16", 11)])
def test_ids_that_a_float_may_have_rounded_are_refused(kind, bits):
    values = [2.0**bits - 1, 2.0**bits, -(2.0**bits), 1 - 2.0**bits, np.inf, np.nan, None, 0.5]
    column = pa.array(values, pa.float64()).cast(getattr(pa, kind)())
    checks = Checks(len(values))
    codes, (_, raw) = ids_of(column, "user_id", checks)
    assert [raw[codes[row]].decode() for row in (0, 3)] == [str(2**bits - 1), str(1 - 2**bits)]
    reasons = dict(checks.failures())
    assert sorted(reasons) == [1, 2, 4, 5, 6, 7]
    for row in (1, 2):
        assert reasons[row].startswith(f"user_id is a number of 2^{bits} or more")
        assert reasons[row].endswith("write ids as text or integers")
    assert reasons[4] == reasons[5] == reasons[7] == "user_id is not a whole number"
    assert reasons[6] == "user_id is missing"


def test_different_users_do_not_become_one(tmp_path, capsys):
    users = np.arange(2**53 + 1, 2**53 + 41, dtype=np.int64).astype(np.float64)
    pq.write_table(pa.table({"user_id": users, "item_id": ["x"] * 40}), tmp_path / "log.parquet")
    status, error = run(
        capsys, "--source", str(tmp_path / "log.parquet"), "--output", str(tmp_path / "out")
    )
    assert (status, "write ids as text or integers" in error, "\n" in error) == (2, True, False)


def read_text(path, **settings):
    """The good rows of a text file, (user, item) in order, and its dead letters."""
    config, pairs, bad = PrepareConfig(source=str(path), output="out", **settings), [], []
    for block, letters, _ in log.read_blocks(find_pieces(config)[0], config):
        names = [dict(zip(prints.tolist(), raw, strict=True)) for prints, raw in block.ids.values()]
        for row in block.rows:
            pair = (names[0][row["query"]], names[1][row["candidate"]])
            pairs.append(tuple(raw.decode() for raw in pair))
        bad += letters
    return pairs, bad


@pytest.mark.parametrize("block_bytes", [*range(32, 80, 7), 1000])
def test_a_text_of_several_lines_is_whole_wherever_a_block_ends(tmp_path, monkeypatch, block_bytes):
    texts = ["soft", "two\nlines", 'a "quote"\n', "\n", "c,o,m\nm,a,s\n\n", '"', "end\r\nx"]
    rows = [(f"u{n}", text, f"i{n}") for n, text in enumerate(texts * 3)]
    with open(tmp_path / "log.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("user_id", "review", "item_id"), *rows])
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    assert read_text(tmp_path / "log.csv") == ([(user, item) for user, _, item in rows], [])


@pytest.mark.parametrize("block_bytes", [60, 10_000])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quote_that_is_not_closed_takes_no_other_row_with_it(
    tmp_path, monkeypatch, block_bytes, delimiter
):
    notes = [f"n{n}" for n in range(30)]
    notes[3] = '"Weird Al'
    notes[7] = '"Great" as they say'  # no quoted cell, but no harm either
    notes[12] = '"two\nlines"'
    notes[20:24] = '7" vinyl', '"', '"in quotes"', '"Heroes'
    notes[29] = '"the last'
    lines = [("user_id", "note", "item_id")]
    lines += [(f"u{n}", note, f"i{n}") for n, note in enumerate(notes)]
    text = "".join(delimiter.join(line) + "\n" for line in lines)
    (tmp_path / "log.csv").write_text(text)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    pairs, bad = read_text(tmp_path / "log.csv", delimiter=delimiter)
    lost = (3, 21, 23, 29)
    assert [(letter.row, letter.reason, letter.content) for letter in bad] == [
        (n + 1, "a quote is not closed", delimiter.join(lines[n + 1])) for n in lost
    ]
    assert pairs == [(f"u{n}", f"i{n}") for n in range(30) if n not in lost]


def run(capsys, *arguments):
    status = twotower.main(["prepare", *arguments])
    return status, capsys.readouterr().err.strip()


@pytest.mark.long
def test_bad_rows_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 10_000)
    (tmp_path / "log.csv").write_bytes(HEADER + GOOD + b"u,i,3,5,one too many\n" * 50_000)
    config = PrepareConfig(source=str(tmp_path / "log.csv"), output="out", partitions=2)
    (tmp_path / "dead").mkdir()
    [piece] = find_pieces(config)
    tracemalloc.start()
    for _ in log._read_piece(piece, config, "query", None, tmp_path / "dead", tmp_path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    letters = tmp_path / "dead" / "000000.jsonl"
    tally = json.loads((tmp_path / "piece-000000.json").read_text())
    assert tally["counts"] == {"read": 50_020, "bad": 50_000, "below_threshold": 0}
    assert letters.read_bytes().count(b"\n") == 50_000
    assert peak < letters.stat().st_size / 4


def test_too_many_bad_rows_is_an_error_that_keeps_the_letters(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes(HEADER + GOOD + b",i1,3,5\n")
    status, error = run(
        capsys, "--source", str(tmp_path / "log.csv"), "--output", str(tmp_path / "out")
    )
    assert status == 2
    assert "1 of 21 rows" in error
    assert "--max_bad_share 0.01" in error
    assert "user_id is missing" in error
    assert "\n" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "out.dead_letters.jsonl"]


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (None, [], "does not exist"),
        (b"", [], "is empty"),
        (HEADER, [], "holds no rows"),
        (b"user,item\na,b\n", [], "has no column 'user_id', it has 'user', 'item'"),
        (b"user_id,item_id\na,b\n", ["--split", "time"], "has no column 'timestamp'"),
        (b"user_id,item_id\na,b\n", ["--timestamp_column", "t"], "has no column 't'"),
        (b"user_id,item_id,item_id\na,b,c\n", [], "has two columns 'item_id'; rename"),
        (b"user_id,item_id\na,b\n", ["--min_user_interactions", "2"], "the k-core of"),
        (b"user_id,item_id\na,b\n", ["--split", "given"], "needs a directory"),
        (b"user_id,item_id\na,b\n", ["--split", "randon"], "split must be one of"),
        (b"user_id,item_id\na,b\n", ["--train_ratio", "1.5"], "train_ratio must be in (0, 1]"),
        (b"user_id,item_id\na,b\n", ["--train_ration", "1"], "did you mean --train_ratio?"),
        (b"user_id,item_id\na,b\n", ["--runnner", "x"], "did you mean --runner?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, capsys, content, flags, expected):
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    status, error = run(
        capsys, "--source", str(tmp_path / "log.csv"), "--output", str(tmp_path / "out"), *flags
    )
    assert status == 2
    assert expected in error
    assert "\n" not in error
    assert {p.name for p in tmp_path.iterdir()} <= {"log.csv"}


def test_files_that_are_not_what_their_name_says(tmp_path, capsys):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "cut.csv.gz").write_bytes(b"\x1f\x8b\x08\x00 no")
    (tmp_path / "log.xlsx").write_bytes(b"PK")
    (tmp_path / "logs" / "log.parquet").mkdir(parents=True)  # as Spark writes a table
    for name, expected in (
        ("log.parquet", "is not a Parquet file"),
        ("logs", "is not a Parquet file"),
        ("cut.csv.gz", "cannot be read"),
        ("log.xlsx", "is of no known format"),
    ):
        status, error = run(
            capsys, "--source", str(tmp_path / name), "--output", str(tmp_path / "out")
        )
        assert (status, expected in error, "\n" in error) == (2, True, False), error
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_early_is_an_error(tmp_path, capsys):
    import gzip

    noise = np.random.default_rng(0).integers(0, 2**60, (20_000, 2)).tolist()
    whole = gzip.compress(HEADER + b"".join(b"%d,%d,1,5\n" % (a, b) for a, b in noise))
    (tmp_path / "log.csv.gz").write_bytes(whole[: len(whole) // 2])
    status, error = run(
        capsys, "--source", str(tmp_path / "log.csv.gz"), "--output", str(tmp_path / "out")
    )
    assert status == 2
    assert "cannot be read to its end" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv.gz"]


@pytest.mark.parametrize(
    ("command", "reader"),
    [(prepare, "pipeline.job.ingest"), (count, "pipeline.counts.job.merge_log")],
)
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, command, reader):
    """Its next content would be counted on top of the rows that were read of this one."""
    source, original = tmp_path / "log.csv", pkgutil.resolve_name(reader)

    def read_and_append(*arguments):
        original(*arguments)
        source.write_bytes(HEADER + GOOD * 2)

    monkeypatch.setattr(reader, read_and_append)
    source.write_bytes(HEADER + GOOD)
    settings = PrepareConfig if command is prepare else FrequenciesConfig
    with pytest.raises(ValueError, match=r"log\.csv changed while it was read"):
        command(settings(source=str(source), output=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_an_existing_output_stays_unless_told_otherwise(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes(HEADER + GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("before")
    arguments = ["--source", str(tmp_path / "log.csv"), "--output", str(tmp_path / "out")]
    status, error = run(capsys, *arguments, "--seed", "11")
    assert status == 2
    assert "already exists" in error
    assert (tmp_path / "out" / "manifest.json").read_text() == "before"
    assert run(capsys, *arguments, "--seed", "11", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "manifest.json").read_text() != "before"


@pytest.mark.parametrize("output", ["logs", "logs/log.csv"])
def test_what_is_no_output_is_not_overwritten(tmp_path, capsys, output):
    """The source, for one."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_bytes(HEADER + GOOD)
    arguments = ["--source", str(tmp_path / "logs"), "--output", str(tmp_path / output)]
    status, error = run(capsys, *arguments, "--overwrite")
    assert (status, "holds something else" in error) == (2, True)
    assert (tmp_path / "logs" / "log.csv").read_bytes() == HEADER + GOOD
