"""The feature tower against its formula in NumPy, and what it does with ids it never saw."""

import attributes
import numpy as np
import pytest
import tensorflow as tf

from pipeline.contract import schema
from towers.data.dataframe import from_dataframe
from towers.data.interactions import open_data
from towers.encoders.feature_tower import AttentionPooling, mean_of
from towers.encoders.tower import uniform_by_id
from towers.encoders.tower_config import TowerConfig
from towers.model.two_tower import TwoTower

DIM = 6


@pytest.fixture(scope="module")
def attributed_data(attributed):
    return open_data(attributed)


def make_model(data, **settings):
    """Weights that are far from their small initial values."""
    settings = {"hidden": (7, 5), "feature_dim": 4, "history": 4, "text_buckets": 50} | settings
    model = TwoTower(data, DIM, tower="features", init_stddev=1.0, jit_compile=False, **settings)
    for number, variable in enumerate(model.trainable_variables):
        if "bias" in variable.name or "vector" in variable.name:
            variable.assign(tf.random.stateless_normal(variable.shape, (number, 1)))
    return model


def in_numpy(tower, inputs):
    """row + pooled history + network(columns || pooled history), one id at a time."""
    embeddings = []
    for n in range(len(inputs["row"])):
        parts, terms = [], []
        for number, column in enumerate(tower.columns):
            value = inputs["columns"][column.name][n]
            if column.kind == "numeric":
                parts.append(value)
                continue
            table = tower._value_tables[column.name].numpy()
            assert table.shape == (column.num_codes + 1, 4), number
            if column.kind == "categorical":
                parts.append(table[value])
            else:
                codes = [code for code in value if code > 0]
                parts.append(table[codes].mean(0) if codes else np.zeros(4))
        if tower.table is not None and inputs["has_id"][n]:
            terms.append(tower.table.numpy()[inputs["row"][n]])
        if "history" in inputs:
            items = [code - 1 for code in inputs["history"][n] if code > 0]
            pooled = tower.items.numpy()[items].mean(0) if items else np.zeros(DIM)
            terms.append(pooled)
            parts.append(pooled)
        hidden = np.concatenate(parts)
        for layer, dense in enumerate(tower._dense):
            hidden = hidden @ dense.kernel.numpy() + dense.bias.numpy()
            if layer < len(tower._dense) - 1:
                hidden = np.maximum(hidden, 0)
        embeddings.append(np.sum([hidden, *terms], axis=0))
    return np.array(embeddings)


def inputs_of(tower, first, stop):
    tensors = tower.source.as_tensors(tf.constant)
    ids = tf.range(first, stop, dtype=tf.int64)
    return tf.nest.map_structure(lambda t: t.numpy(), tensors.inputs(ids, tower.columns))


@pytest.mark.parametrize("share_items", [True, False])
def test_embeddings_are_the_formula(attributed_data, share_items):
    model = make_model(
        attributed_data,
        query_inputs=("id", "history", "features"),
        share_items=share_items,
        temperature=0.5,
    )
    query, candidate = model.query_tower, model.candidate_tower
    assert (query.items is candidate.table) == share_items
    assert [len(tower.columns) for tower in (query, candidate)] == [2, 6]
    expected = in_numpy(query, inputs_of(query, 0, query.vocabulary_size)) / 0.5
    np.testing.assert_allclose(model.query_embeddings(), expected, rtol=1e-4, atol=1e-4)
    expected = in_numpy(candidate, inputs_of(candidate, 0, candidate.vocabulary_size))
    np.testing.assert_allclose(model.candidate_embeddings(), expected, rtol=1e-4, atol=1e-4)
    for tower, size in ((query, 1), (candidate, 10)):
        known = tower.vocabulary_size
        expected = in_numpy(tower, inputs_of(tower, known, known + size))
        assert expected.shape == (size, DIM)
        np.testing.assert_allclose(tower.embed_cold(), expected, rtol=1e-4, atol=1e-4)


