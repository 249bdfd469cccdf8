"""Candidates that come and go: a delta, in the graph, in the retriever, and built anew."""

import json
import multiprocessing
import re
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import twotower
from pipeline.contract import schema
from pipeline.contract.attributes import as_attributes
from pipeline.contract.bundle import write_bundle as write_vectors
from pipeline.contract.files import check_files
from serving.publish.items import change_items
from serving.publish.publish import publish
from serving.publish.settings import ItemsConfig
from serving.retrieval.requests import RetrieveRequest
from serving.retrieval.retriever import Retriever
from serving.runtime.loaded_version import LoadedVersion
from serving.version.versions import find_version, look_at

K = 40


class Encoder(tf.Module):
    """Embeds a candidate by a colour, its sizes and a weight."""

    COLOURS = ("red", "blue")

    def __init__(self, dimensions):
        super().__init__()
        self.directions = tf.Variable(np.eye(3, dimensions, dtype=np.float32))

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="candidate_id"),
            tf.TensorSpec([None], tf.string, name="colour"),
            tf.TensorSpec([None, None], tf.string, name="sizes_"),
            tf.TensorSpec([None], tf.float64, name="weight"),
        ]
    )
    def request(self, candidate_id, colour, sizes_, weight):
        weight_or = tf.where(tf.math.is_nan(weight), 0.5 * tf.ones_like(weight), weight)
        values = [
            tf.cast(colour == "red", tf.float32),
            tf.reduce_sum(tf.cast(sizes_ != "", tf.float32), axis=1),
            tf.cast(weight_or, tf.float32),
        ]
        known = (colour != "") | tf.reduce_any(sizes_ != "", axis=1) | ~tf.math.is_nan(weight)
        skipped = tf.zeros(tf.shape(colour), tf.int32)
        embedding = tf.stack(values, axis=1) @ self.directions
        return {"embedding": embedding, "known": known, "unknown_history": skipped}


class Shop:
    """A model whose candidates change, and a dictionary that says what should be found."""

    def __init__(self, root, sample, bundle, **options):
        self.models, self.sample, self.root = root / "models", sample, root
        self.version = publish(bundle, self.models, k=K, **options)
        self.corpus = dict(zip(sample.candidate_ids, sample.vectors, strict=True))

    def change(self, add=None, remove=(), vectors=(), **options):
        """Calls the command; `vectors` are what the rows of `add` are embedded as."""
        files = {}
        if add is not None:
            files["add"] = str(self.root / "new.parquet")
            pq.write_table(pa.table(add), files["add"])
        if len(remove):
            files["remove"] = str(self.root / "old.parquet")
            pq.write_table(pa.table({"candidate_id": list(remove)}), files["remove"])
        change_items(ItemsConfig(models=str(self.models), **files, **options))
        self.corpus = {name: v for name, v in self.corpus.items() if name not in set(remove)}
        self.corpus |= dict(zip((add or {}).get("candidate_id", ()), vectors, strict=True))

    def best(self, query, barred=()):
        scores = {
            name: float(vector.astype(np.float64) @ self.sample.queries[query].astype(np.float64))
            for name, vector in self.corpus.items()
            if name not in barred
        }
        return sorted(scores, key=scores.__getitem__, reverse=True)


def replaced_and_added(sample):
    """Ids, the first two of them of the sample, their columns, and what they are embedded as."""
    ids = [sample.candidate_ids[7], sample.best_ids(1)[0], *[f"nëw\n{row}\0" for row in range(10)]]
    columns = {
        "candidate_id": ids,
        "colour": ["red", "blue", None] * 4,
        "sizes?": [["s", "m"], None, [], ["l"]] * 3,
        "weight": pa.array(np.where(np.arange(12) % 4 == 3, None, np.arange(12) * 0.7)),
        "title": ["not read"] * 12,
    }
    vectors = np.zeros((12, sample.vectors.shape[1]), np.float32)
    vectors[:, 0] = [1, 0, 0] * 4
    vectors[:, 1] = [2, 0, 0, 1] * 3
    vectors[:, 2] = np.where(np.arange(12) % 4 == 3, 0.5, np.arange(12) * 0.7)
    return columns, vectors


