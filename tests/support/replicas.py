"""Trains models on one replica and on several, and compares all that training has changed.

    python tests/support/replicas.py REPLICAS '[{"method": "ssl_pop"}, ...]' [DATA]

A process of its own, since the CPU is cut into logical devices before TensorFlow is used; and one
for each number of replicas, since the strategies of a process number their gathers alike.
"""

import contextlib
import json
import sys

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import towers
from towers.legacy_keras import tf_keras, tfrs
from towers.model.optimizers import LazyAdam, RowwiseAdagrad, SparseAdagrad
from towers.model.two_tower import TwoTower
from towers.training.teacher import soft_targets

BATCH = 61  # no multiple of a number of replicas
ROUGH = {"rtol": 0.02, "atol": 0.01}  # for bfloat16


OPTIMIZERS = {
    "sgd": lambda: tf_keras.optimizers.SGD(1.0),
    "adam": lambda: towers.CoupledAdam(0.01, l2=1e-3),
    "lazy_adam": lambda: LazyAdam(0.01, l2=1e-3),
    "adagrad": lambda: SparseAdagrad(0.1, l2=1e-3),
    "rowwise_adagrad": lambda: RowwiseAdagrad(0.1, l2=1e-3),
}


def make_data(last_rows):
    """Pairs with popular candidates, for epochs of two whole batches and `last_rows`."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 30, 900), (25 * rng.random(900) ** 2).astype(int)
    pairs = pd.DataFrame({"user_id": users, "item_id": items}).drop_duplicates(ignore_index=True)
    pairs["weight"] = 1 + pairs["user_id"] % 3 / 2
    data = towers.from_dataframe(pairs, user="user_id", item="item_id", train_ratio=0.8)
    kept = {name: values[: 2 * BATCH + last_rows] for name, values in data.arrays("train").items()}
    kept["weight"] = (1 + kept["query_id"] % 3 / 2).astype(np.float32)
    counts = np.bincount(kept["candidate_id"], minlength=data.num_candidates)
    return towers.RetrievalData(
        data.query_vocabulary,
        data.candidate_vocabulary,
        counts,
        lambda split: kept if split == "train" else data.arrays(split),
        fingerprint="",
    )


def trained(data, case, strategy=None):
    case = {"jit_compile": False, "normalize": True, "temperature": 0.3} | case
    optimizer, epochs = case.pop("optimizer", "sgd"), case.pop("epochs", 2)
    tf_keras.mixed_precision.set_global_policy(case.pop("policy", "float32"))
    if case.pop("teacher", False):
        case["targets"] = soft_targets(TwoTower(data, 6, seed=5), data, 7)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = TwoTower(data, 6, init_stddev=0.5, **case)
        model.compile(optimizer=OPTIMIZERS[optimizer]())
    if strategy is not None and not model.method.row_by_row:
        watch_that_work_is_divided(model, strategy.num_replicas_in_sync)
    history = model.fit(data.train(BATCH, seed=3), epochs=epochs, verbose=0).history
    return model, history["loss"]


def values_of(model):
    """All that a run changes: weights, states of the method and of the optimizer, the counter."""
    variables = {f"weight {number}": v for number, v in enumerate(model.trainable_variables)}
    variables |= {f"optimizer {number}": v for number, v in enumerate(model.optimizer.variables)}
    variables |= {f"method {number}": v for number, v in enumerate(model.method.variables)}
    return {name: v.numpy() for name, v in (variables | {"iteration": model.iteration}).items()}


def compare(alone, together, rtol=1e-4, atol=2e-6):
    """Raises an AssertionError that names what differs."""
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        np.testing.assert_allclose(together[name], expected, rtol=rtol, atol=atol, err_msg=name)


def copies_of(model):
    """What each replica holds of every variable."""
    strategy = model.distribute_strategy
    variables = [*model.trainable_variables, *model.method.variables, model.iteration]
    return [[c.numpy() for c in strategy.experimental_local_results(v)] for v in variables]


def check_that_a_part_has_no_loss(model, batch):
    """`compute_loss` of the part of one replica would leave out negatives."""
    with pytest.raises(ValueError, match=r"^compute_loss must have the whole batch"):
        model.distribute_strategy.run(model.compute_loss, args=(batch,))


def check_where_the_counter_is():
    """Seeds are made of it on the host, and nothing comes from an accelerator for them."""
    with tf.device("CPU:1"):  # in place of a GPU
        model = TwoTower(make_data(30), 6, "ssl_pop", jit_compile=False)
    assert model.query_tower.table.device.endswith("CPU:1")
    assert model.iteration.device.endswith("CPU:0")


def watch_that_work_is_divided(model, replicas):
    """Where rows are negatives of each other, a replica has the loss of its part of the rows."""
    loss = model.method.loss

    def watched(encoders, batch, *arguments, **keywords):
        losses = loss(encoders, batch, *arguments, **keywords)
        columns = tf.shape(encoders.columns)[0]
        checks = [
            tf.debugging.assert_less_equal(columns, BATCH),
            tf.debugging.assert_less(replicas * (tf.size(losses) - 1), columns),
        ]
        with tf.control_dependencies(checks):
            return tf.identity(losses)

    model.method.loss = watched


class StockModel(tfrs.Model):
    """A model of stock TFRS with one of our methods, whose `compute_loss` passes nothing on."""

    def __init__(self, data, method):
        super().__init__()
        self.queries = tf_keras.layers.Embedding(data.num_queries, 6)
        self.candidates = tf_keras.layers.Embedding(data.num_candidates, 6)
        self.task = towers.RetrievalTask(
            method,
            frequency=data.train_counts,
            num_candidates=data.num_candidates,
            candidate_encoder=self.candidates,
        )

    def compute_loss(self, inputs, training=False):
        ids = inputs["candidate_id"]
        embedded = self.queries(inputs["query_id"]), self.candidates(ids)
        return self.task(*embedded, candidate_ids=ids, compute_metrics=False)


def check_a_task(case, strategy):
    """Training counts its steps on all replicas alike, evaluation counts none."""
    data = make_data(30)
    with strategy.scope():
        model = StockModel(data, case["task"])
        model.compile(optimizer=tf_keras.optimizers.SGD(1.0))
    rows = data.train(BATCH).take(2)
    model.fit(rows, verbose=0)
    model.evaluate(rows, verbose=0)
    for variable in [*model.trainable_variables, model.task.iteration]:
        copies = strategy.experimental_local_results(variable)
        assert len(copies) == strategy.num_replicas_in_sync
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
    assert int(model.task.iteration.numpy()) == 2


def main():
    """Compares every case; the first difference ends it."""
    replicas = int(sys.argv[1])
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, logical)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])
    check_where_the_counter_is()
    for case in json.loads(sys.argv[2]):
        if "task" in case:
            check_a_task(case, strategy)
            print("equal:", case, flush=True)
            continue
        name, rows = str(case), case.pop("last_rows", 30)
        data = towers.open_data(sys.argv[3]) if "tower" in case else make_data(rows)
        alone, losses = trained(data, case)
        together, joined_losses = trained(data, case, strategy)
        try:
            # A last bit that differs may round to another bfloat16, which has 8 bits.
            rough = "policy" in case
            rtol = 1e-3 if rough else 1e-5
            np.testing.assert_allclose(joined_losses, losses, rtol=rtol, err_msg="loss")
            compare(values_of(alone), values_of(together), **(ROUGH if rough else {}))
            for copies in copies_of(together):
                assert len(copies) == replicas
                for copy in copies[1:]:
                    np.testing.assert_array_equal(copy, copies[0], err_msg="copies of a variable")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        check_that_a_part_has_no_loss(together, next(iter(data.train(8))))
        print("equal:", name, flush=True)


if __name__ == "__main__":
    main()
