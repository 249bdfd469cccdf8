"""Every block of docs/python.md, in its order, prints what stands under it."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from running_server import running

from pipeline.contract.flags import parse
from twotower import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)


def value_of(code, names):
    """Runs a block; the text of its last expression."""
    block = ast.parse(code)
    last = block.body.pop()
    if not isinstance(last, ast.Expr):
        block.body.append(last)
    exec(compile(block, PAGE.name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return ""
    return str(eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names))


def is_shown(shown, printed):
    """Whether a text begins as it is shown; … stands for anything, space for any space."""
    parts = re.split(r"(…|\s+)", shown.strip())
    parts = [".*?" if p == "…" else r"\s+" if p.isspace() else re.escape(p) for p in parts]
    return re.match(r"\s*" + "".join(parts), printed, re.S) is not None


@pytest.mark.long  # trains, publishes and serves a model
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, kinds = {}, []
    for language, code, shown in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        kinds.append(language)
        if language == "bash":
            check_service(code)
            continue
        printed = value_of(code, names)
        assert is_shown(shown, printed), f"{code}\nshown:\n{shown}\nprinted:\n{printed}"
    assert kinds == ["python"] * (len(kinds) - 1) + ["bash"]


def check_service(code):
    """The two commands of the block: the flags of the first, and what the second asks."""
    serve, *curl = code.replace("\\\n", " ").strip().split("\n")
    command, *flags = shlex.split(serve.rstrip("& "))[1:]
    config, _ = parse(command, COMMANDS[command], flags)
    words = shlex.split(*curl)
    [url] = [word for word in words if word.startswith("localhost:8501/")]
    with running(config.models) as server:
        answer = server.ask("POST", url.removeprefix("localhost:8501"), words[-1].encode())
    assert answer.status == 200, answer.body
    [result] = answer.json["results"]
    titles = [candidate["title"] for candidate in result["candidates"]]
    assert [title.split()[0] for title in titles] == ["crime"] * 3


def test_the_comparison_can_fail():
    assert is_shown("a … 0.6…\nend", "a b c   0.61\nend, and more")
    assert not is_shown("a … 0.6…\nend", "a b c 0.71\nend")
    assert not is_shown("b", "a b")