def test_cosine_towers_have_length_1(attributed_data):
    model = make_model(attributed_data, normalize=True)
    for found in (model.candidate_embeddings(), model.candidate_tower.embed_cold()):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_inputs_choose_columns(attributed_data):
    model = make_model(attributed_data, query_inputs=("town",), candidate_inputs=("tags", "price"))
    assert [column.name for column in model.query_tower.columns] == ["town"]
    assert [column.name for column in model.candidate_tower.columns] == ["tags", "price"]
    assert model.candidate_tower.table is None
    assert len(model.candidate_tower.cold_ids) == 10


def test_ids_without_train_rows_are_embedded_by_their_attributes(attributed_data):
    """The row of such an id changes nothing; that of an id with train rows does."""
    model = make_model(attributed_data)
    table = model.candidate_tower.table
    before = model.candidate_embeddings().numpy()
    table.assign(table + 1)
    moved = np.abs(model.candidate_embeddings().numpy() - before).max(axis=1) > 0.5
    np.testing.assert_array_equal(moved, attributed_data.train_counts > 0)
    assert 0 < moved.sum() < len(moved)
    ids = attributed_data.candidate_vocabulary.raw_ids.to_pylist()
    assert {ids[n] for n in np.flatnonzero(~moved)} == set(attributes.TEST_ONLY)


def test_a_cold_item_is_a_warm_one_without_its_row(attributed_data):
    """Given the attributes of item 0, a cold item differs from it by the row of item 0."""
    model = make_model(attributed_data)
    tower = model.candidate_tower
    source = tower.source.as_tensors(tf.constant)
    rows = tower.rows(source.inputs(tf.constant([0], tf.int64), tower.columns))
    warm = tower(rows)
    cold = tower(rows | {"id": tf.zeros_like(rows["id"])})
    np.testing.assert_allclose(warm - cold, tower.table[:1], atol=1e-5)


def test_a_tower_of_ids_alone_has_a_row_for_every_id(attributed_data):
    model = make_model(attributed_data, candidate_inputs=("id",))
    np.testing.assert_array_equal(model.candidate_embeddings(), model.candidate_tower.table)
    assert len(model.candidate_tower.cold_ids) == 0
    with_drops = model.candidate_tower.embed(None, seed=tf.constant([1, 2]))
    np.testing.assert_array_equal(with_drops, model.candidate_tower.table)


def test_dropped_rows(attributed_data):
    """A seed drops a row in all places or in none; without a seed nothing is dropped."""
    model = make_model(attributed_data, id_dropout=0.5)
    tower = model.candidate_tower
    every = tf.range(attributed_data.num_candidates, dtype=tf.int64)
    shares = []
    for step in range(20):
        seed = tf.constant([10, step], tf.int64)
        kept = tf.reduce_any(tower.lookup(every, seed=seed)["id"] != 0, axis=1).numpy()
        twice = tower.lookup(tf.stack([every, every]), seed=seed)["id"].numpy()
        np.testing.assert_array_equal(twice[0], twice[1])
        np.testing.assert_array_equal((twice[0] != 0).any(axis=1), kept)
        shares.append(kept[attributed_data.train_counts > 0].mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert len(set(shares)) > 5
    known = tf.reduce_any(tower.lookup(every)["id"] != 0, axis=1).numpy()
    np.testing.assert_array_equal(known, attributed_data.train_counts > 0)


def test_numbers_of_ids_are_uniform_and_independent():
    ids = tf.range(20_000, dtype=tf.int64)
    numbers = [uniform_by_id(ids, tf.constant([10, step])).numpy() for step in range(3)]
    for found in numbers:
        assert found.min() >= 0
        assert found.max() < 1
        counts, _ = np.histogram(found, bins=20, range=(0, 1))
        assert abs(counts / 1000 - 1).max() < 0.12  # 4 deviations
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[1], numbers[2])[0, 1]) < 0.03


