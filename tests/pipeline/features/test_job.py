"""Feature files against a reference in plain Python; what they may not depend on."""

import ast
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from attributes import (
    COLD,
    FLAGS,
    KINDS,
    TEST_ONLY,
    TRAIN,
    as_table,
    cells,
    expected_features,
    make_items,
    write_log,
)
from prepared import digest, vocabulary

import twotower
from pipeline.contract import schema
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.quality.page import page
from pipeline.read import readers

TAFENG = (
    Path(os.environ.get("TWOTOWER_DATA", Path(__file__).parents[4] / "shared" / "data")) / "tafeng"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("source") / "log")


@pytest.fixture
def run(source, tmp_path):
    return lambda *parts, **settings: prepare_items(source, tmp_path, *parts, **settings)


def prepare_items(source, directory, *parts, name="out", **settings):
    """Prepares the log with a table of items, a file for each part: the output."""
    items = directory / f"{name}-items"
    items.mkdir()
    for number, part in enumerate(parts):
        pq.write_table(part, items / f"{number}.parquet", row_group_size=20)
    chosen = {"item_feature_kinds": FLAGS, "split": "given", "rows_per_shard": 17}
    chosen |= {"partitions": 2} | settings
    out = directory / name
    prepare(PrepareConfig(source=source, output=str(out), item_features=str(items), **chosen))
    return out


@pytest.fixture(scope="module")
def out(source, tmp_path_factory):
    return prepare_items(source, tmp_path_factory.mktemp("out"), as_table(make_items()))


