"""`twotower train`: one run, from its configuration to its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.contract import stores
from towers.data.interactions import RetrievalData, open_data
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import FullCorpusMetrics
from towers.model.distribution import is_chief, make_strategy, wait_for_all
from towers.model.memory import fit_to_memory
from towers.model.optimizers import make_optimizer, staircase_decay
from towers.model.two_tower import TwoTower
from towers.training.checkpoints import RunRecorder
from towers.training.earlier_run import check_held_out, keep_vocabularies, start_from_run
from towers.training.failures import (
    MemoryIsFull,
    check_data,
    compile_quietly,
    explain_divergence,
    full_disk,
    told_when_full,
)
from towers.training.frequency import open_frequency
from towers.training.run_directory import (
    CHECKPOINTS,
    LOGS,
    claim,
    make_model,
    only_writer,
    open_run,
    refit_settings,
)
from towers.training.settings import TrainConfig, parse_metric
from towers.training.teacher import soft_targets

log = logging.getLogger(__name__)
_STEPS_ON_A_GPU = 16  # that TensorFlow takes in a row
_TIMED_STEPS, _TIMED_PASSES = 20, 5  # of them, by which XLA is chosen or not


def train(config: TrainConfig, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains a model, or goes on with the run that its directory holds.

    A run that was killed goes on at the exact step of its last checkpoint: the order of the rows
    and all draws are functions of the seed and the step, so its final weights are, on the same
    machine, those of a run that was never interrupted; on a GPU if `deterministic` is set.

    Callbacks of Keras are told after an epoch is measured and its checkpoint written.

    Returns:
      The content of training.json: steps, seconds, history by epoch, which weights to use.

    Raises:
      ValueError: the data, the method or its options are wrong, the directory holds another run,
        or early stopping has no validation part to look at; later, the loss is no longer finite,
        the data were changed, or the disk is full: the last checkpoint is as good as ever.
    """
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    config = refit_settings(config) if config.refit else config
    strategy = make_strategy(config.strategy, config.devices)
    compile_quietly()
    data = open_data(config.data)
    if config.patience and data.num_rows("validation") == 0:
        raise ValueError(
            f"patience must be 0 without a validation part, got {config.patience}: prepare the "
            "data with --validation_ratio above 0, or leave out --patience."
        )
    prepared = data
    if config.refit:
        log.info("train: %d epochs on all rows, as %s chose", config.epochs, config.refit)
        data = data.all_as_train()
    config, frequency = open_frequency(config, data)
    targets, rows = None, data  # rows: whose train rows make up an epoch
    if config.teacher:
        teacher, earlier = open_run(stores.local_copy(config.teacher), prepared)
        check_held_out("teacher", config, earlier, same_data=True)
        log.info("train: the ranking of %s is read off", config.teacher)
        shown = config.teacher_candidates, config.teacher_graph
        targets, rows = soft_targets(teacher, data, *shown), data.by_query()
    with strategy.scope():
        model = make_model(config, frequency.counted(data), targets)
        batch = min(config.batch_size, rows.num_rows("train"))
        _compile(config, rows, model)
        fit_to_memory(model, batch)
        model.optimizer.build(model.trainable_variables)
        frequency.start(model.method)
        checkpoints = str(Path(config.run) / CHECKPOINTS)
        begun = tf.train.latest_checkpoint(checkpoints) and not config.overwrite
        if config.init_from and not begun:
            start_from_run(config, model, data)
    wait_for_all(strategy)  # all have read what the run directory held before
    with contextlib.ExitStack() as stack:
        if is_chief(strategy):
            again = ": the run goes on from its last checkpoint"
            stack.enter_context(told_when_full(config.run, again))
            stack.enter_context(only_writer(config.run))
            claim(config, data)
            frequency.keep(config.run)
            keep_vocabularies(config.run, data)
        wait_for_all(strategy)
        if frequency.directory:
            steps = rows.steps_per_epoch(config.batch_size)

            def renew(epoch: int, logs: Any) -> None:
                done = int(model.iteration.numpy())
                if done and done % steps == 0:  # an interrupted epoch goes on with its checkpoint
                    if is_chief(strategy):  # one looks, so that all workers take the same
                        frequency.renew(config, data)
                    wait_for_all(strategy)
                    frequency.read(config.run)
                    frequency.start(model.method)

            callbacks = [tf_keras.callbacks.LambdaCallback(on_epoch_begin=renew), *callbacks]
        return _train(config, data, rows, model, strategy, callbacks)


def _tensor_float_32() -> Any:
    """Products round factors to 10 bits of mantissa on a GPU: in steps, not in later callbacks.

    TensorFlow has it on. Here it is off, see `towers.legacy_keras`, so that scores are compared as
    they are, but for the steps with `--precision tf32` or `bfloat16`. Embeddings of bfloat16 have 7
    bits, so that it rounds nothing of them, and their products are added up in float32.
    """
    enable = tf.config.experimental.enable_tensor_float_32_execution
    return tf_keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: enable(True), on_epoch_end=lambda *_: enable(False)
    )