@pytest.fixture(scope="module")
def shop_bundle(tmp_path_factory, small_sample, write_bundle, sign_bundle):
    sample = small_sample()
    bundle = write_bundle(tmp_path_factory.mktemp("shop") / "bundle", sample, described=True)
    model = Encoder(sample.vectors.shape[1])
    place = str(bundle / schema.BUNDLE_CANDIDATE_MODEL)
    tf.saved_model.save(model, place, signatures={"request_embedding": model.request})
    sign_bundle(bundle)
    return sample, bundle


def changed_twice(root, sample, bundle, **options):
    """Version 2 has replaced, added and removed; version 3 takes some of that back."""
    shop = Shop(root, sample, bundle, **options)
    columns, vectors = replaced_and_added(sample)
    best = [name for name in sample.best_ids(0)[:6] if name not in columns["candidate_id"]]
    shop.change(columns, [*best, "never there"], vectors, max_share=0.1)
    back = 9 * sample.queries[:2]
    again = {"candidate_id": [best[0], "nëw\n3\0"], "embedding": back.tolist()}
    shop.change(again, ["nëw\n4\0", sample.candidate_ids[7]], back, max_share=0.1)
    return shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory, shop_bundle):
    return changed_twice(tmp_path_factory.mktemp("models"), *shop_bundle)


@pytest.fixture(scope="module")
def live(shop):
    return Retriever.load(shop.models)


@pytest.mark.parametrize("index", ["exact", "scann"])
@pytest.mark.parametrize("k", [1, 10, K, K + 1, 1000])
def test_the_changed_corpus_is_searched(live, shop, index, k):
    assert live.num_candidates == len(shop.corpus)
    for query, result in enumerate(live.top_k(shop.sample.query_ids, k, index=index)):
        best = shop.best(query)[:k]
        assert result.candidate_ids == best
        wanted = [shop.corpus[name] @ shop.sample.queries[query] for name in best]
        np.testing.assert_allclose(result.scores, wanted, rtol=1e-4, atol=1e-5)


def test_an_index_gives_more_only_where_removed_ones_could_leave_too_few(live, shop, monkeypatch):
    index, widths = live.index("scann"), []
    wider = type(index).search_wider
    monkeypatch.setattr(
        type(index), "search_wider", lambda self, e, n: (widths.append(n), wider(self, e, n))[1]
    )
    assert 0 < index.spare < K
    live.top_k(shop.sample.query_ids[:2], K - index.spare, index="scann")
    assert not widths
    live.top_k(shop.sample.query_ids[:2], K - index.spare + 1, index="scann")
    assert widths == [K + 1]


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_filters_hold_for_added_replaced_and_removed_ones(live, shop, index):
    ids, sample = shop.sample.query_ids, shop.sample
    removed, replaced = sample.best_ids(0)[3], sample.best_ids(1)[0]
    exclude = [*shop.best(0)[:3], removed, "nobody"]
    for query, result in enumerate(live.top_k(ids, 9, exclude=exclude, index=index)):
        assert result.candidate_ids == shop.best(query, exclude)[:9]
    allow = ["nëw\n2\0", removed, replaced, *sample.candidate_ids[20:25]]
    for query, result in enumerate(live.top_k(ids, 9, allow=allow, index=index)):
        wanted = [name for name in shop.best(query) if name in allow]
        assert result.candidate_ids == wanted
    for query, result in enumerate(live.top_k(ids, 30, exclude_seen=True, index=index)):
        barred = {sample.candidate_ids[row] for row in sample.seen[query]}
        assert result.candidate_ids == shop.best(query, barred)[:30]
    assert replaced in {sample.candidate_ids[row] for row in sample.seen[1]}
    [result] = live.top_k([ids[4]], 200, min_score=1.5, index=index)
    wanted = [name for name in shop.best(4) if shop.corpus[name] @ sample.queries[4] >= 1.5]
    assert result.candidate_ids == wanted


