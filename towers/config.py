"""Settings of training and evaluation; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from towers.metrics import METRICS
from towers.tower_config import TowerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(TowerConfig):
    """Settings of one training run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the run; an unfinished run in it goes on where it stopped
    method: str = "ssl_pop"  # a name in samplers.METHODS
    dim: int = 32  # D, size of the embeddings
    normalize: bool = False  # score by the cosine instead of the dot product
    temperature: float = 1.0  # what scores are divided by; about 0.1 for cosines
    batch_size: int = 2048  # B, interactions of a step
    epochs: int = 20  # passes over the train split
    optimizer: str = "adam"  # adam, dense; lazy_adam or adagrad: only rows of the batch, any corpus
    learning_rate: float = 0.01  # of the optimizer, at the start
    learning_rate_decay: float = 0.95  # the learning rate is multiplied by it ...
    decay_epochs: int = 5  # ... every so many epochs
    l2: float = 1e-5  # coupled: l2 · θ is added to the gradient of every row at every step; with a
    # sparse optimizer, to that of the rows of the batch
    init_stddev: float = 0.1  # standard deviation of the initial embeddings
    reduction: str = "mean"  # mean or sum of the losses of a batch
    seed: int = 10  # of the initial embeddings, the order of rows and all draws
    patience: int = 0  # epochs without a better validation metric before it stops; 0: never
    validation_metric: str = "recall@50"  # metric and cut-off that `patience` watches
    checkpoint_minutes: float = 10.0  # between two checkpoints inside an epoch
    options: tuple[str, ...] = ()  # of the method, as name=value, such as positive_twice=true
    frequency: str = "counts"  # of candidates: counts of the train split; counts:DIR of a log, or
    # streaming:DIR, a snapshot or a directory of them, both made by `twotower frequencies`
    init_from: str = ""  # directory of a run whose vectors this one starts with, by raw id
    overwrite: bool = False  # delete what is in the run directory and start anew
    jit_compile: bool | None = None  # compile steps with XLA; none: where that is faster

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: a field breaks its rule; the message names rule, value and remedy.
        """
        super().__post_init__()
        if isinstance(self.options, Mapping):
            pairs = tuple(f"{name}={value}" for name, value in self.options.items())
            object.__setattr__(self, "options", pairs)
        object.__setattr__(self, "options", tuple(self.options))
        for name in ("data", "run", "method"):
            _require(bool(getattr(self, name)), name, "must be given", getattr(self, name))
        for name in ("dim", "epochs", "decay_epochs"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("l2", "init_stddev", "seed", "patience"):
            _require(getattr(self, name) >= 0, name, "must be at least 0", getattr(self, name))
        for name in ("temperature", "learning_rate", "checkpoint_minutes"):
            _require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))
        decay, reduction = self.learning_rate_decay, self.reduction
        _require(self.batch_size >= 2, "batch_size", "must be at least 2", self.batch_size)
        _require(0 < decay <= 1, "learning_rate_decay", "must be in (0, 1]", decay)
        _require(reduction in ("mean", "sum"), "reduction", "must be mean or sum", reduction)
        for option in self.options:
            _require("=" in option[1:], "options", "must be name=value", option)
        kind, _, path = self.frequency.partition(":")
        _require(
            self.frequency == "counts" or bool(kind in ("counts", "streaming") and path),
            "frequency",
            "must be counts, counts:DIR or streaming:DIR",
            self.frequency,
        )
        start = self.init_from
        other = not start or os.path.abspath(start) != os.path.abspath(self.run)
        _require(other, "init_from", "must be another directory than run", start)
        parse_metric(self.validation_metric)

    @property
    def method_options(self) -> dict[str, str]:
        """The options of the method by name, still as text."""
        pairs = (option.partition("=") for option in self.options)
        return {name.strip(): value.strip() for name, _, value in pairs}

    def recorded(self) -> dict[str, Any]:
        """What a record of the trained model holds: all fields but paths and the running of it."""
        fields = dataclasses.asdict(self)
        for name in ("data", "run", "checkpoint_minutes", "overwrite", "jit_compile"):
            del fields[name]
        fields["frequency"] = "".join(self.frequency.partition(":")[:2])  # without its path
        fields["init_from"] = bool(self.init_from)
        return fields


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation of a trained run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the trained run; metrics.json is written there
    ks: tuple[int, ...] = (10, 20, 50)  # K, cut-offs
    split: str = "test"  # test or validation
    block_size: int = 256  # queries that are ranked at a time

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: a field breaks its rule; the message names rule, value and remedy.
        """
        object.__setattr__(self, "ks", tuple(self.ks))
        for name in ("data", "run"):
            _require(bool(getattr(self, name)), name, "must be given", getattr(self, name))
        _require(
            bool(self.ks) and min(self.ks) >= 1, "ks", "must be one or more numbers >= 1", self.ks
        )
        _require(
            self.split in ("test", "validation"),
            "split",
            "must be test or validation",
            self.split,
        )
        _require(self.block_size >= 1, "block_size", "must be at least 1", self.block_size)


def parse_metric(metric: str) -> tuple[str, int]:
    """The name and the cut-off of a metric such as "recall@50".

    Raises:
      ValueError: it is not a metric with a cut-off.
    """
    name, _, cut_off = metric.partition("@")
    rule = f"must be one of {', '.join(METRICS)}, then @ and a cut-off, as in recall@50"
    _require(name in METRICS, "validation_metric", rule, metric)
    _require(cut_off.isdigit() and int(cut_off) > 0, "validation_metric", rule, metric)
    return name, int(cut_off)


def _require(holds: bool, name: str, rule: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {got!r}; change --{name}.")
