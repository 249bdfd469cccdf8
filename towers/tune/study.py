"""`twotower tune`: many short trainings, from which Optuna learns which settings are good."""

from __future__ import annotations

import gc
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from pipeline.contract.files import held
from samplers.methods.by_name import METHODS
from towers.data.interactions import RetrievalData, open_data
from towers.legacy_keras import tf_keras
from towers.metrics.held_out import HeldOut
from towers.metrics.ranking import Diverged
from towers.training.failures import MemoryIsFull, check_data
from towers.training.run_directory import CONFIG, TRAINING, read_json, record_settings
from towers.training.settings import RUNNING
from towers.training.train import train
from towers.tune.report import REPORTS, TRIALS, as_text, log_progress, write_reports
from towers.tune.settings import TuneConfig
from towers.tune.space import METHOD, Space, make_space, suggest, train_config

log = logging.getLogger(__name__)

STUDY = "study.json"  # the configuration, and the fingerprint of the data
STORAGE = "study.sqlite3"  # Optuna's record of the trials
_LOCK = ".lock"
# What a study may go on with although it is not what it began with.
_FREE = (*RUNNING, "output", "trials", "timeout")


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
    space = make_space(config)
    data = open_data(config.data)
    HeldOut(data, "validation")  # refuses data without one
    busy = f"another process tunes in {config.output}: wait for it, or give another --output."
    with held(Path(config.output) / _LOCK, busy):
        _claim(config, data)
        del data
        study = _open_study(config, space)
        result = _search(config, study, space)
    if "best" not in result:
        reasons = (trial["reason"] for trial in result["trials"] if trial["reason"])
        reason = next(reasons, "none was run")
        raise ValueError(f"no trial of {config.output} was finished: {reason}")
    print(f"\nThe best trial is {result['best']['number']}; to train with its settings:\n")
    print(result["best"]["command"])
    return result


def _claim(config: TuneConfig, data: RetrievalData) -> None:
    """Begins a study, or checks that the one that is there is the same."""
    output = Path(config.output)
    if config.overwrite or not (output / STUDY).exists():
        shutil.rmtree(output / TRIALS, ignore_errors=True)
        for name in (STUDY, STORAGE, *REPORTS):
            (output / name).unlink(missing_ok=True)
    what = "study", "another --output"
    record_settings(output / STUDY, config, data, *what, _FREE)


def _remove_runs(config: TuneConfig, result: dict[str, Any]) -> None:
    """Removes the run directories of finished trials, but for the best one."""
    kept = {f"{trial['number']:04d}" for trial in result["trials"] if trial["state"] == "running"}
    kept |= {f"{result['best']['number']:04d}"} if "best" in result else set()
    for path in (Path(config.output) / TRIALS).glob("*"):
        if path.name not in kept:
            shutil.rmtree(path)


def _open_study(config: TuneConfig, space: Space) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    pruners = {
        "hyperband": optuna.pruners.HyperbandPruner(max_resource=config.epochs),
        "median": optuna.pruners.MedianPruner(config.startup_trials, max(1, config.epochs // 5)),
        "none": optuna.pruners.NopPruner(),
    }
    study = optuna.create_study(
        storage=f"sqlite:///{Path(config.output).absolute() / STORAGE}",
        study_name="tune",
        direction="maximize",
        pruner=pruners[config.pruner],
        load_if_exists=True,
    )
    if not study.trials:
        defaults = {}
        for knob in space.knobs:
            of_method = knob.name.startswith(METHOD)
            owner = METHODS[config.method] if of_method else config.base
            value = getattr(owner, knob.name.removeprefix(METHOD))
            if knob.holds(value):
                defaults[knob.name] = value
        study.enqueue_trial(defaults)
    return study


def _search(config: TuneConfig, study: optuna.Study, space: Space) -> dict[str, Any]:
    """Runs trials until there are enough; the reports are renewed after each."""
    started, trial = time.monotonic(), None
    while True:
        result = write_reports(config, study, space)
        if trial:
            log_progress(config, result, trial.number)
        _remove_runs(config, result)
        states = [trial["state"] for trial in result["trials"] if trial["state"] != "running"]
        if len(states) >= config.trials:
            return result
        if config.timeout and time.monotonic() - started > config.timeout:
            log.info("tune: the time is over; the same command goes on with more --timeout.")
            return result
        if len(states) >= config.startup_trials and set(states) == {"failed"}:
            return result  # so many do not fail for their settings
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        unfinished = [trial.number for trial in trials if not trial.state.is_finished()]
        # Draws depend on the number of the trial, not on what this process drew before.
        number = unfinished[0] if unfinished else len(trials)
        seed = (config.seed * 1_000_003 + number) % 2**32
        study.sampler = TPESampler(seed=seed, n_startup_trials=config.startup_trials)
        # One that was running when a process was killed goes on; Optuna would leave it.
        trial = optuna.Trial(study, running[0]._trial_id) if running else study.ask()
        _run_trial(config, study, space, trial)


def _run_trial(config: TuneConfig, study: optuna.Study, space: Space, trial: optuna.Trial) -> None:
    """Trains, and tells the study the metric of the weights that the run chose."""
    params = suggest(config, space, trial)
    run = Path(config.output) / TRIALS / f"{trial.number:04d}"
    settings = train_config(config, space.fixed | params, str(run))
    before = read_json(Path(config.output) / STUDY)["data_fingerprint"]
    check_data(config.data, before, "study ran", "--output")
    log.info("tune: trial %d of %d: %s", trial.number, config.trials, as_text(params))
    state, value, reason = TrialState.FAIL, None, ""

    def report(epoch: int, logs: dict[str, Any]) -> None:
        """Tells Optuna the metric after every epoch; ends a trial where others were better."""
        trial.report(float(logs[f"val_{config.metric}"]), epoch + 1)
        if trial.should_prune():
            raise optuna.TrialPruned

    if (run / TRAINING).exists():  # epochs after which the process was killed before it reported
        reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for epoch in read_json(run / TRAINING)["history"]:
            if epoch["epoch"] not in reported:
                trial.report(epoch[f"val_{config.metric}"], epoch["epoch"])
    try:
        if trial.should_prune():  # the process was killed before it did what was decided
            raise optuna.TrialPruned
        summary = train(settings, [tf_keras.callbacks.LambdaCallback(on_epoch_end=report)])
        chosen = summary["best_epoch"] or summary["epochs"]
        value = summary["history"][chosen - 1][f"val_{config.metric}"]
        state = TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except (Diverged, MemoryIsFull) as error:
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
