"""Every tower in the model: gradients, ranking, resuming, export."""

import copy
import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import towers
import twotower
from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle
from towers.data.attributes import Features
from towers.data.interactions import open_data
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.model.two_tower import TwoTower
from towers.output.bundle import export_bundle
from towers.output.recommend import recommend
from towers.output.settings import RecommendConfig
from towers.training.run_directory import open_run
from towers.training.settings import TrainConfig
from towers.training.train import train

FEATURES = {
    "tower": "features",
    "query_inputs": ("id", "history", "features"),
    "history": 4,
    "hidden": (8,),
    "feature_dim": 4,
    "id_dropout": 0.3,
    "text_buckets": 64,
}
SETTINGS = {
    "gmf": {"tower": "gmf"},
    "light_gcn": {"tower": "light_gcn"},
    "light_gcn_segments": {"tower": "light_gcn", "jit_compile": True},
    "ngcf": {"tower": "ngcf", "num_layers": 2},
    "fism": {"tower": "fism", "history": 4},
    "by_popularity": {"normalize": True, "popularity_power": 0.5},
    "svdpp": {"tower": "svdpp", "history": 4, "share_items": False},
    "features": FEATURES,
    "attention": FEATURES | {"history_pooling": "attention", "share_items": False},
}
# One of each way to use the towers.
WAYS = ("ssl_pop", "full_softmax", "xir", "bmns", "dns_mn", "adasir_w", "aobpr", "sl_at_k")
LONG = pytest.mark.long
pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config:UserWarning")


@pytest.fixture(scope="module")
def attributed_data(attributed):
    return open_data(attributed)


@pytest.fixture(autouse=True)
def eagerly(request):
    """Steps run op by op, for which a few need less time than to be compiled once."""
    compiled = ("segments", "mixed", "checkerboard")
    if not request.node.get_closest_marker("long") or not any(
        word in request.node.name for word in compiled
    ):
        tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


class Recording(tf_keras.optimizers.SGD):
    """Keeps the gradients it is given, densely."""

    def apply_gradients(self, grads_and_vars, **kwargs):
        self.given = [None if g is None else tf.convert_to_tensor(g) for g, _ in grads_and_vars]
        return tf.no_op()


def batch_of(data, size):
    return next(iter(data.train(size, seed=0)))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("features", "xir"),
        ("attention", "dns_mn"),
        ("light_gcn", "dns"),
        ("ngcf", "full_softmax"),
        ("fism", "full_softmax"),
        pytest.param("svdpp", "mns", marks=LONG),
        ("gmf", "ssl_pop"),
        *(pytest.param("features", m, marks=LONG) for m in WAYS if m != "xir"),
        *(pytest.param("by_popularity", m, marks=LONG) for m in ("dns", "full_softmax")),
        pytest.param("light_gcn", "full_softmax", marks=LONG),
        pytest.param("light_gcn_segments", "mns", marks=LONG),
        pytest.param("fism", "dns", marks=LONG),
    ],
)
def test_step_takes_the_gradients_of_compute_loss(attributed_data, name, method):
    """The step looks up outside of its compiled unit; Keras differentiates the loss as a whole."""
    settings = {"jit_compile": False, "init_stddev": 1.0} | SETTINGS[name]
    model = TwoTower(attributed_data, 4, method=method, temperature=0.5, **settings)
    batch = batch_of(attributed_data, 16)

    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch, training=True)
    expected = tape.gradient(loss, model.trainable_variables)
    model.compile(optimizer=Recording(0.1), run_eagerly=True)
    assert float(model.train_step(batch)["loss"]) == pytest.approx(float(loss), rel=1e-4)
    known = 0
    for ours, theirs in zip(model.optimizer.given, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, tf.convert_to_tensor(theirs), atol=2e-5)
            known += bool(tf.reduce_any(ours != 0))
    assert known >= min(2, len(expected))  # fism has one table


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ngcf", "ssl_pop"),
        ("features", "dns"),
        pytest.param("gmf", "dns", marks=LONG),
        pytest.param("fism", "dns", marks=LONG),
        pytest.param("svdpp", "ssl_pop", marks=LONG),
        pytest.param("light_gcn_segments", "ssl_pop", marks=LONG),
        pytest.param("attention", "ssl_pop", marks=LONG),
    ],
)
def test_checkerboard(checkerboard, name, method):
    """Even queries like even candidates: the pair held out of each query must rank first."""
    settings = dict(SETTINGS[name])
    if settings["tower"] == "features":
        settings |= {"query_inputs": ("history",), "candidate_inputs": ("id",)}
        del settings["feature_dim"], settings["text_buckets"]
        settings |= {"id_dropout": 0.1, "history": 6}
    model = TwoTower(
        checkerboard,
        8,
        method=method,
        normalize=True,
        temperature=0.2,
        **({"jit_compile": False} | settings),
    )
    # A network learns such a small board by heart after it has learnt its colours; h slows gmf.
    epochs = {"features": 10, "ngcf": 6}.get(settings["tower"], 30)
    model.compile(optimizer=towers.CoupledAdam(0.02 if settings["tower"] == "gmf" else 0.05))
    model.fit(checkerboard.train(60), epochs=epochs, verbose=0)
    means, _ = HeldOut(checkerboard, "test").measure(
        model.query_embeddings().numpy(), model.candidate_embeddings().numpy(), (1,)
    )
    # On a board this small the hardest of ten draws may be the pair that is held out.
    assert means["recall@1"] >= (0.95 if method == "dns" else 1)