def features(directory, kind="candidate_features"):
    """The rows of a kind of feature files, in order."""
    paths = sorted(Path(directory).glob(f"{kind}-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def details(directory):
    return schema.read_manifest(directory, "prepared").details["features"]["candidate"]


def specs(directory, side="candidate"):
    manifest = schema.read_manifest(directory, "prepared")
    return {spec.name: spec for spec in schema.feature_specs(manifest.details, side)}


def values_of(directory, column):
    table = pq.read_table(directory / schema.feature_vocabulary_name("candidate", column))
    return table["value"].to_pylist()


def content(directory):
    """All but the manifest, which names the table, and the page that is made of it."""
    files = digest(directory)
    return {name: files[name] for name in files.keys() - {"manifest.json", "quality.html"}}


def assert_equal(found, expected):
    assert [set(row) for row in found] == [set(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.pop("price") == pytest.approx(other.pop("price"), rel=1e-6, abs=1e-6)
        assert one == other


def test_every_id_has_its_features(out):
    ids = vocabulary(out, "candidate")
    assert len(ids) == 50
    expected, learned = expected_features(make_items(), ids)
    assert_equal(features(out), expected)
    found = specs(out)
    assert {name: spec.kind for name, spec in found.items()} == KINDS
    mean, std = learned.pop("price")
    assert (found["price"].mean, found["price"].std) == pytest.approx((mean, std), rel=1e-12)
    for name in ("brand", "sub", "new", "tags"):
        assert values_of(out, name) == learned[name]
        assert found[name].size == len(learned[name])
    by_id = {row["item_id"]: row for row in make_items()}
    assert found["tags"].max_length == max(len(cells(by_id.get(i, {}), "tags")) for i in TRAIN)
    for shard in range(3):  # a shard has the rows of the vocabulary's shard of its number
        names = [
            name(side="candidate", shard=shard, num_shards=3)
            for name in (schema.vocabulary_name, schema.features_name)
        ]
        assert len({pq.read_metadata(out / name).num_rows for name in names}) == 1


def test_ids_without_interactions_have_theirs(out):
    found = features(out, "candidate_features_cold")
    ids = [row.pop("raw_id") for row in found]
    assert sorted(ids) == sorted(COLD)
    assert_equal(found, expected_features(make_items(), ids)[0])
    assert details(out)["rows"] == {
        "read": 55,
        "bad": 0,
        "duplicates": 0,
        "joined": 45,
        "cold": 10,
    }


def test_the_spec_counts_what_is_missing_and_unknown(out):
    found = specs(out)
    rows = {row["item_id"]: row for row in make_items()}
    known = [rows.get(item, {}) for item in vocabulary(out, "candidate")]
    assert found["price"].missing == sum(row.get("price") is None for row in known)
    assert found["brand"].missing == sum(not row.get("brand") for row in known)
    assert found["tags"].missing == sum(not row.get("tags") for row in known)
    assert found["brand"].unknown == sum(row.get("brand") == "new brand" for row in known) > 0
    assert found["tags"].unknown == sum("new tag" in (row.get("tags") or ()) for row in known) > 0
    assert details(out)["ids_without_row"] == 5


def test_the_page_of_quality_lists_the_columns(out):
    quality, features = ast.literal_eval((out / "quality.html").read_text())  # see conftest
    text = page(quality, features).partition("Attributes")[2]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in text.split("<tr>")[2:]]
    columns = [*specs(out).values()]
    assert [row[:2] for row in rows] == [[f"items: {spec.name}", spec.kind] for spec in columns]
    assert [row[-1] for row in rows] == [f"{spec.missing:,}" for spec in columns]
    means = [row[3] for row in rows if row[1] == "numeric"]
    assert means == [f"{spec.mean:,.6g}" for spec in columns if spec.kind == "numeric"]


def test_what_has_no_train_rows_teaches_nothing(out, run):
    """Vocabularies, normalisation and layout are the same whatever such items are like."""
    rows = make_items()
    for number, row in enumerate(rows):
        if row["item_id"] in (*TEST_ONLY, *COLD):
            other = {"price": 1e9 * number, "brand": f"b{number}", "sub": 99, "new": None}
            rows[number] = row | other | {"tags": [f"x{n}" for n in range(30)], "title": ""}
    changed = run(as_table(rows))
    assert features(changed) != features(out)
    counted = {"missing": 0, "unknown": 0}
    one, other = ([vars(spec) | counted for spec in specs(d).values()] for d in (out, changed))
    assert one == other
    for name in KINDS:
        path = schema.feature_vocabulary_name("candidate", name)
        assert (out / path).exists() == (name not in ("price", "title"))
        if (out / path).exists():
            assert (out / path).read_bytes() == (changed / path).read_bytes()


def test_order_blocks_files_and_key_ranges_do_not_matter(out, run, monkeypatch):
    """Nor do equal rows of an id."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 17)
    table = as_table(make_items())
    shuffled = table.take(np.random.default_rng(1).permutation(len(table)))
    parts = shuffled.slice(0, 13), shuffled.slice(13, 1), shuffled.slice(14), table.slice(20)
    again = run(*parts, item_feature_kinds=(*FLAGS, "tags=multi"), partitions=9)
    assert content(again) == content(out)
    assert details(again)["columns"] == details(out)["columns"]
    assert details(again)["rows"]["duplicates"] == 35


@pytest.mark.long
def test_workers_do_not_matter(source, tmp_path, out):
    pq.write_table(as_table(make_items()), tmp_path / "items.parquet")
    config = PrepareConfig(
        source=source,
        output=str(tmp_path / "many"),
        item_features=str(tmp_path / "items.parquet"),
        item_feature_kinds=FLAGS,
        split="given",
        rows_per_shard=17,
        partitions=2,
    )
    prepare(config, ["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    assert content(tmp_path / "many") == content(out)


@pytest.mark.long
def test_rare_values_count_as_unknown(run):
    found = run(as_table(make_items()), feature_min_count=11)
    ids = vocabulary(found, "candidate")
    expected, learned = expected_features(make_items(), ids, min_count=11)
    assert_equal(features(found), expected)
    assert 0 < specs(found)["tags"].size == len(learned["tags"]) < 6


@pytest.mark.long
def test_different_rows_of_an_id_are_an_error(run, tmp_path):
    rows = make_items()
    with pytest.raises(ValueError, match=f"rows for the id '{rows[3]['item_id']}' that differ"):
        run(as_table([*rows, rows[3] | {"tags": ["z"]}, rows[8]]))
    assert [path.name for path in tmp_path.iterdir()] == ["out-items"]


@pytest.mark.long
def test_the_command_reads_text_tables_of_both_sides(out, source, tmp_path, caplog):
    """The same features from a file without types; users by another column and delimiter."""
    lines = ["sku;price;brand;sub;new;tags;title;notes"]
    for row in make_items():
        row |= {"tags": ",".join(row["tags"] or ())}
        texts = (str(v).lower() if isinstance(v, bool) else v for v in row.values())
        lines.append(";".join("" if text is None else str(text) for text in texts))
    (tmp_path / "items.csv").write_text("\n".join(lines))
    for path in Path(source).glob("*.csv"):
        text = path.read_text().replace(",", ";")
        (tmp_path / "log").mkdir(exist_ok=True)
        (tmp_path / "log" / path.name).write_text(text)
    (tmp_path / "users.csv").write_text("user_id;age;city\nu1;31.5;Köln\nu2;;Bonn\nx;40.5;Köln\n")
    flags = (
        f"--source {tmp_path}/log --output {tmp_path}/text --split given --rows_per_shard 17 "
        f"--delimiter ; --item_features {tmp_path}/items.csv --item_features_id sku "
        "--item_feature_kinds title=text notes=skip tags=multi --feature_separator , "
        f"--partitions 2 --user_features {tmp_path}/users.csv"
    )
    assert twotower.main(["prepare", *flags.split()]) == 0
    found, expected = content(tmp_path / "text"), content(out)
    assert {name: found[name] for name in expected} == expected
    assert "query features: 3 rows read, 2 of ids with interactions, 1 cold" in caplog.text
    users = vocabulary(tmp_path / "text", "query")
    rows = dict(zip(users, features(tmp_path / "text", "query_features"), strict=True))
    assert rows["u1"] == {"age": 0.0, "age:present": True, "city": 2}
    assert rows["u2"] == {"age": 0.0, "age:present": False, "city": 1}
    assert rows["only test"] == {"age": 0.0, "age:present": False, "city": 0}
    assert specs(tmp_path / "text", "query")["age"].mean == 31.5
    (cold,) = features(tmp_path / "text", "query_features_cold")
    assert cold == {"raw_id": "x", "age": 9.0, "age:present": True, "city": 2}


@pytest.mark.long
@pytest.mark.real_data
@pytest.mark.skipif(
    not TAFENG.exists(), reason=f"{TAFENG} is not there; set TWOTOWER_DATA to its parent"
)
def test_ta_feng(tmp_path):
    log = pq.read_table(TAFENG / "interactions.parquet").slice(0, 60_000)
    pq.write_table(log, tmp_path / "log.parquet")
    prepare(
        PrepareConfig(
            source=str(tmp_path / "log.parquet"),
            output=str(tmp_path / "out"),
            user_features=str(TAFENG / "users.parquet"),
            item_features=str(TAFENG / "items.parquet"),
        )
    )
    tables = {"query": ("users", "user_id"), "candidate": ("items", "item_id")}
    for side, (name, key) in tables.items():
        table = pq.read_table(TAFENG / f"{name}.parquet").to_pandas().set_index(key)
        used = set(log[key].to_pylist())
        ids = vocabulary(tmp_path / "out", side)
        assert {int(raw) for raw in ids} == used
        for column in table.columns:
            path = tmp_path / "out" / schema.feature_vocabulary_name(side, column)
            known = ["", *pq.read_table(path)["value"].to_pylist()]
            codes = [row[column] for row in features(tmp_path / "out", f"{side}_features")]
            assert [known[code] for code in codes] == [
                str(value) if str(value) in known else ""
                for value in table.loc[[int(raw) for raw in ids], column]
            ]
        cold = features(tmp_path / "out", f"{side}_features_cold")
        assert {int(row["raw_id"]) for row in cold} == set(table.index) - used
