"""Settings of training; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from pipeline.contract.files import is_remote
from pipeline.contract.settings import require, require_all
from towers.encoders.tower_config import TowerConfig
from towers.metrics.definitions import METRICS

# Settings of how and where a run is made, not of what it makes.
RUNNING = (
    *("data", "run", "checkpoint_minutes", "overwrite"),
    *("jit_compile", "time_xla", "strategy", "devices"),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(TowerConfig):
    """Settings of one training run."""

    data: str = ""  # directory that `twotower prepare` made
    run: str = ""  # directory of the run; an unfinished run in it goes on where it stopped
    # best: settings that were found together, see docs/towers.md; other flags come first
    preset: str = ""
    method: str = "ssl_pop"  # how negatives are chosen; `twotower methods` lists them
    dim: int = 32  # D, size of the embeddings
    normalize: bool = False  # score by the cosine instead of the dot product
    temperature: float = 1.0  # what scores are divided by; about 0.1 for cosines
    batch_size: int = 2048  # B, interactions of a step
    epochs: int = 20  # passes over the train split
    # adam, dense; of the rows of the batch, for any corpus: lazy_adam, adagrad, or rowwise_adagrad,
    # which takes the least memory
    optimizer: str = "adam"
    learning_rate: float = 0.01  # of the optimizer, at the start
    learning_rate_decay: float = 0.95  # the learning rate is multiplied by it ...
    decay_epochs: int = 5  # ... every so many epochs
    # coupled: l2 · θ is added to the gradient of every row at every step; with a sparse optimizer,
    # to that of the rows of the batch
    l2: float = 1e-5
    init_stddev: float = 0.1  # standard deviation of the initial embeddings
    reduction: str = "mean"  # mean or sum of the losses of a batch
    seed: int = 10  # of the initial embeddings, the order of rows and all draws
    patience: int = 0  # epochs without a better validation metric before it stops; 0: never
    validation_metric: str = "recall@50"  # metric and cut-off that `patience` watches
    checkpoint_minutes: float = 10.0  # between two checkpoints inside an epoch
    options: tuple[str, ...] = ()  # of the method, as name=value, such as positive_twice=true
    # of candidates: counts of the train split; counts:DIR of a log, or streaming:DIR, a snapshot or
    # a directory of them, both made by `twotower frequencies`; correct_sfx takes the newest of a
    # directory at each epoch
    frequency: str = "counts"
    # leave out of the negatives of a user what the user chose in train; none: where the paper of
    # the method does, which is dns, dns_mn, soft_bpr and softmax_v
    exclude_seen_negatives: bool | None = None
    init_from: str = ""  # directory of a run whose vectors this one starts with, by raw id
    # directory of a finished run: its settings and the epochs that it chose, on the rows of train,
    # validation and test
    refit: str = ""
    # directory of a run of the same data, often a larger one, whose ranking full_softmax learns
    # besides; an epoch then has one row for each query
    teacher: str = ""
    teacher_candidates: int = 100  # T, the first of that ranking which it learns, for each query
    # beside the teacher's scores, both in standard deviations: weight of what a random walk and a
    # low-pass filter on the graph of train rows say
    teacher_graph: float = 0.0
    overwrite: bool = False  # delete what is in the run directory and start anew
    # compile steps with XLA; none: as the run began, a new one by a table of methods
    jit_compile: bool | None = None
    # a new run times steps with XLA and without, and keeps the faster way; which it is may differ
    # between two runs of a seed, and with it last bits
    time_xla: bool = False
    # of what is computed, weights stay float32: float32; tf32, products of training steps on a GPU
    # with factors of 10 bits; bfloat16, embeddings as well
    precision: str = "float32"
    deterministic: bool = False  # a GPU gives the same bits every time, as a CPU does; slower
    # none; mirrored, the devices of this machine; or multi_worker, several machines, which the
    # environment variable TF_CONFIG names
    strategy: str = "none"
    devices: int = 0  # mirrored: how many; 0: all GPUs. Without GPUs: parts of the CPU, for tests

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.options, Mapping):
            pairs = tuple(f"{name}={value}" for name, value in self.options.items())
            object.__setattr__(self, "options", pairs)
        object.__setattr__(self, "options", tuple(self.options))
        require_all(self, "must be given", "data", "run", "method")
        rule = "must be left out: in Python, TrainConfig(**towers.presets.FLAGS[NAME], ...)"
        require(not self.preset, "preset", rule, self.preset)
        counts = ("dim", "epochs", "decay_epochs", "teacher_candidates")
        require_all(self, "must be at least 1", *counts)
        require_all(self, "must be at least 2", "batch_size")
        names = "l2", "init_stddev", "seed", "patience", "devices", "teacher_graph"
        require_all(self, "must be at least 0", *names)
        require_all(self, "must be above 0", "temperature", "learning_rate", "checkpoint_minutes")
        require_all(self, "must be in (0, 1]", "learning_rate_decay")
        known = self.reduction in ("mean", "sum")
        require(known, "reduction", "must be mean or sum", self.reduction)
        for name, choices in (
            ("precision", ("float32", "tf32", "bfloat16")),
            ("strategy", ("none", "mirrored", "multi_worker")),
        ):
            rule = f"must be one of {', '.join(choices)}"
            require(getattr(self, name) in choices, name, rule, getattr(self, name))
        several = self.strategy == "mirrored" or not self.devices
        require(several, "devices", "must be 0 without --strategy mirrored", self.devices)
        enough = self.batch_size >= self.devices
        require(enough, "batch_size", f"must be at least devices = {self.devices}", self.batch_size)
        for option in self.options:
            require("=" in option[1:], "options", "must be name=value", option)
        kind, _, path = self.frequency.partition(":")
        known = self.frequency == "counts" or bool(kind in ("counts", "streaming") and path)
        rule = "must be counts, counts:DIR or streaming:DIR"
        require(known, "frequency", rule, self.frequency)
        for name in ("init_from", "teacher", "refit"):
            start = getattr(self, name)
            other = not start or os.path.abspath(start) != os.path.abspath(self.run)
            require(other, name, "must be another directory than run", start)
        for name, value in (("jit_compile", None), ("strategy", "none")):
            free = not self.time_xla or getattr(self, name) == value
            require(free, name, "must be left out with --time_xla", getattr(self, name))
        learns = not self.teacher or self.method == "full_softmax"
        require(learns, "teacher", "goes with --method full_softmax alone", self.teacher)
        free = bool(self.teacher) or not self.teacher_graph
        require(free, "teacher_graph", "must be 0 without --teacher", self.teacher_graph)
        taught = {"teacher_weight", "teacher_temperature", "num_chosen"} & {*self.method_options}
        rule = f"must not have {', '.join(sorted(taught))} without --teacher"
        require(bool(self.teacher) or not taught, "options", rule, self.options)
        if self.strategy == "multi_worker" and is_remote(self.run):
            raise ValueError("--strategy multi_worker needs a local run that all machines see.")
        parse_metric(self.validation_metric)

    @property
    def method_options(self) -> dict[str, str]:
        """The options of the method by name, still as text."""
        pairs = (option.partition("=") for option in self.options)
        return {name.strip(): value.strip() for name, _, value in pairs}

    def recorded(self) -> dict[str, Any]:
        """What a record of the trained model holds: all fields but paths and the running of it."""
        left_out = (*RUNNING, "deterministic")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        fields["frequency"] = "".join(self.frequency.partition(":")[:2])  # without its path
        for name in ("init_from", "teacher", "refit"):
            fields[name] = bool(getattr(self, name))
        return fields


def parse_metric(metric: str, name: str = "validation_metric") -> tuple[str, int]:
    """The name and the cut-off of "recall@50"; for others a ValueError of the setting `name`."""
    kind, _, cut_off = metric.partition("@")
    rule = f"must be one of {', '.join(METRICS)}, then @ and a cut-off, as in recall@50"
    require(kind in METRICS, name, rule, metric)
    require(cut_off.isdigit() and int(cut_off) > 0, name, rule, metric)
    return kind, int(cut_off)
