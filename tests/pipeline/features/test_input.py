"""Cells of every type, the kinds that columns get, bad rows and mistakes of the user."""

import datetime
import decimal
import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import twotower
from pipeline.contract import schema
from pipeline.contract.files import describe_files
from pipeline.features.encoding import rank_values
from pipeline.features.join import distinct_rows
from pipeline.features.tables import feature_files, find_tables
from pipeline.features.values import VALUE_TYPES, Moments, infer_kind, values_of
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.read.cells import Checks

NAN = float("nan")
DAY = datetime.date(2000, 1, 2)


@pytest.mark.parametrize(
    ("kind", "column", "expected"),
    [
        ("categorical", pa.array([7, None, -1]), ["7", None, "-1"]),
        ("categorical", pa.array([7.0, None, NAN, 2.5]), ["7", None, None, "2.5"]),
        ("categorical", pa.array([2.0**60, math.inf]), [str(2.0**60).lower(), "inf"]),
        ("categorical", pa.array(["é", "", None]), ["é", None, None]),
        ("categorical", pa.array([b"\xc3\xa9", b"", None]), ["é", None, None]),
        ("categorical", pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        ("categorical", pa.array([True, False, None]), ["true", "false", None]),
        ("categorical", pa.array([DAY]), ["2000-01-02"]),
        ("categorical", pa.nulls(2), [None, None]),
        ("text", pa.array(["a b", "", None], pa.large_string()), ["a b", None, None]),
        ("numeric", pa.array([1, None]), [1.0, None]),
        ("numeric", pa.array([0.5, NAN, None]), [0.5, None, None]),
        ("numeric", pa.array([" 1e3 ", "", " ", None, "-.5"]), [1000.0, None, None, None, -0.5]),
        ("numeric", pa.array([b"2", b""]), [2.0, None]),
        ("numeric", pa.array([decimal.Decimal("1.50"), None]), [1.5, None]),
        ("numeric", pa.array([DAY, None]), [946_771_200.0, None]),
        ("multi", pa.array([["b", "a", "b"], [], None, ["", None]]), [["b", "a"], [], [], []]),
        (
            "multi",
            pa.array([[1, 2], None, [3, 3]], pa.list_(pa.int32(), 2)),
            [["1", "2"], [], ["3"]],
        ),
        ("multi", pa.array(["b|a||b", "", None]), [["b", "a"], [], []]),
        ("multi", pa.array([5, None]), [["5"], []]),
    ],
)
def test_cells_of_every_type(kind, column, expected):
    checks = Checks(len(column))
    found = values_of(column, kind, "x", "|", checks)
    assert found.type == VALUE_TYPES[kind]
    assert found.to_pylist() == expected
    assert checks.good.all()


@pytest.mark.parametrize(
    ("kind", "column", "reason"),
    [
        ("numeric", pa.array(["1", "1,5", "2"]), "x is not a number"),
        ("numeric", pa.array([1.0, math.inf, 2.0]), "x is not a number"),
        ("numeric", pa.array([1.0, 1e200, 2.0]), "x is out of range"),
        ("categorical", pa.array([b"a", b"\xff", None]), "x is not UTF-8"),
        ("text", pa.array([b"a", b"\xff", None]), "x is not UTF-8"),
        ("multi", pa.array([b"a|b", b"a|\xff", None]), "x is not UTF-8"),
        ("multi", pa.array([[b"a", b"b"], [b"a", b"\xff"], None]), "x is not UTF-8"),
    ],
)
def test_cells_that_cannot_be_read(kind, column, reason):
    checks = Checks(3)
    values_of(column, kind, "x", "|", checks)
    assert checks.failures() == [(1, reason)]


def test_a_text_column_that_only_claims_to_be_utf8():
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    checks = Checks(3)
    assert values_of(column, "text", "x", "|", checks).to_pylist() == ["a", None, "c"]
    assert checks.failures() == [(1, "x is not UTF-8")]


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (pa.int8(), "categorical"),
        (pa.bool_(), "categorical"),
        (pa.large_string(), "categorical"),
        (pa.dictionary(pa.int8(), pa.string()), "categorical"),
        (pa.float32(), "numeric"),
        (pa.decimal128(5, 2), "numeric"),
        (pa.timestamp("us", "UTC"), "numeric"),
        (pa.list_(pa.string()), "multi"),
        (pa.large_list(pa.int64()), "multi"),
        (pa.null(), ""),
    ],
)
def test_the_type_of_a_column_says_its_kind(found, kind):
    assert infer_kind(found) == kind


