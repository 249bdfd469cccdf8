"""What a study leaves for people: trials.json, a page, the best trial's command."""

from __future__ import annotations

import functools
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.contract.files import write_atomically
from pipeline.contract.flags import as_flags
from pipeline.contract.pages import ABOVE, BLUE, INK, ORANGE, render, svg_plot
from towers.training.run_directory import changed_settings, write_json
from towers.tune.settings import TuneConfig
from towers.tune.space import Space, train_config

log = logging.getLogger(__name__)

RECORD, PAGE = REPORTS = ("trials.json", "tune.html")
TRIALS = "trials"  # run directories: that of the best trial, and of one that is not finished
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_COLOURS = {"complete": BLUE, "pruned": ORANGE}
_TEMPLATE = Path(__file__).with_name("templates") / "tune.html"


def write_reports(config: TuneConfig, study: optuna.Study, space: Space) -> dict[str, Any]:
    """Writes trials.json and tune.html about the trials that the study has so far.

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
    title = f"Search of settings: {config.method}"
    values = result | {"trials": ranked, "best": result.get("best")}
    page = render(_TEMPLATE, title=title, plots=plots(result), short=_short, **values)
    write_atomically(output / PAGE, page)
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


def plots(result: dict[str, Any]) -> list[Markup]:
    """The value of each trial by its number, with the best so far, and by each knob."""
    panels = {"number": ["linear"]} | result["space"]
    rows = []
    for trial in result["trials"]:
        places = {
            name: _short(value) if panels[name][0] == "choice" else value
            for name, value in trial["params"].items()
        }
        rows.append(trial | places)
    trials = pd.DataFrame(rows, columns=[*panels, "state", "value"])
    trials = trials.astype({"value": float}).dropna(subset="value")
    margin = 0.08 * (trials["value"].max() - trials["value"].min()) or 0.01

    def draw(name: str, axes: Axes) -> None:
        kind, *choices = panels[name]
        if kind == "choice":  # at equal distances, in this order
            axes.xaxis.update_units([_short(choice) for choice in choices])
            axes.margins(x=0.2)
        elif kind == "log":
            marks = np.geomspace(choices[0], choices[1], 3)
            axes.set_xscale("log")
            axes.set_xticks(marks, [_short(mark) for mark in marks])
            axes.minorticks_off()
        if kind != "choice" and choices:
            axes.set_xlim(*choices)
        for state, colour in _COLOURS.items():
            points = trials[trials["state"] == state]
            axes.scatter(points[name], points["value"], 18, colour, label=state, clip_on=False)
        if name == "number":
            best = trials["value"].where(trials["state"] == "complete").cummax().ffill()
            axes.step(trials[name], best, where="post", color=INK, label="best so far")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(**ABOVE)
        axes.set(xlabel="trial" if name == "number" else name)
        axes.set(ylabel=f"{result['metric']} on validation")
        axes.set_ylim(trials["value"].min() - margin, trials["value"].max() + margin)
        axes.grid()

    drawn = []
    for name in panels:
        if trials[name].notna().any():
            title = "Trials in their order" if name == "number" else f"By {name}"
            about = title, name.replace(".", "-"), functools.partial(draw, name)
            drawn.append(svg_plot(*about, height=2.6, left=0.16, top=0.3))
    return drawn
