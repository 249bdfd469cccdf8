"""The two-tower model: from data and settings to recommendations and a saved model."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import tensorflow as tf

from pipeline.contract import schema
from samplers.methods.by_name import METHODS, build
from samplers.methods.full_softmax import SoftTargets
from samplers.methods.method import require
from towers.data.interactions import RetrievalData
from towers.encoders.make_towers import make_towers
from towers.encoders.tower_config import split_options
from towers.model import top_k
from towers.model.distribution import check_strategy, cut_into_parts
from towers.model.memory import fit_to_memory
from towers.model.step import EndOfEpoch, TrainedPair

_NOT_SETTINGS = ("self", "data", "targets", "options", "__class__")  # of the arguments


class TwoTower(TrainedPair):
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
      jit_compile: compile the step from rows to gradients with XLA; None: on a GPU, and on a CPU
        where that was faster for the method.
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
        config, options = split_options(options)
        towers = make_towers(
            data,
            config,
            dim,
            normalize=normalize,
            init_stddev=init_stddev,
            temperature=temperature,
            seed=seed,
            jit_compile=jit_compile,
        )
        if exclude_seen_negatives is None:
            exclude_seen_negatives = str(method) in METHODS and METHODS[method].excludes_seen
        built = build(
            method,
            frequency=data.train_counts,
            num_candidates=data.num_candidates,
            num_queries=data.num_queries,
            fingerprints=data.candidate_vocabulary.fingerprints,
            targets=targets,
            seen=data.seen() if exclude_seen_negatives else None,
            **options,
        )
        step: dict[str, Any] = {"seed": seed, "reduction": reduction, "batch_l2": config.batch_l2}
        super().__init__(towers, built, jit_compile=jit_compile, **step)
        self.data, self.temperature = data, temperature
        # As text: Keras would track a dictionary as a part of the checkpoint.
        self.settings = json.dumps(
            settings, default=lambda v: v.item() if hasattr(v, "item") else str(v)
        )

    recommend = top_k.recommend

    def __repr__(self) -> str:
        shown, defaults = json.loads(self.settings), inspect.signature(TwoTower).parameters
        for name in set(shown) & set(defaults) - {"dim", "method"}:
            if shown[name] == defaults[name].default:
                del shown[name]
        arguments = ", ".join(f"{k}={v!r}" for k, v in ({"tower": "id"} | shown).items())
        size = sum(int(tf.size(variable)) for variable in self.trainable_variables)
        steps = int(self.iteration.numpy())
        return f"TwoTower({arguments}): {size:,} weights, {steps:,} steps, on {self.data!r}"

    def fit(self, *args: Any, callbacks: Iterable[Any] | None = None, **kwargs: Any) -> Any:
        """Trains as `tf_keras.Model.fit` does, and tells the method when an epoch has ended.

        On several replicas a `tf.data.Dataset` holds joined batches, which are cut into parts.

        Raises:
          ValueError: it is given no batches, those of other data, or such that a step needs more
            memory than the machine has; on several replicas, their number is not known, or it is
            given validation_data.
        """
        callbacks = [EndOfEpoch(), *(callbacks or ())]
        given = inspect.signature(super().fit).bind(*args, callbacks=callbacks, **kwargs).arguments
        batches = given.get("x")
        no_batches = isinstance(batches, RetrievalData) or hasattr(batches, "iloc")
        if no_batches or given.get("y") is not None:
            got = type(batches).__name__
            raise ValueError(f"fit takes batches of pairs, model.fit(data.train(2048)), got {got}.")
        data, rows = getattr(batches, "of_data", (self.data, 0))
        of_batches = data.num_queries, data.num_candidates
        if of_batches != (self.data.num_queries, self.data.num_candidates):
            raise ValueError("the model was made of other data: fit it to batches of those.")
        fit_to_memory(self, rows)
        if self.distribute_strategy.num_replicas_in_sync > 1:
            given = cut_into_parts(given, self.distribute_strategy)
        return super().fit(**given)

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
