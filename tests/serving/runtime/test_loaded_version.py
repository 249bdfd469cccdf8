import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import tensorflow as tf
from saved_models import write_affine

from serving.errors import FailedPrecondition, InvalidRequest
from serving.runtime.loaded_version import LoadedVersion, join, split
from serving.version.versions import find_version, look_at


def load(path, **options):
    first = look_at(int(path.name), path)
    files = look_at(int(path.name), path, first.stamp)
    assert not files.problem
    return LoadedVersion(files, **options)


def names(*ids):
    return np.array([raw.encode() for raw in ids], object)


def ids_of(loaded, outputs):
    ids = loaded.ids("serving_default")["candidate_id"]
    return [json.loads(row) for row in ids.json_lists(outputs["candidate_id"])]


@pytest.fixture(scope="module")
def affine(tmp_path_factory):
    return load(write_affine(tmp_path_factory.mktemp("affine") / "7", 3.0))


@pytest.fixture(scope="module")
def embedding(by_embedding):
    return load(by_embedding.version, index="exact")


def test_a_published_version_answers_as_brute_force_does(small):
    loaded = load(small.version, index="exact")
    assert loaded.number == 1
    assert sorted(loaded.signatures) == ["embedding_search", "query_embedding", "serving_default"]
    outputs = loaded.run("serving_default", {"query_id": names("query 3", "nobody", "query 0")})
    best = small.sample.best_ids
    assert ids_of(loaded, outputs) == [best(3)[:40], [""] * 40, best(0)[:40]]
    assert not loaded.ids("query_embedding")
    assert outputs["score"].dtype == np.float32
    assert not outputs["score"][1].any()


@pytest.mark.parametrize("sample", ["small", "described", "by_embedding"])
def test_a_session_gets_of_every_signature_what_our_clients_get(sample, request):
    published = request.getfixturevalue(sample)
    loaded, queries = load(published.version, index="exact"), published.sample.queries[:3]
    history = [published.sample.candidate_ids[:2], ["?", ""], ["", ""], ["", ""]]
    values = {
        "query_id": names(*published.sample.query_ids[:3], "nobody"),
        "embedding": np.concatenate([queries, np.zeros_like(queries[:1])]),
        "history": np.array([[raw.encode() for raw in row] for row in history], object),
        "tags": np.array([[b"a"], [b""], [b""], [b""]], object),
        "town": names("Ulm", "", "", ""),
        "age": np.array([30.0, np.nan, np.nan, np.nan]),
    }
    inputs = {
        name: {key: values[key] for key in signature.inputs}
        for name, signature in loaded.signatures.items()
    }
    answers = {name: loaded.run(name, arrays) for name, arrays in inputs.items()}
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        path = str(published.version)
        graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
        assert loaded.signatures.keys() == graph.signature_def.keys() - {"__saved_model_init_op"}
        for name, ours in answers.items():
            proto = graph.signature_def[name]
            feed = {proto.inputs[key].name: value for key, value in inputs[name].items()}
            fetch = {key: info.name for key, info in proto.outputs.items()}
            theirs = session.run(fetch, feed)
            if loaded.ids(name):
                texts = [[raw.decode() for raw in row] for row in theirs.pop("candidate_id")]
                assert ids_of(loaded, ours) == texts
                assert ours.pop("candidate_id").dtype == np.int32
            assert theirs.keys() == ours.keys()
            for key, value in theirs.items():
                np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_index_of_serving_default_is_chosen(clustered):
    queries = names(*clustered.sample.query_ids)
    answers = {}
    for index in ("exact", "scann"):
        loaded = load(clustered.version, index=index)
        answers[index] = ids_of(loaded, loaded.run("serving_default", {"query_id": queries}))
        assert list(loaded.signatures["embedding_search"].inputs) == ["embedding"]
        loaded.close()
    version = find_version(clustered.models, "twotower")
    for index, answer in answers.items():
        model = version.load(index)
        expected = model.signatures["serving_default"](query_id=tf.constant(queries))
        texts = [[raw.decode() for raw in row] for row in expected["candidate_id"].numpy()]
        assert answer == texts
    assert answers["exact"] != answers["scann"]