@pytest.mark.parametrize("few_chosen", [0, 20_000])
@pytest.mark.parametrize("index", ["exact", "scann"])
def test_added_candidates_are_chosen_by_their_columns(live, shop, index, few_chosen, monkeypatch):
    monkeypatch.setattr("serving.retrieval.search._FEW_CHOSEN", few_chosen)
    sample = shop.sample
    colour = {
        i: row["colour"] for i, row in zip(sample.candidate_ids, sample.attributes, strict=True)
    }
    columns, _ = replaced_and_added(sample)
    colour |= dict(zip(columns["candidate_id"], columns["colour"], strict=True))
    best = [name for name in sample.best_ids(0)[:6] if name not in columns["candidate_id"]]
    colour |= {best[0]: None, "nëw\n3\0": None}  # added again, with an embedding alone
    where = {"colour": ["blue"]}
    for query, result in enumerate(live.top_k(sample.query_ids, 30, where=where, index=index)):
        wanted = [name for name in shop.best(query) if colour[name] == "blue"]
        assert result.candidate_ids == wanted[:30]
    [result] = live.top_k([sample.query_ids[0]], 1000, where={"weight": {"min": 6.3, "max": 7.7}})
    assert "nëw\n7\0" in result.candidate_ids  # 9 · 0.7
    assert "nëw\n9\0" not in result.candidate_ids  # without a weight


def test_columns_of_another_kind_are_refused(tmp_path, shop_bundle):
    shop = Shop(tmp_path, *shop_bundle, scann=False)
    add = {"candidate_id": ["x"], "weight": ["heavy"], "embedding": [[1.0] * 8]}
    with pytest.raises(ValueError, match="attribute 'weight' must hold numbers"):
        shop.change(add, (), [[1.0] * 8])


def test_popular_ones_are_of_the_changed_corpus(live, shop):
    [result] = live.top_k(["nobody"], 1000, unknown_queries="popular")
    count = np.bincount(np.concatenate(shop.sample.seen), minlength=300)
    by_name = dict(zip(shop.sample.candidate_ids, count.tolist(), strict=True))
    wanted = {name: by_name.get(name, 0) for name in shop.corpus}
    got = dict(zip(result.candidate_ids, result.scores, strict=True))
    assert got == wanted
    assert result.scores == sorted(result.scores, reverse=True)


def as_lists(outputs, size):
    ids = [[raw.decode() for raw in row if raw] for row in outputs["candidate_id"]]
    assert outputs["candidate_id"].shape == outputs["score"].shape == (size, K)
    return ids


def inputs_of(name, sample):
    """Ids of known queries, and one that nobody knows."""
    ids = np.array([*sample.query_ids, "nobody"], object)
    if name == "serving_default":
        return {"query_id": ids}
    empty = np.full((len(ids), 1), "", object)
    missing = {"history": empty, "tags": empty, "town": empty[:, 0]}
    return {"query_id": ids, "age": np.full(len(ids), np.nan), **missing}


