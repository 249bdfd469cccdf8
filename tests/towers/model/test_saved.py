"""Models in directories: what comes back, also in a fresh process, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import towers
from towers.data.interactions import open_data
from towers.legacy_keras import tf_keras
from towers.model.saved import load

FEATURES = {"tower": "features", "dim": 8, "hidden": (8,), "feature_dim": 4, "history": 5}


def fitted(data, epochs=1, **settings):
    model = towers.TwoTower(data, jit_compile=False, seed=3, **settings)
    model.compile(
        optimizer=towers.CoupledAdam(
            towers.staircase_decay(0.05, 0.9, decay_epochs=1, steps_per_epoch=4)
        )
    )
    model.fit(data.train(64), epochs=epochs, verbose=0)
    return model


def state(model):
    """All that a checkpoint holds, by name."""
    checkpoint = tf.train.Checkpoint(model=model)
    return [variable.numpy() for variable in tf.nest.flatten(tf.Module.variables.fget(model))] + [
        variable.numpy() for variable in checkpoint.model.optimizer.variables
    ]


def ask_elsewhere(code, *arguments):
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long  # a fresh process
def test_a_fresh_process_answers_without_the_data(attributed, tmp_path):
    model = fitted(open_data(attributed), **FEATURES)
    model.save(tmp_path / "model")
    code = (
        "import sys, towers\n"
        "model = towers.load(sys.argv[1])\n"
        "model.recommend(['u0', 'u29'], k=5, exclude_seen=True).to_parquet(sys.argv[2])\n"
        "model.fit(model.data.train(64), verbose=0)\n"
        "print(int(model.iteration))\n"
    )
    steps = ask_elsewhere(code, tmp_path / "model", tmp_path / "answer.parquet")
    expected = model.recommend(["u0", "u29"], k=5, exclude_seen=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "answer.parquet"), expected)
    assert int(steps) == 2 * int(model.iteration)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bir", {}),  # a cache
        ("adasir_u", {"normalize": True, "temperature": 0.2}),  # a pool for each query
    ],
)
def test_training_goes_on_as_if_it_had_not_stopped(data, tmp_path, method, settings):
    model = fitted(data, method=method, dim=8, **settings)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    for mine, theirs in zip(state(model), state(again), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    done = int(model.iteration)
    for trained in (model, again):
        trained.fit(data.train(64, first_step=done), verbose=0)
    for mine, theirs in zip(state(model), state(again), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert int(again.iteration) == 2 * done


def test_what_comes_back(attributed, tmp_path):
    data = open_data(attributed)
    model = towers.TwoTower(data, **FEATURES)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    for side in ("query", "candidate"):
        for ids in (None, tf.constant([1, 0], tf.int64)):
            mine, theirs = (getattr(m, f"{side}_embeddings")(ids) for m in (model, again))
            np.testing.assert_array_equal(mine, theirs)
        assert data.features(side).cold.equals(again.data.features(side).cold)
    assert again.data.num_rows("test") == 0
    assert again.data.fingerprint == data.fingerprint
    assert json.loads(again.settings) == json.loads(model.settings)
    again.save(tmp_path / "model")  # a saved model may be replaced


def test_weights_in_half_precision(data, tmp_path):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = towers.TwoTower(data, dim=4)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    model.save(tmp_path / "model")
    assert load(tmp_path / "model").query_tower.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("path", ["x.keras", "x.h5"])
def test_files_of_keras_are_refused(data, tmp_path, path):
    model = towers.TwoTower(data, dim=4)
    with pytest.raises(ValueError, match=r"model.save\('x'\), then towers.load\('x'\)"):
        model.save(tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_other_directories_are_left_alone(data, tmp_path):
    model = towers.TwoTower(data, dim=4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="is not a saved model"):
        model.save(tmp_path / "notes")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="overwrite=True"):
        model.save(tmp_path / "model", overwrite=False)
    with pytest.raises(ValueError, match="save_format must be left out"):
        model.save(tmp_path / "other", save_format="h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"


def test_what_cannot_be_loaded(data, tmp_path):
    with pytest.raises(ValueError, match=r"Make it with `model\.save`"):
        load(tmp_path / "nothing")
    towers.TwoTower(data, dim=4).save(tmp_path / "model")
    [weights] = (tmp_path / "model").glob("weights.data*")
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"must have .* bytes by its manifest"):
        load(tmp_path / "model")


def test_keras_checkpoints_the_best_epoch(data, tmp_path):
    model = towers.TwoTower(data, dim=8, jit_compile=False)
    model.compile(optimizer=towers.CoupledAdam(0.05))
    best, weights = str(tmp_path / "best"), str(tmp_path / "weights-{epoch}")
    kept = {"monitor": "val_recall@10", "mode": "max", "save_best_only": True}
    callbacks = [
        towers.FullCorpusMetrics(data, ks=(10,)),
        tf_keras.callbacks.ModelCheckpoint(best, **kept),
        tf_keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
    ]
    history = model.fit(data.train(64), epochs=3, callbacks=callbacks, verbose=0).history
    table = towers.evaluate(load(best), data, split="validation", ks=(10,))
    assert table.loc["recall@10", "model"] == max(history["val_recall@10"])
    final = model.query_embeddings().numpy()
    model.load_weights(str(tmp_path / "weights-1"))
    assert not np.array_equal(model.query_embeddings(), final)
    model.load_weights(str(tmp_path / "weights-3"))
    np.testing.assert_array_equal(model.query_embeddings(), final)
