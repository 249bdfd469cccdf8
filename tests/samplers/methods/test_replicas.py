"""Methods whose state is written inside a step, on two replicas of a distribution strategy."""

import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import samplers

N, Q, D = 12, 7, 3
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
queries = tf.random.stateless_normal([Q, D], [1, 2])
table = tf.random.stateless_normal([N, D], [1, 3])
batch = samplers.Batch(tf.constant([1, 2, 3], tf.int64), tf.constant([4, 5, 6], tf.int64))
encoders = samplers.Encoders(
    query=tf.gather(queries, batch.query_ids),
    positive=tf.gather(table, batch.candidate_ids),
    candidates=lambda ids: tf.gather(table, ids),
    corpus=lambda: table,
    queries=lambda ids: tf.gather(queries, ids),
)


def step(method, compiled=False):
    call = tf.function(method) if compiled else method
    losses = call(encoders, batch, seed=tf.constant([1, 2], tf.int64))
    method.update(batch)
    return losses


def check(name, compiled=False, **options):
    def make():
        frequency = np.arange(1, N + 1)
        return samplers.build(
            name, frequency=frequency, num_candidates=N, num_queries=Q, **options
        )

    alone = make()
    with strategy.scope():
        mirrored = make()
    on_replicas = tf.function(lambda: strategy.run(step, args=(mirrored, compiled)))
    for _ in range(3):
        expected = step(alone)
        for losses in strategy.experimental_local_results(on_replicas()):
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
        alone.end_epoch(encoders)
        mirrored.end_epoch(encoders)
    restored = make()
    checkpoint = tf.train.Checkpoint(method=mirrored).write(f"/{FOLDER}/{name}")
    tf.train.Checkpoint(method=restored).read(checkpoint).assert_consumed()
    np.testing.assert_allclose(step(restored), step(alone), rtol=1e-5)


for name in ("adasir_w", "aobpr", "kernel", "correct_sfx"):
    check(name)
check("xir")
check("cbns", warm_up=1)
check("sl_at_k", k=3)
"""


@pytest.mark.long
def test_replicas_write_their_state_alike(tmp_path):
    script = SCRIPT.replace("/{FOLDER}", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
