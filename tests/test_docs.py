"""What a reader copies runs: blocks of README.md and docs/, examples of docstrings, links.

The blocks of a page run from top to bottom in one folder, `bash` by bash and `python` in one
session. Every page but README starts from what README leaves behind. A block of `text` right below
another is all that this one prints, where `…` stands for anything, a line break for any space or
none, and a number before `s` or `ms` for any number. What a training computes depends on the
processor: numbers with decimals may be a fifth larger or smaller, and where there are such numbers,
half of the shop's products must be those that are shown, at places of products. A service is asked
again, for some time, until it answers as shown, as it changes versions while it runs.
"""

import ast
import contextlib
import doctest
import importlib
import io
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import yaml

import twotower
from pipeline.contract.flags import parse, take_config_file

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(ROOT.glob("docs/*.md"))
ROOMS = ("pipeline", "samplers", "serving", "towers")
SOURCES = [path for room in ROOMS for path in sorted(ROOT.glob(f"{room}/**/*.py"))]
MODULES = [path for path in SOURCES if ">>>" in path.read_text(encoding="utf-8")]
IN_SHOP = {  # their examples read and write what README leaves behind
    ROOT / "pipeline/contract/files.py",
    ROOT / "serving/publish/items.py",
    ROOT / "serving/publish/publish.py",
    ROOT / "serving/retrieval/retriever.py",
}
# (page, how a block begins) → why it cannot run here; all else is run.
NOT_RUN = {
    ("README.md", "git clone URL"): "clones and installs",
    ("beam.md", 'pip install ".[prepare,s3]"'): "installs, and reads a bucket of the reader",
    ("beam.md", 'pip install ".[prepare,dask]"'): "installs, and needs machines",
    (
        "beam.md",
        "mvn -q -f tests/pipeline/cluster/pom.xml -P flink",
    ): "needs a cluster; test_clusters.py runs it",
    (
        "beam.md",
        "mvn -q -f tests/pipeline/cluster/pom.xml -P spark",
    ): "needs a cluster; test_clusters.py runs it",
    (
        "beam.md",
        "mkdir incoming && cp log.csv incoming/day1.csv\ntwotower frequencies --source incoming/",
    ): "needs a cluster; test_clusters.py runs it",
    ("beam.md", "# needs apache-beam[gcp]"): "needs a project of Google Cloud",
    ("scale.md", "TF_CONFIG"): "needs two machines; test_distribution_runs.py runs it on one",
    ("serving.md", "apiVersion: apps/v1"): "needs a cluster; a test below checks it",
    ("serving.md", 'docker run -p 8500:8500 -p 8501:8501 -v "$PWD/models'): "needs Docker",
    ("serving.md", 'docker run -p 8500:8500 -p 8501:8501 -v "$PWD/scann_models'): "needs Docker",
}
SECONDS = 900
ASKING = 300
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\n?```(text)\n(.*?)^```$)?", re.M | re.S)
DECIMAL = r"-?\d+\.\d+"
SHELVES = runpy.run_path(str(ROOT / "docs" / "shop.py"))["SHELVES"].values()
PRODUCTS = rf"\b(?:{'|'.join(sorted(','.join(SHELVES).split(','), key=len, reverse=True))})\b"


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str  # page:line
    language: str
    code: str
    shown: str  # what stands below it as its output

    @property
    def reason(self):
        """Why it is not run, or None."""
        page = self.place.split(":")[0]
        keys = [key for key in NOT_RUN if key[0] == page and self.code.startswith(key[1])]
        return NOT_RUN[keys[0]] if keys else None


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    return [
        Block(f"{path.name}:{text.count(chr(10), 0, block.start()) + 1}", *block.group(1, 2, 4))
        for block in BLOCK.finditer(text)
    ]


def compare(shown, printed):
    """Raises AssertionError where a text is not what a page shows of it."""
    products = PRODUCTS if re.search(DECIMAL, shown) else r"(?!)"  # with scores, a ranking
    tokens = re.compile(
        rf"(?P<space>\s+)|(?P<time>\d[\d.,]*(?= m?s\b))|(?P<value>{DECIMAL})|(?P<name>{products})|."
    )
    patterns = {"time": r"[\d.,]+", "value": f"({DECIMAL})", "name": f"({products})"}
    wanted, found, begin = [], [], 0
    parts = shown.strip().split("…")
    for number, part in enumerate(parts):
        pattern = "" if number else r"\s*"
        for token in tokens.finditer(part):
            if token["value"] or token["name"]:
                wanted.append(token[0])
            space = r"\s*" if "\n" in token[0] else r"\s+"
            literal = space if token["space"] else re.escape(token[0])
            pattern += patterns.get(token.lastgroup, literal)
        pattern = re.compile(pattern + (r"\s*\Z" if number == len(parts) - 1 else ""))
        match = pattern.search(printed, begin) if number else pattern.match(printed)
        assert match, f"shown:\n{shown}\nprinted:\n{printed}\nnot found there: {part}"
        found += match.groups()
        begin = match.end()
    ranked = {name for name in wanted if not re.fullmatch(DECIMAL, name)}
    assert 2 * len(ranked & {*found}) >= len(ranked), f"shown:\n{shown}\nprinted:\n{printed}"
    for one, other in zip(wanted, found, strict=True):
        if one not in ranked:
            near = math.isclose(float(one), float(other), rel_tol=0.2, abs_tol=0.02)
            assert near, f"shown {one}, printed {other} in:\n{printed}"