def _compile(config: TrainConfig, data: RetrievalData, model: TwoTower) -> None:
    """Gives the model its optimizer."""
    schedule = staircase_decay(
        config.learning_rate,
        config.learning_rate_decay,
        decay_epochs=config.decay_epochs,
        steps_per_epoch=data.steps_per_epoch(config.batch_size),
    )
    model.compile(
        optimizer=make_optimizer(config.optimizer, schedule, config.l2),
        # Python between steps costs a GPU that is faster than it; callbacks come after so many.
        steps_per_execution=_STEPS_ON_A_GPU if tf.config.list_physical_devices("GPU") else 1,
    )


def _train(
    config: TrainConfig,
    data: RetrievalData,
    rows: RetrievalData,
    model: TwoTower,
    strategy: tf.distribute.Strategy,
    further: Sequence[Any],
) -> dict[str, Any]:
    steps, chief = rows.steps_per_epoch(config.batch_size), is_chief(strategy)
    recorder = RunRecorder(config, model, steps, chief=chief)
    resumed = recorder.restore()
    wait_for_all(strategy)  # all have restored what the chief may now replace
    if (config.init_from or config.time_xla) and not resumed:
        recorder.save()  # the earlier run may change before this one goes on after a kill
    if config.time_xla and not resumed:
        batches = rows.train(config.batch_size, seed=config.seed).take(_TIMED_STEPS)
        faster = faster_with_xla(model, batches)
        recorder.restore()
        model.compiled = faster
        model.make_step()
        recorder.save()
    sizes = (rows.num_queries, rows.num_candidates, rows.num_rows("train"), steps)
    text = "train: %s, %d queries, %d candidates, %d rows, %d steps an epoch"
    log.info(text, config.method, *sizes)
    before = recorder.summary()
    if before["finished"]:
        more = "patience ended it" if before["stopped_early"] else "more --epochs go on with it"
        text = f"train: %s is finished after %d epochs; {more}, --overwrite begins again."
        log.info(text, config.run, before["epochs"])
    elif resumed:
        done = before["steps"]
        log.info("train: going on at step %d, in epoch %d", done, done // steps + 1)
    callbacks = [*_callbacks(config, data, recorder, chief), *further]
    while not recorder.summary()["finished"]:
        done = int(model.iteration.numpy())
        epoch, place = divmod(done, steps)
        try:
            model.fit(
                rows.train(config.batch_size, seed=config.seed, first_step=done),
                initial_epoch=epoch,
                # Keras takes the length of the first epoch for that of all: a rest goes alone.
                epochs=epoch + 1 if place else config.epochs,
                steps_per_epoch=steps - place,
                callbacks=callbacks,
                verbose=1 if sys.stdout.isatty() else 0,
            )
        except tf.errors.ResourceExhaustedError as error:
            if full_disk(error):  # TensorFlow has the same kind for it
                raise
            raise MemoryIsFull(
                f"the memory is full in a step with batch_size {config.batch_size}: lower it, or "
                "where the method has it score in blocks, --options block_size=1024."
            ) from error
        except tf.errors.InvalidArgumentError as error:
            step = int(model.iteration.numpy())
            raise explain_divergence(error, config, rows, step) or error from error
        finally:  # an epoch that failed has no end
            tf.config.experimental.enable_tensor_float_32_execution(False)
    summary = recorder.summary()
    if summary["stopped_early"]:
        text = "train: stopped after epoch %d, %s was best in epoch %d"
        log.info(text, summary["epochs"], config.validation_metric, summary["best_epoch"])
    values = (summary["steps"], summary["seconds"], summary["weights"], config.run)
    log.info("train: %d steps in %.0f s; weights %s in %s", *values)
    return summary


def faster_with_xla(model: TwoTower, batches: tf.data.Dataset) -> bool:
    """Whether passes over batches take less time by steps that XLA compiles; trains the model.

    Both take turns, so that what else the machine does weighs on both.
    """
    functions: dict[bool, Any] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for compiled in seconds:
        model.compiled = compiled
        model.make_step()
        model.fit(batches, verbose=0)
        functions[compiled] = model.train_function
    for _ in range(_TIMED_PASSES):
        for compiled, times in seconds.items():
            model.train_function, started = functions[compiled], time.perf_counter()
            model.fit(batches, verbose=0)
            times.append(time.perf_counter() - started)
    medians = {compiled: statistics.median(times) for compiled, times in seconds.items()}
    by = {compiled: 1e3 * median / len(batches) for compiled, median in medians.items()}
    log.info("train: a step takes %.1f ms with XLA, %.1f ms without", by[True], by[False])
    return by[True] < by[False]


def _callbacks(
    config: TrainConfig, data: RetrievalData, recorder: RunRecorder, chief: bool
) -> list[Any]:
    """Metrics before the recorder and TensorBoard, which read them from the logs."""
    began_with = config.data, data.fingerprint, "run trained", "--run"
    check = tf_keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: check_data(*began_with))
    callbacks: list[Any] = [check]
    if config.precision in ("tf32", "bfloat16"):
        callbacks.append(_tensor_float_32())
    if data.num_rows("validation"):
        metric, cut_off = parse_metric(config.validation_metric)
        names, ks = sorted({"recall", "ndcg", metric}), sorted({10, 20, 50, cut_off})
        callbacks.append(FullCorpusMetrics(data, "validation", metrics=names, ks=ks))
    callbacks.append(recorder)
    if chief:
        logs = str(Path(config.run) / LOGS)
        callbacks.append(tf_keras.callbacks.TensorBoard(logs, write_graph=False, profile_batch=0))
    return callbacks
