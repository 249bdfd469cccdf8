"""What a study leaves for people: trials.json, a table, a picture, the best trial's command."""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure

from pipeline.contract.files import write_atomically, written_aside
from pipeline.contract.flags import as_flags
from pipeline.contract.pages import render
from towers.training.run_directory import changed_settings, write_json
from towers.tune.settings import TuneConfig
from towers.tune.space import Space, train_config

log = logging.getLogger(__name__)

RECORD, TABLE, PLOT = REPORTS = ("trials.json", "trials.md", "tune.png")
TRIALS = "trials"  # run directories: that of the best trial, and of one that is not finished
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_COLOURS = {"complete": "tab:blue", "pruned": "tab:orange"}
_TEMPLATE = Path(__file__).with_name("templates") / "trials.md.jinja"


def write_reports(config: TuneConfig, study: optuna.Study, space: Space) -> dict[str, Any]:
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
        "space": {knob.name: [knob.kind, *knob.values] for knob in space.knobs},
        "trials": trials,
    }
    states, output = list(_STATES.values()), Path(config.output)
    ranked = sorted(trials, key=lambda t: (states.index(t["state"]), -(t["value"] or 0)))
    if ranked and ranked[0]["state"] == "complete":
        best = ranked[0]
        settings = train_config(config, space.fixed | best["params"], str(output / "best"))
        result["best"] = best | {
            "run": str(output / TRIALS / f"{best['number']:04d}"),
            "command": shlex.join(["twotower", "train", *as_flags(changed_settings(settings))]),
        }
    write_json(output / RECORD, result)
    page = render(_TEMPLATE, **(result | {"trials": ranked}), short=_short)
    write_atomically(output / TABLE, page)
    return result


def _record(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """A trial; its value is that of its last epoch where it was not finished."""
    values = [value for _, value in sorted(trial.intermediate_values.items())]
    return {
        "number": trial.number,
        "state": _STATES[trial.state.name],
        "value": trial.value if trial.value is not None else (values[-1] if values else None),
        "epochs": len(values),
        "seconds": trial.user_attrs.get("seconds"),
        "params": trial.params,
        "values": values,
        "reason": trial.user_attrs.get("reason", ""),
    }


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
    """tune.png: the value of each trial by its number, with the best so far, and by each knob."""
    panels = {"number": ["linear"]} | result["space"]
    rows = []
    for trial in result["trials"]:
        places = {
            name: _short(value) if panels[name][0] == "choice" else value
            for name, value in trial["params"].items()
        }
        rows.append(trial | places)
    trials = pd.DataFrame(rows, columns=[*panels, "state", "value"])
    num_rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 3.2 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, 3, sharey=True, squeeze=False)
    for axes, (name, (kind, *choices)) in zip(grid.flat, panels.items(), strict=False):
        if kind == "choice":  # at equal distances, in this order
            axes.xaxis.update_units([_short(choice) for choice in choices])
            axes.margins(x=0.2)
        elif kind == "log":
            marks = np.geomspace(choices[0], choices[1], 3)
            axes.set_xscale("log")
            axes.set_xticks(marks, [_short(mark) for mark in marks])
            axes.minorticks_off()
        for state, colour in _COLOURS.items():
            points = trials[trials["state"] == state]
            axes.scatter(points[name], points["value"], s=18, color=colour, label=state)
        axes.set_xlabel("trial" if name == "number" else name)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    best = trials["value"].where(trials["state"] == "complete").cummax().ffill()
    grid[0, 0].step(trials["number"], best, where="post", color="black", label="best so far")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.suptitle(f"{result['method']}, validation split")
    for axes in grid[:, 0]:
        axes.set_ylabel(result["metric"])
    with written_aside(Path(output) / PLOT) as aside:
        figure.savefig(aside, format="png", dpi=100)
