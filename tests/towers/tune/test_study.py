"""`twotower tune`: the space of every method, a study, pruning, a kill, what it leaves."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tensorflow as tf
from browser import assert_file_fits, assert_shared_look

import samplers
import twotower
from pipeline.contract import flags
from samplers.methods.by_name import METHODS, option_types
from towers.data.dataframe import from_dataframe
from towers.data.interactions import open_data
from towers.model.two_tower import TwoTower
from towers.training.settings import TrainConfig
from towers.training.train import train
from towers.tune.ranges import FIXED, OPTIONS, SETTINGS
from towers.tune.settings import TuneConfig
from towers.tune.space import (
    METHOD,
    default_range,
    knob_types,
    make_space,
    parse,
)
from towers.tune.study import tune


@pytest.fixture(scope="module")
def without_test(prepared, tmp_path_factory):
    """The prepared data, whose test split cannot be read."""
    directory = tmp_path_factory.mktemp("tune") / "prepared"
    shutil.copytree(prepared, directory)
    for path in directory.glob("*test*"):
        path.unlink()
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    with pytest.raises(ValueError, match="test"):
        open_data(directory).arrays("test")
    return directory


@pytest.fixture
def config(without_test, tmp_path):
    return TuneConfig(
        data=str(without_test),
        output=str(tmp_path / "study"),
        method="dns",
        trials=4,
        epochs=2,
        dim=4,
        batch_size=256,
        metric="recall@10",
        normalize=False,
        space=["learning_rate=log:0.01:0.1", "method.num_negatives=2,4"],
        startup_trials=2,
        jit_compile=False,
    )


def knobs_of(config):
    knobs, fixed = make_space(config)
    return {knob.name: knob for knob in knobs}, fixed


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_option_of_every_method_has_a_range(method):
    types = knob_types(method)
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    sizes = {"frequency": [3] * 500, "num_candidates": 500, "num_queries": 9}
    for option in option_types(method):
        name = METHOD + option
        text = default_range(method, name)  # a KeyError: give it a line in towers/tune/ranges.py
        if text == FIXED:
            continue
        knob = parse(name, text, types[name])
        assert len(set(knob.values)) > 1
        assert knob.holds(defaults[option]), f"the default of {name} is not in {text}"
        for value in knob.values:
            other = {"num_negatives": 32} if option == "num_kept" else {}
            samplers.build(method, **sizes, **other, **{option: value})


def test_no_range_is_stale():
    options = {option for method in METHODS for option in option_types(method)}
    for name in OPTIONS:
        method, _, option = name.rpartition(".")
        assert option in options
        assert not method or option in option_types(method)
    assert set(SETTINGS) <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_what_is_given_is_not_searched(config):
    knobs, fixed = knobs_of(config)
    assert set(knobs) == {"learning_rate", "l2", "temperature", "method.num_negatives"}
    assert fixed == {}
    assert knobs["temperature"].for_cosines
    assert knobs["learning_rate"].values == (0.01, 0.1)
    assert knobs["method.num_negatives"].values == (2, 4)
    more = TuneConfig(data="d", output="o", method="dns_mn", options=("num_kept=1",), l2=0.0)
    knobs, fixed = knobs_of(more)
    assert set(knobs) == {"method.num_negatives", "learning_rate", "normalize", "temperature"}
    space = ["dim=8", "temperature=0.1,0.2", "l2=0,1e-5", "method.num_kept=[1, 2]"]
    knobs, fixed = knobs_of(TuneConfig(data="d", output="o", method="dns_mn", space=space))
    assert fixed == {"dim": 8}
    assert not knobs["temperature"].for_cosines
    assert knobs["l2"].values == (0.0, 1e-5)
    assert knobs["method.num_kept"].values == (1, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"output": ""}, "output must be given"),
        ({"run": "r"}, "run must be left out"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"pruner": "some"}, "pruner must be median, hyperband or none"),
        ({"metric": "recall"}, "must be one of"),
        ({"space": ["dim"]}, "space must be NAME=RANGE"),
        ({"space": ["dimm=1,2"]}, "space cannot hold 'dimm' for dns; did you mean dim"),
        ({"space": ["num_negatives=1"]}, "did you mean method.num_negatives"),
        ({"space": ["method.gamma=0,1"]}, "space cannot hold 'method.gamma' for dns"),
        ({"space": ["epochs=1,2"]}, "space cannot hold 'epochs'"),
        ({"space": ["dim=a,b"]}, "space of dim must be of int, got 'a'"),
        ({"space": ["dim=log:4"]}, "must be log:LOW:HIGH, linear:LOW:HIGH or A,B"),
        ({"space": ["dim=linear:9:4"]}, "must be log:LOW:HIGH"),
        ({"space": ["l2=log:0:1"]}, "must be above 0 for log"),
        ({"space": ["l2=0,1"], "l2": 0.1}, "l2 is given and in space as well"),
        ({"space": ["batch_size=1,64"]}, "batch_size must be at least 2"),
        ({"space": ["learning_rate=linear:0:1"]}, "learning_rate must be above 0"),
        ({"method": "dnss"}, "there is no method 'dnss'; did you mean dns"),
    ],
)
def test_wrong_settings_are_one_line(changes, text):
    with pytest.raises(ValueError, match=text) as error:
        make_space(TuneConfig(**({"data": "d", "output": "o", "method": "dns"} | changes)))
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_a_study_from_the_command_line(config, tmp_path, capsys, caplog):
    """Repeated --space adds up; the printed command trains as the best trial did."""
    words = ["--data", config.data, "--output", str(tmp_path / "study"), "--method", "dns"]
    words += shlex.split("--trials 2 --epochs 2 --batch_size 256 --metric recall@10")
    words += shlex.split("--normalize false --startup_trials 2 --jit_compile false")
    words += shlex.split("--space learning_rate=log:0.01:0.1 --space method.num_negatives=2,4")
    words += ["--space", "dim=4,5"]
    assert twotower.main(["tune", *words]) == 0
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    out = tmp_path / "study"
    result = json.loads((out / "trials.json").read_text())
    trials, best = result["trials"], result["best"]
    assert [one["number"] for one in trials] == [0, 1]
    assert {one["state"] for one in trials} <= {"complete", "pruned"}
    complete = [one for one in trials if one["state"] == "complete"]
    assert best["value"] == max(one["value"] for one in complete)
    assert all(one["values"][-1] == one["value"] for one in complete)
    assert trials[0]["params"]["learning_rate"] == 0.01  # the default
    assert all(0.01 <= one["params"]["learning_rate"] <= 0.1 for one in trials)
    searched = {"learning_rate", "l2", "method.num_negatives", "dim"}
    assert all(set(one["params"]) == searched for one in trials)
    assert [path.name for path in (out / "trials").iterdir()] == [f"{best['number']:04d}"]
    page = (out / "tune.html").read_text()
    rows = re.findall(r"<td>(\d+\.\d+)</td><td>(\w+)</td>", page)
    values = [float(value) for value, state in rows if state == "complete"]
    assert values == sorted(values, reverse=True)
    assert len(rows) == 2
    words = html.unescape(" ".join(re.findall(r"<span>(.*?)</span>", page)))
    assert words == shlex.join(command)
    assert page.count("<figure>") == 5  # by number, and by each of four settings
    assert_shared_look(page)
    assert_file_fits(out / "tune.html")
    assert f"tune: trial {best['number']} is complete after 2 epochs" in caplog.text

    assert command[:2] == ["twotower", "train"]
    again, _ = flags.parse("train", twotower.COMMANDS["train"], command[2:])
    summary = train(again)
    assert summary["history"][-1]["val_recall@10"] == best["value"]


@pytest.mark.long
def test_a_finished_study_goes_on_with_more_trials_only(config):
    first = tune(dataclasses.replace(config, trials=2))
    assert tune(dataclasses.replace(config, trials=2))["trials"] == first["trials"]
    third = tune(dataclasses.replace(config, trials=3))["trials"]
    assert third[:2] == first["trials"]
    assert len(third) == 3
    with pytest.raises(ValueError, match=r"another configuration: epochs 2 → 3. Give another"):
        tune(dataclasses.replace(config, epochs=3))
    anew = tune(dataclasses.replace(config, trials=1, epochs=1, overwrite=True))
    assert [one["epochs"] for one in anew["trials"]] == [1]


@pytest.mark.long
def test_what_is_hopeless_is_ended_early(config, make_prepared):
    """Trial 0 takes the default, which learns; most of the range learns nothing."""
    pairs = [(q, c) for q in range(40) for c in range(60) if q % 4 == c % 4]
    frame = pd.DataFrame(pairs, columns=["user", "item"])
    learnable = from_dataframe(frame, user="user", item="item", validation_ratio=0.2)
    hopeless = dataclasses.replace(
        config,
        data=str(make_prepared(learnable)),
        method="ssl",
        space=["learning_rate=log:1e-30:0.01"],
        temperature=0.2,
        normalize=True,
        batch_size=8,
        trials=2,
        seed=3,  # whose second draw is hopeless
        startup_trials=1,
    )
    result = tune(hopeless)
    assert result["best"]["value"] > 2 * 10 / 60
    others = [one for one in result["trials"] if one["params"]["learning_rate"] < 1e-5]
    assert others
    assert all(one["state"] == "pruned" and one["epochs"] == 1 for one in others)


@pytest.mark.long
def test_a_trial_that_diverges_is_told_and_the_study_goes_on(config):
    space = ["learning_rate=0.01,1e30,2e30,3e30,4e30", "method.num_negatives=10"]
    result = tune(dataclasses.replace(config, space=space, trials=2, epochs=1))
    assert result["best"]["params"]["learning_rate"] == 0.01
    others = [one for one in result["trials"] if one["params"]["learning_rate"] > 0.01]
    assert others
    for one in others:
        assert one["state"] == "failed"
        assert "must be finite" in one["reason"]
        assert "\n" not in one["reason"]
    assert others[0]["reason"] in html.unescape((Path(config.output) / "tune.html").read_text())


@pytest.mark.long
def test_a_trial_that_fills_the_memory_is_told_and_the_study_goes_on(config, monkeypatch):
    fit, calls = TwoTower.fit, []

    def full_at_first(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 1:
            raise tf.errors.ResourceExhaustedError(None, None, "failed to allocate 9 GiB")
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(TwoTower, "fit", full_at_first)
    result = tune(dataclasses.replace(config, trials=2, epochs=1))
    states = {trial["state"]: trial.get("reason") or "" for trial in result["trials"]}
    assert "the memory is full in a step" in states["failed"]
    assert "complete" in states


def test_settings_that_no_trial_can_have_end_the_study(config):
    wrong = dataclasses.replace(config, method="dns_mn", space=["method.num_kept=900,901"])
    with pytest.raises(ValueError, match=r"no trial of .* was finished: num_kept must be"):
        tune(dataclasses.replace(wrong, trials=30))
    record = json.loads((Path(config.output) / "trials.json").read_text())
    assert len(record["trials"]) == config.startup_trials


def test_data_without_validation_are_refused(config, data, make_prepared):
    class WithoutValidation:
        def __getattr__(self, name):
            return getattr(data, name)

        def arrays(self, split):
            arrays = data.arrays(split)
            return {k: v[:0] for k, v in arrays.items()} if split == "validation" else arrays

    directory = make_prepared(WithoutValidation())
    with pytest.raises(ValueError, match="no validation rows: prepare it with validation_ratio"):
        tune(dataclasses.replace(config, data=str(directory)))
    assert not Path(config.output).exists()


KILLED = """
import json, os, signal, sys
import towers.training.checkpoints
from towers.tune.study import tune
from towers.tune.settings import TuneConfig

