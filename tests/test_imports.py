"""Who may import whom: by reading the code, and by looking at what a process has loaded."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import towers

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "samplers", "serving", "towers")
CONTRACT = ("pipeline.contract", "pipeline.schema")
# What `towers.from_dataframe` shares with `prepare`: arithmetic on rows and columns, without Beam.
IN_MEMORY = (
    "pipeline.features.encoding",
    "pipeline.features.values",
    "pipeline.prepare.settings",
    "pipeline.prepare.split",
    "pipeline.read.cells",
)
ALLOWED = {  # room → modules of ours that it may import
    "pipeline": {"pipeline"},
    "samplers": {"samplers"},
    "towers": {"towers", "samplers", *CONTRACT, *IN_MEMORY},
    "serving": {"serving", *CONTRACT},
}
FLOORS = {  # room → its sub-packages and top modules; each may import those after it
    "pipeline": "commands job streaming counts features quality prepare read beam contract",
    "samplers": "methods proposals selection losses random_numbers state candidates",
    "towers": "commands doctor catalogue presets audit tune output evaluation report training "
    "model encoders metrics data legacy_keras",
    "serving": "commands workers server rest rpc runtime settings retrieval publish monitoring "
    "version errors",
}
MOST_MODULES = 16  # in one folder
FORBIDDEN = {  # room → foreign packages that none of its files may import
    "pipeline": {"tf_keras", "keras", "tensorflow_recommenders", "scann"},
    "samplers": {"tf_keras", "keras", "tensorflow_recommenders", "apache_beam", "scann", "pyarrow"},
    "towers": {"apache_beam", "keras", "scann"},
    "serving": {"apache_beam", "tf_keras", "keras", "tensorflow_recommenders"},
}
EXCEPT = {("towers/model/method_layer.py", "keras")}  # Keras 3; the rest of towers is Keras 2


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
        return module.split(".")[0] not in FORBIDDEN[room] | {"twotower", "twotower_run"}
    if module == "pipeline" and room != "pipeline":
        return True  # `from pipeline import schema`: the name behind it is looked at as well
    return any(module == name or module.startswith(name + ".") for name in ALLOWED[room])


@pytest.mark.parametrize("room", ROOMS)
def test_import_arrows(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files_of(room)
        for module in imported_modules(path)
        if not is_allowed(module, room) and (str(path.relative_to(ROOT)), module) not in EXCEPT
    ]
    assert not wrong


def goes_up(importer, imported):
    """Whether an import inside a room goes to a higher floor."""
    room, own = importer.split(".")[:2]
    if imported.split(".")[0] != room or "." not in imported:
        return False
    floors = FLOORS[room].split()
    other = imported.split(".")[1]
    if other not in floors:
        return False
    return own in floors and floors.index(other) < floors.index(own)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_the_floors_of_a_room(room):
    modules = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files_of(room)}
    placed = {"__init__", "schema", *FLOORS[room].split()}
    assert {name.split(".")[1] for name in modules.values()} <= placed
    assert not [
        f"{name} imports {module}"
        for path, name in modules.items()
        for module in imported_modules(path)
        if goes_up(name, module)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_no_folder_is_crowded(room):
    folders = Counter(path.parent for path in files_of(room) if path.name != "__init__.py")
    assert max(folders.values()) <= MOST_MODULES, folders
    assert all((folder / "__init__.py").is_file() for folder in folders)


def files_of(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    return files


def test_the_arrows_can_fail():
    assert goes_up("pipeline.read.cells", "pipeline.prepare.settings")
    assert goes_up("serving.version.index", "serving.server")
    assert not goes_up("pipeline.prepare.ingest", "pipeline.read.cells")
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
        (f"import {', '.join(IN_MEMORY)}", {"apache_beam", "tensorflow"}),
        ("import twotower, towers, samplers, serving", {"apache_beam", "tensorflow", "keras"}),
        ("import pipeline.job", {"tensorflow_recommenders", "scann", "towers", "serving"}),
    ],
)
def test_what_a_process_loads(code, absent):
    assert not loaded_by(code) & absent


def test_dir_of_towers_is_what_it_offers():
    assert dir(towers) == sorted(towers.__all__)
    assert [name for name in dir(towers) if name.startswith("_")] == []
    assert {"from_dataframe", "TwoTower", "evaluate", "load", "export"} <= set(dir(towers))
    assert all(callable(getattr(towers, name)) for name in ("from_dataframe", "export"))


def test_the_guide_of_the_workspace_shows_every_folder_and_no_other():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in files_of(room)}
    assert not [str(folder) for folder in folders if f"`{folder.name}/`" not in text]
    named = re.findall(r"`((?:pipeline|samplers|towers|serving|benchmarks)/[\w/]+\.py)`", text)
    assert len(named) >= 10
    assert not [path for path in named if not (ROOT / path).exists()]


# Each runs in a process of its own, a copy of one that has imported TensorFlow and nothing else.
WITH_TENSORFLOW = {
    "samplers": """
import samplers
samplers.build
assert "TF_USE_LEGACY_KERAS" not in os.environ
assert_not_loaded("apache_beam tensorflow_recommenders scann towers pipeline")
""",
    "serving": """
import serving.retrieval.retriever
assert_not_loaded("apache_beam towers samplers scann")
""",
    "data and encoders": """
import towers.data.dataframe, towers.encoders.make_towers, towers.metrics.held_out
towers.open_data, towers.HeldOut
assert "TF_USE_LEGACY_KERAS" not in os.environ
assert_not_loaded("apache_beam serving tensorflow_recommenders")
""",
    "towers": """
before = loaded()
import towers, towers.training.settings
assert not loaded() - before & {"keras", "tf_keras", "tensorflow_recommenders"}
towers.TwoTower
import tf_keras
assert tf.keras.Model is tf_keras.Model
assert_not_loaded("apache_beam serving")
""",
    "towers beside a model of Keras 3": """
import keras
assert keras.__version__.startswith("3.")
model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(tf.ones([4, 2]), tf.ones([4, 1]), verbose=0)
import towers
assert not issubclass(towers.TwoTower, keras.Model)
model.fit(tf.ones([4, 2]), tf.ones([4, 1]), verbose=0)
""",
    "towers after tf.keras as Keras 3": """
tf.keras.Model
import towers
towers.HeldOut
try:
    towers.TwoTower
except ImportError as error:
    assert "tf.keras is Keras 3" in str(error), error
    assert "write `import keras`" in str(error)
    assert "\\n" not in str(error)
else:
    raise AssertionError("no ImportError")
""",
}
COPIES = """
import os, sys, traceback
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import tensorflow as tf

def loaded():
    return {name.split(".")[0] for name in sys.modules}

def assert_not_loaded(names):
    assert not loaded() & set(names.split()), loaded() & set(names.split())

def passes(code):
    child = os.fork()
    if not child:
        try:
            exec(code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

print("FAILED", *[name for name, code in CASES.items() if not passes(code)], sep="|")
"""


@pytest.mark.long
def test_what_a_process_loads_besides_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", f"CASES = {WITH_TENSORFLOW!r}\n{COPIES}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1:] == ["FAILED"], done.stdout + done.stderr
