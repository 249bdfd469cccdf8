"""Settings of the papers' tables and curves: each is a configuration, a curve shows one thing."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.paper_settings import FIGURES, TABLES
from benchmarks.paper_tables import settings_of
from samplers.losses.pairwise import soft_bpr_loss
from samplers.methods.by_name import METHODS
from towers.training.settings import TrainConfig


def test_every_row_is_a_configuration():
    for table in {**TABLES, **FIGURES}.values():
        for name, row in table.rows.items():
            settings = settings_of(row, table, name)
            config = TrainConfig(data="data", run="run", **settings)
            assert config.method in METHODS


@pytest.mark.parametrize("sweep", ["soft", "drawn", "kept", "of", "pool", "rho"])
def test_coupled_l2_weighs_as_much_against_the_loss_at_each_point_of_a_curve(sweep):
    table = FIGURES[sweep, "gowalla"]
    shares = []
    for name, row in table.rows.items():
        settings = settings_of(row, table, name)
        factor = 1.0
        if settings["method"] == "soft_bpr":
            factor = float(settings["options"].get("soft_factor", METHODS["soft_bpr"].soft_factor))
        score = tf.Variable([0.0])
        with tf.GradientTape() as tape:
            loss = soft_bpr_loss(score, tf.zeros([1, 1]), soft_factor=factor)
        shares.append(settings["l2"] / abs(tape.gradient(loss, score).numpy()[0]))
    np.testing.assert_allclose(shares, shares[0], rtol=1e-6)
