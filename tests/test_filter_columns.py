"""Attributes from a table of items to filters, through every door, against filters by hand."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running_server import running

import twotower
from serving.retrieval.retriever import Retriever

pytestmark = pytest.mark.long

USERS, ITEMS, K = 60, 120, 20
ROWS = np.arange(ITEMS)
KINDS = [None if row % 10 == 9 else f"kind {row % 3}" for row in range(ITEMS)]
TAGS = [[], ["new"], ["new", "örganic"], None] * (ITEMS // 4)
PRICES = [None if row % 7 == 6 else float(row % 40) for row in range(ITEMS)]
IN_STOCK = [bool(row % 2) for row in range(ITEMS)]
WHERE = [
    ({"kind": ["kind 1"]}, ["kind=kind 1"], lambda i: KINDS[i] == "kind 1"),
    (
        {"kind": ["kind 0", "kind 2"], "price": {"min": 5, "max": 20}},
        ["kind=kind 0,kind 2", "price:min=5", "price:max=20"],
        lambda i: (
            KINDS[i] in ("kind 0", "kind 2") and PRICES[i] is not None and 5 <= PRICES[i] <= 20
        ),
    ),
    ({"tags": "örganic"}, ["tags=örganic"], lambda i: "örganic" in (TAGS[i] or ())),
    (
        {"in_stock": True, "price": {"min": 7, "max": 7}},
        ["in_stock=true", "price=7"],
        lambda i: IN_STOCK[i] and PRICES[i] == 7,
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published version, by the commands alone."""
    place = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(7)
    users, items = rng.integers(0, USERS, 4000), rng.integers(0, ITEMS // 4, 4000) * 4
    items = items + users % 4
    log = {"user": [f"u{u}" for u in users], "item": [f"i{i}" for i in items]}
    pq.write_table(pa.table(log | {"when": np.arange(4000)}), place / "log.parquet")
    table = {"item": [f"i{i}" for i in range(ITEMS)], "kind": KINDS, "tags": TAGS}
    table |= {"price": PRICES, "in_stock": IN_STOCK}
    pq.write_table(pa.table(table), place / "items.parquet")
    data, run, models = (str(place / name) for name in ("prepared", "run", "models"))
    commands = [
        f"prepare --source {place}/log.parquet --output {data} --user_column user --item_column "
        f"item --timestamp_column when --item_features {place}/items.parquet",
        f"train --data {data} --run {run} --tower features --query_inputs history --dim 16 "
        "--epochs 1 --batch_size 256",
        f"export --data {data} --run {run} --models {models} --k {K} --filter_columns "
        "kind,tags,price,in_stock",
    ]
    for command in commands:
        assert twotower.main(command.split()) == 0
    return place


@pytest.fixture(scope="module")
def scores(place):
    """Item → score, by the vectors of the version and the embedding of a history."""
    retriever = Retriever.load(place / "models")

    def of(**query):
        queries = retriever.query_inputs.tensors([query])
        encoder = retriever.index("exact").model.signatures["request_embedding"]
        vectors = np.asarray(retriever.corpus.vectors) @ encoder(**queries)["embedding"][0].numpy()
        names = retriever.corpus.encoded_ids.names(np.arange(len(vectors)))
        return dict(zip(names, vectors.tolist(), strict=True))

    yield of
    retriever.close()


def best(scores, fulfils, barred=(), k=K):
    """By hand: all scores, the condition on each row of the table, a sort."""
    kept = {n: s for n, s in scores.items() if fulfils(int(n[1:])) and n not in barred}
    return sorted(kept, key=kept.__getitem__, reverse=True)[:k]


@pytest.fixture(scope="module")
def live(place):
    with running(place / "models") as server:
        yield server


@pytest.mark.parametrize(("where", "pairs", "fulfils"), WHERE)
def test_the_commands_filter(place, scores, where, pairs, fulfils, tmp_path, capsys):
    models = ["--models", str(place / "models")]
    for index in ("exact", "scann"):
        flags = ["--history", "i3,i8", "--where", *pairs, "--k", "20", "--index", index, "--json"]
        assert twotower.main(["query", *models, *flags]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        wanted = best(scores(history=["i3", "i8"]), fulfils)
        assert [result["candidate_id"] for result in results] == wanted
        assert wanted
    people = {
        "query_id": ["nobody 1", "u5", "nobody 2"],
        "history": [["i3", "i8", None], None, ["never\n\0"]],
    }
    pq.write_table(pa.table(people), tmp_path / "people.parquet")
    for index in ("exact", "scann"):
        out = ["--output", str(tmp_path / index), "--k", "20", "--index", index, "--where", *pairs]
        described = ["--queries", str(tmp_path / "people.parquet")]
        assert twotower.main(["recommend", *models, *described, *out]) == 0
        [file] = (tmp_path / index).glob("*.parquet")
        rows = {row["query_id"]: row["candidate_ids"] for row in pq.read_table(file).to_pylist()}
        assert list(rows) == people["query_id"]
        assert rows["nobody 1"] == best(scores(history=["i3", "i8"]), fulfils, ["i3", "i8"])
        seen = set(Retriever.load(place / "models").history("u5"))
        assert rows["u5"] == best(scores(query_id="u5"), fulfils, seen)
        assert rows["nobody 2"] == []
    run = ["--data", str(place / "prepared"), "--run", str(place / "run"), "--keep_seen"]
    out = ["--output", str(tmp_path / "all"), "--k", "20", "--where", *pairs]
    assert twotower.main(["recommend", *models, *run, *out]) == 0
    [file] = (tmp_path / "all").glob("*.parquet")
    for row in pq.read_table(file).to_pylist()[:5]:
        assert row["candidate_ids"] == best(scores(query_id=row["query_id"]), fulfils)


@pytest.mark.parametrize(("where", "pairs", "fulfils"), WHERE)
def test_the_service_filters(live, scores, where, pairs, fulfils):
    body = {"queries": [{"history": ["i3", "i8"]}, {"query_id": "u5"}], "where": where, "k": 25}
    for extra in ({}, {"index": "exact"}, {"exclude": ["i1", "i2"]}):
        answer = live.post("/v1/models/twotower:retrieve", body | extra).json["results"]
        for query, result in zip(body["queries"], answer, strict=True):
            barred = extra.get("exclude", ())
            ids = [candidate["id"] for candidate in result["candidates"]]
            assert ids == best(scores(**query), fulfils, barred, 25)