def test_training_hides_the_positive_from_the_history(attributed_data):
    """The rows of a step hold no item of the time of its positive; embeddings of queries do."""
    model = make_model(attributed_data)
    rows = attributed_data.arrays("train")
    batch = {name: tf.constant(rows[name][:64]) for name in (schema.QUERY_ID, schema.CANDIDATE_ID)}
    found = model.query_tower.lookup(batch["query_id"], positives=batch["candidate_id"])
    whole = model.query_tower.lookup(batch["query_id"])
    triples = [(rows["query_id"][n], rows["timestamp"][n]) for n in range(len(rows["query_id"]))]
    for n in range(64):
        query, time = triples[n]
        earlier = sum(q == query and t < time for q, t in triples)
        assert found["in_history"].numpy()[n].sum() == min(earlier, 4)
    assert whole["in_history"].numpy().sum() > found["in_history"].numpy().sum()


def test_attention_pooling():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(3, 4, 5)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    pool = AttentionPooling(4, 5, seed=(1, 2))
    np.testing.assert_allclose(pool(embeddings, valid), mean_of(embeddings, valid), atol=1e-6)
    matrix, places, vector = (rng.normal(size=w.shape) for w in pool.weights)
    pool.set_weights([matrix, places, vector])
    expected = np.zeros((3, 5))
    for n in range(2):
        kept = np.flatnonzero(valid[n])
        logits = np.tanh(embeddings[n, kept] @ matrix + places[kept]) @ vector
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[n] = weights @ embeddings[n, kept]
    np.testing.assert_allclose(pool(embeddings, valid), expected, rtol=1e-4, atol=1e-5)


def test_initial_values_of_nothing_are_zero(attributed_data):
    tower = make_model(attributed_data).candidate_tower
    for table in tower._value_tables.values():
        np.testing.assert_array_equal(table[0], 0)
        assert np.std(table[1:]) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"candidate_inputs": ("brend",)}, "names 'brend', which is no column of the data"),
        ({"candidate_inputs": ("history",)}, "candidate_inputs must be without history"),
        ({"query_inputs": ()}, "query_inputs must name an input"),
        ({"history_pooling": "max"}, "history_pooling must be one of"),
        ({"id_dropout": 1.0}, r"id_dropout must be in \[0, 1\), got 1.0"),
        ({"id_dropout": "0.1"}, "id_dropout must be a number, got '0.1'"),
        ({"hidden": (0,)}, "hidden must be whole numbers of at least 1"),
        ({"hidden": (8.5,)}, "hidden must be whole numbers of at least 1"),
        ({"hidden": "8"}, "hidden must be whole numbers of at least 1"),
        ({"history": 2.5}, "history must be a number without decimals, got 2.5"),
        ({"history": 0}, "history must be at least 1"),
        ({"num_layers": 2}, "num_layers is for tower light_gcn or ngcf, got 2 with features"),
        ({"tower": "id", "hidden": ()}, r"hidden is for tower features, got \(\) with id"),
        ({"tower": "gnn"}, "tower must be one of .*got 'gnn'; change tower"),
    ],
)
def test_wrong_settings_are_errors(attributed_data, settings, text):
    with pytest.raises(ValueError, match=text):
        TwoTower(attributed_data, **({"tower": "features"} | settings))


def test_missing_attributes_are_an_error(data):
    with pytest.raises(ValueError, match="no attributes of that side: prepare them with user_fea"):
        TwoTower(data, tower="features", candidate_inputs=("id",))
    assert TowerConfig(tower="features").inputs("query") == ("history", "features")
    one = TowerConfig(tower="features", query_inputs="id", hidden=32)  # no list of letters
    assert (one.query_inputs, one.hidden) == (("id",), (32,))


def test_attributes_of_one_side_are_enough(pairs):
    items = pairs[["item_id"]].drop_duplicates().assign(kind="a")
    data = from_dataframe(pairs, user="user_id", item="item_id", item_features=items)
    model = TwoTower(data, tower="features", dim=4)
    assert [column.name for column in model.candidate_tower.columns] == ["kind"]
    assert model.query_tower.columns == ()
    with pytest.raises(ValueError, match="no attributes of that side"):
        TwoTower(data, tower="features", query_inputs=("features",))