ended = towers.training.checkpoints.RunRecorder.on_epoch_end
count = 0

def on_epoch_end(self, epoch, logs=None):
    global count
    ended(self, epoch, logs)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

towers.training.checkpoints.RunRecorder.on_epoch_end = on_epoch_end
tune(TuneConfig(**json.loads(sys.argv[1])))
"""


def as_json(config, **changes):
    names = ("data", "method", "trials", "epochs", "dim", "batch_size", "metric", "space")
    settings = {name: getattr(config, name) for name in (*names, "startup_trials", "output")}
    return settings | {"normalize": False, "jit_compile": False} | changes


@pytest.mark.long
def test_killed_then_again_ends_as_if_nothing_had_happened(config, tmp_path):
    """Killed in the midst of the second trial, and after its last epoch."""
    whole = tune(TuneConfig(**as_json(config, trials=3)))["trials"]
    for epochs_before in (3, 4):
        settings = as_json(config, trials=3, output=str(tmp_path / f"killed-{epochs_before}"))
        done = subprocess.run(
            [sys.executable, "-c", KILLED, json.dumps(settings), str(epochs_before)],
            capture_output=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        killed = tune(TuneConfig(**settings))["trials"]
        for name in ("params", "values", "state"):
            assert [trial[name] for trial in killed] == [trial[name] for trial in whole]
