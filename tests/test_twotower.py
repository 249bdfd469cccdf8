"""The front door: flags, files, exit statuses."""

import dataclasses
import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest

import twotower
from pipeline.contract.flags import as_flags, parse, resolve, take_config_file
from pipeline.prepare.settings import PrepareConfig
from towers.presets import FLAGS

ROOT = Path(__file__).parents[1]


def test_usage_lists_every_command(capsys):
    assert twotower.main([]) == 2
    assert twotower.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in twotower.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert twotower.main(["prepar"]) == 2
    assert "did you mean prepare?" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["s3://bucket/x", "s3://key:hidden@bucket/x"])
@pytest.mark.parametrize(
    "arguments",
    [
        "frequencies --streaming --source x --output PLACE",
        "train --data x --run PLACE --strategy multi_worker",
        "recommend --models x --queries PLACE --output y",
        "items --models x --add PLACE",
        "items --models x --remove PLACE",
        "serve --models x --config_file PLACE",
        "serve --models x --state_dir PLACE",
        "serve --models x --tls_certificate x --tls_key PLACE",
        "serve --models x --tls_key x --tls_certificate PLACE",
        "run --workdir PLACE",
    ],
)
def test_a_path_in_a_store_is_never_taken_for_a_local_one(arguments, place):
    name, *rest = arguments.replace("PLACE", place).split()
    with pytest.raises(ValueError, match=r"must be a local|needs a local|credentials") as error:
        parse(name, twotower.COMMANDS[name], rest)
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(twotower.COMMANDS)))
def test_every_command_has_help_for_every_flag(capsys, name):
    assert twotower.main([name, "--help", "all"]) == 0
    out = capsys.readouterr().out
    command = twotower.COMMANDS[name]
    fields = dataclasses.fields(resolve(command.config))
    fields = [field.name for field in fields if field.metadata.get("cmd", True)]
    shown = re.findall(r"^  --(\w+)(?: .*?)?(?:  +|\n {28})([^ ].*)$", out, re.MULTILINE)
    assert not re.search("noqa|type: ignore", out)
    assert sorted(flag for flag, _ in shown) == sorted(fields)  # each once, with a meaning
    named = " ".join([command.flags, *command.groups.values()]).split()
    assert set(named) <= set(fields)
    assert len(named) == len(set(named))
    assert twotower.main([name, "-h"]) == 0
    short = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)", short, re.M) == (command.flags.split() or fields)
    assert len(command.flags.split()) <= 8
    assert len(fields) <= 10 or "--help all" in short
    assert max(map(len, out.splitlines())) <= 100


def test_help_of_several_lines_is_that_of_its_own_flag(capsys):
    """A comment that goes on below its field would be taken for help of the next one."""
    assert twotower.main(["train", "--help", "all"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--frequency TEXT of candidates: counts of the train split; counts:DIR of" in out
    assert "--init_from TEXT directory of a run whose vectors" in out
    goes_on_below = re.compile(
        r"^    (\w+): [^#\n]*  # .*\n    # .*\n    \w+: [^#\n]*  # \w+ ", re.M
    )
    for command in twotower.COMMANDS.values():
        for kind in resolve(command.config).__mro__[:-1]:
            assert not goes_on_below.findall(inspect.getsource(kind)), kind


def test_flags_with_dashes_and_without_abbreviations(capsys):
    flags = ["--source", "a", "--output", "b", "--train-ratio", "0.5", "--runner=X"]
    config, rest = parse("prepare", twotower.COMMANDS["prepare"], flags)
    assert config == PrepareConfig(source="a", output="b", train_ratio=0.5)
    assert rest == ["--runner=X"]
    assert twotower.main(["train", "--dat", "x"]) == 2
    assert "did you mean --data?" in capsys.readouterr().err


def test_a_file_then_flags_override(tmp_path):
    (tmp_path / "c.yaml").write_text("prepare:\n  source: a\n  train_ratio: 5e-1\n  seed: 3\n")
    arguments = ["--config", str(tmp_path / "c.yaml"), "--seed", "4", "--output", "b"]
    rest, sections = take_config_file(arguments)
    config, _ = parse("prepare", twotower.COMMANDS["prepare"], as_flags(sections["prepare"]) + rest)
    assert (config.source, config.train_ratio, config.seed) == ("a", 0.5, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[1, 2]", "must hold name: value pairs"),
        ("a: [", "cannot be read"),
        ("trian: {}\nworkdir: x", "unknown section 'trian'"),
        ("train: {dimm: 3}\nworkdir: x\nprepare: {source: demo}", "unknown argument --dimm"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    assert twotower.main(["run", "--config", "c.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error


@pytest.mark.long  # loads everything
def test_doctor_reports_as_json(capsys):
    assert twotower.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["tensorflow"].startswith("2.20")
    assert all(check["ok"] for check in findings["checks"].values())
    assert findings["checks"]["a compiled training step runs"]["found"].startswith("on ")
    assert "twotower[" not in json.dumps(findings)  # no such package on PyPI


def test_doctor_names_what_is_broken(monkeypatch):
    from towers import doctor

    checks = {
        "thing": ("raise ImportError('no such thing')", "install it"),
        "crash": ("import os; os._exit(3)", "mend it"),
        "sound": ("print('here')", "never said"),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "_COUNT_GPUS", "print('1 True')")
    findings = doctor.examine()
    assert findings["checks"] == {
        "thing": {"ok": False, "error": "ImportError: no such thing", "remedy": "install it"},
        "crash": {"ok": False, "error": "exit status 3", "remedy": "mend it"},
        "sound": {"ok": True, "found": "here"},
    }
    assert findings["devices"] == {"gpus": 1, "built_with_cuda": True}
    text = "\n".join(doctor._lines(findings))
    assert "FAIL thing" in text
    assert "remedy: install it" in text


def test_the_lock_for_gpus_adds_the_cuda_libraries_and_changes_nothing_else():
    def pins(name):
        text = (ROOT / name).read_text()
        return set(re.findall(r"^([a-z0-9][\w.-]*(?:\[[\w,-]+\])?==\S+)", text, re.MULTILINE))

    without, with_gpu = pins("requirements.lock"), pins("requirements-gpu.lock")
    assert without <= with_gpu
    added = with_gpu - without
    assert {"nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-cuda-nvcc-cu12"} <= {
        pin.partition("==")[0] for pin in added
    }
    assert all(pin.startswith("nvidia-") for pin in added)


@pytest.mark.parametrize(("flags", "lock"), [((), ""), (("GPU=1",), "-gpu"), (("GPU=0",), "")])
def test_make_env_installs_the_lock_that_was_asked_for(flags, lock, tmp_path):
    command = ["make", "-n", "env", f"VENV={tmp_path}", "PYTHON=python3.11", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"-r requirements{lock}.lock" in done.stdout


def test_a_preset_is_the_flags_that_it_stands_for():
    def parsed(arguments):
        return parse("train", twotower.COMMANDS["train"], f"--data d --run r {arguments}".split())[
            0
        ]

    preset = parsed("--dim 8 --preset best --epochs=2")
    assert (preset.dim, preset.epochs, preset.tower) == (8, 2, "fism")
    flags = as_flags({**FLAGS["best"], "dim": 8, "epochs": 2})
    assert preset == parsed(" ".join(flags)) == parsed("--preset=best --dim 8 --epochs 2")
    assert parsed("--dim 8").tower == "id"


def test_an_unknown_preset_names_the_nearest(capsys):
    assert twotower.main(["train", "--data", "d", "--run", "r", "--preset", "bset"]) == 2
    assert "there is no preset 'bset'; did you mean best?" in capsys.readouterr().err
