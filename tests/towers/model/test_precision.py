"""`--precision bfloat16`: embeddings are rounded, weights are not, and the ranking stays good."""

import numpy as np
import pytest
import tensorflow as tf

import towers
from towers.encoders.id_tower import IdTower
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.training.run_directory import make_model, open_run
from towers.training.settings import TrainConfig
from towers.training.train import train


def fitted(data, precision, **settings):
    config = TrainConfig(
        data="d", run="r", dim=8, normalize=True, temperature=0.125, precision=precision, **settings
    )
    model = make_model(config, data)
    assert tf_keras.mixed_precision.global_policy().name == "float32"
    model.compile(optimizer=towers.CoupledAdam(0.05))
    model.fit(data.train(60), epochs=20, verbose=0)
    return model


def recall(model, data):
    tables = model.query_embeddings().numpy(), model.candidate_embeddings().numpy()
    return HeldOut(data, "test").measure(*tables, (2,))[0]["recall@2"]


def is_rounded(values):
    return np.array_equal(tf.cast(tf.cast(values, tf.bfloat16), tf.float32), values)


@pytest.mark.parametrize("method", ["ssl_pop", pytest.param("bmns", marks=pytest.mark.long)])
def test_checkerboard_in_both_precisions(checkerboard, method):
    options = {"method": method, "options": () if method == "ssl_pop" else ("num_mixed=16",)}
    for precision in ("float32", "bfloat16"):
        model = fitted(checkerboard, precision, **options)
        assert recall(model, checkerboard) == 1.0
        # Their product with 8 = 1 / temperature is exact.
        assert is_rounded(model.query_embeddings()) == (precision == "bfloat16")
        assert is_rounded(model.candidate_embeddings()) == (precision == "bfloat16")
        assert not is_rounded(model.query_tower.table)


def test_a_run_remembers_its_precision(prepared, tmp_path):
    config = TrainConfig(
        data=str(prepared), run=str(tmp_path / "run"), dim=8, epochs=1, precision="bfloat16"
    )
    train(config)
    model, opened = open_run(config.run, towers.open_data(prepared))
    assert opened.recorded()["precision"] == "bfloat16"
    assert is_rounded(model.candidate_embeddings())
    with pytest.raises(ValueError, match="precision 'bfloat16' → 'float32'"):
        train(TrainConfig(data=config.data, run=config.run, dim=8, epochs=1))


class Watch(tf_keras.callbacks.Callback):
    """Whether products may be rounded to TensorFloat-32, in the steps and after an epoch."""

    def __init__(self):
        super().__init__()
        self.in_steps, self.after = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.in_steps.append(tf.config.experimental.tensor_float_32_execution_enabled())

    def on_epoch_end(self, epoch, logs=None):
        self.after.append(tf.config.experimental.tensor_float_32_execution_enabled())


@pytest.mark.parametrize(("precision", "rounds"), [("float32", False), ("tf32", True)])
def test_only_steps_of_training_round_to_tensor_float_and_only_if_asked(
    prepared, tmp_path, precision, rounds
):
    run, watch = str(tmp_path / "run"), Watch()
    config = TrainConfig(data=str(prepared), run=run, dim=4, epochs=2, precision=precision)
    train(config, [watch])
    assert set(watch.in_steps) == {rounds}
    assert watch.after == [False, False]
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


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