def test_embeddings_are_longer_by_popularity(checkerboard):
    counts = checkerboard.train_counts
    model = TwoTower(checkerboard, 4, normalize=True, popularity_power=0.5)
    lengths = np.linalg.norm(model.candidate_embeddings(), axis=1)
    np.testing.assert_allclose(lengths, np.sqrt(counts / counts.mean()), rtol=1e-5)
    np.testing.assert_allclose(model.candidate_embeddings([3]), model.candidate_embeddings()[3:4])
    np.testing.assert_allclose(np.linalg.norm(model.query_embeddings(), axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^popularity_power must be 0 without normalize"):
        TwoTower(checkerboard, 4, popularity_power=0.5)


def test_cold_items_are_ranked_by_their_attributes(checkerboard):
    """Trained on a board with colours, even queries prefer an even item that nobody ever chose."""
    data = copy.copy(checkerboard)
    colours = [1 + int(raw) % 2 for raw in data.candidate_vocabulary.raw_ids.to_pylist()]
    cold = {"raw_id": ["20", "21"], "colour": pa.array([1, 2], pa.int32())}
    attributes = Features(
        (schema.FeatureSpec("colour", "categorical", size=2),),
        pa.table({"colour": pa.array(colours, pa.int32())}),
        pa.table(cold),
    )
    data.features = lambda side: attributes
    model = TwoTower(
        data,
        8,
        tower="features",
        query_inputs=("id",),
        normalize=True,
        temperature=0.2,
        jit_compile=False,
    )
    model.compile(optimizer=towers.CoupledAdam(0.05))
    model.fit(data.train(60), epochs=8, verbose=0)
    scores = model.query_embeddings().numpy() @ model.candidate_tower.embed_cold().numpy().T
    even = np.array([int(raw) % 2 == 0 for raw in data.query_vocabulary.raw_ids.to_pylist()])
    assert (scores[even, 0] > scores[even, 1] + 1).all()
    assert (scores[~even, 1] > scores[~even, 0] + 1).all()


def config_for(prepared, run, name, **settings):
    fields = {"dim": 6, "batch_size": 64, "epochs": 2, "normalize": True, "temperature": 0.3}
    fields["jit_compile"] = False
    return TrainConfig(data=str(prepared), run=str(run), **(fields | SETTINGS[name] | settings))


def checkpoint_of(run):
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints")))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    return {name: reader.get_tensor(name) for name in names}


@pytest.fixture(
    scope="module",
    params=["features", *(pytest.param(name, marks=LONG) for name in ("ngcf", "svdpp"))],
)
def trained(request, attributed, tmp_path_factory):
    """The name of a tower and a run of two epochs."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    tf.config.run_functions_eagerly(True)
    train(config_for(attributed, run, request.param))
    tf.config.run_functions_eagerly(False)
    return request.param, run


@pytest.mark.long
def test_a_run_that_goes_on_is_one_that_never_stopped(trained, attributed, tmp_path):
    name, whole = trained
    config = config_for(attributed, tmp_path / "parts", name, epochs=1)
    train(config)
    summary = train(dataclasses.replace(config, epochs=2))
    assert summary["epochs"] == 2
    expected, found = checkpoint_of(whole), checkpoint_of(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_another_tower_is_another_run(trained, attributed):
    name, run = trained
    with pytest.raises(ValueError, match=r"tower '.*' → 'gmf'"):
        train(dataclasses.replace(config_for(attributed, run, "gmf"), epochs=3))
    _, config = open_run(run, open_data(attributed))
    assert config.tower == SETTINGS[name]["tower"]


def told_in_one_line(capsys, *arguments):
    """What a command that ends with status 2 says."""
    assert twotower.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_checkpoints_of_another_configuration_are_refused(trained, attributed, tmp_path, capsys):
    """Some of them hold all the variables of the tower, in the same shapes."""
    name, run = trained
    mixed = shutil.copytree(run, tmp_path / "mixed")
    shutil.rmtree(mixed / "checkpoints")
    train(config_for(attributed, tmp_path / "gmf", "gmf"))
    shutil.copytree(tmp_path / "gmf" / "checkpoints", mixed / "checkpoints")
    error = told_in_one_line(capsys, "evaluate", "--data", attributed, "--run", mixed)
    assert f"it is of another configuration: tower 'gmf' → '{name}'" in error
    assert "--overwrite" in error
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*--overwrite"):
        train(dataclasses.replace(config_for(attributed, mixed, name), epochs=3))
    shutil.rmtree(mixed / "checkpoints")
    error = told_in_one_line(capsys, "evaluate", "--data", attributed, "--run", mixed)
    assert "cannot be read" in error


def test_mistakes_are_told_in_one_line(attributed, prepared, tmp_path, capsys):
    flags = ["--run", tmp_path / "run", "--tower", "features", "--epochs", "1"]
    command = ["train", "--data", attributed, *flags]
    error = told_in_one_line(capsys, *command, "--candidate_inputs", "id", "brend")
    assert "'brend', which is no column of the data: it has price, brand" in error
    error = told_in_one_line(capsys, "train", "--data", prepared, *flags)
    assert "prepare them with item_features" in error
    mixed = shutil.copytree(attributed, tmp_path / "mixed")
    file = next(mixed.glob("candidate_vocabulary-*"))
    shutil.copy(next(prepared.glob("candidate_vocabulary-*")), file)
    error = told_in_one_line(capsys, "train", "--data", mixed, *flags)
    assert "candidate_vocabulary" in error
    assert "or is of another one: make the data again with `twotower prepare`" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_what_is_exported_scores_as_the_model(trained, attributed, tmp_path):
    name, run = trained
    data = open_data(attributed)
    model, _ = open_run(run, data)
    bundle = read_bundle(export_bundle(attributed, run, tmp_path / "bundle"))
    served = tf.saved_model.load(str(bundle.query_model)).signatures["serving_default"]
    known = data.query_vocabulary.raw_ids.to_pylist()
    answer = served(query_id=tf.constant([*known, "u29", "nobody"]))
    scores = answer["embedding"].numpy() @ bundle.vectors.T
    queries, candidates = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    np.testing.assert_allclose(
        scores[: len(known), : len(candidates)], queries @ candidates.T, atol=2e-5
    )
    cold = name == "features"  # the others embed ids with interactions only
    output = str(tmp_path / "all")
    config = RecommendConfig(data=str(attributed), run=str(run), output=output, k=3)
    assert recommend(config).counts["queries"] == len(known) + cold
    assert answer["known"].numpy()[-2:].tolist() == [cold, False]
    assert (answer["embedding"].numpy()[-2] != 0).any() == cold
    assert (answer["embedding"].numpy()[-1] == 0).all()
    raw_ids = data.candidate_vocabulary.raw_ids.to_pylist()
    assert bundle.candidate_ids[: len(raw_ids)] == raw_ids
    assert len(bundle.vectors) == len(bundle.candidate_ids) == len(raw_ids) + 10 * cold
    assert bundle.num_queries == len(known) + cold
    assert bundle.manifest.counts["cold_candidates"] == 10 * cold
    if cold:
        features = data.features("candidate").cold[schema.RAW_ID].to_pylist()
        assert bundle.candidate_ids[-10:] == features
        np.testing.assert_allclose(bundle.vectors[-10:], model.candidate_tower.embed_cold())
        ids = pq.read_table(bundle.path / schema.BUNDLE_QUERY_IDS)[schema.RAW_ID].to_pylist()
        assert ids[-1] == "u29"


@LONG
def test_mixed_precision(attributed_data):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        for name in ("attention", "ngcf"):
            model = TwoTower(attributed_data, 8, normalize=True, temperature=0.2, **SETTINGS[name])
            model.compile(optimizer=towers.CoupledAdam(0.02))
            losses = model.fit(attributed_data.train(128), epochs=3, verbose=0).history["loss"]
            assert losses[-1] < losses[0]
            assert model.query_embeddings().dtype == tf.float32
            assert all(v.dtype == tf.float32 for v in model.trainable_variables)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