@pytest.mark.parametrize("seed", range(3))
def test_moments_are_exact_and_do_not_depend_on_the_order(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(1.5e9, 1e-3, 300) * 10.0 ** rng.integers(-30, 30, 300)
    parts = np.split(rng.permutation(values), [0, 7, 150])
    merged = Moments()
    for part in parts:
        merged = merged.plus(Moments.of(part))
    assert merged == Moments.of(values)
    exact = [Fraction(value) for value in values.tolist()]
    mean = sum(exact) / len(exact)
    assert merged.mean == float(mean)
    assert merged.std == math.sqrt(sum((value - mean) ** 2 for value in exact) / len(exact))


def test_moments_where_the_textbook_formula_fails():
    values = 1e9 + np.array([0.0, 1e-3, 2e-3])
    assert Moments.of(values).std == pytest.approx(np.std(values - 1e9), rel=1e-12)
    assert Moments.of(np.array([2.0, 4.0])) == (2, 6 << 1130, 20 << 2260)  # 2 + 4, 4 + 16
    assert (Moments().mean, Moments().std) == (0.0, 1.0)
    for value in (3.0, 1e-160, 5e-324, -1e150):  # equal values have no deviation to divide by
        assert (Moments.of(np.full(3, value)).mean, Moments.of(np.full(3, value)).std) == (
            value,
            1.0,
        )


@pytest.mark.parametrize(
    ("column", "different"),
    [
        (["x", "x", None, None, "y", "y", "z", "z"], []),
        (["x", "y", None, None, "x", "x", "x", "x"], ["i0"]),
        ([1.0, 1.0, None, 2.0, 3.0, None, 0.0, -0.0], ["i1", "i2"]),
        ([["x"], ["x"], [], ["x"], ["x", "y"], ["y", "x"], [], []], ["i1", "i2"]),
    ],
)
def test_rows_of_an_id_that_differ_are_found(column, different):
    prints = pa.array([0, 0, -1, -1, 2, 2, -3, -3])
    raw = pa.array([f"i{abs(n)}" for n in prints.to_pylist()], pa.large_string())
    cells = pa.array(column)
    if pa.types.is_list(cells.type):
        cells = cells.cast(VALUE_TYPES["multi"])
    table = pa.table({"fingerprint": prints, "raw_id": raw, "0": cells}).take(
        [7, 1, 3, 4, 0, 6, 2, 5]
    )
    kept, repeated, conflicts = distinct_rows(table)
    assert kept["raw_id"].to_pylist() == ["i3", "i1", "i0", "i2"]
    assert (repeated, sorted(conflicts)) == (4, different)


def test_values_are_ranked_by_count_then_by_value():
    counts = pa.table({"value": list("dbac"), "count": [2, 3, 3, 1]})
    assert rank_values(counts, 2).to_pylist() == [
        {"value": "a", "count": 3},
        {"value": "b", "count": 3},
        {"value": "d", "count": 2},
    ]


@pytest.fixture
def config(tmp_path):
    """Settings for a log of five items beside tables that a test writes."""
    log = pa.table({"user_id": ["u"] * 5, "item_id": list("abcde")})
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "items").mkdir()

    def config(**settings):
        chosen = {"item_features": str(tmp_path / "items"), "partitions": 2} | settings
        return PrepareConfig(
            source=str(tmp_path / "log.parquet"), output=str(tmp_path / "out"), **chosen
        )

    return config


