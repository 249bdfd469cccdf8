"""A step of training: look-ups, the loss and its gradients, the optimizer, the method's state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from pipeline.contract import schema
from samplers.candidates import Batch, Candidates
from samplers.methods.method import Method, require, without_gradient
from samplers.random_numbers import HOST, split_seed, step_seed
from samplers.selection.validity import weigh_rows
from samplers.state import state_variable
from towers.encoders.tower_pair import Tables, TowerPair, floats_in
from towers.legacy_keras import tf_keras, tfrs
from towers.model.optimizers import OPTIMIZERS
from towers.model.replica_part import MeanOfAll, WholeBatch, check_alone, part_of, sum_gradients

MUST_BE_FINITE = "of a training step must be finite"  # what `finite_loss` says when it fails


class TrainedPair(tfrs.Model):
    """A pair of towers that a method of `samplers` trains, behind the interface of Keras.

    Args:
      towers: the pair.
      method: made by `samplers.build`.
      seed, reduction, batch_l2, jit_compile: as `TwoTower` has them.
    """

    def __init__(
        self,
        towers: TowerPair,
        method: Method,
        *,
        seed: int,
        reduction: str,
        batch_l2: float,
        jit_compile: bool | None,
    ) -> None:
        super().__init__()
        self._towers, self.method = towers, method
        self.query_tower, self.candidate_tower = towers.query, towers.candidate
        self.propagation = towers.propagation
        self.reduction, self._seed, self._batch_l2 = reduction, seed, batch_l2
        with tf.device(HOST):
            self.iteration = state_variable(tf.constant(0, tf.int64), "iteration")
        self.mean_loss = MeanOfAll(name="loss")
        if jit_compile is None:
            has_gpu = bool(tf.config.list_physical_devices("GPU"))
            jit_compile = method.faster_with_xla or has_gpu
        self.compiled = jit_compile  # steps by XLA
        self.make_step()
        self.built = True

    def compile(self, optimizer: Any = "adam", *args: Any, **kwargs: Any) -> None:
        """As Keras has it; a name of `twotower train --optimizer` is that optimizer."""
        if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
            optimizer = OPTIMIZERS[optimizer]()
        super().compile(optimizer, *args, **kwargs)

    def make_step(self) -> None:
        """Forgets traced steps, after `compiled` or a setting of the method has changed."""
        self._differentiate = tf.function(self._loss_and_gradients, jit_compile=self.compiled)
        self.train_function = None

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The reduced loss of a batch, as TFRS asks for it; a scalar.

        Towers drop nothing at random unless in training, and the method remembers nothing. A
        ValueError in one of several replicas, whose batch is a part of what they have.
        """
        check_alone()
        batch = _as_batch(inputs)
        seed = step_seed(self._seed, self.iteration)
        drop = _drop_seed(seed) if training else None
        tables, rows = self._towers.look_up(batch, drop)
        encoders = self._towers.encoders(rows, tables, drop)
        return self._reduce(self.method(encoders, batch, seed=seed), batch)

    def train_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Look-ups, then gradients in one compiled unit, then the optimizer and the method."""
        batch, seed = _as_batch(inputs), step_seed(self._seed, self.iteration)
        first, second = split_seed(seed)
        drop = _drop_seed(seed)
        with tf.GradientTape() as tape:
            tables, rows = self._towers.look_up(batch, drop)
            part = part_of(batch, rows, self._towers, row_by_row=self.method.row_by_row)
            with tape.stop_recording():
                proposed = self._propose(part, tables, first, drop)
            if proposed is not None:
                part.add_proposed(
                    proposed.ids, lambda ids: self._towers.candidate_rows(ids, tables, drop)
                )
            penalty = self._penalty(part.batch, proposed, part.num_rows)
        batch = self.method.with_seen(part.batch, proposed)
        scaled = isinstance(self.optimizer, tf_keras.mixed_precision.LossScaleOptimizer)
        scale = tf.constant(1.0)
        if scaled:
            scale = self.optimizer.get_scaled_loss(scale)
        loss, by_rows, by_variables, worst = self._differentiate(
            batch, part.num_rows, proposed, tables, part.rows, second, drop, scale
        )
        # Scaled gradients may overflow: the optimizer that scales them leaves such a step out.
        loss = finite_loss(part.total(loss), None if scaled else worst)
        # Or the counters would run ahead of a step that finds no more data.
        with tf.control_dependencies([loss]):
            looked_up, by_rows = floats_in(tables, part.own), part.by_looked_up(tables, by_rows)
            if penalty is not None:
                looked_up, by_rows = [*looked_up, penalty], [*by_rows, scale]
            known = [gradient is not None for gradient in by_rows]
            through = tape.gradient(  # sparse where only rows of a table have one
                list(itertools.compress(looked_up, known)),
                self.trainable_variables,
                output_gradients=list(itertools.compress(by_rows, known)),
            )
            gradients = [sum_gradients(both) for both in zip(through, by_variables, strict=True)]
            if scaled:
                gradients = self.optimizer.get_unscaled_gradients(gradients)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            part.sum_up(self.method.counted)
            self.method.update(part.joined)
            self.iteration.assign_add(1)
            self.mean_loss.update_state(loss)
        return {"loss": self.mean_loss.result()}

    def end_epoch(self) -> None:
        """Tells the method that an epoch has ended; `EndOfEpoch` does it."""
        self.method.end_epoch(self._towers.encoders_without_batch())

    def _propose(
        self, part: WholeBatch, tables: Tables, seed: tf.Tensor, drop: tf.Tensor
    ) -> Candidates | None:
        """The method's steps before its loss, none of which has a gradient."""
        encoders = without_gradient(self._towers.encoders(part.rows, tables, drop))
        self.method.refresh(encoders, seed=seed)
        proposed = self.method.propose(part.queries(encoders.query), part.joined, seed=seed)
        if proposed is None:
            return None
        return self.method.select(encoders, part.batch, part.drawn(proposed))

    def _penalty(
        self, batch: Batch, proposed: Candidates | None, num_rows: tf.Tensor | None
    ) -> tf.Tensor | None:
        """`batch_l2` of the rows of a batch, reduced as losses are: a scalar; None for 0.

        The published code of LightGCN (He et al., SIGIR 2020) adds it to the loss:
            λ / (2 B) Σ_b (|θ_u|² + |θ_i|² + Σ_j |θ_j|²)
        over the rows b of a batch, θ the tables before they spread over the graph. Negatives that
        a batch shares are not in it, and the loss that is logged is without it.
        """
        if not self._batch_l2:
            return None
        ids = batch.candidate_ids[:, None]  # [B, 1 + N]
        if proposed is not None and proposed.ids.shape.rank != 1:
            ids = tf.concat([ids, proposed.by_row(tf.size(batch.query_ids)).ids], axis=1)
        rows = tf.gather(self.candidate_tower.table, ids)
        squares = tf.reduce_sum(tf.square(rows), axis=[1, 2])
        rows = tf.gather(self.query_tower.table, batch.query_ids)
        squares += tf.reduce_sum(tf.square(rows), axis=1)
        losses = weigh_rows(self._batch_l2 / 2 * squares, batch._replace(weight=None))
        return self._reduce(losses, batch, num_rows)

    def _reduce(
        self, losses: tf.Tensor, batch: Batch, num_rows: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Sum of the losses, or their mean: over `num_rows`, or the rows that are not padding."""
        total = tf.reduce_sum(losses)
        if self.reduction == "sum":
            return total
        if num_rows is not None:
            return tf.math.divide_no_nan(total, tf.cast(num_rows, total.dtype))
        if batch.valid is None:
            return total / tf.cast(tf.size(losses), total.dtype)
        return tf.math.divide_no_nan(total, tf.reduce_sum(tf.cast(batch.valid, total.dtype)))

    def _loss_and_gradients(
        self,
        batch: Batch,
        num_rows: tf.Tensor | None,
        proposed: Candidates | None,
        tables: Tables,
        rows: dict[str, Any],
        seed: tf.Tensor,
        drop: tf.Tensor,
        loss_scale: tf.Tensor,
    ) -> tuple[tf.Tensor, list[Any], list[Any], tf.Tensor]:
        """The loss, its gradients by what was looked up and by variables, and the worst of these.

        What the loss does not depend on has None for a gradient.
        """
        looked_up = floats_in(tables, rows)
        with tf.GradientTape() as tape:
            tape.watch(looked_up)
            encoders = self._towers.encoders(rows, tables, drop)
            if proposed is not None:
                gathered, embed = self.candidate_tower(rows["proposed"]), encoders.candidates
                encoders = encoders._replace(
                    candidates=lambda ids: gathered if ids is proposed.ids else embed(ids)
                )
            losses = self.method.loss(encoders, batch, proposed, seed=seed)
            loss = self._reduce(losses, batch, num_rows)
            scaled = loss * loss_scale
        by_rows, by_variables = tape.gradient(scaled, (looked_up, self.trainable_variables))
        return loss, by_rows, by_variables, worst_of([*by_rows, *by_variables])


class EndOfEpoch(tf_keras.callbacks.Callback):
    """Tells the method of a `TrainedPair` that an epoch has ended."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.end_epoch()


def _as_batch(inputs: Mapping[str, tf.Tensor]) -> Batch:
    return Batch(
        *(_dense_ids(inputs, f"{side}_id") for side in schema.SIDES),
        *(inputs.get(name) for name in (schema.WEIGHT, "valid")),
    )


def _dense_ids(inputs: Mapping[str, tf.Tensor], name: str) -> tf.Tensor:
    ids = tf.convert_to_tensor(inputs[name])
    rule = "whole numbers, as encode_queries and encode_candidates of the data give them"
    require(ids.dtype.is_integer, name, rule, ids.dtype.name)
    return tf.cast(ids, tf.int64)


def _drop_seed(seed: tf.Tensor) -> tf.Tensor:
    """The seed of what the towers drop in a step, from that of the step: int64 [2]."""
    with tf.device(HOST):
        return tf.random.experimental.stateless_fold_in(seed, 1)


def worst_of(gradients: Iterable[Any]) -> tf.Tensor:
    """0, infinity where a gradient has one, NaN where one has that: a scalar, float32.

    Taken in what XLA compiles, so that one number of all gradients goes to the host.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in known]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
    nan = tf.reduce_any([tf.reduce_any(tf.math.is_nan(value)) for value in values])
    return tf.where(nan, float("nan"), tf.where(finite, 0.0, float("inf")))


def finite_loss(loss: tf.Tensor, worst: tf.Tensor | None) -> tf.Tensor:
    """The loss, for a step to wait for before it writes anything; `worst` None: not looked at.

    At run time an InvalidArgumentError where the loss or a gradient is NaN or infinite.
    """
    checks = [tf.debugging.check_numerics(loss, f"the loss {MUST_BE_FINITE}")]
    if worst is not None:
        checks.append(tf.debugging.check_numerics(worst, f"a gradient {MUST_BE_FINITE}"))
    with tf.control_dependencies(checks):
        return tf.identity(loss)