def test_a_version_without_scann_is_searched_exactly(without_scann):
    loaded = load(without_scann.version, index="scann")
    outputs = loaded.run("serving_default", {"query_id": names("query 1")})
    assert outputs["candidate_id"].shape == (1, 5)


def test_another_framework_is_run_as_it_is(affine):
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    outputs = affine.run("serving_default", {"x": x})
    np.testing.assert_array_equal(outputs["y"], x + 3)
    np.testing.assert_array_equal(outputs["amount"], [3, 3, 3])
    assert affine.retriever is None
    total = affine.run("total", {"x": x})["total"]
    assert isinstance(total, np.ndarray)
    assert total.shape == ()
    assert total == 21


def test_requests_are_joined_and_split(affine):
    parts = [np.full((rows, 2), rows, np.float32) for rows in (2, 0, 3)]
    outputs = affine.run_all("serving_default", [{"x": part} for part in parts])
    for part, output in zip(parts, outputs, strict=True):
        np.testing.assert_array_equal(output["y"], part + 3)
        assert output["amount"].shape == part.shape[:1]
    assert outputs[0]["y"].base is outputs[2]["y"].base


def test_what_does_not_go_by_rows_after_all_is_run_alone(affine):
    assert affine.signatures["mean"].by_rows  # its shape does not tell
    parts = [np.full((rows, 2), rows, np.float32) for rows in (2, 3)]
    for _ in range(2):
        outputs = affine.run_all("mean", [{"x": part} for part in parts])
        np.testing.assert_array_equal([output["mean"] for output in outputs], [[2, 2], [3, 3]])


def test_what_the_graph_refuses_is_the_fault_of_the_request(affine):
    with pytest.raises(InvalidRequest, match="The model refuses the inputs"):
        affine.run("positive", {"x": np.full((1, 2), -1, np.float32)})


def test_an_unknown_signature_names_those_there_are(affine):
    with pytest.raises(
        FailedPrecondition, match=r"'other' is not in version 7; there are: mean, positive"
    ):
        affine.signature("other")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_numbers_that_break_an_index_are_refused(embedding, bad):
    queries = np.ones((3, 8), np.float32)
    assert embedding.fit("serving_default", {"embedding": queries})
    queries[1, 2] = bad
    with pytest.raises(InvalidRequest, match="'embedding' must hold finite numbers"):
        embedding.fit("serving_default", {"embedding": queries})


def test_another_framework_may_mean_something_by_nan(affine):
    x = np.full((1, 2), np.nan, np.float32)
    assert np.isnan(
        affine.run("serving_default", affine.fit("serving_default", {"x": x}))["y"]
    ).all()


def test_no_rows_have_no_rows(without_scann, affine):
    loaded = load(without_scann.version)
    outputs = loaded.run("serving_default", {"query_id": np.empty(0, object)})
    assert outputs["candidate_id"].shape == outputs["score"].shape == (0, 5)
    assert affine.run("serving_default", {"x": np.empty((0, 2), np.float32)})["y"].shape == (0, 2)


def test_a_saved_model_of_tensorflow_1_is_served(tmp_path):
    path = tmp_path / "1"
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.int64, [None], "numbers")
        weight = tf.compat.v1.get_variable("weight", initializer=tf.constant(3, tf.int64))
        session.run(weight.initializer)
        tf.compat.v1.saved_model.simple_save(session, str(path), {"x": x}, {"out": x * weight})
    loaded = load(path)
    inputs = loaded.fit("serving_default", {"x": np.array([1, 2])})
    assert loaded.run("serving_default", inputs)["out"].tolist() == [3, 6]
    with pytest.raises(InvalidRequest, match=r"'x' .* must be int64 \[any\], got int32"):
        loaded.fit("serving_default", {"x": np.array([1, 2], np.int32)})


