"""What a run survives, and what it leaves behind where it cannot go on."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from full_disk import largest_file
from tensorflow.python.framework import config as tf_config

from pipeline.contract import schema
from towers.data.dataframe import from_dataframe
from towers.data.epochs import step_rows
from towers.data.interactions import open_data
from towers.legacy_keras import tf_keras
from towers.model.optimizers import make_optimizer
from towers.model.step import worst_of
from towers.model.two_tower import TwoTower
from towers.training.earlier_run import start_from_run
from towers.training.run_directory import make_model, open_run
from towers.training.settings import TrainConfig
from towers.training.train import train


def config_for(prepared, run, **settings):
    fields = {"dim": 8, "batch_size": 32, "epochs": 4, "l2": 1e-4, "temperature": 0.5}
    fields["jit_compile"] = False
    return TrainConfig(data=str(prepared), run=str(run), **(fields | settings))


@pytest.fixture(scope="module")
def finished(prepared, trained, tmp_path_factory):
    """(epochs) → the directory of a run that was never interrupted; to be read or copied."""

    @functools.cache
    def make(epochs):
        if epochs == trained[0].epochs:
            return Path(trained[0].run)
        run = tmp_path_factory.mktemp("finished") / "run"
        train(config_for(prepared, run, epochs=epochs))
        return run

    return make


@pytest.fixture
def one_epoch(prepared, finished, tmp_path):
    """The settings of a run of one epoch, which is there."""
    shutil.copytree(finished(1), tmp_path / "run")
    return config_for(prepared, tmp_path / "run", epochs=1)


def content_of(checkpoint):
    reader = tf.train.load_checkpoint(str(checkpoint))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    return {name: reader.get_tensor(name) for name in names}


def last_of(run):
    return content_of(tf.train.latest_checkpoint(str(run / "checkpoints")))


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert np.asarray(values).tobytes() == np.asarray(two[name]).tobytes(), name


class Poison(tf_keras.callbacks.Callback):
    """Breaks a row of a table before a given step."""

    def __init__(self, step, row, value):
        super().__init__()
        self._at = (step, row, value)

    def on_train_batch_begin(self, batch, logs=None):
        step, row, value = self._at
        if int(self.model.iteration) == step:
            self.model.candidate_tower.table.scatter_nd_update([[row, 0]], [value])


def test_a_loss_that_is_no_number_changes_nothing_and_leaves_its_batch(
    prepared, one_epoch, tmp_path, monkeypatch
):
    data = open_data(prepared)
    steps = data.steps_per_epoch(32)
    before = last_of(tmp_path / "run")
    failing = 2 * steps + 4
    rows = step_rows(data.num_rows("train"), 32, seed=10, step=failing)
    poison = Poison(failing, data.arrays("train")["candidate_id"][rows[0]], np.nan)
    monkeypatch.setattr("towers.training.train._callbacks", lambda *_: [poison])
    with pytest.raises(
        ValueError, match=f"loss must be finite, got NaN in epoch 3, after {failing}"
    ):
        train(dataclasses.replace(one_epoch, epochs=4))
    assert_same(last_of(tmp_path / "run"), before)
    saved = pq.read_table(tmp_path / "run" / "diverged.parquet").to_pydict()
    assert saved["row"] == rows.tolist()
    arrays = data.arrays("train")
    for side, name in (("query", "query_id"), ("candidate", "candidate_id")):
        ids = arrays[name][saved["row"]].tolist()
        assert saved[name] == ids
        raw_ids = getattr(data, f"{side}_vocabulary").raw_ids.to_pylist()
        assert saved[f"{side}_raw_id"] == [raw_ids[i] for i in ids]


@pytest.mark.parametrize(
    ("jit_compile", "factor", "optimizer"),
    [pytest.param(True, np.inf, "adam", marks=pytest.mark.long), (False, np.nan, "lazy_adam")],
)
def test_a_step_with_a_gradient_that_is_not_finite_writes_nothing(
    data, jit_compile, factor, optimizer
):
    model = TwoTower(data, 4, jit_compile=jit_compile, init_stddev=1.0)
    model.compile(optimizer=make_optimizer(optimizer, 0.1, 0.0))
    model.optimizer.build(model.trainable_variables)
    batch = next(iter(data.train(16)))
    original = model.method.loss

    @tf.custom_gradient
    def breaks(losses):
        return losses, lambda upstream: upstream + factor

    model.method.loss = lambda *args, **kwargs: breaks(original(*args, **kwargs))
    before = [variable.numpy() for variable in model.variables]
    step = tf.function(model.train_step)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a gradient of a training step must"):
        step(batch)
    for variable, value in zip(model.variables, before, strict=True):
        assert variable.numpy().tobytes() == value.tobytes()


@pytest.mark.parametrize("worst", [0.0, np.inf, np.nan])
def test_one_number_tells_the_worst_of_all_gradients(worst):
    rows = tf.IndexedSlices(tf.constant([[1.0, -worst or 2.0]]), tf.constant([3]))
    np.testing.assert_equal(worst_of([tf.ones([2]), None, rows]).numpy(), np.float32(worst))


def test_deterministic_ops_are_asked_for_and_train_the_same_on_a_cpu(prepared, finished, tmp_path):
    any_order = finished(1)
    assert not tf_config.is_op_determinism_enabled()
    try:
        train(config_for(prepared, tmp_path / "run", epochs=1, deterministic=True))
        assert tf_config.is_op_determinism_enabled()
    finally:
        tf_config.disable_op_determinism()
    assert_same(last_of(tmp_path / "run"), last_of(any_order))


def test_diverging_by_itself_is_told_in_one_line(prepared, tmp_path):
    config = config_for(prepared, tmp_path / "run", init_stddev=1e20)
    with pytest.raises(ValueError, match=r"got (NaN|infinity) in epoch 1, after 0 steps.*smaller"):
        train(config)
    assert (tmp_path / "run" / "diverged.parquet").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_file_that_cannot_grow_ends_the_run_and_no_more(prepared, one_epoch, finished, tmp_path):
    """EFBIG at the first checkpoint after the limit."""
    config, run = dataclasses.replace(one_epoch, epochs=2), tmp_path / "run"
    before = last_of(run)
    with (
        largest_file(8_000),
        pytest.raises(ValueError, match=f"{run} cannot be written: file too large; make room"),
    ):
        train(config)
    assert_same(last_of(run), before)
    names = {path.name.split(".")[0] for path in (run / "checkpoints").iterdir()}
    record = json.loads((run / "training.json").read_text())
    assert record["weights"] in names
    assert not [name for name in names if name.endswith("_temp")]
    assert not list(run.glob(".*.json.*"))
    open_run(run, open_data(prepared))
    train(config)
    assert_same(last_of(run), last_of(finished(2)))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.long  # the limit of a file's size, above, is another errno in the same words
def test_a_full_disk_ends_the_run_and_no_more(prepared, tmp_path, small_disk):
    config = config_for(prepared, small_disk / "run", dim=150)
    with pytest.raises(ValueError, match="cannot be written: no space left on device; make room"):
        train(config)
    record = json.loads((small_disk / "run" / "training.json").read_text())
    assert record["steps"] > 0
    weights = small_disk / "run" / "checkpoints" / record["weights"]
    moved = tmp_path / "run"
    saved = content_of(weights)
    shutil.copytree(small_disk / "run", moved)
    assert int(saved["model/iteration/.ATTRIBUTES/VARIABLE_VALUE"]) == record["steps"]
    assert train(dataclasses.replace(config, run=str(moved)))["finished"]
    train(dataclasses.replace(config, run=str(tmp_path / "whole")))
    assert_same(last_of(moved), last_of(tmp_path / "whole"))


def test_other_errors_are_not_taken_for_a_full_disk(prepared, tmp_path, monkeypatch):
    def broken(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("towers.training.train.keep_vocabularies", broken)
    with pytest.raises(PermissionError):
        train(config_for(prepared, tmp_path / "run"))


def test_the_checkpoint_before_is_taken_when_the_last_cannot_be_read(
    prepared, finished, tmp_path, caplog
):
    run = shutil.copytree(finished(2), tmp_path / "run")
    last = tf.train.latest_checkpoint(str(run / "checkpoints"))
    os.truncate(f"{last}.data-00000-of-00001", 10)
    train(config_for(prepared, run, epochs=2))
    assert "cannot be read" in caplog.text
    assert_same(last_of(run), last_of(finished(2)))


def test_what_a_killed_process_left_is_removed(one_epoch, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "ckpt-7_temp").mkdir()
    (checkpoints / "ckpt-7_temp" / "part").write_text("half")
    (checkpoints / "ckpt-7.data-00000-of-00001").write_text("half")
    (tmp_path / "run" / ".training.json.0123").write_text("{")
    before = last_of(tmp_path / "run")
    train(one_epoch)
    assert not [path for path in checkpoints.iterdir() if "ckpt-7" in path.name]
    assert not list((tmp_path / "run").glob(".training*"))
    assert_same(last_of(tmp_path / "run"), before)


def test_data_that_change_under_a_run_are_noticed(
    data, make_prepared, finished, tmp_path, monkeypatch
):
    directory = make_prepared(data)
    config = config_for(directory, tmp_path / "run", epochs=2)
    manifest = (directory / "manifest.json").read_text()
    end_epoch = TwoTower.end_epoch

    def change(self):
        end_epoch(self)
        fields = json.loads(manifest)
        fields["configuration"]["seed"] = 11
        (directory / "manifest.json").write_text(json.dumps(fields))

    with monkeypatch.context() as patch:
        patch.setattr(TwoTower, "end_epoch", change)
        with pytest.raises(ValueError, match="was changed while a run trained on it"):
            train(config)
    with pytest.raises(ValueError, match="the content of the data"):
        train(config)
    (directory / "manifest.json").write_text(manifest)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["epochs"] == 1
    train(config)
    assert_same(last_of(tmp_path / "run"), last_of(finished(2)))


def grown(pairs):
    """The pairs of a later day: other counts, new users and items, some gone."""
    rng = np.random.default_rng(1)
    late = pd.DataFrame(
        {
            "user_id": rng.integers(40, 90, 900),
            "item_id": [f"i{i}" for i in rng.integers(20, 70, 900)],
        }
    )
    df = pd.concat([pairs[pairs.user_id > 5], late]).drop_duplicates(ignore_index=True)
    return from_dataframe(df, user="user_id", item="item_id", validation_ratio=0.2)


@pytest.mark.parametrize(
    "tower", ["gmf", *(pytest.param(name, marks=pytest.mark.long) for name in ("id", "svdpp"))]
)
def test_a_run_starts_from_the_vectors_of_another_by_raw_id(
    prepared, pairs, make_prepared, tmp_path, tower, caplog
):
    old = config_for(prepared, tmp_path / "old", epochs=1, tower=tower)
    train(old)
    later = make_prepared(grown(pairs), "later")
    config = dataclasses.replace(old, data=str(later), run=str(tmp_path / "new"), init_from=old.run)
    data, before = open_data(later), open_data(prepared)
    model, drawn = make_model(config, data), make_model(config, data)
    start_from_run(config, model, data)
    assert f"{old.run} is of other data" in caplog.text
    known, _ = open_run(old.run, before)
    new_ids = 0
    for side in schema.SIDES:
        tables = [getattr(one, f"{side}_tower").table.numpy() for one in (model, drawn, known)]
        ids = [getattr(one, f"{side}_vocabulary").raw_ids.to_pylist() for one in (data, before)]
        for row, raw_id in enumerate(ids[0]):
            new_ids += raw_id not in ids[1]
            found = raw_id in ids[1]
            expected = tables[2][ids[1].index(raw_id)] if found else tables[1][row]
            np.testing.assert_array_equal(tables[0][row], expected, err_msg=raw_id)
    assert new_ids > 10
    if tower == "gmf":
        weights = [one.query_tower.factor_weights.numpy() for one in (model, known)]
        np.testing.assert_array_equal(*weights)
        assert (weights[0] != 1).all()


def test_a_run_that_started_from_another_goes_on_without_it(one_epoch, tmp_path, monkeypatch):
    old = one_epoch
    whole = dataclasses.replace(old, run=str(tmp_path / "whole"), init_from=old.run)
    train(whole)
    cut = dataclasses.replace(whole, run=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(TwoTower, "fit", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(cut)
    began, known = last_of(tmp_path / "cut"), last_of(Path(old.run))
    tables = [name for name in known if "_tower/table/.ATTRIBUTES" in name]
    assert len(tables) == 2
    assert_same({name: known[name] for name in tables}, {name: began[name] for name in tables})
    shutil.rmtree(old.run)
    train(cut)
    assert_same(last_of(tmp_path / "cut"), last_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("id", "features", r"--tower features makes them .*: leave out --init_from"),
        ("features", "id", r"--tower features makes them .*: leave out --init_from"),
        ("gmf", "id", r"^tower must be gmf as in .*, got id: change --tower, or leave out"),
        ("light_gcn", "fism", r"^tower must be light_gcn as in .*, got fism: change --tower"),
    ],
)
def test_vectors_that_are_no_rows_of_a_table_start_no_other_tower(
    one_epoch, prepared, data, tmp_path, old, new, text
):
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["configuration"]["tower"] = old
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    config = config_for(prepared, tmp_path / "new", tower=new, init_from=one_epoch.run)
    with pytest.raises(ValueError, match=text):
        start_from_run(config, TwoTower(data, 8), data)


@pytest.mark.parametrize("tower", [pytest.param("fism", marks=pytest.mark.long), "svdpp"])
def test_queries_start_as_an_earlier_run_embedded_them(
    prepared, pairs, make_prepared, tmp_path, tower
):
    settings = {"dim": 4, "batch_size": 100, "epochs": 1, "normalize": True, "temperature": 0.2}
    old = TrainConfig(data=str(prepared), run=str(tmp_path / "old"), tower=tower, **settings)
    train(old)
    data = open_data(prepared)
    earlier, _ = open_run(old.run, data)
    new = dataclasses.replace(old, run=str(tmp_path / "new"), tower="id", init_from=old.run)
    model = make_model(new, data)
    start_from_run(new, model, data)
    for name in ("query_embeddings", "candidate_embeddings"):
        found, expected = getattr(model, name)(), getattr(earlier, name)()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    split = {"user": "user_id", "item": "item_id", "train_ratio": 0.7}
    other = open_data(make_prepared(from_dataframe(pairs, **split)))
    model = make_model(new, other)
    drawn = model.query_embeddings()
    start_from_run(new, model, other)  # of other rows: the ids are known, the queries are not
    np.testing.assert_array_equal(model.query_embeddings(), drawn)
    np.testing.assert_allclose(model.candidate_embeddings(), earlier.candidate_embeddings())


def test_wrong_runs_to_start_from_are_errors(one_epoch, checkerboard, make_prepared, tmp_path):
    old = one_epoch
    config = dataclasses.replace(old, run=str(tmp_path / "new"), init_from=old.run)
    with pytest.raises(ValueError, match="holds no trained run: there is no training"):
        train(dataclasses.replace(config, init_from=str(tmp_path)))
    with pytest.raises(ValueError, match=r"dim must be 8 as in .*, got 4; change dim"):
        train(dataclasses.replace(config, dim=4))
    board = dataclasses.replace(config, data=str(make_prepared(checkerboard)))
    with pytest.raises(ValueError, match="init_from must be another directory than run"):
        dataclasses.replace(config, init_from=config.run)
    with pytest.raises(ValueError, match="ids of a side of the data is in"):
        train(board)
    assert not (tmp_path / "new").exists()
