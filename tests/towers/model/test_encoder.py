"""A raw request is embedded as the prepared data of the same id: every column, every history."""

import json
import subprocess
import sys

import attributes
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from attributed import make_users
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.features.encoding import encode
from pipeline.features.values import VALUE_TYPES, values_of
from pipeline.read.cells import Checks
from towers.data.attributes import Features, columns_of
from towers.data.history import History
from towers.data.interactions import open_data
from towers.encoders.feature_tower import FeatureSource
from towers.model.encoder import REQUEST, Encoder, _input_names
from towers.model.two_tower import TwoTower

BUCKETS = 64
TOWER = {
    "tower": "features",
    "query_inputs": ("id", "history", "features"),
    "history": 4,
    "feature_dim": 4,
    "hidden": (8,),
    "text_buckets": BUCKETS,
}
TOWERS = {
    "features": TOWER,
    "attention": TOWER | {"history_pooling": "attention", "normalize": True, "temperature": 0.2},
    "fism": {"tower": "fism", "normalize": True, "temperature": 0.3},
    "svdpp": {"tower": "svdpp", "share_items": False},
}
RTOL = 1e-5
LONG = pytest.mark.long
TEXTS = st.one_of(
    st.sampled_from(["Größe 7 漢字", "äpfel", "Birne", "t1", "t2", "ULM", "İ\n\0", " ", "x" * 300]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
NUMBERS = st.one_of(st.none(), st.floats(-1e9, 1e9), st.sampled_from([0.0, 1e-30, 16.5, 1e9]))
HISTORY = st.lists(
    st.one_of(st.sampled_from(attributes.ITEMS), st.sampled_from(["", "gone", "i1\n", "\0"])),
    max_size=12,
)


@pytest.fixture(scope="module")
def data(attributed):
    return open_data(attributed)


@pytest.fixture(scope="module")
def encoders(data, tmp_path_factory):
    """name, side → the model, its encoder, and the path of the saved one."""

    def make(name, side, made={}):  # noqa: B006 - a cache
        if (name, side) not in made:
            model = TwoTower(data, 6, method="mns", init_stddev=0.5, **TOWERS[name])
            scratch = tmp_path_factory.mktemp("scratch")
            encoder = Encoder(data, model, side, scratch)
            encoder.save(scratch / "saved")
            loaded = tf.saved_model.load(str(scratch / "saved"))
            made[name, side] = model, loaded, scratch / "saved"
        return made[name, side]

    return make


def ask(loaded, rows):
    """Rows of raw values by input → embeddings; None is missing."""
    signature = loaded.signatures[REQUEST]
    specs = signature.structured_input_signature[1]
    inputs = {n: tensor_of(spec, [row.get(n) for row in rows]) for n, spec in specs.items()}
    return signature(**inputs)


def tensor_of(spec, values):
    if spec.dtype == tf.float64:
        return tf.constant([np.nan if v is None else v for v in values], tf.float64)
    if spec.shape.rank == 1:
        return tf.constant([v or "" for v in values], tf.string)
    width = max([len(v or ()) for v in values], default=0)
    padded = [[*(v or ()), *[""] * (width - len(v or ()))] for v in values]
    return tf.constant(padded, tf.string, [len(values), width])


def prepared_rows(features, rows):
    """The rows as a table of features would hold them, by the functions of `twotower prepare`."""
    arrays = {"raw_id": pa.array([str(n) for n in range(len(rows))])}
    for spec in features.specs:
        cells = [row.get(spec.name) for row in rows]
        kind = {"numeric": pa.float64(), "multi": pa.list_(pa.string())}.get(spec.kind, pa.string())
        checks = Checks(len(rows))
        column = values_of(pa.array(cells, kind), spec.kind, spec.name, "|", checks)
        values = pa.chunked_array([column.cast(VALUE_TYPES[spec.kind])])
        vocabulary = features.values.get(spec.name, pa.array([], pa.string()))
        arrays |= encode(values, spec, pa.table({"value": vocabulary}))[0]
    return pa.table(arrays)


def expected_of(model, data, side, rows, histories=None):
    tower = getattr(model, f"{side}_tower")
    features = data.features(side)
    table = prepared_rows(features, rows)
    _, cold = columns_of(Features(features.specs, table, table.slice(0, 0)), BUCKETS)
    last = None
    if histories is not None:
        last = last_codes(data, histories, 4)
    source = FeatureSource(np.zeros(len(rows), np.int64), np.zeros(len(rows), bool), cold, last)
    inputs = source.as_tensors(tf.constant).inputs(tf.range(len(rows)), tower.columns)
    embedded = tower(tower.rows(inputs))
    return embedded / (model.temperature if side == "query" else 1)


def distinct_codes(data, history):
    dense = {name: n for n, name in enumerate(data.candidate_vocabulary.raw_ids.to_pylist())}
    return [dense[name] for name in dict.fromkeys(history) if name in dense]


def last_codes(data, histories, length):
    """By the class that training reads histories with, of a log with each pair once."""
    codes = [distinct_codes(data, history) for history in histories]
    rows = {
        "query_id": np.repeat(np.arange(len(codes)), [len(c) for c in codes]),
        "candidate_id": np.array([c for chosen in codes for c in chosen], np.int64),
    }
    rows["timestamp"] = np.arange(len(rows["query_id"]))
    return History(rows, len(codes), data.num_candidates, length).last


def assert_close(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    scale = np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-6)
    np.testing.assert_array_less(np.abs(got - expected) / scale, RTOL)


ITEM = st.fixed_dictionaries(
    {
        "price": NUMBERS,
        "brand": st.one_of(st.none(), TEXTS),
        "sub": st.one_of(st.none(), st.sampled_from(["0", "1", "2", "3", "99"])),
        "new": st.sampled_from([None, "true", "false"]),
        "tags": st.one_of(st.none(), st.lists(TEXTS, max_size=9)),
        "title": st.one_of(st.none(), TEXTS),
    }
)
USER = st.fixed_dictionaries(
    {"age": NUMBERS, "town": st.one_of(st.none(), st.sampled_from(["Ulm", "Bern"]), TEXTS)}
)
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.long
@SLOW
@given(rows=st.lists(ITEM, min_size=1, max_size=8))
def test_a_new_candidate_is_embedded_as_prepared(data, encoders, rows):
    model, loaded, _ = encoders("features", "candidate")
    answer = ask(loaded, rows)
    shown = answer["known"].numpy()
    expected = expected_of(model, data, "candidate", rows).numpy()
    assert_close(answer["embedding"], np.where(shown[:, None], expected, 0))
    cells = [[*(row.pop("tags") or ()), *row.values()] for row in rows]
    given = np.array([any(v not in (None, "") for v in row) for row in cells])
    np.testing.assert_array_equal(shown, given & (expected != 0).any(axis=1))


@SLOW
@given(rows=st.lists(st.tuples(USER, HISTORY), min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["features", pytest.param("attention", marks=LONG)])
def test_a_new_query_is_embedded_as_prepared(data, encoders, name, rows):
    model, loaded, _ = encoders(name, "query")
    users, histories = zip(*rows, strict=True)
    answer = ask(loaded, [user | {"history": chosen} for user, chosen in rows])
    expected = expected_of(model, data, "query", users, histories).numpy()
    assert_close(answer["embedding"], np.where(answer["known"].numpy()[:, None], expected, 0))
    known = {"", *attributes.ITEMS[:50]}
    unknown = [sum(name not in known for name in history) for history in histories]
    np.testing.assert_array_equal(answer["unknown_history"], unknown)


@SLOW
@given(histories=st.lists(HISTORY, min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["fism", pytest.param("svdpp", marks=LONG)])
def test_a_history_is_summed_as_that_of_training(data, encoders, name, histories):
    model, loaded, _ = encoders(name, "query")
    tower = model.query_tower
    answer = ask(loaded, [{"history": history} for history in histories])
    items = np.asarray(tower.scaled(tower.items), np.float64)
    for got, known, history in zip(
        answer["embedding"].numpy(), answer["known"].numpy(), histories, strict=True
    ):
        codes = distinct_codes(data, history)
        assert known == bool(codes)
        total = items[codes].sum(axis=0) / np.sqrt(max(len(codes), 1))
        if tower.normalize and codes:
            total /= np.linalg.norm(total)
        assert_close(got[None], total[None] / model.temperature)


@pytest.mark.parametrize("name", TOWERS)
def test_what_a_request_leaves_out_is_what_is_stored(data, encoders, name):
    model, loaded, _ = encoders(name, "query")
    ids = data.query_vocabulary.raw_ids.to_pylist()
    answer = ask(loaded, [{"query_id": raw_id} for raw_id in ids])
    known = (model.query_embeddings().numpy() != 0).any(axis=1)  # u28 has no train rows
    np.testing.assert_array_equal(answer["known"], known)
    assert known.sum() == len(ids) - (name == "fism")
    assert_close(answer["embedding"], model.query_embeddings())
    by_id = loaded.signatures["serving_default"](query_id=tf.constant(ids))
    assert_close(by_id["embedding"], model.query_embeddings())


def test_each_part_of_a_request_replaces_what_is_stored(data, encoders):
    model, loaded, _ = encoders("features", "query")
    users = {row["user_id"]: row for row in make_users()}
    [raw_id] = data.query_vocabulary.raw_ids.to_pylist()[:1]
    stored = {"query_id": raw_id, "age": users[raw_id]["age"], "town": users[raw_id]["town"]}
    whole = ask(loaded, [stored])["embedding"]
    assert_close(whole, model.query_embeddings()[:1])
    for change in ({"age": 7.0}, {"town": "nowhere"}, {"history": ["i1", "i2"]}):
        assert (ask(loaded, [{"query_id": raw_id, **change}])["embedding"] != whole).numpy().any()
        assert_close(
            ask(loaded, [{"query_id": raw_id, **change}])["embedding"],
            ask(loaded, [stored | change])["embedding"],
        )


ALONE = """
import json, sys
import numpy as np
import tensorflow as tf
path, (rows, specs) = sys.argv[1], json.load(open(sys.argv[2]))
names = sorted(specs)
loaded = tf.saved_model.load(path).signatures["request_embedding"]
feed = {n: np.array(rows[n], np.float64 if specs[n] == "float64" else object) for n in names}
one = loaded(**{n: tf.constant(feed[n], specs[n]) for n in names})["embedding"].numpy()
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
    signature = graph.signature_def["request_embedding"]
    place = {signature.inputs[n].name: feed[n] for n in names}
    two = session.run(signature.outputs["embedding"].name, place)
np.save(sys.argv[3], np.stack([one, two]))
trainer = {"towers", "samplers", "pipeline"}
assert not trainer & {name.split(".")[0] for name in sys.modules}
"""


@LONG
def test_both_loaders_need_tensorflow_alone(encoders, tmp_path):
    _, loaded, path = encoders("features", "query")
    rows = [{"query_id": "u3", "age": 1e6, "town": "Bern", "history": ["ü7", "i1\n", "i1"]}]
    rows += [{"query_id": "", "town": "漢\n\0"}]
    specs = loaded.signatures[REQUEST].structured_input_signature[1]
    tensors = {n: tensor_of(s, [row.get(n) for row in rows]) for n, s in specs.items()}
    texts = {
        n: [[v.decode() for v in row] if t.ndim == 2 else row.decode() for row in t.numpy()]
        if t.dtype == tf.string
        else t.numpy().tolist()
        for n, t in tensors.items()
    }
    types = {name: spec.dtype.name for name, spec in specs.items()}
    (tmp_path / "rows.json").write_text(json.dumps([texts, types]))
    arguments = [str(path), str(tmp_path / "rows.json"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path)
    for embedding in np.load(tmp_path / "out.npy"):
        assert_close(embedding, ask(loaded, rows)["embedding"])


def test_names_that_a_graph_cannot_tell_apart_are_refused(data):
    columns = columns_of(data.features("query"), 8)[0]
    named = [columns[0].__class__(name, "numeric") for name in ("a b", "a-b")]
    with pytest.raises(ValueError, match="column 'a-b' of the query features and column 'a b'"):
        _input_names("query", named)
    with pytest.raises(ValueError, match="the history would both be the input 'history'"):
        _input_names("query", [columns[0].__class__("history", "multi")])
    named = [columns[0].__class__(name, "numeric") for name in ("3 größe", "class")]
    assert _input_names("query", named) == ["_3_gr__e", "class_"]  # as Python names arguments