def test_nothing_to_serve_is_an_error(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"))
    with pytest.raises(ValueError, match="has no signature to serve"):
        load(tmp_path / "1")


def tables(model):
    """Handles of the lookup tables of a SavedModel."""
    parts = tf.train.TrackableView(model).descendants()
    handles = [getattr(part, "resource_handle", None) for part in parts]
    return [handle for handle in handles if handle is not None]


def test_lookup_tables_go_with_the_version_and_only_with_it(small, unshared):
    unshared()
    first = load(small.version, index="exact")
    unshared()
    second = load(small.version, index="exact")
    [mine] = tables(first.retriever.index("exact").model)
    [scanns] = tables(first.retriever.index("scann").model)  # loaded when it was first asked for
    first.close()
    for handle in (mine, scanns):
        with pytest.raises(tf.errors.NotFoundError):
            tf.raw_ops.LookupTableSizeV2(table_handle=handle)
    [others] = tables(second.retriever.index("exact").model)
    assert tf.raw_ops.LookupTableSizeV2(table_handle=others) == 20
    outputs = second.run("query_embedding", {"query_id": names("query 3")})
    assert outputs["known"].all()


@pytest.mark.parametrize(
    "damaged",
    [
        "assets.extra/scann/variables/variables.data-00000-of-00001",
        "variables/variables.index",
        "assets.extra/retrieval/candidate_vectors.npy",
    ],
)
def test_what_was_loaded_halfway_is_freed(small, tmp_path, monkeypatch, unshared, damaged):
    """A version that cannot be read whole: the tables of its exact part are destroyed."""
    unshared()
    path = shutil.copytree(small.version, tmp_path / "1")
    files = look_at(1, path)
    if damaged.endswith(".npy"):
        np.save(path / damaged, np.load(path / damaged).astype(np.int32))
    else:
        (path / damaged).write_bytes(bytes((path / damaged).stat().st_size))
    models, read = [], tf.saved_model.load
    monkeypatch.setattr(
        tf.saved_model, "load", lambda *a, **k: models.append(read(*a, **k)) or models[-1]
    )
    with pytest.raises((OSError, TypeError, tf.errors.OpError)):
        LoadedVersion(files, "scann")
    [exact] = models
    [table] = tables(exact)
    with pytest.raises(tf.errors.NotFoundError):
        tf.raw_ops.LookupTableSizeV2(table_handle=table)


def test_a_searcher_that_cannot_be_built_keeps_no_tables(small, unshared):
    unshared()
    loaded = load(small.version, index="scann")
    models = [loaded.retriever.index(index).model for index in ("exact", "scann")]
    models[1].index._state.scann_config.assign([b"of another ScaNN"])
    handles = [handle for model in models for handle in tables(model)]
    with pytest.raises(tf.errors.OpError):
        loaded.retriever.warm_up()
    loaded.close()
    assert len(handles) == 2
    for handle in handles:
        with pytest.raises(tf.errors.NotFoundError):
            tf.raw_ops.LookupTableSizeV2(table_handle=handle)


def test_what_is_closed_is_gone(small, unshared):
    unshared()
    loaded = load(small.version, index="scann")
    loaded.run("serving_default", {"query_id": names("query 1")})
    models = [weakref.ref(loaded.retriever.index(index).model) for index in ("exact", "scann")]
    retriever = weakref.ref(loaded.retriever)
    loaded.close()
    gc.collect()
    assert [gone() for gone in (retriever, *models)] == [None, None, None]


def arrays(rows, start):
    return {
        "number": np.arange(start, start + 2 * rows, dtype=np.float32).reshape(rows, 2),
        "name": np.array([b"%d" % row for row in range(start, start + rows)], object),
    }


def test_what_is_joined_is_split_again_without_a_copy():
    parts = [arrays(3, 0), arrays(0, 7), arrays(2, 20)]
    joined = join(parts)
    assert joined["number"].shape == (5, 2)
    back = split(joined, [3, 0, 2])
    for part, again in zip(parts, back, strict=True):
        for name, array in part.items():
            np.testing.assert_array_equal(again[name], array)
            assert again[name].base is joined[name]


def test_one_part_stays_as_it_is():
    part = arrays(3, 0)
    assert join([part]) is part
