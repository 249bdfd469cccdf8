"""Settings of `twotower tune`; field names are flags, field comments their help."""

from __future__ import annotations

import dataclasses

from simple_parsing import field

from pipeline.contract.settings import require, require_all
from towers.training.settings import TrainConfig

SEARCHED = ("learning_rate", "temperature", "normalize", "l2")  # where they are not given


@dataclasses.dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """Settings of a search for the settings of training.

    A setting that is None is searched, see `towers.tune.ranges`.
    """

    output: str = ""  # directory of the study; an unfinished study in it goes on where it stopped
    run: str = ""  # not to be given: every trial has a directory of its own
    trials: int = 30  # in all, with those that earlier commands made
    epochs: int = 10  # passes of a trial over the train split
    metric: str = "recall@50"  # metric and cut-off on the validation split that decides
    # fixed at this; none: searched
    learning_rate: float | None = None  # type: ignore[assignment]
    # fixed at this; none: searched
    temperature: float | None = None  # type: ignore[assignment]
    # fixed at this; none: searched
    normalize: bool | None = None  # type: ignore[assignment]
    # fixed at this; none: searched
    l2: float | None = None  # type: ignore[assignment]
    # NAME=log:LOW:HIGH, NAME=linear:LOW:HIGH or NAME=A,B,... of a setting, such as dim, or of an
    # option of the method as method.NAME; one value: fixed
    space: list[str] = field(default_factory=list, action="extend", nargs="*")  # noqa: RUF009
    pruner: str = "median"  # what ends trials early: median, hyperband or none
    startup_trials: int = 5  # the first ones are drawn at random, and none is ended early
    timeout: float = 0.0  # seconds after which no further trial begins; 0: no limit
    overwrite: bool = False  # delete the study in the output directory and start anew

    def __post_init__(self) -> None:
        """Raises ValueError where a field breaks its rule; it names rule, value and remedy."""
        require(bool(self.output), "output", "must be given", self.output)
        require(not self.run, "run", "must be left out: trials lie in --output", self.run)
        watched, unset = self.validation_metric, TrainConfig.validation_metric
        require(watched in (unset, self.metric), "validation_metric", "is --metric here", watched)
        require_all(self, "must be at least 1", "trials", "startup_trials")
        rule = "must be median, hyperband or none"
        require(self.pruner in ("median", "hyperband", "none"), "pruner", rule, self.pruner)
        require_all(self, "must be at least 0", "timeout")
        alone = self.strategy != "multi_worker"
        require(alone, "strategy", "must be none or mirrored for a study", self.strategy)
        for pair in self.space:
            require("=" in pair[1:], "space", "must be NAME=RANGE", pair)
        object.__setattr__(self, "options", self.base.options)  # checks what training has, too

    @property
    def base(self) -> TrainConfig:
        """The settings of a training with the defaults of what is searched."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(TrainConfig)
            if field.name not in SEARCHED or getattr(self, field.name) is not None
        }
        own = {"run": self.output, "validation_metric": self.metric, "overwrite": False}
        return TrainConfig(**(given | own))

    @property
    def given(self) -> set[str]:
        """Names of what is fixed, though it would be searched by default."""
        settings = {name for name in SEARCHED if getattr(self, name) is not None}
        return settings | {f"method.{name}" for name in self.method_options}
