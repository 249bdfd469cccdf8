"""What a study of `twotower tune` searches, and how a trial becomes the settings of a training."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

from pipeline.contract.settings import did_you_mean
from samplers.methods.by_name import METHODS, option_types, parse_option
from towers.training.settings import TrainConfig
from towers.tune.ranges import FIXED, L2_OF_SUMS, OPTIONS, SETTINGS
from towers.tune.settings import TuneConfig

METHOD = "method."  # what stands before the name of an option of the method

# What belongs to the study, or to no model.
_NEVER = (
    *("data", "run", "method", "epochs", "seed", "patience", "validation_metric", "options"),
    *("checkpoint_minutes", "frequency", "init_from", "refit", "overwrite", "strategy", "devices"),
)


class Knob(NamedTuple):
    """One thing that is searched.

    Attributes:
      name: a field of `TrainConfig`, or an option of the method after "method.".
      kind: "log", "linear" or "choice".
      values: the lowest and the highest number, or the choices.
      for_cosines: searched only in trials that score by the cosine.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    for_cosines: bool = False

    def suggest(self, trial: Any) -> Any:
        """The value for an Optuna trial; asked again, the same."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        whole = all(isinstance(value, int) for value in self.values)
        suggest = trial.suggest_int if whole else trial.suggest_float
        return suggest(self.name, *self.values, log=self.kind == "log")

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if self.kind == "choice":
            return (type(value), value) in [(type(choice), choice) for choice in self.values]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]


class Space(NamedTuple):
    """What a study looks through."""

    knobs: list[Knob]  # what is searched, in the order of the fields
    fixed: dict[str, Any]  # what `--space` sets to one value, by name


def make_space(config: TuneConfig) -> Space:
    """The space of a study.

    A setting or option that is given as such is not searched. `temperature` is by default
    searched for cosines only. A ValueError where `--space` names what there is not, or what is
    given, or gives no range.
    """
    if config.method not in METHODS:
        hint = did_you_mean(config.method, METHODS, f"it is one of {', '.join(METHODS)}.")
        raise ValueError(f"there is no method {config.method!r}; {hint}")
    types = knob_types(config.method)
    requested = _requested(config, types)
    ranges = {name: default_range(config.method, name) for name in types}
    if config.reduction == "sum":
        ranges["l2"] = L2_OF_SUMS
    ranges = {name: text for name, text in ranges.items() if text and name not in config.given}
    knobs: list[Knob] = []
    single: dict[str, Any] = {}
    for name, text in (ranges | requested).items():
        knob = parse(name, text, types[name])
        if len(set(knob.values)) == 1:
            single[name] = knob.values[0]
        else:
            for_cosines = name == "temperature" and name not in requested
            knobs.append(knob._replace(for_cosines=for_cosines))
    for knob in knobs:
        for value in knob.values:  # what no training may have is an error before the first one
            train_config(config, single | {knob.name: value}, config.output)
    return Space(knobs, single)


def suggest(config: TuneConfig, space: Space, trial: Any) -> dict[str, Any]:
    """What an Optuna trial is to try, by name of a knob."""
    params: dict[str, Any] = {}
    for knob in space.knobs:  # normalize comes before temperature
        cosine = ({"normalize": config.base.normalize} | space.fixed | params)["normalize"]
        if cosine or not knob.for_cosines:
            params[knob.name] = knob.suggest(trial)
    return params


def train_config(config: TuneConfig, params: dict[str, Any], run: str) -> TrainConfig:
    """The settings of one training: those of the study, and over them some by name of a knob."""
    settings: dict[str, Any] = {}
    options = config.method_options
    for name, value in params.items():
        if name.startswith(METHOD):
            options[name.removeprefix(METHOD)] = _as_text(value)
        else:
            settings[name] = value
    pairs = tuple(f"{name}={value}" for name, value in options.items())
    return dataclasses.replace(config.base, **settings, run=run, options=pairs)


def _as_text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def knob_types(method: str) -> dict[str, str]:
    """Everything that may be searched for a method: name → type, such as "int | None"."""
    kinds = {  # not the types of the fields: a parser of flags puts classes there
        name: kind
        for part in reversed(TrainConfig.__mro__)
        for name, kind in inspect.get_annotations(part).items()
        if name not in _NEVER and not kind.startswith("tuple")
    }
    return kinds | {METHOD + name: kind for name, kind in option_types(method).items()}


def default_range(method: str, name: str) -> str:
    """The range of a setting, or of an option, which has a line in the table; `FIXED`: none."""
    if not name.startswith(METHOD):
        return SETTINGS.get(name, FIXED)
    option = name.removeprefix(METHOD)
    return OPTIONS.get(f"{method}.{option}") or OPTIONS[option]


def parse(name: str, text: str, kind: str) -> Knob:
    """A knob from the text of its range; a ValueError where that is no range for such values."""
    scale, _, limits = text.partition(":")
    is_choice = scale not in ("log", "linear")
    parts = text.strip("[]").split(",") if is_choice else limits.split(":")
    values = tuple(_value(name, part, kind) for part in parts if part.strip())
    numbers = len(values) == 2 and all(type(value) in (int, float) for value in values)
    if not values or not (is_choice or (numbers and values[0] <= values[1])):
        raise ValueError(
            f"space of {name} must be log:LOW:HIGH, linear:LOW:HIGH or A,B,..., got {text!r}; "
            "change --space."
        )
    if scale == "log" and values[0] <= 0:
        raise ValueError(f"space of {name} must be above 0 for log, got {text!r}; use linear:.")
    return Knob(name, "choice" if is_choice else scale, values)


def _requested(config: TuneConfig, types: dict[str, str]) -> dict[str, str]:
    """The ranges of `--space` by name; the last one of a name counts."""
    requested = {}
    for pair in config.space:
        name, _, text = (part.strip() for part in pair.partition("="))
        if name not in types:
            near = METHOD + name if METHOD + name in types else name
            hint = did_you_mean(near, types, "see twotower train --help.")
            raise ValueError(f"space cannot hold {name!r} for {config.method}; {hint}")
        if name in config.given:
            raise ValueError(f"{name} is given and in space as well; leave out one of the two.")
        requested[name] = text
    return requested


def _value(name: str, text: str, kind: str) -> Any:
    """A value of a declared type from text."""
    text = text.strip().strip("'\"")
    try:
        return parse_option(name, text, kind)
    except ValueError:
        wrong = f"space of {name} must be of {kind}, got {text!r}; change --space."
        raise ValueError(wrong) from None
