import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import twotower
from pipeline.contract import bundle as contract
from pipeline.contract import schema
from pipeline.contract.files import describe_files
from serving.publish.publish import publish
from serving.retrieval.retriever import Retriever
from serving.version.versions import find_version


def run_python(code, *arguments):
    """A fresh process in which only the code's own imports have happened."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def visible(home):
    return sorted(path.name for path in home.iterdir() if not path.name.startswith("."))


@pytest.fixture(scope="module")
def scann_model(clustered):
    import_scann_operations()
    return tf.saved_model.load(str(clustered.version / "assets.extra/scann"))


def test_the_exact_signature_is_brute_force(small):
    model = tf.saved_model.load(str(small.version))
    top = model.signatures["serving_default"](query_id=tf.constant(small.sample.query_ids))
    for query in range(len(small.sample.queries)):
        expected = small.sample.best_ids(query)[:40]
        assert [raw.decode() for raw in top["candidate_id"][query].numpy()] == expected
    rows = [small.sample.best(query)[:40] for query in range(20)]
    scores = np.take_along_axis(small.sample.queries @ small.sample.vectors.T, np.array(rows), 1)
    np.testing.assert_allclose(top["score"], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["", "assets.extra/scann"])
def test_an_unknown_query_gives_empty_ids_beside_known_ones(small, model):
    import_scann_operations()
    signatures = tf.saved_model.load(str(small.version / model)).signatures
    ids = tf.constant(["nobody", small.sample.query_ids[0]])
    top = signatures["serving_default"](query_id=ids)
    assert set(top["candidate_id"][0].numpy()) == {b""}
    assert not top["score"][0].numpy().any()
    assert top["candidate_id"][1, 0].numpy().decode() == small.sample.best_ids(0)[0]
    embedded = signatures["query_embedding"](query_id=ids)
    assert embedded["known"].numpy().tolist() == [False, True]
    np.testing.assert_array_equal(embedded["embedding"][1], small.sample.queries[0])


def test_scann_finds_nearly_what_brute_force_finds(clustered, scann_model):
    sample, model = clustered.sample, scann_model
    top = model.signatures["serving_default"](query_id=tf.constant(sample.query_ids))
    found = top["candidate_id"].numpy().tolist()
    hits = [
        len({raw.decode() for raw in found[query]} & set(sample.best_ids(query)[:20]))
        for query in range(len(sample.queries))
    ]
    assert np.mean(hits) / 20 >= 0.9


def test_leaves_to_search_is_an_input(clustered, scann_model):
    search = scann_model.signatures["embedding_search"]
    queries = tf.constant(clustered.sample.queries)
    exact = [set(clustered.sample.best(query)[:20]) for query in range(len(queries))]

    def recall(leaves):
        found = search(embedding=queries, leaves_to_search=tf.constant(leaves))["candidate_row"]
        assert found.shape == (len(queries), 20)
        return np.mean([len(set(a) & b) / 20 for a, b in zip(found.numpy(), exact, strict=True)])

    report = json.loads((clustered.version / "ann_report.json").read_text())
    assert report["scann"]["num_leaves"] == 63  # the square root of 4,000
    assert recall(1) < recall(8) <= recall(63)
    assert recall(63) > 0.94
    assert recall(0) == recall(report["scann"]["leaves_to_search"])


def test_releasing_one_loaded_scann_model_leaves_another_alone(clustered, scann_model):
    first = tf.saved_model.load(str(clustered.version / "assets.extra/scann"))
    second = scann_model
    query = tf.constant(clustered.sample.query_ids[:3])
    before = second.signatures["serving_default"](query_id=query)["candidate_id"].numpy()
    first.signatures["serving_default"](query_id=query)
    first.release()
    for model in (second, first):  # a released searcher is rebuilt by the next search
        after = model.signatures["serving_default"](query_id=query)["candidate_id"].numpy()
        np.testing.assert_array_equal(before, after)


def test_the_card_and_the_manifest_describe_the_version(small):
    card = (small.version / "model_card.md").read_text()
    parts = ["test log", "method | ssl_pop", "train_rows | 1234", "300 candidates"]
    parts += ["of the exact top 40, promised 0.95", "| Metric | test |"]
    for part in [*parts, "recall@20 | 0.125", "users | 20"]:
        assert part in card
    manifest = schema.read_manifest(small.version, "version")
    assert manifest.counts == {"candidates": 300, "dimensions": 8, "queries": 20}
    assert manifest.configuration["k"] == 40
    missing = set(describe_files(small.version)) - set(manifest.files)
    assert missing == {"manifest.json", "model_card.md"}  # people may annotate the card


def test_versions_are_numbered_on_and_never_replaced(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.publish.publish.write_version", lambda path, *_: path.mkdir())
    home = tmp_path / "models" / "shop"
    made = [publish(bundle, home.parent, name="shop") for _ in range(2)]
    assert made == [home / "1", home / "2"]
    assert publish(bundle, home.parent, name="shop", version=9) == home / "9"
    with pytest.raises(ValueError, match=r"version 2 of .* exists"):
        publish(bundle, home.parent, name="shop", version=2)
    assert publish(bundle, home.parent, name="shop") == home / "10"
    assert sorted(path.name for path in home.iterdir()) == ["1", "10", "2", "9"]


@pytest.mark.long
def test_two_publishers_at_once_make_two_versions(bundle, tmp_path):
    def work():
        publish(bundle, tmp_path, scann=False)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert visible(tmp_path / "twotower") == ["1", "2"]
    for version in (1, 2):
        assert len(Retriever.load(tmp_path, version=version).top_k(["query 0"], 5)[0].scores) == 5


KILLED = """
import os, signal, sys
from serving.publish import model_card, publish
model_card.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
publish.publish(sys.argv[1], sys.argv[2], scann=False)
"""


@pytest.mark.long
def test_a_killed_publish_leaves_no_version_and_the_next_one_cleans_up(bundle, tmp_path):
    models = tmp_path / "models"
    assert run_python(KILLED, bundle, models).returncode == -9
    [leftover] = (models / "twotower").glob(".partial*")
    assert (leftover / "saved_model.pb").exists()
    assert visible(models / "twotower") == []
    with pytest.raises(ValueError, match="holds no model version"):
        find_version(models, "twotower")
    assert publish(bundle, models, scann=False).name == "1"
    assert not leftover.exists()


def test_a_failure_on_the_way_leaves_nothing(bundle, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("serving.publish.publish.model_card.write", fail)
    with pytest.raises(OSError, match="no space left"):
        publish(bundle, tmp_path / "models", scann=False)
    assert [path.name for path in (tmp_path / "models" / "twotower").iterdir()] == []


@pytest.mark.long
@pytest.mark.parametrize("num_candidates", [1, 5, 2000])
def test_any_size_of_corpus_gets_a_scann_index(
    num_candidates, tmp_path, write_bundle, small_sample
):
    sample = small_sample(num_candidates=max(num_candidates, 100), dimensions=3)
    sample = type(sample)(sample.vectors[:num_candidates], sample.queries)
    k = min(9, num_candidates)
    publish(write_bundle(tmp_path / "bundle", sample), tmp_path / "models", k=k)
    retriever = Retriever.load(tmp_path / "models")
    results, size = retriever.top_k(sample.query_ids, 10, index="scann"), min(10, num_candidates)
    assert {len(set(result.candidate_ids)) for result in results} == {size}
    hits = [
        len(set(result.candidate_ids) & set(sample.best_ids(query)[:size]))
        for query, result in enumerate(results)
    ]
    assert np.mean(hits) >= 0.9 * size


def test_without_scann_a_version_is_exact_and_says_so(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    version = publish(bundle, tmp_path)
    report = json.loads((version / "ann_report.json").read_text())
    assert report["scann"] is None
    assert "could not be imported" in report["scann_is_absent_because"]
    assert "There is no ScaNN index" in (version / "model_card.md").read_text()
    with pytest.raises(ValueError, match="published without one"):
        Retriever.load(tmp_path).top_k(["query 0"], 3, index="scann")


def test_a_bundle_of_another_framework_is_asked_by_embedding(by_embedding):
    sample = by_embedding.sample
    report = json.loads((by_embedding.version / "ann_report.json").read_text())
    halves = {"choosing": 150, "judging": 150}
    assert report["queries"] == {"source": "candidate_vectors", "count": 300, **halves}
    for path in (by_embedding.version, by_embedding.version / "assets.extra/scann"):
        signatures = tf.saved_model.load(str(path)).signatures
        top = signatures["serving_default"](embedding=tf.constant(sample.queries))
        assert [raw.decode() for raw in top["candidate_id"][4].numpy()] == sample.best_ids(4)[:10]
        embedded = signatures["query_embedding"](embedding=tf.constant(sample.queries))
        assert embedded["known"].numpy().all()


def test_more_leaves_than_candidates_are_refused(bundle, tmp_path):
    with pytest.raises(ValueError, match=r"scann_leaves must be at most .* 30, got 31"):
        publish(bundle, tmp_path, scann_leaves=31)


def test_arrays_become_a_version_by_one_command(small, tmp_path, capsys):
    sample = small.sample
    contract.write_bundle(
        tmp_path / "bundle",
        sample.vectors.astype(np.float64),
        sample.candidate_ids,
        source="another trainer",
        query_model=small.bundle / schema.BUNDLE_QUERY_MODEL,
        sample_queries=sample.queries,
        query_ids=sample.query_ids,
        seen=sample.seen,
        counts=np.arange(300),
    )
    models = tmp_path / "models"
    flags = [
        "--bundle",
        str(tmp_path / "bundle"),
        "--models",
        str(models),
        "--k",
        "40",
        "--noscann",
    ]
    assert twotower.main(["export", *flags, "--target_recall", "0.9", "--at", "10"]) == 0
    assert f"version: {models / 'twotower' / '1'}" in capsys.readouterr().out
    report = json.loads((models / "twotower/1/ann_report.json").read_text())
    assert (report["at"], report["target_recall"], report["queries"]["count"]) == (10, 0.9, 20)
    retriever = Retriever.load(models)
    for query, result in enumerate(retriever.top_k(sample.query_ids, 40, exclude_seen=True)):
        assert result.candidate_ids == sample.best_ids(query, sample.seen[query])[:40]
    [popular] = retriever.top_k(["nobody"], 2, unknown_queries="popular")
    assert popular.scores == [299, 298]


def test_a_command_without_bundle_or_run_says_what_it_needs(tmp_path, capsys):
    assert twotower.main(["export", "--models", str(tmp_path)]) == 2
    assert "data must be a directory, got ''" in capsys.readouterr().err


def test_a_query_model_of_another_size_is_refused(bundle, tmp_path, sign_bundle):
    vectors = bundle / schema.BUNDLE_VECTORS
    np.save(vectors, np.load(vectors)[:, :4].copy())
    (bundle / schema.BUNDLE_SAMPLE_QUERIES).unlink()
    sign_bundle(bundle)
    with pytest.raises(ValueError, match=r"must give embeddings float32 \[B, 4\]"):
        publish(bundle, tmp_path / "models", scann=False)
    assert not list((tmp_path / "models" / "twotower").glob("[!.]*"))
    assert not list((tmp_path / "models" / "twotower").glob(".partial*"))


def test_a_query_model_that_is_none_is_refused(bundle, tmp_path, sign_bundle):
    shutil.rmtree(bundle / schema.BUNDLE_QUERY_MODEL)
    (bundle / schema.BUNDLE_QUERY_MODEL).mkdir()
    sign_bundle(bundle)
    with pytest.raises(ValueError, match="must be a SavedModel"):
        publish(bundle, tmp_path / "models", scann=False)


def import_scann_operations():
    """What a caller without this project does before it loads the ScaNN model."""
    import scann  # noqa: F401
