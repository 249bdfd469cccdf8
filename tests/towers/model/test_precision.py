"""`--precision bfloat16`: embeddings are rounded, weights are not, and the ranking stays good."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import towers
from towers.encoders.tower import IdTower
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.training.run_directory import make_model, open_run
from towers.training.settings import TrainConfig
from towers.training.train import train


def fitted(data, precision, **settings):
    config = TrainConfig(
        data="d",
        run="r",
        dim=8,
        normalize=True,
        temperature=0.125,
        precision=precision,
        jit_compile=False,
        **settings,
    )
    model = make_model(config, data)
    assert tf_keras.mixed_precision.global_policy().name == "float32"
    model.compile(optimizer=towers.CoupledAdam(0.05))
    model.fit(data.train(60), epochs=12, verbose=0)
    return model


def recall(model, data):
    tables = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    return HeldOut(data, "test").measure(*tables, (2,))[0]["recall@2"]


def is_rounded(values):
    return np.array_equal(tf.cast(tf.cast(values, tf.bfloat16), tf.float32), values)


@pytest.mark.parametrize(
    ("precision", "method", "options"),
    [
        ("bfloat16", "ssl_pop", ()),
        pytest.param("bfloat16", "bmns", ("num_mixed=16",), marks=pytest.mark.long),
    ],
)
def test_checkerboard(checkerboard, precision, method, options):
    model = fitted(checkerboard, precision, method=method, options=options)
    assert recall(model, checkerboard) == 1.0
    # Their product with 8 = 1 / temperature is exact.
    assert is_rounded(model.query_embeddings())
    assert is_rounded(model.candidate_embeddings())
    assert not is_rounded(model.query_tower.table)
    without = make_model(TrainConfig(data="d", run="r", dim=8), checkerboard)
    assert not is_rounded(without.query_embeddings())


class Watch(tf_keras.callbacks.Callback):
    """Whether products may be rounded to TensorFloat-32, in the steps and after an epoch."""

    def __init__(self):
        super().__init__()
        self.in_steps, self.after = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.in_steps.append(tf.config.experimental.tensor_float_32_execution_enabled())

    def on_epoch_end(self, epoch, logs=None):
        self.after.append(tf.config.experimental.tensor_float_32_execution_enabled())


@pytest.mark.parametrize(
    ("precision", "rounds"),
    [
        ("bfloat16", True),
        pytest.param("tf32", True, marks=pytest.mark.long),
        ("float32", False),
    ],
)
def test_only_steps_of_training_round_and_a_run_remembers_its_precision(
    prepared, tmp_path, precision, rounds
):
    settings = {"dim": 4, "batch_size": 512, "epochs": 1, "jit_compile": False}
    config = TrainConfig(
        data=str(prepared), run=str(tmp_path / "run"), precision=precision, **settings
    )
    watch = Watch()
    train(config, [watch])
    assert set(watch.in_steps) == {rounds}
    assert watch.after == [False]
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    model, opened = open_run(config.run, towers.open_data(prepared))
    assert opened.recorded()["precision"] == precision
    assert is_rounded(model.candidate_embeddings()) == (precision == "bfloat16")
    other = "float32" if precision == "bfloat16" else "bfloat16"
    with pytest.raises(ValueError, match=f"precision '{precision}' → '{other}'"):
        train(dataclasses.replace(config, precision=other))


def test_lengths_are_taken_in_float32():
    rows = tf.random.stateless_normal([50, 24], [1, 2]) + 1.0
    rounded = tf.cast(rows, tf.bfloat16)
    lengths = np.linalg.norm(tf.cast(rounded, tf.float64), axis=1, keepdims=True)
    expected = tf.cast(tf.cast(rounded, tf.float64) / lengths, tf.bfloat16)
    tower = IdTower(50, 24, normalize=True, dtype="mixed_bfloat16")
    found = tower(rows)
    assert found.dtype == tf.bfloat16
    # A float32 next to a tie may round the other way.
    different = tf.reduce_mean(tf.cast(found != expected, tf.float32))
    assert different < 0.01