def kinds_of(config):
    return find_tables(config)["candidate"].kinds


def test_a_text_file_shows_which_columns_hold_numbers(config, tmp_path):
    path = tmp_path / "items" / "a.tsv"
    path.write_text("item_id\tcode\tprice\tname\tnothing\na\t12\t1\t5\t\nb\t\t2.5\tx\t\n")
    kinds = kinds_of(config())
    assert kinds.pop("price") == "numeric"
    assert kinds == dict.fromkeys(("code", "name", "nothing"), "categorical")
    flags = ("code=numeric", "name=skip", "nothing=text")
    assert kinds_of(config(item_feature_kinds=flags)) == {
        "code": "numeric",
        "price": "numeric",
        "nothing": "text",
    }
    assert feature_files(config()) == [str(path)]


@pytest.mark.long
def test_the_three_files_of_recbole(tmp_path, caplog):
    """Their headers say the kinds, and `--source DIR` reads the log alone."""
    (tmp_path / "ml.inter").write_text("user_id:token\titem_id:token\nu\ta\nu\tb\nv\ta\n")
    header = "item_id:token\ttitle:token_seq\tyear:token\tprice:float\tvector:float_seq\n"
    rows = "a\tToy Story\t1995\t3\t1 2\nb\tTwo Toy\t1996\t\t1 2\n"
    (tmp_path / "ml.item").write_text(header + rows)
    (tmp_path / "ml.user").write_text("user_id:token\tage:float\nu\t24\nv\t5\n")
    config = PrepareConfig(
        source=str(tmp_path),
        output=str(tmp_path / "out"),
        user_features=str(tmp_path / "ml.user"),
        item_features=str(tmp_path / "ml.item"),
        train_ratio=1.0,
    )
    tables = find_tables(config)
    assert tables["query"].kinds == {"age": "numeric"}
    kinds = {"title": "multi", "year": "categorical", "price": "numeric"}
    assert tables["candidate"].kinds == kinds
    with caplog.at_level("INFO"):
        manifest = prepare(config)
    assert manifest.counts["rows"] == 3
    said = [line for line in caplog.messages if " of 2 without a value" in line]
    assert said == [
        "prepare: user age: numeric; 0 of 2 without a value",
        "prepare: item title: multi, 3 values; 0 of 2 without a value",
        "prepare: item year: categorical, 2 values; 0 of 2 without a value",
        "prepare: item price: numeric; 1 of 2 without a value",
    ]
    files = {"source": "ml.inter", "user_features": "ml.user", "item_features": "ml.item"}
    described = describe_files(tmp_path)  # by the same function as those of the output
    assert manifest.details["inputs"] == {
        name: [{"file": file} | described[file]] for name, file in files.items()
    }


def test_files_of_one_table_agree(config, tmp_path):
    def write(name, **columns):
        pq.write_table(pa.table({"item_id": ["a"]} | columns), tmp_path / "items" / name)

    write("1.parquet", n=pa.array([1]), m=pa.nulls(1))
    write("2.parquet", m=pa.array(["x"]), n=pa.array([2], pa.int8()))
    assert kinds_of(config()) == {"n": "categorical", "m": "categorical"}
    write("3.parquet", n=pa.array([1.5]), m=pa.array(["x"]))
    with pytest.raises(ValueError, match=r"'n' looks numeric in .*3.parquet and categorical in"):
        find_tables(config())
    assert kinds_of(config(item_feature_kinds=("n=numeric",)))["n"] == "numeric"
    write("3.parquet", n=pa.array([1]))
    with pytest.raises(ValueError, match=r"differ in the columns \['m'\]"):
        find_tables(config())


