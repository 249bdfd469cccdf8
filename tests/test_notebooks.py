"""The notebooks run as they stand, in a fresh kernel, and show what they say."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    *("1_quick_start", "2_change_one_line", "3_choosing_a_sampler", "4_serving"),
    "5_keras_3",
)
MAX_BYTES = 250_000
MAX_COLUMNS = 88  # characters of a line of output that a page of 700 pixels holds
# A path of some machine; `/v1/models` of a URL and dates are none.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|usr|var|opt|Users)/|[A-Z]:\\")
SECONDS = 300


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this interpreter by the name that the notebooks ask for; nothing in the home."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    place = tmp_path / "jupyter" / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        (tmp_path / variable.lower()).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)  # the notebooks see to it


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT)


def run(name, folder, *expressions):
    """Runs a notebook in `folder`; the values of some expressions after its last cell."""
    notebook = read(name)
    question = f"import json\nprint(json.dumps([{', '.join(expressions)}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(question))
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert not list(folder.iterdir()), "it left files behind in its working directory"
    printed = [out.text for out in notebook.cells[-1].outputs if out.get("name") == "stdout"]
    return json.loads("".join(printed))


@pytest.mark.long  # a model on a hundred thousand rows
def test_quick_start(kernel, tmp_path):
    curve, floor, tested, place, top, served_tail = run(
        "1_quick_start",
        tmp_path / "here",
        "curve['val_recall@50'].tolist()",
        "popularity['recall@50']",
        "results['recall@50'].to_dict()",
        "[int(rank) for rank in table['rank']]",
        "[int(one) in chosen.tolist() for one in top]",
        "[part['model']['mean'] for part in parts[:-3]]",
    )
    assert curve[0] < floor < curve[-1]  # starts below popularity and passes it
    assert tested["model"] > 1.05 * tested["popularity"]
    assert min(served_tail) > 0  # finds products that are no bestsellers
    # Two ways to rank one customer's products: the ranking of all, and the scores by hand.
    assert [rank - 1 for rank in sorted(place) if rank <= 10] == [
        at for at, hit in enumerate(top) if hit
    ]


@pytest.mark.long  # a kernel that imports Beam
def test_prepare_in_a_kernel(kernel, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\na,x\na,y\nb,x\n")
    settings = f"source='{tmp_path}/log.csv', output='{tmp_path}/out'"
    source = f"""
        from pipeline.prepare.settings import PrepareConfig
        from pipeline.job import prepare
        print(prepare(PrepareConfig({settings})).counts["rows"])
    """
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(source))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    printed = [out.text for out in notebook.cells[-1].outputs if out.get("name") == "stdout"]
    assert "".join(printed) == "3\n"


@pytest.mark.long  # tests/towers/model/test_retrieval_task.py covers what it calls
def test_change_one_line(kernel, tmp_path):
    stock, changed, mixed, floor, losses, floored, asked = run(
        "2_change_one_line",
        tmp_path / "here",
        "stock['recall@50'].max()",
        "changed['recall@50'].max()",
        "mixed['recall@50'].max()",
        "popularity['recall@50']",
        "[float(loss) for loss in losses.values()]",
        "of_stock.numpy().tolist()",
        "(-np.log(shares)).tolist()",
    )
    assert stock < floor < changed
    assert stock < mixed
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    above = [i for i, value in enumerate(asked) if value < 13.8]  # -log(1e-6) is 13.82
    assert [floored[i] for i in above] == pytest.approx([asked[i] for i in above], rel=1e-4)
    assert max(floored) < 13.82 < max(asked)


@pytest.mark.long  # seven methods
def test_choosing_a_sampler(kernel, tmp_path):
    table, floor, both, median = run(
        "3_choosing_a_sampler",
        tmp_path / "here",
        "table.T.to_dict()",
        "popularity.to_dict()",
        "both.T.to_dict()",
        "float(median)",
    )
    assert set(table) == {"ssl", "ssl_pop", "bir", "bmns", "bpr", "dns_mn", "softmax_v"}
    corrected = [row for name, row in table.items() if name != "ssl"]
    assert all(row["buyers"] > table["ssl"]["buyers"] for row in corrected)
    assert all(median < row["buyers"] < floor["buyers"] for row in corrected)
    assert all(row["recall@50"] > 1.2 * table["ssl"]["recall@50"] for row in corrected)
    best = {k: max(table, key=lambda name: table[name][f"recall@{k}"]) for k in (10, 50)}
    assert best == {10: "dns_mn", 50: "bmns"}
    gain = {k: table["dns_mn"][f"recall@{k}"] / table["bpr"][f"recall@{k}"] for k in (10, 50)}
    assert gain[10] > gain[50] > 1  # harder negatives help most at the top
    more = both["bmns, L2 doubled"]
    assert all(more[f"recall@{k}"] > table["dns_mn"][f"recall@{k}"] for k in (10, 50))
    assert both["dns_mn, hardest 2 of 50"]["recall@10"] < floor["recall@10"] / 2


@pytest.mark.long
@pytest.mark.clock  # a server on a port; tests/serving cover what it calls
def test_serving(kernel, tmp_path):
    anything, new, other, on_shelf, shelf, from_tensorflow, from_http, times, left = run(
        "4_serving",
        tmp_path / "here",
        "anything.candidate_ids",
        "new.candidate_ids",
        "other.candidate_ids",
        "on_shelf.candidate_ids",
        "shelf",
        "from_tensorflow",
        "from_http",
        "[len(over_http), float(min(over_http)), len(in_process), float(min(in_process))]",
        "place.exists()",
    )
    assert len(set(anything)) == 5
    assert from_tensorflow == anything
    assert from_http == new != anything
    assert other[:3] == new[2:]
    assert set(on_shelf) <= set(shelf)
    assert times[::2] == [200, 200]
    assert min(times[1::2]) > 0
    assert not left


@pytest.mark.long  # four trainings, and an export
def test_keras_3(kernel, tmp_path):
    measured, floor, steps, same, version, other, new, chosen, left = run(
        "5_keras_3",
        tmp_path / "here",
        "{name: curve['recall@50'].tolist() for name, curve in curves.items()}",
        "popularity['recall@50']",
        "[steps_before, int(begun.loss_layer.iteration), int(resumed.loss_layer.iteration)]",
        "bool(same)",
        "anything.candidate_ids",
        "by_keras_rs",
        "new.candidate_ids",
        "data.candidate_vocabulary.raw_ids.take(had.of(customer)).to_pylist()",
        "place.exists()",
    )
    assert all(curve[0] < floor < curve[-1] for curve in measured.values())
    assert steps[0] == 0 < steps[1] == steps[2]
    assert same
    assert version == other
    assert len(set(new)) == 5
    assert not set(new) & set(chosen)
    assert set(version) & set(chosen)
    assert not left


def test_a_failure_in_the_block_stops_the_server():
    """The cell with `server` alone, around a process that would wait for long."""
    [source] = [
        cell.source
        for cell in read("4_serving").cells
        if cell.cell_type == "code" and "def server(" in cell.source
    ]
    code = (
        "import contextlib, subprocess, sys, time\n"
        "waits = 'import time; print(\"Serving REST http://here, gRPC\", flush=True);'\n"
        "twotower = [sys.executable, '-c', waits + 'time.sleep(45)']\n"
        f"{source}\n"
        "started = []\n"
        "real = subprocess.Popen\n"
        "subprocess.Popen = lambda *a, **k: started.append(real(*a, **k)) or started[-1]\n"
        "try:\n"
        "    with server('models') as address:\n"
        "        assert address == 'http://here', address\n"
        "        raise KeyError('a query fails')\n"
        "except KeyError:\n"
        "    print(started[0].poll() is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_stored_with_clean_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert 1 <= len(images) <= 3
    for text in [cell.source for cell in notebook.cells] + [text_of(output) for output in outputs]:
        assert not MACHINE_PATH.search(text), text
    assert max(len(line) for output in outputs for line in text_of(output).split("\n")) <= (
        MAX_COLUMNS
    )


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(FOLDER)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def text_of(output):
    """What an output says, in plain text."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_and_every_seed_is_given(name):
    notebook = read(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) >= 3
    assert not [link for link in links if not (FOLDER / link).exists()]
    draws = {"from_dataframe", "TwoTower", "TrainConfig", "train"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = getattr(node.func, "attr", None) or node.func.id
                on_data = called != "train" or "batch_size" in [kw.arg for kw in node.keywords]
                if called in draws and on_data:
                    assert "seed" in [keyword.arg for keyword in node.keywords], ast.unparse(node)


def test_the_rule_of_paths_can_fail():
    assert MACHINE_PATH.search("saved to /tmp/abc/models")
    assert MACHINE_PATH.search("in '/home/me/x'")
    assert not MACHINE_PATH.search("http://127.0.0.1:8501/v1/models/twotower")
    assert not MACHINE_PATH.search("models/tmp/1")