class Reader:
    """Who tries the blocks of a page in a folder, on free ports."""

    def __init__(self, folder, tools):
        self.folder, self.names, self.servers = folder, {}, []
        self.ports = {port: free_port() for port in ("8501", "8500", "8443", "8444")}
        tools.mkdir()
        flags = f"--rest_port {self.ports['8501']} --grpc_port {self.ports['8500']}"
        (tools / "twotower").write_text(
            f'#!/bin/sh\n[ "$1" = serve ] && shift && set -- serve {flags} "$@"\n'
            f'exec {sys.executable} -m twotower "$@"\n'
        )
        (tools / "twotower").chmod(0o755)
        (tools / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
        paths = (tools, Path(sys.executable).parent, os.environ["PATH"])
        silent = "TF_CPP_MIN_LOG_LEVEL"  # a matter of the command, not of other tests
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != silent},
            "CURL_HOME": str(tools),
            "PATH": os.pathsep.join(map(str, paths)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def read(self, path):
        for block in blocks_of(path):
            if not block.reason:
                try:
                    self.run(block)
                except Exception as error:
                    raise AssertionError(f"{block.place}\n{block.code}\n{error}") from error

    def run(self, block):
        code, shown = self.here(block.code), self.here(block.shown or "…")
        if block.language == "python":
            return compare(shown, self.python(code))
        commands = re.sub(r"\\\n\s*", "", code).strip().split("\n")
        if commands[-1].startswith("twotower serve"):
            return compare(shown, self.serve(code))
        until = time.monotonic() + ASKING
        while True:
            printed = self.bash(code)
            try:
                return compare(shown, printed)
            except AssertionError:
                asks = all(command.startswith("curl ") for command in commands)
                if not asks or time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def here(self, text):
        """A text with the ports of this reader."""
        for port, free in self.ports.items():
            text = re.sub(rf"(?<=[: ]){port}\b", str(free), text)
        return text

    def bash(self, code):
        command = ["bash", "-e", "-o", "pipefail", "-c", code]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def serve(self, code):
        """Starts a service that goes on; what it prints until it answers."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the service)
        server = subprocess.Popen(
            ["bash", "-e", "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.servers.append((server, log))
        until = time.monotonic() + ASKING
        while True:
            log.seek(0)
            printed = log.read()
            if re.search("^Serving .*\n", printed, re.M):
                return printed
            assert server.poll() is None, printed
            assert time.monotonic() < until, printed
            time.sleep(0.2)

    def python(self, code):
        """What a cell of a notebook shows: what it prints, and its last value."""
        block = ast.parse(code)
        last = block.body.pop() if isinstance(block.body[-1], ast.Expr) else None
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile_of(block), self.names)
            value = last and eval(compile_of(ast.Expression(last.value)), self.names)
        return printed.getvalue() + ("" if value is None else repr(value))

    def close(self):
        for server, log in self.servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
            try:
                assert server.wait(ASKING) == 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                log.close()


def compile_of(tree):
    return compile(tree, "page", "eval" if isinstance(tree, ast.Expression) else "exec")


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def read_page(path, folder, tools):
    with contextlib.closing(Reader(folder, tools)) as reader:
        reader.read(path)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """What README leaves behind, from its first block to its last."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "docs").symlink_to(ROOT / "docs")
    read_page(README, folder, tmp_path_factory.mktemp("tools") / "bin")
    log = pd.read_csv(folder / "log.csv")  # it stands for the data of docs/results.md
    log.columns = ["user_id", "item_id", "when"]
    log.to_parquet(folder / "gowalla.parquet")
    return folder


@pytest.mark.long  # each of its commands, a service among them, on free ports
def test_the_readme(readme):
    assert (readme / "models" / "twotower" / "2").is_dir()  # that of `twotower items`


@pytest.mark.long
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page(path, readme, tmp_path):
    shutil.copytree(readme, tmp_path / "shop", symlinks=True)
    read_page(path, tmp_path / "shop", tmp_path / "bin")


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_blocks_say_what_they_are(path):
    for block in blocks_of(path):
        is_run = block.language in ("bash", "python")  # `text` shows what ran above
        assert is_run or block.reason, block.place


def test_what_is_not_run_is_in_the_pages():
    reasons = [block.reason for path in (README, *PAGES) for block in blocks_of(path)]
    assert sorted(filter(None, reasons)) == sorted(NOT_RUN.values())


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_commands_that_are_not_run_have_flags_that_exist(path):
    for block in blocks_of(path):
        if block.reason:
            for line in re.sub(r"\\\n\s*", "", block.code).split("\n"):
                if match := re.match(r"(?:[A-Z_]+=\S* )*twotower (.*)", line):
                    check_flags(shlex.split(match[1], comments=True), block.place)
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for name, flags in re.findall(r"`twotower ([a-z]+) ([^`]*)`", text):
        config = twotower.resolve(twotower.COMMANDS[name].config)
        known = {*config.__dataclass_fields__, "help", "config"}
        unknown = {*re.findall(r"--(\w+)", flags)} - known
        assert not unknown, f"{path.name}: twotower {name} {flags}"
    for module in re.findall(r"`python -m (benchmarks\.\w+)", text):
        assert importlib.util.find_spec(module), f"{path.name}: python -m {module}"


def check_flags(arguments, place):
    """Raises AssertionError where the front door would refuse a command for its flags."""
    name, *rest = arguments
    rest, _ = take_config_file([word for word in rest if word != "..."])
    try:
        parse(name, twotower.COMMANDS[name], rest)
    except (ValueError, KeyError) as error:
        raise AssertionError(f"{place}: twotower {name}: {error}") from error


def check_examples(path):
    """Fails where an example of a module prints other than its docstring says."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, tried = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert tried
    assert not failures  # pytest shows what doctest has printed


@pytest.mark.parametrize("path", sorted({*MODULES} - IN_SHOP), ids=lambda path: path.stem)
def test_a_docstring(path):
    check_examples(path)


@pytest.mark.long
@pytest.mark.parametrize("path", sorted(IN_SHOP), ids=lambda path: path.stem)
def test_a_docstring_in_the_shop(path, readme, tmp_path, monkeypatch):
    shutil.copytree(readme, tmp_path / "shop", symlinks=True)
    monkeypatch.chdir(tmp_path / "shop")
    check_examples(path)


def test_an_example_without_a_prompt_would_not_run():
    for path in SOURCES:
        bare = re.findall(r"^ *Examples?:\n(?! *>>>| *python -m ).*", path.read_text("utf-8"), re.M)
        assert not bare, f"{path.relative_to(ROOT)}: {bare}"


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "notebooks" / "1_quick_start" / "index.html").is_file()


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("recall 0.8103", "recall 0.4"),
        ("rank 1 yeast", "rank 1 butter"),
        ("1 yeast 0.9 2 eggs 0.8 3 mug 0.7", "1 yeast 0.9 2 milk 0.8 3 rice 0.7"),
        ("1 yeast 0.9", "1 0.9"),
        ("a … z", "a b"),
        ("b", "a b"),
        ("a", "a b"),
        ("12 rows", "13 rows"),
    ],
)
def test_the_comparison_can_fail(shown, printed):
    compare(shown, shown)
    with pytest.raises(AssertionError):
        compare(shown, printed)


def test_the_comparison_allows_what_depends_on_the_machine():
    compare("after 3.4 s: recall 0.81 …\nend", "after 123 s:\nrecall 0.8203\n\nmore\nend\n")
    compare("1 green tea 0.9 2 eggs 0.8", "1 eggs 0.9\n2 green tea 0.8")


def test_the_manifest_for_kubernetes_is_valid_and_its_flags_are_those_of_serve(tmp_path):
    validate = pytest.importorskip("kubernetes_validate", reason="it has the schemas")
    [block] = [block for block in blocks_of(ROOT / "docs/serving.md") if block.language == "yaml"]
    deployment, service = yaml.safe_load_all(block.code)
    for resource in (deployment, service):
        validate.validate(resource, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(service | {"spek": {}}, validate.latest_version(), strict=True)
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command, *arguments = [
        argument.replace("/secret/", f"{tmp_path}/") for argument in container["args"]
    ]
    for name in ("token", "admin_token"):
        (tmp_path / name).write_text("s3cret")
    config, _ = parse(command, twotower.COMMANDS[command], arguments)
    seconds = config.lame_duck_seconds + config.drain_seconds
    assert pod["terminationGracePeriodSeconds"] > seconds
    ready = container["readinessProbe"]
    assert config.lame_duck_seconds > ready["periodSeconds"] * ready["failureThreshold"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"rest": config.rest_port, "grpc": config.grpc_port}
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")]
    assert paths == ["/healthz", "/readyz"]
