"""The two-tower model: towers, method and training step behind the Keras interface."""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from pipeline.contract import schema
from samplers.candidates import Batch, Candidates
from samplers.methods.by_name import METHODS, build
from samplers.methods.full_softmax import SoftTargets
from samplers.methods.method import require, without_gradient
from samplers.random_numbers import HOST, split_seed, step_seed
from samplers.selection.validity import weigh_rows
from samplers.state import state_variable
from towers.data.interactions import RetrievalData
from towers.encoders.make_towers import make_towers
from towers.encoders.tower_config import split_options
from towers.encoders.tower_pair import Tables, floats_in
from towers.legacy_keras import tf_keras, tfrs
from towers.model.distribution import check_strategy, cut_into_parts
from towers.model.gradients import finite_loss, sum_gradients, worst_of
from towers.model.memory import fit_to_memory
from towers.model.replica_part import MeanOfAll, WholeBatch, check_alone, part_of
from towers.model.top_k import recommend

if TYPE_CHECKING:
    import pandas as pd

_NOT_SETTINGS = ("self", "data", "targets", "options", "__class__")  # of the arguments


class TwoTower(tfrs.Model):
    """Two towers trained by one of the methods of `samplers.METHODS`.

    The score of a query and a candidate is the dot product of their embeddings, or their cosine
    where `normalize` is set, divided by the temperature.

    Args:
      data: what to train on: its vocabularies and train counts.
      dim: D, the size of the embeddings.
      method: a name in `samplers.METHODS`.
      normalize: score by the cosine instead of the dot product.
      temperature: what scores are divided by, above 0.
      seed: of the initial tables and of all that the method draws, at least 0.
      init_stddev: standard deviation of the initial tables.
      reduction: "mean" or "sum" of the losses of a batch.
      jit_compile: compile the step from rows to gradients with XLA; None: where that is faster.
      targets: what a teacher ranks highest, for full_softmax, see `towers.soft_targets`.
      exclude_seen_negatives: leave the train positives of a query out of its negatives; None: where
        the paper of the method does.
      **options: `tower` and other fields of `towers.encoders.tower_config.TowerConfig`, and
        options of the method.

    Raises:
      ValueError: a setting breaks its rule, or the data lack what the towers need.
    """

    def __init__(
        self,
        data: RetrievalData,
        dim: int = 32,
        method: str = "ssl_pop",
        *,
        normalize: bool = False,
        temperature: float = 1.0,
        seed: int = 10,
        init_stddev: float = 0.1,
        reduction: str = "mean",
        jit_compile: bool | None = None,
        targets: SoftTargets | None = None,
        exclude_seen_negatives: bool | None = None,
        **options: Any,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS} | options
        is_data = isinstance(data, RetrievalData)
        require(is_data, "data", "what from_dataframe or open_data gives", type(data).__name__)
        for name in ("dim", "seed"):
            whole = isinstance(settings[name], Integral)
            require(whole, name, "a number without decimals", repr(settings[name]))
        for name in ("temperature", "init_stddev"):
            require(isinstance(settings[name], Real), name, "a number", repr(settings[name]))
        require(dim >= 1, "dim", "at least 1", dim)
        require(temperature > 0, "temperature", "above 0", temperature)
        require(seed >= 0, "seed", "at least 0", seed)
        require(init_stddev >= 0, "init_stddev", "at least 0", init_stddev)
        known = reduction in ("mean", "sum")
        require(known, "reduction", "one of ('mean', 'sum')", repr(reduction))
        check_strategy()
        super().__init__()
        self.data = data
        # As text: Keras would track a dictionary as a part of the checkpoint.
        self.settings = json.dumps(
            settings, default=lambda v: v.item() if hasattr(v, "item") else str(v)
        )
        config, options = split_options(options)
        self._towers = make_towers(
            data,
            config,
            dim,
            normalize=normalize,
            init_stddev=init_stddev,
            temperature=temperature,
            seed=seed,
            jit_compile=jit_compile,
        )
        self.query_tower, self.candidate_tower = self._towers.query, self._towers.candidate
        self.propagation = self._towers.propagation
        if exclude_seen_negatives is None:
            exclude_seen_negatives = method in METHODS and METHODS[method].excludes_seen
        self.method = build(
            method,
            frequency=data.train_counts,
            num_candidates=data.num_candidates,
            num_queries=data.num_queries,
            fingerprints=data.candidate_vocabulary.fingerprints,
            targets=targets,
            seen=data.seen() if exclude_seen_negatives else None,
            **options,
        )
        self.temperature, self.reduction, self._seed = temperature, reduction, seed
        self._batch_l2 = config.batch_l2
        with tf.device(HOST):
            self.iteration = state_variable(tf.constant(0, tf.int64), "iteration")
        self.mean_loss = MeanOfAll(name="loss")
        if jit_compile is None:
            has_gpu = bool(tf.config.list_physical_devices("GPU"))
            jit_compile = self.method.faster_with_xla or has_gpu
        self._jit = jit_compile
        self.make_step()
        self.built = True

    def make_step(self) -> None:
        """Forgets compiled steps, after a setting of the method has changed."""
        self._differentiate = tf.function(self._loss_and_gradients, jit_compile=self._jit)
        self.train_function = None

    def __repr__(self) -> str:
        shown, defaults = json.loads(self.settings), inspect.signature(TwoTower).parameters
        for name in set(shown) & set(defaults) - {"dim", "method"}:
            if shown[name] == defaults[name].default:
                del shown[name]
        arguments = ", ".join(f"{k}={v!r}" for k, v in ({"tower": "id"} | shown).items())
        size = sum(int(tf.size(variable)) for variable in self.trainable_variables)
        steps = int(self.iteration.numpy())
        return f"TwoTower({arguments}): {size:,} weights, {steps:,} steps, on {self.data!r}"

    def recommend(
        self,
        queries: Sequence[Any] | None = None,
        *,
        history: Sequence[Sequence[Any]] | None = None,
        attributes: Mapping[str, Sequence[Any]] | None = None,
        k: int = 10,
        exclude_seen: bool = False,
    ) -> pd.DataFrame:
        """The k best candidates of raw queries, by the graph that a published version has.

        >>> import pandas as pd, towers
        >>> log = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "milk", "tea"]})
        >>> data = towers.from_dataframe(log, user="user", item="item", train_ratio=1.0)
        >>> model = TwoTower(data, dim=4, tower="fism")
        >>> model.recommend(["bob"], exclude_seen=True)["candidate_id"].tolist()
        ['milk']
        >>> len(model.recommend(history=[["tea"], ["milk"]], k=1))  # someone new
        2

        Args:
          queries: B raw ids; None: of someone new.
          history: B lists of raw candidate ids, the oldest first, of a tower that reads them; of
            a known id it stands in place of what was trained on.
          attributes: column → B values, None where one is missing, of a tower that reads them.
          k: candidates of each query; fewer where fewer are left.
          exclude_seen: leave out what a query has in train and validation, and its history.

        Returns:
          A row a candidate, best first: query_id (of someone new its place, from 0), rank from 1,
          candidate_id, score, and title where the items' table has a column of that name.

        Raises:
          ValueError: a query is not known, or the tower does not read what is given.
        """
        return recommend(self, queries, history, attributes, k, exclude_seen)

    def save(
        self,
        filepath: str | os.PathLike[str],
        overwrite: bool = True,
        save_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a directory from which `towers.load` makes this model again, without its data.

        It holds the settings, the weights with the states of the method and the optimizer, the
        vocabularies, attributes, and the train and validation rows, which queries are known by.
        What a teacher ranks is left out. `ModelCheckpoint` calls it; its other options of
        SavedModels are ignored.

        Raises:
          ValueError: the path is a file of Keras (.keras, .h5), or something else is there.
        """
        from towers.model.saved import save

        del kwargs
        if save_format not in (None, "tf"):
            raise ValueError(f"save_format must be left out, got {save_format!r}.")
        save(self, filepath, overwrite=overwrite)

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The score of each pair: {query_id [B], candidate_id [B]} → [B]."""
        del training
        query = self.query_embeddings(inputs[schema.QUERY_ID])
        candidate = self.candidate_embeddings(inputs[schema.CANDIDATE_ID])
        return tf.reduce_sum(query * candidate, axis=-1)

    def query_embeddings(self, ids: tf.Tensor | None = None) -> tf.Tensor:
        """Embeddings of dense ids or of all: float32 [..., D], divided by the temperature."""
        return tf.cast(self._towers.queries(ids), tf.float32)

    def candidate_embeddings(self, ids: tf.Tensor | None = None) -> tf.Tensor:
        """Embeddings of dense ids or of the whole corpus: float32 [..., D]."""
        return tf.cast(self._towers.candidates(ids), tf.float32)

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

    def fit(self, *args: Any, callbacks: Iterable[Any] | None = None, **kwargs: Any) -> Any:
        """`tf_keras.Model.fit`; the method is told when an epoch has ended.

        On several replicas a `tf.data.Dataset` holds joined batches, which are cut into parts.

        Raises:
          ValueError: it is given no batches, those of other data, or such that a step needs more
            memory than the machine has; on several replicas, their number is not known.
        """
        callbacks = [_EndOfEpoch(), *(callbacks or ())]
        given = inspect.signature(super().fit).bind(*args, callbacks=callbacks, **kwargs).arguments
        batches = given.get("x")
        if (
            given.get("y") is not None
            or isinstance(batches, RetrievalData)
            or hasattr(batches, "iloc")
        ):
            got = type(batches).__name__
            raise ValueError(f"fit takes batches of pairs, model.fit(data.train(2048)), got {got}.")
        data, rows = getattr(batches, "of_data", (self.data, 0))
        if (data.num_queries, data.num_candidates) != (
            self.data.num_queries,
            self.data.num_candidates,
        ):
            raise ValueError("the model was made of other data: fit it to batches of those.")
        fit_to_memory(self, rows, dense="Adam" in type(self.optimizer).__name__)
        if self.distribute_strategy.num_replicas_in_sync > 1:
            given = cut_into_parts(given, self.distribute_strategy)
        return super().fit(**given)

    def end_epoch(self) -> None:
        """Tells the method that an epoch has ended; `fit` does it."""
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


class _EndOfEpoch(tf_keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.end_epoch()


def _as_batch(inputs: Mapping[str, tf.Tensor]) -> Batch:
    return Batch(
        inputs[schema.QUERY_ID],
        inputs[schema.CANDIDATE_ID],
        *(inputs.get(name) for name in (schema.WEIGHT, "valid")),
    )


def _drop_seed(seed: tf.Tensor) -> tf.Tensor:
    """The seed of what the towers drop in a step, from that of the step: int64 [2]."""
    with tf.device(HOST):
        return tf.random.experimental.stateless_fold_in(seed, 1)
