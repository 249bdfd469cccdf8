"""Every command of docs/production.md, in its order, on a small log."""

import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from running_server import running

import twotower
from pipeline.contract.flags import parse

PAGE = Path(__file__).parents[1] / "docs" / "production.md"
SECONDS = 60


def commands():
    """Section → its commands, each on one line."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    blocks = {
        name: "".join(re.findall(r"```\n(.*?)```", text, re.S))
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {
        name: [re.sub(r"\s*\\\n\s*", " ", line) for line in re.split(r"(?<!\\)\n", block.strip())]
        for name, block in blocks.items()
    }


def log_of(rows, seed):
    """Users of one taste choose the items of that taste; with times, and a user `ann`."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 100, rows)
    items = (30 * rng.random(rows) ** 1.5).astype(int) * 4 + users % 4
    names = np.where(users == 0, "ann", np.char.add("u", users.astype(str)))
    return pd.DataFrame({"user_id": names, "item_id": [f"i{i}" for i in items]})


def answer_in(body):
    """(known, ids of candidates) of the one query of an answer."""
    [result] = json.loads(body)["results"]
    return result["known"], [candidate["id"] for candidate in result["candidates"]]


class Page:
    """Runs the sections of the page in a directory; the server is on free ports."""

    def __init__(self, capsys, stack):
        self._capsys, self._stack, self.server = capsys, stack, None
        self.sections = commands()

    def run(self, section):
        """What each command of a section printed."""
        return [self._run(line) for line in self.sections.pop(section)]

    def _run(self, line):
        if line.startswith("twotower serve"):
            assert line.endswith(" &")
            words = shlex.split(line.removesuffix(" &"))
            config, _ = parse("serve", twotower.COMMANDS["serve"], words[2:])
            given = dataclasses.asdict(config)
            settings = {name: given[name] for name in ("config_file", "poll_seconds")}
            self.server = self._stack.enter_context(running(config.models, **settings))
            return ""
        if line.startswith("twotower "):
            self._capsys.readouterr()
            assert twotower.main(shlex.split(line)[1:]) == 0, self._capsys.readouterr().err
            return self._capsys.readouterr().out
        if self.server:
            line = line.replace("localhost:8501", self.server.rest.removeprefix("http://"))
        assert line.startswith(("echo ", "curl "))
        return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout

    def wait_for(self, version):
        """Until the server answers from a version, and from no other."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            status = self.server.get("/v1/models/twotower").json["model_version_status"]
            there = {one["version"] for one in status if one["state"] == "AVAILABLE"}
            if there == {str(version)}:
                return
            time.sleep(0.2)
        raise AssertionError(f"version {version} is not served: {status}")

    def ask(self, user):
        body = {"query_ids": [user], "k": 5, "exclude_seen": True}
        return answer_in(self.server.post("/v1/models/twotower:retrieve", body).body)


@pytest.mark.long  # four preparations and trainings
@pytest.mark.clock  # a server on a port that looks for versions
def test_the_page_from_top_to_bottom(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    first = log_of(1500, 3)
    new = pd.DataFrame([("zoe", f"i{4 * i}") for i in range(8)], columns=["user_id", "item_id"])
    cheese = pd.DataFrame({"user_id": [f"u{4 * i}" for i in range(1, 20)], "item_id": "cheese"})
    second = pd.concat([first, log_of(500, 4), new, cheese], ignore_index=True)
    for name, log in (("log", first), ("log2", second)):
        log.assign(timestamp=np.arange(len(log))).to_csv(f"{name}.csv", index=False)
    of_ann = [set(log["item_id"][log["user_id"] == "ann"]) for log in (first, second)]
    with contextlib.ExitStack() as stack:
        page = Page(capsys, stack)
        page.run("Choose on validation")
        chosen = json.loads(Path("run/training.json").read_text())
        assert chosen["stopped_early"]
        page.run("Refit on all rows")
        assert json.loads(Path("final/training.json").read_text())["epochs"] == chosen["best_epoch"]
        *_, query, _, _, answer = page.run("Publish")
        page.wait_for(1)
        known, top = answer_in(answer)
        assert (known, len(set(top))) == (True, 5)
        assert not set(top) & of_ann[0]
        assert all(name in query for name in top)
        caplog.clear()
        page.run("New rows, the same model")
        page.wait_for(2)
        assert re.search(r"final does not know 1 of \d+ query ids .* 'zoe'", caplog.text)
        assert re.search(r"final does not know 1 of \d+ candidate ids .* 'cheese'", caplog.text)
        known, top = page.ask("ann")
        assert (known, len(set(top))) == (True, 5)
        assert not set(top) & of_ann[1]
        assert of_ann[1] > of_ann[0]
        assert not page.ask("zoe")[0]
        page.run("A new model")
        page.wait_for(3)
        assert page.ask("zoe")[0]
        page.run("Roll back")
        page.wait_for(2)
        assert not page.ask("zoe")[0]
    assert not page.sections, "sections with commands that no test runs"
