"""What a study leaves for people: trials.json, a table, a picture, the best trial's command."""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.contract.files import write_atomically, written_aside
from towers.training.run_directory import write_json
from towers.tune.settings import TuneConfig
from towers.tune.space import Knob, as_flags, train_config

log = logging.getLogger(__name__)

RECORD, TABLE, PLOT = REPORTS = ("trials.json", "trials.md", "tune.png")
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_COLOURS = {"complete": "tab:blue", "pruned": "tab:orange"}
_COLUMNS = 3  # of pictures


def write_reports(
    config: TuneConfig, study: optuna.Study, knobs: list[Knob], fixed: dict[str, Any]
) -> dict[str, Any]:
    """Writes trials.json and trials.md, as far as the study is.

    Returns:
      {"metric", "method", "space", "trials": by number, "best": where a trial is complete}.
    """
    trials = [_record(one) for one in study.get_trials(deepcopy=False) if one.state.name in _STATES]
    result: dict[str, Any] = {
        "metric": config.metric,
        "method": config.method,
        "space": {knob.name: [knob.kind, *knob.values] for knob in knobs},
        "trials": trials,
    }
    complete = [one for one in trials if one["state"] == "complete"]
    if complete:
        best = max(complete, key=lambda one: (one["value"], -one["number"]))
        place = Path(config.output) / "trials" / f"{best['number']:04d}"
        settings = train_config(config, fixed | best["params"], str(Path(config.output) / "best"))
        command = shlex.join(["twotower", "train", *as_flags(settings)])
        result["best"] = best | {"run": str(place), "command": command}
    write_json(Path(config.output) / RECORD, result)
    write_atomically(Path(config.output) / TABLE, _table(config, result, knobs))
    return result


def _record(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """One trial; its value is that of its last epoch where it was not finished."""
    values = [value for _, value in sorted(trial.intermediate_values.items())]
    return {
        "number": trial.number,
        "state": _STATES[trial.state.name],
        "value": trial.value if trial.value is not None else (values[-1] if values else None),
        "epochs": max(trial.intermediate_values, default=0),
        "seconds": trial.user_attrs.get("seconds"),
        "params": trial.params,
        "values": values,
        "reason": trial.user_attrs.get("reason", ""),
    }


def _table(config: TuneConfig, result: dict[str, Any], knobs: list[Knob]) -> str:
    """Markdown, the best trial first, then those that were ended early, then those that failed."""
    order = {state: place for place, state in enumerate(_STATES.values())}
    rows = sorted(
        result["trials"],
        key=lambda one: (order[one["state"]], -(one["value"] or 0.0), one["number"]),
    )
    heads = ["trial", config.metric, "state", "epochs", "seconds", *(knob.name for knob in knobs)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for one in rows:
        value = "" if one["value"] is None else f"{one['value']:.4f}"
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.0f}"
        cells = [str(one["number"]), value, one["state"], str(one["epochs"]), seconds]
        cells += [_short(one["params"][k.name]) if k.name in one["params"] else "" for k in knobs]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- trial {one['number']}: {one['reason']}" for one in rows if one["reason"]]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def log_progress(config: TuneConfig, result: dict[str, Any], number: int) -> None:
    """One line on a trial that has ended."""
    one = next(one for one in result["trials"] if one["number"] == number)
    value = "" if one["value"] is None else f", {config.metric} {one['value']:.4f}"
    best = ""
    if "best" in result:
        best = f"; best {result['best']['value']:.4f}, trial {result['best']['number']}"
    log.info(
        "tune: trial %d is %s after %d epochs%s%s%s",
        number,
        one["state"],
        one["epochs"],
        value,
        f": {one['reason']}" if one["reason"] else "",
        best,
    )


def shown(params: dict[str, Any]) -> str:
    """Settings for a line of a log."""
    return ", ".join(f"{name} {_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def draw(result: dict[str, Any], output: str) -> None:
    """tune.png: the best value so far by trial, and the values by each knob."""
    trials = [one for one in result["trials"] if one["state"] in _COLOURS and one["value"]]
    names = list(result["space"])
    rows = 1 + math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, _COLUMNS)
    top = figure.add_subplot(grid[0, :])
    _scatter(top, trials, [one["number"] for one in trials])
    complete = [one for one in trials if one["state"] == "complete"]
    best = [max(one["value"] for one in complete[: end + 1]) for end in range(len(complete))]
    numbers = [one["number"] for one in complete]
    if best:
        numbers, best = [*numbers, result["trials"][-1]["number"]], [*best, best[-1]]
    top.step(numbers, best, where="post", color="black", linewidth=1, label="best so far")
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set(xlabel="trial", ylabel=result["metric"], title=f"{result['method']}, validation split")
    top.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // _COLUMNS, place % _COLUMNS])
        with_it = [one for one in trials if name in one["params"]]
        kind, *choices = result["space"][name]
        values = [one["params"][name] for one in with_it]
        if kind == "choice":
            axes.set_xticks(range(len(choices)), [_short(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
            values = [choices.index(value) for value in values]
        elif kind == "log":
            low, high = choices
            marks = [low, math.sqrt(low * high), high]
            axes.set_xscale("log")
            axes.set_xticks(marks, [f"{mark:.2g}" for mark in marks])
            axes.set_xticks([], minor=True)
            axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        _scatter(axes, with_it, values)
        axes.set(xlabel=name, ylabel=result["metric"] if place % _COLUMNS == 0 else "")
    with written_aside(Path(output) / PLOT) as aside:
        figure.savefig(aside, format="png", dpi=100)


def _scatter(axes: Any, trials: list[dict[str, Any]], places: list[Any]) -> None:
    for state, colour in _COLOURS.items():
        points = [
            (x, t["value"]) for x, t in zip(places, trials, strict=True) if t["state"] == state
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, color=colour, label=state)
    axes.grid(alpha=0.3)
