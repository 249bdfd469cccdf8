"""Several replicas train as one with the joined batch: weights, losses and states are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from towers.model.distribution import cut_into_parts, make_strategy
from towers.model.two_tower import TwoTower
from towers.training.settings import TrainConfig

REPLICAS = Path(__file__).parents[2] / "support" / "replicas.py"
QUICK = [  # rows that are negatives of each other, and a loss that looks at one row
    {"method": "xir", "cache_size": 32, "optimizer": "lazy_adam", "epochs": 1},
    {
        **{"method": "bpr", "last_rows": 1, "epochs": 1, "exclude_seen_negatives": True},
        "optimizer": "rowwise_adagrad",
    },
]
# One of each way to draw, to weight and to remember; others are trained below.
METHODS = (
    *("correct_sfx", "cbns", "bmns", "positive_mixing", "pris_u"),
    *("adasir_w", "aobpr", "sl_at_k", "kernel"),
)
OPTIONS = {
    "sl_at_k": {"k": 3, "num_negatives": 20, "refresh_epochs": 1},
    "cbns": {"warm_up": 1, "num_cached": 40},
    "bmns": {"num_mixed": 16},
    "positive_mixing": {"num_mixed": 16},
    "aobpr": {"num_negatives": 2},
    "pris_u": {"group_size": 4},
    "correct_sfx": {"alpha": 0.1},
}
MASKED = {"method": "bir", "mask_accidental_hits": True}
TOWERS = [
    {"tower": "light_gcn", "method": "mns", "batch_l2": 0.1},
    {"tower": "ngcf", "method": "pris_u", "group_size": 4, "num_layers": 2, "batch_l2": 0.1},
    {"tower": "fism", "method": "mns", "history": 4},
    {"tower": "svdpp", "method": "dns_mn", "history": 4, "share_items": False},
    {"tower": "features", "method": "dns_mn", "history": 4, "hidden": [8], "feature_dim": 4},
]


def run(cases, *arguments, replicas=2):
    command = [sys.executable, str(REPLICAS), str(replicas), json.dumps(cases)]
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal:") == len(cases)


@pytest.mark.long
def test_replicas_are_one_with_the_joined_batch():
    run(QUICK)


@pytest.mark.long
def test_methods_optimizers_xla_bfloat16_and_a_task_of_tfrs():
    run(
        [{"method": name, "epochs": 1} | OPTIONS.get(name, {}) for name in METHODS]
        + [{"method": "full_softmax", "teacher": True, "num_chosen": 4}]
        + [{"method": "soft_bpr", "mix": "uniform", "epochs": 1}]
        + [{"method": "ssl_pop", "optimizer": "adam"}]
        + [{"method": "ssl_pop", "optimizer": "adagrad", "epochs": 1}]
        + [{"method": "ssl_pop", "policy": "mixed_bfloat16", "epochs": 1}]
        + [MASKED | {"jit_compile": True, "epochs": 1, "last_rows": 0}]
        + [{"task": "xir"}]
    )


@pytest.mark.long
def test_three_replicas_of_which_the_last_batch_leaves_one_without_rows():
    run(
        [
            {"method": "bpr", "optimizer": "adam", "reduction": "sum", "last_rows": 2},
            {"method": "xir", "cache_size": 32, "redraw": "drawn", "last_rows": 2},
            {"method": "bir", "draws": "independent", "last_rows": 1},
        ],
        replicas=3,
    )


@pytest.mark.long
def test_every_tower(attributed):
    run([{"epochs": 1} | case for case in TOWERS], attributed)


def test_strategies_without_steps_together_are_errors(data):
    with (
        tf.distribute.experimental.CentralStorageStrategy().scope(),
        pytest.raises(ValueError, match=r"^a model must be built under MirroredStrategy.*Central"),
    ):
        TwoTower(data, 4)


def test_one_device_is_no_part(data):
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = TwoTower(data, 4, jit_compile=False)
        model.compile(optimizer="sgd")
    model.fit(data.train(64), verbose=0)
    assert int(model.iteration.numpy()) == data.steps_per_epoch(64)


def test_validation_data_are_refused_before_the_first_epoch(data):
    given = {"x": data.train(64), "validation_data": data.train(64)}
    with pytest.raises(ValueError, match=r"^validation_data must be left out .*FullCorpusMetrics"):
        cut_into_parts(given, tf.distribute.get_strategy())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "tpu"}, "^strategy must be one of none, mirrored, multi_worker"),
        ({"precision": "float16"}, "^precision must be one of float32, tf32, bfloat16"),
        ({"devices": 2}, "^devices must be 0 without --strategy mirrored, got 2"),
        ({"strategy": "mirrored", "devices": 8, "batch_size": 4}, "^batch_size .* devices = 8"),
    ],
)
def test_wrong_settings_are_errors(settings, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(data="d", run="r", **settings)


@pytest.mark.parametrize(
    ("settings", "config", "text"),
    [
        ({"strategy": "multi_worker"}, "", "^TF_CONFIG must be .*, got ''.$"),
        ({"strategy": "multi_worker"}, '{"task": {}}', "^TF_CONFIG must be .*task"),
        (
            {"strategy": "multi_worker"},
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "^TF_CONFIG must be .*a:1",
        ),
        ({"strategy": "mirrored", "devices": 2}, "", "^devices=2 parts of the CPU must be made"),
    ],
)
def test_what_a_strategy_lacks_is_told(settings, config, text, monkeypatch):
    tf.constant(0)  # TensorFlow is in use
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=text):
        make_strategy(**settings)
