"""What a study of `twotower tune` searches, and how a trial becomes the settings of a training."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

from pipeline.contract.settings import did_you_mean
from samplers.methods.by_name import METHODS, option_types
from towers.training.settings import TrainConfig
from towers.tune.ranges import FIXED, L2_OF_SUMS, OPTIONS, SETTINGS
from towers.tune.settings import TuneConfig

METHOD = "method."  # what stands before the name of an option of the method

# What belongs to the study, or to no model.
_NEVER = (
    *("data", "run", "method", "epochs", "seed", "patience", "validation_metric", "options"),
    *("checkpoint_minutes", "frequency", "init_from", "overwrite", "strategy", "devices"),
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
        suggest = trial.suggest_int if self.is_whole else trial.suggest_float
        return suggest(self.name, *self.values, log=self.kind == "log")

    @property
    def is_whole(self) -> bool:
        """Whether its range is one of integers."""
        return self.kind != "choice" and all(isinstance(value, int) for value in self.values)

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if self.kind == "choice":
            return (type(value), value) in [(type(choice), choice) for choice in self.values]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]


def make_space(config: TuneConfig) -> tuple[list[Knob], dict[str, Any]]:
    """What is searched, and what `--space` sets to one value.

    A setting or option that is given as such is not searched. `temperature` is by default
    searched for cosines only.

    Raises:
      ValueError: `space` names what there is not, twice what is fixed, or no range.
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
    return knobs, single


def suggest(
    config: TuneConfig, knobs: list[Knob], fixed: dict[str, Any], trial: Any
) -> dict[str, Any]:
    """What an Optuna trial is to try, by name of a knob."""
    params: dict[str, Any] = {}
    for knob in knobs:  # in the order of the fields: normalize comes before temperature
        cosine = ({"normalize": config.base.normalize} | fixed | params)["normalize"]
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


def as_flags(config: TrainConfig) -> list[str]:
    """The flags of `twotower train` for all that is not its default."""
    flags = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else [value]
            flags += [f"--{field.name}", *map(_as_text, values)]
    return flags


def _as_text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def knob_types(method: str) -> dict[str, str]:
    """Everything that may be searched for a method: name → type, such as "int | None"."""
    kinds: dict[str, str] = {}  # not those of the fields: a parser of flags puts classes there
    for part in reversed(TrainConfig.__mro__):
        kinds |= inspect.get_annotations(part)
    settings = {
        name: kind
        for name, kind in kinds.items()
        if name not in _NEVER and not kind.startswith("tuple")
    }
    return settings | {METHOD + name: kind for name, kind in option_types(method).items()}


def default_range(method: str, name: str) -> str:
    """The range of a setting or an option where `--space` does not name it; `FIXED`: none.

    Raises:
      KeyError: the table has no line for an option.
    """
    if not name.startswith(METHOD):
        return SETTINGS.get(name, FIXED)
    option = name.removeprefix(METHOD)
    return OPTIONS.get(f"{method}.{option}") or OPTIONS[option]


def parse(name: str, text: str, kind: str) -> Knob:
    """A knob from the text of its range.

    Raises:
      ValueError: it is no range for values of that type.
    """
    scale, _, limits = text.partition(":")
    if scale in ("log", "linear"):
        values = tuple(_value(name, limit, kind) for limit in limits.split(":"))
        numbers = all(type(value) in (int, float) for value in values)
        if len(values) != 2 or not numbers or not values[0] <= values[1]:
            raise _no_range(name, text)
        if scale == "log" and values[0] <= 0:
            raise ValueError(f"space of {name} must be above 0 for log, got {text!r}; use linear:.")
        return Knob(name, scale, values)
    choices = [choice for choice in text.strip("[]").split(",") if choice.strip()]
    if not choices:
        raise _no_range(name, text)
    return Knob(name, "choice", tuple(_value(name, choice, kind) for choice in choices))


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
    kinds, text = [part.strip() for part in kind.split("|")], text.strip().strip("'\"")
    if "None" in kinds and text.lower() == "none":
        return None
    if "bool" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number, convert in (("int", int), ("float", float)):
        if number in kinds:
            try:
                return convert(text)
            except ValueError:
                continue
    if "str" in kinds:
        return text
    raise ValueError(f"space of {name} must be of {kind}, got {text!r}; change --space.")


def _no_range(name: str, text: str) -> ValueError:
    return ValueError(
        f"space of {name} must be log:LOW:HIGH, linear:LOW:HIGH or A,B,..., got {text!r}; "
        "change --space."
    )