@pytest.mark.long
def test_bad_rows_go_to_dead_letters_and_their_ids_hold_nothing(config, tmp_path):
    (tmp_path / "items" / "a.csv").write_bytes(
        b"item_id,price,name\na,1.5,x\nb,cheap,y\n,1,z\nd,2.5,\xff\ne,1\nz,3.5,x\n"
    )
    manifest = prepare(config(max_bad_share=0.7, item_feature_kinds=("price=numeric",)))
    lines = (tmp_path / "out" / "candidate_features_dead_letters.jsonl").open(encoding="utf-8")
    letters = [json.loads(line) for line in lines]
    assert [(letter["row"], letter["reason"]) for letter in letters] == [
        (2, "price is not a number"),
        (3, "item_id is missing"),
        (4, "the line is not UTF-8"),
        (5, "expected 3 columns, found 2"),
    ]
    details = manifest.details["features"]["candidate"]
    assert details["rows"] == {"read": 6, "bad": 4, "duplicates": 0, "joined": 1, "cold": 1}
    rows = pq.read_table(tmp_path / "out" / schema.features_name("candidate")).to_pylist()
    assert [row["name"] for row in rows] == [1, 0, 0, 0, 0]  # a to e: equal counts, by raw id
    with pytest.raises(ValueError, match="4 of 6 rows") as caught:
        prepare(config(max_bad_share=0.5, overwrite=True, item_feature_kinds=("price=numeric",)))
    kept = tmp_path / "out.candidate_features_dead_letters.jsonl"
    assert str(kept) in str(caught.value)
    assert "--item_feature_kinds" in str(caught.value)
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 4


TABLE = b"item_id,price\na,1.5\n"


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (
            None,
            "--item_features nowhere",
            "does not exist or holds no readable file; check --item_f",
        ),
        (TABLE, "--item_features demo", "--item_features must be a file"),
        (TABLE, "--item_features_id sku", "name the right one with --item_features_id."),
        (TABLE, "--item_feature_kinds prize=text", "has no column 'prize' beside its id"),
        (TABLE, "--item_feature_kinds price=number", "item_feature_kinds must be COLUMN=KIND"),
        (TABLE, "--item_feature_kinds price", "item_feature_kinds must be COLUMN=KIND"),
        (TABLE, "--item_feature_kinds price=skip", "leaves no column beside the id"),
        (TABLE, "--user_feature_kinds price=text", "needs user_features"),
        (TABLE, "--feature_min_count 0", "feature_min_count must be at least 1"),
        (b"item_id,price\n", "", "holds no rows"),
        (b"item_id,a,a\nx,1,2\n", "", "has two columns 'a'"),
        (b"item_id,a,a:present\nx,1,2\n", "", "may not be called 'a:present'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    config, tmp_path, capsys, content, flags, expected
):
    path = tmp_path / "items" / "a.csv"
    path.write_bytes(content or b"")
    config()
    table = [] if "--item_features " in flags else ["--item_features", str(path)]
    places = ["--source", str(tmp_path / "log.parquet"), "--output", str(tmp_path / "out")]
    assert twotower.main(["prepare", *places, *table, *flags.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error
    assert sorted(one.name for one in tmp_path.iterdir()) == ["items", "log.parquet"]


@pytest.mark.parametrize(
    ("column", "flags", "expected"),
    [
        (pa.array([{"a": 1}]), (), "of type struct<a: int64> cannot be of a kind"),
        (pa.array([[1.5]]), (), "double> cannot be of a kind"),
        (pa.array([["a"]]), ("x=text",), "string> cannot be of kind text"),
    ],
)
def test_types_that_have_no_kind(config, tmp_path, column, flags, expected):
    table = pa.table({"item_id": ["a"], "x": column, "y": [1]})
    pq.write_table(table, tmp_path / "items" / "a.parquet")
    with pytest.raises(ValueError, match=expected):
        find_tables(config(item_feature_kinds=flags))
    assert kinds_of(config(item_feature_kinds=("x=skip",))) == {"y": "categorical"}
