"""`twotower tune`: many short trainings, from which Optuna learns which settings are good."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import tensorflow as tf

from samplers.methods.by_name import METHODS
from towers.data.interactions import open_data
from towers.errors import Diverged
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.training.run_directory import CONFIG, TRAINING, read_json
from towers.training.train import train
from towers.tune.directory import (
    STORAGE,
    TRIALS,
    check_data,
    claim,
    only_one,
    remove_runs,
)
from towers.tune.report import (
    draw,
    log_progress,
    shown,
    write_reports,
)
from towers.tune.settings import TuneConfig
from towers.tune.space import (
    METHOD,
    Knob,
    make_space,
    suggest,
    train_config,
)

log = logging.getLogger(__name__)

_NAME = "tune"
_FINISHED = (
    optuna.trial.TrialState.COMPLETE,
    optuna.trial.TrialState.PRUNED,
    optuna.trial.TrialState.FAIL,
)


def tune(config: TuneConfig) -> dict[str, Any]:
    """Searches settings that are good on the validation split; the test split is never read.

    Trial 0 takes the defaults where they are in range. Each trial trains as `twotower train` does,
    in a directory of its own; that of the best one stays. The draws of a trial are a function of
    the seed, its number and the trials before it: a study that was killed goes on with the trial
    that was running, at its last checkpoint, and ends as if nothing had happened.

    Returns:
      The content of trials.json.

    Raises:
      ValueError: a setting or range is wrong, there is no validation split, the directory holds
        another study, another process works on it, or no trial was finished.
    """
    knobs, fixed = make_space(config)
    data = open_data(config.data)
    HeldOut(data, "validation")  # refuses data without one
    with only_one(config.output):
        claim(config, data.fingerprint)
        del data
        study = _open_study(config, knobs)
        result = _search(config, study, knobs, fixed)
    if "best" not in result:
        reason = next((one["reason"] for one in result["trials"] if one["reason"]), "none was run")
        raise ValueError(f"no trial of {config.output} was finished: {reason}")
    draw(result, config.output)
    print(f"\nThe best trial is {result['best']['number']}; to train with its settings:\n")
    print(result["best"]["command"])
    return result


def _open_study(config: TuneConfig, knobs: list[Knob]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        storage=f"sqlite:///{Path(config.output).absolute() / STORAGE}",
        study_name=_NAME,
        direction="maximize",
        pruner=_pruner(config),
        load_if_exists=True,
    )
    if not study.trials:
        defaults = {knob.name: _default(config, knob) for knob in knobs}
        study.enqueue_trial(
            {knob.name: defaults[knob.name] for knob in knobs if knob.holds(defaults[knob.name])}
        )
    return study


def _pruner(config: TuneConfig) -> optuna.pruners.BasePruner:
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=config.epochs)
    if config.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=config.startup_trials, n_warmup_steps=max(1, config.epochs // 5)
    )


def _default(config: TuneConfig, knob: Knob) -> Any:
    """The value of a setting, or of an option of the method, where nobody gives one."""
    if not knob.name.startswith(METHOD):
        return getattr(config.base, knob.name)
    fields = dataclasses.fields(METHODS[config.method])
    return {field.name: field.default for field in fields}[knob.name.removeprefix(METHOD)]


def _search(
    config: TuneConfig, study: optuna.Study, knobs: list[Knob], fixed: dict[str, Any]
) -> dict[str, Any]:
    """Runs trials until there are enough; the reports are renewed after each."""
    begun = time.monotonic()
    result = write_reports(config, study, knobs, fixed)
    remove_runs(config, result)
    while len(study.get_trials(deepcopy=False, states=_FINISHED)) < config.trials:
        if config.timeout and time.monotonic() - begun > config.timeout:
            log.info("tune: the time is over; the same command goes on with more --timeout.")
            break
        if _all_failed(config, result):
            break
        trials = study.get_trials(deepcopy=False)
        begun_before = [one for one in trials if one.state is optuna.trial.TrialState.RUNNING]
        unfinished = [one for one in trials if one.state not in _FINISHED]
        study.sampler = _sampler(config, unfinished[0].number if unfinished else len(trials))
        trial = optuna.Trial(study, begun_before[0]._trial_id) if begun_before else study.ask()
        _run_trial(config, study, trial, knobs, fixed)
        result = write_reports(config, study, knobs, fixed)
        log_progress(config, result, trial.number)
        remove_runs(config, result)
    return result


def _all_failed(config: TuneConfig, result: dict[str, Any]) -> bool:
    """Whether so many trials failed, and none did not, that it is not for their settings."""
    states = [one["state"] for one in result["trials"] if one["state"] != "running"]
    return len(states) >= config.startup_trials and set(states) == {"failed"}


def _sampler(config: TuneConfig, number: int) -> optuna.samplers.BaseSampler:
    """TPE whose draws depend on the number of the trial, not on what this process drew before."""
    return optuna.samplers.TPESampler(
        seed=(config.seed * 1_000_003 + number) % 2**32, n_startup_trials=config.startup_trials
    )


def _run_trial(
    config: TuneConfig,
    study: optuna.Study,
    trial: optuna.Trial,
    knobs: list[Knob],
    fixed: dict[str, Any],
) -> None:
    """Trains, and tells the study the metric of the weights that the run chose."""
    params = suggest(config, knobs, fixed, trial)
    run = Path(config.output) / TRIALS / f"{trial.number:04d}"
    settings = train_config(config, fixed | params, str(run))
    check_data(config)
    log.info("tune: trial %d of %d: %s", trial.number, config.trials, shown(params))
    state, value, reason = optuna.trial.TrialState.FAIL, None, ""
    _report_missed(study, trial, run, config.metric)
    try:
        if trial.should_prune():  # the process was killed before it did what was decided
            raise optuna.TrialPruned
        summary = train(settings, [_Reporter(trial, config.metric)])
        chosen = summary["best_epoch"] or summary["epochs"]
        value = summary["history"][chosen - 1][f"val_{config.metric}"]
        state = optuna.trial.TrialState.COMPLETE
    except optuna.TrialPruned:
        state = optuna.trial.TrialState.PRUNED
    except (Diverged, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).splitlines()[0]
    except ValueError as error:
        if (run / CONFIG).exists():
            raise  # the disk is full or the data changed: no other settings would help
        reason = str(error)
    trial.set_user_attr("reason", reason)
    if (run / TRAINING).exists():
        trial.set_user_attr("seconds", read_json(run / TRAINING)["seconds"])
    study.tell(trial, value, state)
    tf_keras.backend.clear_session()
    gc.collect()


def _report_missed(study: optuna.Study, trial: optuna.Trial, run: Path, metric: str) -> None:
    """Reports epochs after which a process was killed before it could."""
    if not (run / TRAINING).exists():
        return
    reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for epoch in read_json(run / TRAINING)["history"]:
        if epoch["epoch"] not in reported:
            trial.report(epoch[f"val_{metric}"], epoch["epoch"])


class _Reporter(tf_keras.callbacks.Callback):
    """Tells Optuna the metric after every epoch, and ends a trial that is not worth going on."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        super().__init__()
        self._trial, self._name = trial, f"val_{metric}"

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reports, once the metrics are in the logs.

        Raises:
          optuna.TrialPruned: other trials were better at this epoch.
        """
        self._trial.report(float((logs or {})[self._name]), epoch + 1)
        if self._trial.should_prune():
            raise optuna.TrialPruned
