"""Who may import whom: by reading the code, and by looking at what a process has loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "samplers", "serving", "towers")
CONTRACT = ("pipeline.contract", "pipeline.schema")
ALLOWED = {  # room → modules of ours that it may import
    "pipeline": {"pipeline"},
    "samplers": {"samplers"},
    "towers": {"towers", "samplers", *CONTRACT},
    "serving": {"serving", *CONTRACT},
}
FORBIDDEN = {  # room → foreign packages that none of its files may import
    "pipeline": {"tf_keras", "keras", "tensorflow_recommenders", "scann"},
    "samplers": {"tf_keras", "keras", "tensorflow_recommenders", "apache_beam", "scann", "pyarrow"},
    "towers": {"apache_beam", "keras", "scann"},
    "serving": {"apache_beam", "tf_keras", "keras", "tensorflow_recommenders"},
}


def imported_modules(path):
    """Every module that a file imports, late imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_allowed(module, room):
    if module.split(".")[0] not in ROOMS:
        return module.split(".")[0] not in FORBIDDEN[room] | {"twotower"}
    if module == "pipeline" and room != "pipeline":
        return True  # `from pipeline import schema`: the name behind it is looked at as well
    return any(module == name or module.startswith(name + ".") for name in ALLOWED[room])


@pytest.mark.parametrize("room", ROOMS)
def test_import_arrows(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(path)
        if not is_allowed(module, room)
    ]
    assert not wrong


def test_the_arrows_can_fail():
    assert not is_allowed("towers.training.train", "serving")
    assert not is_allowed("pipeline.job", "towers")
    assert not is_allowed("tf_keras", "samplers")
    assert is_allowed("pipeline.contract.schema", "serving")


def loaded_by(code):
    """The top-level packages that a fresh process has loaded after some code."""
    script = (
        f"{code}\nimport sys\nprint('LOADED', *sorted({{n.split('.')[0] for n in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import pipeline.contract.schema, pipeline.prepare.settings, pipeline.read.discover",
            {"apache_beam", "tensorflow"},
        ),
        ("import twotower, towers, samplers, serving", {"apache_beam", "tensorflow", "keras"}),
        # TensorFlow loads a Keras by itself; TFRS is what our trainer adds to it.
        ("import samplers; samplers.build", {"apache_beam", "tensorflow_recommenders", "scann"}),
        ("import pipeline.job", {"tensorflow_recommenders", "scann", "towers", "serving"}),
        ("import serving.retrieval.retriever", {"apache_beam", "towers", "samplers", "scann"}),
    ],
)
def test_what_a_process_loads(code, absent):
    assert not loaded_by(code) & absent
