"""`--precision bfloat16`: embeddings are rounded, weights are not, and the ranking stays good."""

import numpy as np
import pytest
import tensorflow as tf

import towers
from towers.config import TrainConfig
from towers.held_out import HeldOut
from towers.legacy_keras import tf_keras
from towers.run_directory import make_model, open_run
from towers.train import train


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
