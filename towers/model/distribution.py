"""Strategies of `tf.distribute`: which ones train a model, how they are made, what each reads."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def make_strategy(strategy: str, devices: int = 0) -> tf.distribute.Strategy:
    """The strategy of a name; the default one of TensorFlow for "none".

    The first thing of a process: TensorFlow takes devices and workers as they are at its first
    operation. A ValueError where that is too late, there are not so many devices, or TF_CONFIG is
    missing or wrong.
    """
    if strategy == "mirrored":
        return _mirrored(devices)
    if strategy == "multi_worker":
        return _multi_worker()
    return tf.distribute.get_strategy()


def _mirrored(devices: int) -> tf.distribute.Strategy:
    gpus = tf.config.list_physical_devices("GPU")
    if devices > len(gpus) > 0:
        raise ValueError(
            f"devices must be at most the {len(gpus)} GPUs of this machine, got {devices}; change "
            "--devices."
        )
    if gpus:
        return tf.distribute.MirroredStrategy([f"GPU:{n}" for n in range(devices or len(gpus))])
    devices = devices or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * devices
    if tf.config.get_logical_device_configuration(cpu) != logical:
        with _at_first(f"devices={devices} parts of the CPU must be made"):
            tf.config.set_logical_device_configuration(cpu, logical)
    return tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(devices)])


def _multi_worker() -> tf.distribute.Strategy:
    text = os.environ.get("TF_CONFIG", "")
    try:
        settings = json.loads(text)
        task = settings["task"]
        places = settings["cluster"][task["type"]]
        good = task["type"] in ("worker", "chief") and 0 <= int(task["index"]) < len(places)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(
            'TF_CONFIG must be {"cluster": {"worker": ["host:port", ...]}, "task": {"type": '
            '"worker", "index": 0}} in the environment of every worker with --strategy '
            f"multi_worker, got {text!r}."
        )
    with _at_first("workers must be joined"):
        return tf.distribute.MultiWorkerMirroredStrategy()


@contextlib.contextmanager
def _at_first(rule: str) -> Iterator[None]:
    """A block that TensorFlow refuses once it is in use, told as an error of the user's."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"{rule} before TensorFlow is used: train in a process of its own, or build a strategy "
            "before anything else."
        ) from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes: of several workers, the first."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = strategy.cluster_resolver
    chief = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    # Without TF_CONFIG one worker is alone, and has no type.
    return not resolver.task_type or (resolver.task_type, resolver.task_id) == (chief, 0)


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Returns when every worker has come here."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        here = strategy.run(tf.function(lambda: tf.constant(1.0)))
        strategy.reduce(tf.distribute.ReduceOp.SUM, here, axis=None)


def check_strategy() -> None:
    """Raises ValueError in the scope of a strategy under which no model can be trained."""
    strategy = tf.distribute.get_strategy()
    known = (
        tf.distribute.OneDeviceStrategy,
        tf.distribute.MirroredStrategy,
        tf.distribute.MultiWorkerMirroredStrategy,
    )
    if tf.distribute.has_strategy() and not isinstance(strategy, known):
        raise ValueError(
            "a model must be built under MirroredStrategy, MultiWorkerMirroredStrategy or "
            f"OneDeviceStrategy, got {type(strategy).__name__}, whose replicas do not take a step "
            "together: build it in the scope of one of them, or of none."
        )


def cut_into_parts(arguments: dict[str, Any], strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """The arguments of `fit` with a data set of joined batches, of known length, cut into parts."""
    if arguments.get("validation_data") is not None:
        raise ValueError(
            "validation_data must be left out on several replicas, where a batch of it would be "
            "without the negatives of the others: measure it by a callback, "
            'towers.FullCorpusMetrics(data, "validation").'
        )
    dataset = arguments.get("x")
    if not isinstance(dataset, tf.data.Dataset):
        return arguments
    steps = arguments.get("steps_per_epoch") or int(dataset.cardinality())
    if steps < 1:
        raise ValueError(
            "steps_per_epoch must be given on several replicas for a data set of unknown length, "
            "such as one that starts in mid-epoch."
        )
    epochs = arguments.get("epochs", 1) - arguments.get("initial_epoch", 0)
    parts = split_batches(dataset, strategy, steps=steps * epochs)
    return arguments | {"x": parts, "steps_per_epoch": steps}


def split_batches(
    dataset: tf.data.Dataset, strategy: tf.distribute.Strategy, *, steps: int
) -> tf.distribute.DistributedDataset:
    """The batches of a data set, each cut into a part for every replica, in their order.

    The parts of a batch, joined, are that batch. They differ by one row at most, and where there
    are fewer rows than replicas some are empty. Every worker reads the whole data set, and leaves
    out what is not for its replicas. After the end the data set begins anew, until there were
    `steps` batches; they are nests of tensors, with a row for every row of the batch.
    """
    replicas = strategy.num_replicas_in_sync

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        here = replicas // context.num_input_pipelines
        first_replica = context.input_pipeline_id * here

        def cut(batch: Any) -> tf.data.Dataset:
            rows = tf.shape(tf.nest.flatten(batch)[0], tf.int64)[0]

            def part(number: tf.Tensor) -> Any:
                first, end = part_bounds(rows, number, replicas)
                return tf.nest.map_structure(lambda column: column[first:end], batch)

            return tf.data.Dataset.range(first_replica, first_replica + here).map(part)

        return dataset.repeat().take(steps).flat_map(cut).prefetch(here)

    return strategy.distribute_datasets_from_function(of_worker)


def part_bounds(rows: Any, number: Any, parts: Any) -> tuple[Any, Any]:
    """The first row and the end of part `number` of `parts`, whose sizes differ by one at most."""
    return number * rows // parts, (number + 1) * rows // parts