@pytest.mark.parametrize("name", ["serving_default", "retrieve"])
@pytest.mark.parametrize("loader", ["tf2", "session"])
def test_the_graph_answers_for_the_changed_corpus(shop, name, loader):
    path, inputs = str(shop.models / "twotower/3"), inputs_of(name, shop.sample)
    if loader == "tf2":
        model = tf.saved_model.load(path)
        outputs = model.signatures[name](**{key: tf.constant(v) for key, v in inputs.items()})
        outputs = {key: value.numpy() for key, value in outputs.items()}
    else:
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
            signature = loaded.signature_def[name]
            feed = {signature.inputs[key].name: value for key, value in inputs.items()}
            fetch = {key: value.name for key, value in signature.outputs.items()}
            outputs = session.run(fetch, feed)
    wanted = [shop.best(query)[:K] for query in range(len(shop.sample.queries))]
    assert as_lists(outputs, len(wanted) + 1) == [*wanted, []]


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("name", ["serving_default", "retrieve"])
def test_versions_share_a_base_and_answer_each_for_itself(shop, shop_bundle, name, first):
    sample, _ = shop_bundle
    home, loaded = shop.models / "twotower", {}
    for number in (first, 4 - first):
        loaded[number] = LoadedVersion(look_at(number, home / str(number)))
        loaded[number].warm_up(8)
    retrievers = {number: loaded[number].retriever for number in loaded}
    assert retrievers[1].index("exact").model is retrievers[3].index("exact").model
    assert retrievers[4 - first].joins
    for number, best in ((1, sample.best_ids), (3, shop.best)):
        inputs = loaded[number].fit(name, inputs_of(name, sample))
        outputs = loaded[number].run(name, inputs)
        ids = loaded[number].ids(name)["candidate_id"]
        lists = [json.loads(row) for row in ids.json_lists(outputs["candidate_id"])]
        assert [list(filter(None, row)) for row in lists] == [
            *[best(query)[:K] for query in range(len(sample.queries))],
            [],
        ]
    loaded[first].close()
    [result] = retrievers[4 - first].top_k([sample.query_ids[3]], 3)
    best = shop.best if first == 1 else sample.best_ids
    assert result.candidate_ids == best(3)[:3]
    loaded[4 - first].close()


def test_all_but_the_delta_is_linked_and_described(shop):
    home = shop.models / "twotower"
    version = find_version(shop.models, "twotower", 3)
    check_files(version.path, version.manifest.files, content=True)
    assert version.manifest.counts["candidates"] == len(shop.corpus)
    links = [
        name
        for name in version.manifest.files
        if (home / "1" / name).exists() and (home / "1" / name).samefile(version.path / name)
    ]
    others = set(version.manifest.files) - set(links)
    large = [name for name in others if not name.startswith("assets.extra/delta/")]
    assert sorted(large) == ["variables/variables.data-00001-of-00002", "variables/variables.index"]
    assert not [path for path in home.iterdir() if path.name.startswith(".partial")]


@pytest.mark.long
def test_a_large_delta_is_built_anew(tmp_path, shop_bundle, caplog):
    shop = changed_twice(tmp_path, *shop_bundle, scann=False)
    sample = shop.sample
    with caplog.at_level("INFO"):
        shop.change(remove=["nëw\n5\0"], max_share=0.01)
    assert "building anew" in caplog.text
    version = find_version(shop.models, "twotower")
    assert (version.number, version.manifest.counts["candidates"]) == (4, len(shop.corpus))
    assert "delta" not in version.manifest.details
    card = (version.path / "model_card.md").read_text()
    assert f"best of {len(shop.corpus)} candidates" in card
    [(added, excluded)] = re.findall(r"at last (\d+) added, (\d+) removed or replaced by", card)
    assert 300 + int(added) - int(excluded) == len(shop.corpus)
    assert "| recall@20 | 0.125 |" in card  # what the bundle said of its training
    assert "| method | ssl_pop |" in card
    report = json.loads((version.path / "ann_report.json").read_text())
    assert (report["candidates"], report["queries"]["source"]) == (
        len(shop.corpus),
        "sample_queries",
    )
    retriever = Retriever.load(shop.models)
    assert not len(retriever.corpus.added)
    assert not len(retriever.corpus.removed)
    for query, result in enumerate(retriever.top_k(sample.query_ids, 30, exclude_seen=True)):
        barred = {sample.candidate_ids[row] for row in sample.seen[query]}
        assert result.candidate_ids == shop.best(query, barred)[:30]
    [result] = retriever.top_k(queries=[{"town": "Bern"}], k=1)
    of_town = sample.vectors[1]
    assert result.candidate_ids == [max(shop.corpus, key=lambda name: shop.corpus[name] @ of_town)]
    size = (version.path / "variables/variables.data-00000-of-00002").stat().st_size
    first = shop.version / "variables/variables.data-00000-of-00002"
    assert size < 1.1 * first.stat().st_size
    columns, vectors = replaced_and_added(sample)
    columns["item"] = columns.pop("candidate_id")
    shop.change(columns, id_column="item", max_share=0.1)
    shop.corpus |= dict(zip(columns["item"], vectors, strict=True))
    results = Retriever.load(shop.models).top_k(sample.query_ids, 30)
    assert [r.candidate_ids for r in results] == [shop.best(q)[:30] for q in range(20)]


