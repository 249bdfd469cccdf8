"""What a study leaves for people: trials.json, a table, a picture, the best trial's command."""

from __future__ import annotations

import itertools
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
TRIALS = "trials"  # run directories: that of the best trial, and of one that is not finished
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
    trials = [
        _record(trial) for trial in study.get_trials(deepcopy=False) if trial.state.name in _STATES
    ]
    result: dict[str, Any] = {
        "metric": config.metric,
        "method": config.method,
        "space": {knob.name: [knob.kind, *knob.values] for knob in knobs},
        "trials": trials,
    }
    complete = [trial for trial in trials if trial["state"] == "complete"]
    output = Path(config.output)
    if complete:
        best = max(complete, key=lambda trial: (trial["value"], -trial["number"]))
        settings = train_config(config, fixed | best["params"], str(output / "best"))
        result["best"] = best | {
            "run": str(output / TRIALS / f"{best['number']:04d}"),
            "command": shlex.join(["twotower", "train", *as_flags(settings)]),
        }
    write_json(output / RECORD, result)
    write_atomically(output / TABLE, _table(config, result, knobs))
    return result


def _record(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """A trial; its value is that of its last epoch where it was not finished."""
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
    states = list(_STATES.values())
    trials = sorted(
        result["trials"],
        key=lambda trial: (states.index(trial["state"]), -(trial["value"] or 0), trial["number"]),
    )
    names = [knob.name for knob in knobs]
    heads = ["trial", config.metric, "state", "epochs", "seconds", *names]
    rows = [heads, ["---"] * len(heads)]
    for trial in trials:
        number, state, epochs = (str(trial[name]) for name in ("number", "state", "epochs"))
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        seconds = "" if trial["seconds"] is None else f"{trial['seconds']:.0f}"
        params = [_short(trial["params"].get(name, "")) for name in names]
        rows.append([number, value, state, epochs, seconds, *params])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    failed = [f"- trial {t['number']}: {t['reason']}" for t in trials if t["reason"]]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def log_progress(config: TuneConfig, result: dict[str, Any], number: int) -> None:
    """One line on a trial that has ended."""
    trial = next(trial for trial in result["trials"] if trial["number"] == number)
    text = f"trial {number} is {trial['state']} after {trial['epochs']} epochs"
    if trial["value"] is not None:
        text += f", {config.metric} {trial['value']:.4f}"
    if trial["reason"]:
        text += f": {trial['reason']}"
    if "best" in result:
        text += f"; best {result['best']['value']:.4f}, trial {result['best']['number']}"
    log.info("tune: %s", text)


def as_text(params: dict[str, Any]) -> str:
    """Settings for a line of a log."""
    return ", ".join(f"{name} {_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def draw(result: dict[str, Any], output: str) -> None:
    """tune.png: the best value so far by trial, and the values by each knob."""
    trials = [t for t in result["trials"] if t["state"] in _COLOURS and t["value"]]
    names = list(result["space"])
    rows = 1 + math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, _COLUMNS)
    top = figure.add_subplot(grid[0, :])
    _scatter(top, trials, [trial["number"] for trial in trials])
    complete = [trial for trial in trials if trial["state"] == "complete"]
    numbers = [trial["number"] for trial in complete]
    best = list(itertools.accumulate((trial["value"] for trial in complete), max))
    if best:
        numbers, best = [*numbers, result["trials"][-1]["number"]], [*best, best[-1]]
    top.step(numbers, best, where="post", color="black", linewidth=1, label="best so far")
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set(xlabel="trial", ylabel=result["metric"], title=f"{result['method']}, validation split")
    top.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // _COLUMNS, place % _COLUMNS])
        searched = [trial for trial in trials if name in trial["params"]]
        kind, *choices = result["space"][name]
        values = [trial["params"][name] for trial in searched]
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
        _scatter(axes, searched, values)
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