@pytest.mark.long
@pytest.mark.parametrize("number", [20, 270])  # of 300; fewer than K are left of the latter
def test_many_are_removed_and_none_comes(tmp_path, shop_bundle, number):
    shop = Shop(tmp_path, *shop_bundle, scann=False)
    shop.change(remove=shop.sample.best_ids(0)[:number])
    results = Retriever.load(shop.models).top_k(shop.sample.query_ids, 30)
    assert [r.candidate_ids for r in results] == [shop.best(q)[:30] for q in range(20)]


@pytest.mark.parametrize(
    ("add", "remove", "message"),
    [
        (None, None, "add must be a file where --remove is not given"),
        ({"candidate_id": ["a"], "colour": ["red"]}, ["a"], "'a' is to be added and to be removed"),
        ({"candidate_id": ["a", "a"], "colour": ["red"] * 2}, None, "got 'a' twice"),
        ({"candidate_id": ["a", None], "colour": ["red"] * 2}, None, "an id in every row"),
        ({"item": ["a"]}, None, "a column 'candidate_id'"),
        ({"candidate_id": ["a", "b"], "colour": ["red", None]}, None, "others for candidate b"),
        ({"candidate_id": ["a"], "weight": ["heavy"]}, None, "'weight' must hold numbers"),
        ({"candidate_id": ["a"], "sizes_": ["m"]}, None, "'sizes_' must hold lists"),
        ({"candidate_id": ["a"], "embedding": [[1.0]]}, None, "must be 8 numbers in each row"),
        ({"candidate_id": ["a"], "embedding": [[0.0] * 8]}, None, "others for candidate a"),
        ({"candidate_id": ["a"], "embedding": [[np.nan] * 8]}, None, "others for candidate a"),
        ({"candidate_id": ["a"], "embedding": ["x"]}, None, "must be 8 numbers in each row"),
    ],
)
def test_a_table_that_cannot_be_used_leaves_nothing(shop, capsys, tmp_path, add, remove, message):
    flags = ["items", "--models", str(shop.models)]
    if add is not None:
        pq.write_table(pa.table(add), tmp_path / "add.parquet")
        flags += ["--add", str(tmp_path / "add.parquet")]
    if remove is not None:
        pq.write_table(pa.table({"candidate_id": remove}), tmp_path / "remove.parquet")
        flags += ["--remove", str(tmp_path / "remove.parquet")]
    before = sorted((shop.models / "twotower").iterdir())
    assert twotower.main(flags) != 0
    assert message in capsys.readouterr().err
    assert sorted((shop.models / "twotower").iterdir()) == before


def test_an_id_tower_asks_for_embeddings_and_everything_cannot_go(without_scann, tmp_path):
    pq.write_table(pa.table({"candidate_id": ["a"]}), tmp_path / "a.parquet")
    config = ItemsConfig(models=str(without_scann.models), add=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"knows ids alone: give .* a column 'embedding'"):
        change_items(config)
    everything = pa.table({"candidate_id": without_scann.sample.candidate_ids})
    pq.write_table(everything, tmp_path / "all.parquet")
    config = ItemsConfig(models=str(without_scann.models), remove=str(tmp_path / "all.parquet"))
    with pytest.raises(ValueError, match="nothing would be left"):
        change_items(config)
    with pytest.raises(ValueError, match="holds no model version"):
        change_items(ItemsConfig(models=str(tmp_path), remove=str(tmp_path / "all.parquet")))
    assert not (tmp_path / "twotower").exists()


@pytest.mark.long
def test_the_next_export_names_what_it_lacks(tmp_path, shop_bundle, caplog):
    shop = changed_twice(tmp_path, *shop_bundle, scann=False)
    publish(shop_bundle[1], shop.models, k=K, scann=False)
    added = [name for name in shop.corpus if name.startswith("nëw")]
    assert f"{len(added)} candidates that were added" in caplog.text
    again = str(shop.models / "twotower/3/assets.extra/delta/added.parquet")
    assert f"--add {again}" in caplog.text
    rows = pq.read_table(again)
    assert set(added) <= set(rows["candidate_id"].to_pylist())
    assert set(rows["title"].to_pylist()) == {"not read", None}


@pytest.mark.long
def test_the_next_export_names_what_was_built_in(tmp_path, shop_bundle, caplog):
    shop = changed_twice(tmp_path, *shop_bundle, scann=False)
    shop.change(remove=["nëw\n5\0"], max_share=0.0)
    vector = [[1.0] * 8]
    shop.change(
        {"candidate_id": ["nëw\n6\0", "late"], "embedding": vector * 2},
        (),
        vector * 2,
        max_share=0.0,
    )
    gone = ["nëw\n7\0"]
    shop.change({"candidate_id": ["later"], "embedding": vector}, gone, vector, max_share=0.1)
    publish(shop_bundle[1], shop.models, k=K, scann=False)
    again = shop.models / "twotower/6/assets.extra/added_before.parquet"
    assert f"--add {again}" in caplog.text
    assert "'later'" in caplog.text
    ids = pq.read_table(again)["candidate_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    assert {"late", "nëw\n6\0", "nëw\n7\0"} <= set(ids)
    assert not {"nëw\n5\0", "later", "nëw\n4\0"} & set(ids)


@pytest.mark.long
@pytest.mark.parametrize("max_share", [1.0, 0.0])
def test_killed_at_any_moment_the_old_or_the_new_version_answers(tmp_path, shop_bundle, max_share):
    sample, bundle = shop_bundle
    shop = Shop(tmp_path, sample, bundle, scann=False)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["serving.publish.items"])
    config = ItemsConfig(str(shop.models), add=str(tmp_path / "new.parquet"), max_share=max_share)
    rng, seconds, ends = np.random.default_rng(0), 0.0, set()
    for moment in range(12):
        vector = (10 + moment) * sample.queries[0]
        table = {"candidate_id": [f"new {moment}"], "embedding": [vector.tolist()]}
        pq.write_table(pa.table(table), config.add)
        process = forks.Process(target=change_items, args=(config,))
        process.start()
        start = time.monotonic()
        if moment > 1:  # the first ones say how long it takes
            time.sleep(rng.uniform(0, 1.1) * seconds)
            process.kill()
        process.join()
        seconds = time.monotonic() - start if moment < 2 else seconds
        retriever = Retriever.load(shop.models)
        [result] = retriever.top_k(["query 0"], K)
        changed = shop.corpus | {f"new {moment}": vector}
        ends.add("old" if result.candidate_ids == shop.best(0)[:K] else "new")
        if result.candidate_ids != shop.best(0)[:K]:
            shop.corpus = changed
            assert result.candidate_ids == shop.best(0)[:K]
        model = tf.saved_model.load(str(retriever.version.path))
        outputs = model.signatures["serving_default"](query_id=tf.constant(["query 0"]))
        assert [raw.decode() for raw in outputs["candidate_id"][0].numpy()] == shop.best(0)[:K]
    assert ends == {"old", "new"}


class Shares(NamedTuple):
    """8,000 candidates around 60 centres with K = 100 and a tree; then 160 removed, 300 added."""

    retriever: Retriever
    vectors: np.ndarray  # of all that ever were there
    column: dict[str, list[str | None]]  # columns of theirs
    queries: np.ndarray
    left: np.ndarray  # bool: which are there now


@pytest.fixture(scope="module", params=["base", "delta"])
def shares(tmp_path_factory, request):
    rng, root = np.random.default_rng(5), tmp_path_factory.mktemp("shares")
    centres = rng.normal(size=(60, 16))
    around = np.concatenate([rng.integers(0, 60, 8300), rng.integers(0, 60, 40)])
    points = (centres[around] + 0.3 * rng.normal(size=(8340, 16))).astype(np.float32)
    vectors, queries = points[:8300], points[8300:]
    even, clump = rng.random(8300), around[:8300]  # over the corpus, and where some queries are
    columns = {}
    for percent in (2, 4, 8):
        columns[f"even {percent}"] = ["x" if e < percent / 100 else None for e in even]
        columns[f"clump {percent}"] = ["x" if c < 0.6 * percent else None for c in clump]
    ids = [f"item {row}" for row in range(8300)]
    table = pa.table(columns)
    bundle = write_vectors(
        root / "bundle",
        vectors[:8000],
        ids[:8000],
        sample_queries=queries,
        attributes=as_attributes(table.slice(0, 8000)),
    )
    publish(bundle, root / "models", k=100, scann_leaves=90)
    left = np.arange(8300) < 8000
    if request.param == "delta":
        new = table.slice(8000).append_column("candidate_id", pa.array(ids[8000:]))
        new = new.append_column("embedding", pa.array(vectors[8000:].tolist()))
        pq.write_table(new, root / "new.parquet")
        left = np.isin(np.arange(8300), rng.choice(8000, 160, replace=False), invert=True)
        gone = [ids[row] for row in np.flatnonzero(~left)]
        pq.write_table(pa.table({"candidate_id": gone}), root / "old.parquet")
        add, remove = (str(root / name) for name in ("new.parquet", "old.parquet"))
        change_items(ItemsConfig(str(root / "models"), add=add, remove=remove))
    retriever = Retriever.load(root / "models")
    yield Shares(retriever, vectors, columns, queries, left)
    retriever.close()


@pytest.mark.long
@pytest.mark.parametrize("few_chosen", [0, 20_000])
@pytest.mark.parametrize("index", ["exact", "scann"])
def test_a_small_share_of_the_corpus_gives_its_k_best(shares, index, few_chosen, monkeypatch):
    monkeypatch.setattr("serving.retrieval.search._FEW_CHOSEN", few_chosen)
    assert index in shares.retriever.usable_indexes
    scores = shares.queries.astype(np.float64) @ shares.vectors.T.astype(np.float64)
    features = {"embedding": shares.queries}
    for name, column in shares.column.items():
        fulfils = shares.left & np.array([value == "x" for value in column])
        assert 0.01 < fulfils.mean() < 0.1
        order = np.argsort(-np.where(fulfils, scores, -np.inf), axis=1)
        for k in (10, 100, 1000):
            request = RetrieveRequest(features=features, k=k, where={name: ["x"]}, index=index)
            results = shares.retriever.answer(request).results
            num_best = min(k, int(fulfils.sum()))
            hits = 0
            for result, best in zip(results, order[:, :num_best], strict=True):
                assert len(set(result.candidate_ids)) == num_best
                hits += len({f"item {row}" for row in best} & set(result.candidate_ids))
            recall = hits / (len(results) * num_best)
            assert recall >= (1 if index == "exact" or few_chosen else 0.95), (name, k, recall)
